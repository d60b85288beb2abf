"""nbdev 3 must export the same package from the same notebooks as the nbdev that is pinned here: byte for byte, but for
_modidx.py, whose settings differ and which lists modules without names of their own; there the names must be the same.
It needs other versions of what nbdev runs on, so it has an environment of its own, .venv-nbdev3, made once."""
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED = 'nbdev>=3,<4'
KEYS = ('lib_path', 'nbs_path', 'branch', 'doc_host', 'doc_baseurl', 'git_url') # of settings.ini, which nbdev 3 refuses


def tool(env: Path, name: str) -> Path: return env/('Scripts' if os.name == 'nt' else 'bin')/name


def make_environment(env: Path) -> str: # '', or why there is none
    done = env/'.installed'
    if done.is_file() and done.read_text(encoding='utf-8') == WANTED: return ''
    shutil.rmtree(env, ignore_errors=True)
    try:
        venv.create(env, with_pip=True)
        words = [tool(env, 'python'), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', WANTED]
        r = subprocess.run(words, capture_output=True, encoding='utf-8', timeout=300)
    except (OSError, subprocess.SubprocessError) as e: return str(e)
    if r.returncode: return (r.stderr.strip().splitlines() or ['pip failed'])[-1]
    done.write_text(WANTED, encoding='utf-8')
    return ''


def export(env: Path, root: Path, tree: Path) -> Path: # the project; an empty folder -> the package that was exported
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    cfg = config['DEFAULT']
    lines = ['[project]', f'name = "{cfg["lib_name"]}"', f'version = "{cfg["version"]}"', '[tool.nbdev]',
             'recursive = true', *(f'{k} = "{cfg[k]}"' for k in KEYS)]
    (tree/'pyproject.toml').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    shutil.copytree(root/cfg['nbs_path'], tree/cfg['nbs_path'], ignore=shutil.ignore_patterns('.*', '*.png', '*.jpg'))
    (tree/cfg['lib_path']).mkdir()
    shutil.copy(root/cfg['lib_path']/'__init__.py', tree/cfg['lib_path'])
    r = subprocess.run([tool(env, 'nbdev-export')], cwd=tree, capture_output=True, encoding='utf-8', timeout=300)
    if r.returncode: sys.exit(f'nbdev 3 cannot export: {r.stderr.strip().splitlines()[-1]}')
    return tree/cfg['lib_path']


def names(index: Path) -> dict: # of _modidx.py: module -> its names and where they are documented
    text = index.read_text(encoding='utf-8')
    return {k: v for k, v in ast.literal_eval(text[text.index('{'):])['syms'].items() if v}


def compare(new: Path, old: Path) -> list[str]: # packages -> what differs
    files = lambda p: {q.relative_to(p).as_posix(): q.read_bytes() for q in p.rglob('*.py')}
    a, b = files(new), files(old)
    wrong = [f'{k}: only {"here" if k in b else "by nbdev 3"}' for k in sorted(a.keys() ^ b.keys())]
    wrong += [f'{k}: other code' for k in sorted(a.keys() & b.keys()) if k != '_modidx.py' and a[k] != b[k]]
    x, y = (names(p/'_modidx.py') for p in (new, old))
    return wrong + [f'_modidx.py: other names in {k}' for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]


def main():
    env = ROOT/'.venv-nbdev3'
    if why := make_environment(env): return print(f'nbdev 3: skipped, it cannot be installed here ({why[:120]})')
    with tempfile.TemporaryDirectory() as tmp: wrong = compare(export(env, ROOT, Path(tmp)), ROOT/'ldm_nb')
    if wrong: sys.exit('\n'.join(f'nbdev 3: {o}' for o in wrong))
    print(f'nbdev 3: exports the same {len(list((ROOT/"ldm_nb").rglob("*.py")))} files')


if __name__ == '__main__': main()
