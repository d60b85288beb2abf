"""Notebooks and what is made of them. `check` says whether they are exported and clean, without looking at git; `tidy`
folds what a reader need not see and cleans, and makes the pictures of the notebooks named smaller (`all`: of all);
`run` re-executes, tidies and exports them all, or those named (`story/06_unet`, or `06_unet` where one folder alone has
it), and keeps how long each took in data/results/chapter-times.json."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from house import PACKAGE, address, notebooks

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'


def nbdev(module: str, function: str, folder: Path): # call one of nbdev's functions on the project in `folder`
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # with it nbdev exports nothing
    code = f'from nbdev.{module} import {function}; {function}()'
    r = subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, encoding='utf-8')
    if r.returncode or 'Failed' in r.stderr: sys.exit(f'{function} failed in {folder}:\n{r.stdout}{r.stderr}')


def package_files(root: Path) -> set[str]: # every file of the package, below its folder
    return {p.relative_to(root).as_posix() for p in (root/PACKAGE).rglob('*')
            if p.is_file() and '__pycache__' not in p.parts}


def fold(nb: dict) -> bool: # JupyterLab shows hidden cells and the solutions of exercises closed; True: changed
    before = json.dumps([c['metadata'] for c in nb['cells']])
    exercises = False
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown' and src.startswith('#'): exercises = bool(re.match(r'#+ Exercise', src))
        hidden = re.match(r'#\|\s*(hide|default_exp)', src) or exercises and re.match(r'(def|class) [mM]y_?\w', src)
        if c['cell_type'] == 'code' and hidden: c['metadata']['jupyter'] = dict(source_hidden=True)
    return before != json.dumps([c['metadata'] for c in nb['cells']])


def fold_all(folder: Path): # rewrite those that a person would see open
    for p in notebooks(folder/'nbs'):
        nb = json.loads(p.read_text(encoding='utf-8'))
        if fold(nb): p.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def check() -> list[str]: # all that is wrong; empty when nothing is
    wrong = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        (tmp/PACKAGE).mkdir() # empty, so that a module whose notebook is gone is noticed
        shutil.copy(ROOT/'settings.ini', tmp)
        shutil.copy(ROOT/PACKAGE/'__init__.py', tmp/PACKAGE)
        for p in notebooks(NBS):
            copy = tmp/p.relative_to(ROOT)
            try: json.loads(p.read_text(encoding='utf-8'))
            except ValueError as e: sys.exit(f'{p.relative_to(ROOT)} is no notebook: {e}')
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, copy)
        nbdev('doclinks', 'nbdev_export', tmp)
        made, there = package_files(tmp), package_files(ROOT)
        for f in sorted(made - there): wrong.append(f'{f} is missing: run nbdev_export')
        for f in sorted(there - made): wrong.append(f'{f} comes from no notebook: remove it, or write the notebook')
        for f in sorted(made & there):
            if (tmp/f).read_bytes() != (ROOT/f).read_bytes():
                wrong.append(f'{f} is not what its notebook exports: run nbdev_export')
        fold_all(tmp)
        nbdev('clean', 'nbdev_clean', tmp)
        for p in notebooks(NBS):
            name = p.relative_to(ROOT)
            if (tmp/name).read_bytes() != p.read_bytes():
                wrong.append(f'{name.as_posix()} is not clean: run .ci/notebooks.py tidy')
    return wrong


def processor() -> float: # seconds that the processors have spent on processes started here and ended since
    import resource # Windows has none
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def keep_time(name: str, seconds: float, spent: float): # of a whole run: by the clock, and by the processors
    path = ROOT/'data/results/chapter-times.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    kept[name] = dict(seconds=round(seconds), processor_seconds=round(spent), processors=os.cpu_count(),
                      busy=round(os.getloadavg()[1], 1))
    order = [address(p, NBS) for p in notebooks(NBS)] # times of notebooks that are gone go with them
    path.write_text(json.dumps({k: kept[k] for k in order if k in kept}, indent=1) + '\n', encoding='utf-8')


def find(name: str) -> Path: # by its address, or by its stem where that is in one folder alone
    found = [p for p in notebooks(NBS) if name in (address(p, NBS), p.stem)]
    if len(found) == 1: return found[0]
    if found: sys.exit(f'{name} may be any of {", ".join(address(p, NBS) for p in found)}: give the folder, too')
    sys.exit(f'no notebook {name} in nbs/; there are {", ".join(address(p, NBS) for p in notebooks(NBS))}')


def shrink_pictures(paths: list[Path]): # of the outputs; by .ci/pictures.py, which `check` does not need
    from pictures import shrink
    won = 0
    for p in paths:
        nb = json.loads(p.read_text(encoding='utf-8'))
        if not (bytes_won := shrink(nb)): continue
        won += bytes_won
        p.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    if won: print(f'pictures: {won:,} bytes smaller')


def named(names: list[str]) -> list[Path]: # none means all
    asked = [find(name.removeprefix('nbs/').removesuffix('.ipynb')) for name in names]
    return [p for p in notebooks(NBS) if not names or p in asked]


def tidy(paths: list[Path] = ()): # fold and clean all; smaller pictures in these
    fold_all(ROOT)
    shrink_pictures(paths)
    nbdev('clean', 'nbdev_clean', ROOT)


def run(names: list[str]): # none means all
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    paths = named(names)
    for p in paths:
        start, spent, nb = time.time(), processor(), nbformat.read(p, as_version=4)
        print(f'{address(p, NBS)} ...', end=' ', flush=True)
        here = dict(metadata=dict(path=str(p.parent))) # the notebook's own folder, where Jupyter would run it
        try: NotebookClient(nb, timeout=None, kernel_name='python3', resources=here).execute()
        except CellExecutionError as e: sys.exit(f'failed after {time.time()-start:.0f} s; left as it was\n{e}')
        # controls whose kernel is gone would greet the reader with an error; their text and their strip of images stay
        for c in nb.cells:
            for o in c.get('outputs', []): o.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
        nb.metadata.pop('widgets', None)
        part = p.with_name(f'.{p.name}.part')
        nbformat.write(nb, part)
        part.replace(p)
        keep_time(address(p, NBS), time.time() - start, processor() - spent)
        print(f'{time.time()-start:.0f} s', flush=True)
    tidy(paths)
    nbdev('doclinks', 'nbdev_export', ROOT)


if __name__ == '__main__':
    what, *names = sys.argv[1:] or ['check']
    if what == 'run': run(names)
    elif what == 'tidy': tidy(named([] if names == ['all'] else names) if names else [])
    elif what == 'check':
        wrong = check()
        for w in wrong: print('notebooks:', w, file=sys.stderr)
        if not wrong: print(f'notebooks: {len(notebooks(NBS))} exported and clean')
        sys.exit(bool(wrong))
    else: sys.exit('usage: notebooks.py check | tidy [all | NAME ...] | run [NAME ...]')
