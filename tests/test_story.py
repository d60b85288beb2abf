"`make check` passes on a good tree and fails on each kind of bad one. The bad ones are small copies, broken on purpose."
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from conftest import run

CHAPTERS = ('00a_files', '01_data')


def script(tree, name, *words): return run(sys.executable, tree/'.ci'/f'{name}.py', *words, cwd=tree)


def source(cell) -> str: return ''.join(cell['source'])


def edit(path, f): # `f` changes the cells of a notebook; written as nbdev_clean writes
    nb = json.loads(path.read_text(encoding='utf-8'))
    f(nb['cells'])
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def exported(cells, holding='') -> dict: # the first exported cell that holds a text
    return next(c for c in cells if c['cell_type'] == 'code' and source(c).startswith('#| export\n') and holding in source(c))


def add_code(cells, text): # a cell before the last one
    cells.insert(-1, dict(cell_type='code', id='made-to-fail', metadata={}, execution_count=None, outputs=[], source=text.splitlines(True)))


def without_pictures(cells):
    for c in cells:
        if c['cell_type'] == 'code': c['outputs'] = [o for o in c['outputs'] if 'image/png' not in o.get('data', {})]


LINKS = '![](images/a.png) [first](00a_files.ipynb#saving) [out](https://x.org/y) [up](../LICENSE)'
INDEX = [dict(cell_type='markdown', id='a', metadata={}, source='# A title\n\n' + LINKS),
         dict(cell_type='code', id='b', metadata={}, execution_count=None, source='#| hide\nsecret = 1', outputs=[]),
         dict(cell_type='code', id='c', metadata={}, execution_count=None, source='1 + 1',
              outputs=[dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': '2'})])]


@pytest.fixture(scope='session')
def good(root, tmp_path_factory): # two chapters, an index, all in order
    tree = tmp_path_factory.mktemp('tree')
    for d in ('nbs/images', 'ldm_nb'): (tree/d).mkdir(parents=True)
    shutil.copytree(root/'.ci', tree/'.ci', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('settings.ini', 'LICENSE', 'ldm_nb/__init__.py', 'nbs/sidebar.yml', *(f'nbs/{c}.ipynb' for c in CHAPTERS)): shutil.copy(root/f, tree/f)
    (tree/'nbs/images/a.png').write_bytes(b'')
    for c in CHAPTERS: edit(tree/f'nbs/{c}.ipynb', without_pictures) # small, whatever the chapters grow to
    (tree/'nbs/index.ipynb').write_text(json.dumps(dict(cells=INDEX, metadata={}, nbformat=4, nbformat_minor=5)))
    for f in ('clean import nbdev_clean', 'doclinks import nbdev_export'):
        subprocess.run([sys.executable, '-c', f'from nbdev.{f} as f; f()'], cwd=tree, check=True)
    assert script(tree, 'readme').returncode == 0
    return tree


@pytest.fixture
def tree(good, tmp_path): return shutil.copytree(good, tmp_path/'tree')


def test_this_tree(root):
    for words in (('story',), ('notebooks', 'check'), ('readme', '--check')):
        r = script(root, *words)
        assert r.returncode == 0, r.stderr


def test_good_tree_passes(tree):
    for words in (('story',), ('notebooks', 'check'), ('readme', '--check')):
        r = script(tree, *words)
        assert r.returncode == 0, r.stderr


def test_not_exported(tree):
    edit(tree/'nbs/00a_files.ipynb', lambda cells: exported(cells, 'def weights_hash')['source'].append('\n# one more line'))
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'ldm_nb/files.py is not what its notebook exports: run nbdev_export' in r.stderr
    assert 'not clean' not in r.stderr


def test_edited_module(tree):
    with open(tree/'ldm_nb/data.py', 'a') as f: f.write('# by hand\n')
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'ldm_nb/data.py is not what' in r.stderr


def test_module_without_notebook(tree):
    (tree/'ldm_nb/stray.py').write_text('')
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'ldm_nb/stray.py comes from no notebook' in r.stderr


def test_not_clean(tree):
    edit(tree/'nbs/01_data.ipynb', lambda cells: next(c for c in cells if c['cell_type'] == 'code').update(execution_count=7))
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'nbs/01_data.ipynb is not clean: run nbdev_clean' in r.stderr
    assert 'nbs/00a_files.ipynb' not in r.stderr and 'exports' not in r.stderr


@pytest.mark.parametrize('line, says', [
    ('from ldm_nb.data import Postcards', 'imports data, a later chapter'), ('import ldm_nb.data', 'imports data, a later chapter'),
    ('from ldm_nb import data', 'imports data, a later chapter'), ('from .data import Postcards', 'imports data, a later chapter'),
    ('def f():\n    from ldm_nb.data import Postcards', 'imports data, a later chapter'), ('import ldm_nb.files', 'imports its own module'),
    ('import ldm_nb.widgets', 'which no exported cell may'), ('import ldm_nb.nothing', 'which no notebook exports')])
def test_imports_ahead(tree, line, says):
    edit(tree/'nbs/00a_files.ipynb', lambda cells: add_code(cells, f'#| export\n{line}'))
    r = script(tree, 'story')
    assert r.returncode and says in r.stderr and '00a_files.ipynb, cell' in r.stderr, r.stderr


def test_demo_cell_may_import_ahead(tree):
    edit(tree/'nbs/00a_files.ipynb', lambda cells: add_code(cells, 'from ldm_nb.data import Postcards'))
    assert script(tree, 'story').returncode == 0


@pytest.mark.parametrize('text, says', [
    ('#| eval: false\nx = 1', 'every cell is evaluated'), ('#| eval false\nx = 1', 'every cell is evaluated'), ('#| slow cuda\nx = 1', 'stand alone'),
    ('x = 1\n#| slow\n', 'below code'), ('import os\nx = 1', 'mixes imports'), ('x = (', 'is not Python')])
def test_cell_rules(tree, text, says):
    edit(tree/'nbs/01_data.ipynb', lambda cells: add_code(cells, text))
    r = script(tree, 'story')
    assert r.returncode and says in r.stderr, r.stderr


def test_cells_that_are_fine(tree):
    for text in ('#| slow\nx = 1', '#| slow\n#| cuda\nx = 1', '%matplotlib inline\nimport os', '#| hide\nimport os, re'):
        edit(tree/'nbs/01_data.ipynb', lambda cells: add_code(cells, text))
    r = script(tree, 'story')
    assert r.returncode == 0, r.stderr


def test_notebook_rules(tree):
    nb = tree/'nbs/01_data.ipynb'
    edit(nb, lambda cells: cells.insert(0, dict(cell_type='raw', id='r', metadata={}, source=['---\n', 'skip_exec: true\n', '---'])))
    shutil.copy(nb, tree/'nbs/02_twice.ipynb')
    edit(nb, lambda cells: cells[-1].update(outputs=[dict(output_type='error', ename='E', evalue='', traceback=['x'*1_600_000])]))
    r = script(tree, 'story')
    for says in ('skip_exec', 'two notebooks export data', '02_twice.ipynb is not in nbs/sidebar.yml', 'more than 1,500,000', 'output of an error'):
        assert says in r.stderr, says
    assert r.returncode


def test_forbidden_arrows(root):
    spec = importlib.util.spec_from_file_location('story', root/'.ci/story.py')
    story = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(story)
    order = ['data', 'layers', 'autoencoder', 'losses', 'diffusion', 'unet', 'conditioning', 'samplers', 'training', 'core', 'recipes']
    for arrow in ('samplers diffusion', 'samplers unet', 'unet diffusion', 'training autoencoder', 'core recipes', 'autoencoder losses'):
        assert 'must never' in story.check_arrow(*arrow.split(), order), arrow
    for arrow in ('unet layers', 'recipes core', 'training data', 'core samplers'): assert story.check_arrow(*arrow.split(), order) is None, arrow


def test_readme(tree):
    text = (tree/'README.md').read_text()
    assert '(nbs/images/a.png)' in text and '(nbs/00a_files.ipynb#saving)' in text and '(https://x.org/y)' in text and '(LICENSE)' in text
    assert 'secret' not in text and '1 + 1' in text
    (tree/'README.md').write_text(text + '\nby hand\n')
    r = script(tree, 'readme', '--check')
    assert r.returncode and 'run make readme' in r.stderr
    (tree/'nbs/images/a.png').unlink()
    r = script(tree, 'readme')
    assert r.returncode and 'nbs/images/a.png' in r.stderr
    (tree/'nbs/index.ipynb').unlink()
    r = script(tree, 'readme', '--check')
    assert r.returncode and 'no nbs/index.ipynb' in r.stderr


def test_run_keeps_outputs(tree): # `make notebooks` on a tiny chapter: executed in nbs/, cleaned, exported; a failing one is left alone
    nb = tree/'nbs/01_data.ipynb'
    edit(nb, lambda cells: cells.__setitem__(slice(None), [c for c in cells if source(c).startswith('#| default_exp')]))
    for text in ('#| export\ndef here(): return __name__', 'import os', 'os.path.basename(os.getcwd())'): edit(nb, lambda cells: add_code(cells, text))
    edit(nb, lambda cells: [c.update(id=f'c{i}') for i, c in enumerate(cells)])
    r = script(tree, 'notebooks', 'run', '01_data')
    assert r.returncode == 0, r.stderr
    assert "'nbs'" in nb.read_text() and 'def here' in (tree/'ldm_nb/data.py').read_text()
    assert script(tree, 'notebooks', 'check').returncode == 0
    edit(nb, lambda cells: add_code(cells, '1/0'))
    before = nb.read_bytes()
    r = script(tree, 'notebooks', 'run', '01_data')
    assert r.returncode and 'ZeroDivisionError' in r.stderr and nb.read_bytes() == before
    assert script(tree, 'notebooks', 'run', 'nothing').returncode
