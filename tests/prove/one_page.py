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

def run_chapter(seed: int, pictures: Path | None = None) -> dict: # every code cell, in one namespace
    cells = [''.join(c['source']) for c in json.loads(CHAPTER.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    cells = [c for c in cells if 'nbdev' not in c]
    if sum('seed = 0' in c.splitlines() for c in cells) != 1: raise ValueError(f'{CHAPTER} does not say `seed = 0` once')
    names: dict = {}
    for k, cell in enumerate(cells):
        exec(compile('\n'.join(f'seed = {seed}' if o == 'seed = 0' else o for o in cell.splitlines()), f'cell {k}', 'exec'), names)
        if pictures and plt.get_fignums(): plt.savefig(pictures/f'{seed}-{k:02}.png', dpi=100)
        plt.close('all')
    return {k: round(float(names[k]), 4) for k in ('psnr', 'time_right', 'season_right')}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=ROOT/'data/results/one-page.json')
    p.add_argument('--pictures', type=Path, help='a folder for the figures')
    a = p.parse_args()
    matplotlib.use('agg')
    if a.pictures: a.pictures.mkdir(parents=True, exist_ok=True)
    kept = json.loads(a.out.read_text(encoding='utf-8')) if a.out.is_file() else dict(runs={})
    for seed in a.seeds:
        start, before = time.time(), resource.getrusage(resource.RUSAGE_SELF)
        row = run_chapter(seed, a.pictures)
        after = resource.getrusage(resource.RUSAGE_SELF)
        row |= dict(seconds=round(time.time() - start), threads=torch.get_num_threads(), device='cpu', machine=platform.machine(),
                    processor_seconds=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        print(f'seed {seed}:', json.dumps(row), flush=True)
        kept['runs'][str(seed)] = row
        with atomic_path(a.out) as part: part.write_text(json.dumps(dict(kept, torch=torch.__version__), indent=1) + '\n')
