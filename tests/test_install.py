"A wheel, made from the source archive, in an empty folder: models, data and commands are all there, without a clone."
import ast, os, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
import pytest
import ldm_nb
from ldm_nb.engine import files

ROOT = Path(ldm_nb.__file__).resolve().parent.parent
BUILD = 'from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))'
USE = '''
import json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
import ldm_nb
assert ldm_nb.__file__.startswith(sys.argv[1]), ldm_nb.__file__
from ldm_nb.cli.sample import main as sample
from ldm_nb.core import LatentDiffusion
from ldm_nb.course.grading import main as grading
from ldm_nb.data import ImageFolder, Postcards, show_images
from ldm_nb.engine.files import data_folders, data_path, find_shipped
from ldm_nb.metrics.reader import load_reader
assert data_folders() == [type(data_path('pretrained'))(sys.argv[1])/'ldm_nb/shipped'], data_folders()
assert LatentDiffusion.from_pretrained('postcards').sample(steps=1).shape == (1, 3, 64, 64)
load_reader(), find_shipped('ae-vq-f4')
sample(['a house', '--n', '1', '--steps', '1', '--out', 'grid.png'])
try: grading(['student'])
except SystemExit as e: assert e.code == 2
'''

def run(words, folder, **env):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'LDM_NB_DATA')} | env
    p = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert p.returncode == 0, p.stdout + p.stderr
    return p

def built(what, folder, out): # by setuptools, in this environment: nothing is downloaded
    out.mkdir()
    return out/run([sys.executable, '-c', BUILD, what, str(out)], folder).stdout.splitlines()[-1]

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('install')
    (tmp/'src').mkdir()
    for p in ROOT.iterdir(): # what git ignores is not in a clone
        if p.name in ('data', 'ldm_nb') or p.is_file() and p.name[0] != '.': (tmp/'src'/p.name).symlink_to(p)
    archive = built('build_sdist', tmp/'src', tmp/'sdist')
    with tarfile.open(archive) as f:
        f.extractall(tmp/'again', **dict(filter='data') if hasattr(tarfile, 'data_filter') else {}) # since 3.11.4
    return built('build_wheel', next((tmp/'again').iterdir()), tmp/'wheel')

def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    models = {p.parent.name for p in (ROOT/'data/pretrained').glob('*/config.json')}
    wanted = {f'ldm_nb/shipped/pretrained/{m}/{f}' for m in models for f in ('config.json', 'model.safetensors')}
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT/'ldm_nb').rglob('*.py')}
    wanted |= {f'ldm_nb/shipped/pretrained/{p.name}' for p in (ROOT/'data/pretrained').glob('*.safetensors')} # adapters
    wanted |= {'ldm_nb/shipped/tokenizer/vocab.txt'}
    assert wanted <= names and not {n for n in names - wanted if '.dist-info/' not in n}
    assert wheel.stat().st_size < 48e6

def test_in_an_empty_folder(wheel, tmp_path):
    (tmp_path/'empty').mkdir()
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    before = sorted(p for p in (tmp_path/'site').rglob('*'))
    p = run([sys.executable, '-I', '-B', '-c', USE, str(tmp_path/'site')], tmp_path/'empty', HOME=str(tmp_path/'home'),
            XDG_CACHE_HOME=str(tmp_path/'cache'))
    assert 'no notebook in nbs' in p.stderr and 'clone' in p.stderr, p.stderr # what needs one says so
    assert [q.name for q in (tmp_path/'empty').iterdir()] == ['grid.png']
    assert sorted(p for p in (tmp_path/'site').rglob('*')) == before # nothing is written beside the package

def test_data_beside_the_package_belong_to_somebody_else(tmp_path, monkeypatch):
    (tmp_path/'ldm_nb/shipped').mkdir(parents=True)
    (tmp_path/'data/pretrained').mkdir(parents=True) # as in site-packages
    monkeypatch.setattr(ldm_nb, '__file__', str(tmp_path/'ldm_nb/__init__.py'))
    monkeypatch.delenv('LDM_NB_DATA', raising=False)
    assert files.data_folders() == [tmp_path/'ldm_nb/shipped']
    (tmp_path/'settings.ini').touch() # a clone
    assert files.data_folders() == [tmp_path/'data', tmp_path/'ldm_nb/shipped']
    monkeypatch.setenv('LDM_NB_DATA', str(tmp_path/'none'))
    with pytest.raises(FileNotFoundError, match='LDM_NB_DATA names .*none'): files.data_folders()

OPTIONAL = {'onnx', 'onnxruntime', 'onnxscript', 'pillow_heif', 'torch_fidelity'} # said where they are missing

def imported(paths, also=()) -> dict[str, Path]: # name of a package -> a file that needs it
    found = {name: where for name, where in also}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            found |= {n.split('.')[0]: path for n in names}
    return found

def brought(wanted: str) -> set[str]: # by installing these, with all that they need
    todo, got = [canonical(re.split(r'[<>=!~\[]', w)[0]) for w in wanted.split()], set()
    while todo:
        name = todo.pop()
        if name in got: continue
        got.add(name)
        try: needs = requires(name) or []
        except PackageNotFoundError: continue
        todo += [canonical(re.match(r'[\w.-]+', n)[0]) for n in needs if 'extra ==' not in n]
    return got

def undeclared(names: dict, wanted: str) -> list[str]: # imported packages that nothing we ask for brings
    own = {p.stem for folder in ('tests', 'tests/prove', 'site', '.ci') for p in (ROOT/folder).glob('*.py')}
    known = own | {'ldm_nb', 'prove'} | sys.stdlib_module_names | OPTIONAL
    there, sources = brought(wanted), packages_distributions()
    return [f'{name} ({path.relative_to(ROOT)})' for name, path in sorted(names.items())
            if name not in known and not there & {canonical(d) for d in sources.get(name, [name])}]

def canonical(name: str) -> str: return re.sub(r'[-_.]+', '-', name).lower()

def test_what_is_imported_is_declared():
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = cfg['DEFAULT']
    wanted = cfg['requirements'] + ' ' + cfg['emoji_requirements']
    assert undeclared(imported((ROOT/'ldm_nb').rglob('*.py')), wanted) == []
    conf = {}
    exec((ROOT/'site/conf.py').read_text(encoding='utf-8'), conf)
    also = [(n.split('.')[0], ROOT/'site/conf.py') for n in (*conf['extensions'], conf['html_theme'])]
    others = [p for folder in ('tests', 'site', '.ci') for p in (ROOT/folder).rglob('*.py')
              if 'node_modules' not in p.parts]
    assert undeclared(imported(others, also), cfg['requirements'] + ' ' + cfg['dev_requirements']) == []
