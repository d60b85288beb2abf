"""Chapter 01 for several seeds: runs the cells of the notebook as they are, with another `seed`, and keeps how well the
attribute reader recognises what was asked for. Writes data/results/one-page.json.

    python tests/prove/one_page.py --seeds 0 1 2       about 7 minutes a seed on two quiet cores, about 9 on one"""
import argparse, json, platform, resource, time
from pathlib import Path
import matplotlib
import matplotlib.pyplot as plt
import torch
from ldm_nb.engine.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT/'nbs/story/01_one_page.ipynb'

def code_cells(seed: int) -> list[str]: # as they are, but for the seed; without those of nbdev and of Jupyter
    cells = json.loads(CHAPTER.read_text(encoding='utf-8'))['cells']
    cells = [''.join(c['source']).splitlines() for c in cells if c['cell_type'] == 'code']
    if sum(c.count('seed = 0') for c in cells) != 1: raise ValueError(f'{CHAPTER} does not say `seed = 0` once')
    cells = ['\n'.join(f'seed = {seed}' if line == 'seed = 0' else line for line in c) for c in cells]
    return [c for c in cells if 'nbdev' not in c and not c.startswith('%')]

def processor() -> float: # seconds that this process has worked, all threads
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def run_chapter(seed: int, out: Path, pictures: Path | None = None # a folder for the figures
    ) -> dict: # what the chapter has defined
    "Run every code cell in one namespace, and put what it measured into the file `out`."
    names, start, before = {}, time.time(), processor()
    for k, cell in enumerate(code_cells(seed)):
        exec(compile(cell, f'cell {k}', 'exec'), names)
        if pictures and plt.get_fignums(): plt.savefig(pictures/f'{seed}-{k:02}.png', dpi=100)
        plt.close('all')
    row = {k: round(float(names[k]), 4) for k in ('psnr', 'time_right', 'season_right')}
    row |= dict(seconds=round(time.time() - start), processor_seconds=round(processor() - before),
                threads=torch.get_num_threads())
    print(f'seed {seed}:', json.dumps(row), flush=True)
    kept = json.loads(out.read_text(encoding='utf-8')) if out.is_file() else dict(runs={})
    kept |= dict(torch=torch.__version__, device='cpu', machine=platform.machine())
    kept['runs'][str(seed)] = row
    with atomic_path(out) as part: part.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n')
    return names

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=ROOT/'data/results/one-page.json')
    p.add_argument('--pictures', type=Path, help='a folder for the figures')
    a = p.parse_args()
    matplotlib.use('agg')
    if a.pictures: a.pictures.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds: run_chapter(seed, a.out, a.pictures)
