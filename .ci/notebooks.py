"""Notebooks and what is made of them. `check` says whether they are exported and clean, without looking at git; `run` re-executes,
cleans and exports them all, or those named, and keeps how long each took in data/results/chapter-times.json."""
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def chapters() -> list[Path]: # the index last: it may show what the others make
    return sorted((p for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '_.'), key=lambda p: (p.stem == 'index', p.name))


def nbdev(module: str, function: str, folder: Path): # call one of nbdev's functions on the project in `folder`
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # with it nbdev exports nothing
    r = subprocess.run([sys.executable, '-c', f'from nbdev.{module} import {function}; {function}()'], cwd=folder, env=env, capture_output=True, text=True)
    if r.returncode or 'Failed' in r.stderr: sys.exit(f'{function} failed in {folder}:\n{r.stdout}{r.stderr}')


def check() -> list[str]: # all that is wrong; empty when nothing is
    wrong = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        (tmp/'nbs').mkdir()
        (tmp/'ldm_nb').mkdir() # empty, so that a module whose notebook is gone is noticed
        shutil.copy(ROOT/'settings.ini', tmp)
        shutil.copy(ROOT/'ldm_nb/__init__.py', tmp/'ldm_nb')
        for p in chapters():
            try: json.loads(p.read_text(encoding='utf-8'))
            except ValueError as e: sys.exit(f'nbs/{p.name} is no notebook: {e}')
            shutil.copy(p, tmp/'nbs')
        nbdev('doclinks', 'nbdev_export', tmp)
        made, there = ({p.name for p in d.glob('*.py')} for d in (tmp/'ldm_nb', ROOT/'ldm_nb'))
        for f in sorted(made - there): wrong.append(f'ldm_nb/{f} is missing: run nbdev_export')
        for f in sorted(there - made): wrong.append(f'ldm_nb/{f} comes from no notebook: remove it, or write the notebook')
        for f in sorted(made & there):
            if (tmp/'ldm_nb'/f).read_bytes() != (ROOT/'ldm_nb'/f).read_bytes(): wrong.append(f'ldm_nb/{f} is not what its notebook exports: run nbdev_export')
        nbdev('clean', 'nbdev_clean', tmp)
        for p in chapters():
            if (tmp/'nbs'/p.name).read_bytes() != p.read_bytes(): wrong.append(f'nbs/{p.name} is not clean: run nbdev_clean')
    return wrong


def processor() -> float: # seconds that the processors have spent on processes started here and ended since
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def keep_time(chapter: str, seconds: float, spent: float): # of a whole run, as a reader has it: by the clock, and by the processors
    path = ROOT/'data/results/chapter-times.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    kept[chapter] = dict(seconds=round(seconds), processor_seconds=round(spent), processors=os.cpu_count(), busy=round(os.getloadavg()[1], 1))
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + '\n')


def run(names: list[str]): # stems of notebooks; none means all
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    files = [p for p in chapters() if not names or p.stem in names]
    if unknown := set(names) - {p.stem for p in files}:
        sys.exit(f'no notebook {", ".join(sorted(unknown))} in nbs/; there are {", ".join(p.stem for p in chapters())}')
    for p in files:
        start, spent, nb = time.time(), processor(), nbformat.read(p, as_version=4)
        print(f'{p.name} ...', end=' ', flush=True)
        try: NotebookClient(nb, timeout=None, kernel_name='python3', resources=dict(metadata=dict(path=str(ROOT/'nbs')))).execute()
        except CellExecutionError as e: sys.exit(f'failed after {time.time()-start:.0f} s; left as it was\n{e}')
        for c in nb.cells: # controls whose kernel is gone would greet the reader with an error; their text and their strip of pictures stay
            for o in c.get('outputs', []): o.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
        nb.metadata.pop('widgets', None)
        part = p.with_name(f'.{p.name}.part')
        nbformat.write(nb, part)
        part.replace(p)
        keep_time(p.stem, time.time() - start, processor() - spent)
        print(f'{time.time()-start:.0f} s', flush=True)
    nbdev('clean', 'nbdev_clean', ROOT)
    nbdev('doclinks', 'nbdev_export', ROOT)


if __name__ == '__main__':
    what, *names = sys.argv[1:] or ['check']
    if what == 'run': run(names)
    elif what == 'check':
        wrong = check()
        for w in wrong: print('notebooks:', w, file=sys.stderr)
        if not wrong: print(f'notebooks: {len(chapters())} exported and clean')
        sys.exit(bool(wrong))
    else: sys.exit('usage: notebooks.py check | run [NAME ...]')
