"""What does each idea after the paper buy? The text model of the course's recipe (`ldm-train diffusion --preset
laptop`), trained anew with one thing changed at a time, in equally many steps on the same data and batches: on the
paper's path with eps and with v, on the straight path with flow; with v and a transformer of as many operations a
step (dit), with v and the reader's features as a teacher (align), with v on first stages that were trained on, with
scale equivariance and without it (equivariant, continued). After a quarter, a half and all of the steps: how much of
held-out captions is in the pictures, and FID. The tables of nbs/beyond/00_flow, 01_transformer, 03_latents and
05_alignment.

    python tests/prove/paths.py             all settings, three seeds, two at a time on one thread each (four hours)
    python tests/prove/paths.py --steps 8 --n 24 --settings v --out runs/tiny.json --work runs/tiny    in miniature

The two first stages are made first (ten minutes each):

    ldm-train autoencoder --init ae-kl-f4 --pixel-loss l2 --lr 1e-3 --steps 1200 --out runs/ae-continued
    ldm-train autoencoder --init ae-kl-f4 --pixel-loss l2 --lr 1e-3 --steps 1200 --scale-equivariance 0.25 \
        --out runs/ae-equivariant

Timesteps: eps and 'v uniform' uniformly, as in the paper; the others as the recipe draws them (logit_normal_share
0.75). A row that is
in the file is not done again."""
import argparse, json, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import torch
from ldm_nb.cli.recipes import train_diffusion
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.devices import keep_memory
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.distances import embed, fid, reader_features
from ldm_nb.metrics.intervals import jackknife
from ldm_nb.metrics.judges import judge_text
from ldm_nb.metrics.reader import load_reader

UNIFORM = dict(logit_normal_share=0.)
SETTINGS = {'eps': dict(prediction_type='eps', **UNIFORM), 'v': {}, 'v uniform': UNIFORM, 'flow': dict(path='flow'),
            'dit': dict(network='dit'), 'align': dict(align=.5),
            'equivariant': dict(autoencoder='runs/ae-equivariant'), 'continued': dict(autoencoder='runs/ae-continued')}


@torch.no_grad()
def measure(ldm, n: int, seed: int, reader, real) -> dict: # share of what was asked with its interval, FID with its
    held = load_images('postcards', 64, n, 2024, held_out=True)
    x = torch.cat([ldm.sample(held['caption'][k:k + 32], steps=20, guidance=3., seed=seed*10_000 + k)
                   for k in range(0, n, 32)])
    tally = judge_text(x, dict(caption=held['caption']), reader, None)
    right = {k.removeprefix('caption: '): [t.measured(None).value, t.measured(None).low, t.measured(None).high]
             for k, t in tally.items()}
    seen = embed(reader_features(reader), x).features
    return dict(right=right, fid=[v.item() for v in jackknife(lambda p, q: fid(p, q).reshape(1), real, seen)])

def run(name: str, seed: int, steps: int, n: int, work: Path, pictures: int) -> dict:
    torch.set_num_threads(1)
    keep_memory()
    reader, rows, clock = load_reader(), [], dict(judged=0., start=time.process_time())
    real = embed(reader_features(reader),
                 to_float(load_images('postcards', 64, 1000, 77, held_out=True)['image'])).features
    folder = work/f'{name}-{seed}'.replace(' ', '-')
    def watch(ldm, step):
        if step not in (steps//4, steps//2, steps): return {}
        begin = time.process_time()
        found = measure(ldm, n, seed, reader, real)
        clock['judged'] += time.process_time() - begin
        spent = time.process_time() - clock['start'] - clock['judged']
        rows.append(dict(step=step, minutes=spent/60, **found))
        print(name, seed, step,
              f'{spent/60:.1f} min, {found["right"]["all"][0]:.3f}, FID {found["fid"][0]:.1f}', flush=True)
        return dict(all=found['right']['all'][0])
    train_diffusion(folder, preset='laptop', seed=seed, steps=steps, n=pictures, save_every=steps//4, device='cpu',
                    precision='fp32', quiet=True, tracker=None, watch=watch, **SETTINGS[name])
    return dict(setting=name, seed=seed, steps=steps, n=n, pictures=pictures, curve=rows, torch=torch.__version__)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=2400)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=SETTINGS)
    p.add_argument('--n', type=int, default=256, help='held-out captions')
    p.add_argument('--pictures', type=int, default=15000)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--out', type=Path, default=Path('data/results/paths.json'))
    p.add_argument('--work', type=Path, default=Path('runs/paths'))
    a = p.parse_args()
    found = json.loads(a.out.read_text()) if a.out.is_file() else dict(rows=[])
    have = {(r['setting'], r['seed']) for r in found['rows']}
    todo = [(k, s) for s in a.seeds for k in a.settings if (k, s) not in have]
    with ProcessPoolExecutor(a.workers, get_context('spawn')) as pool:
        jobs = [pool.submit(run, k, s, a.steps, a.n, a.work, a.pictures) for k, s in todo]
        for job in jobs:
            found['rows'].append(job.result())
            a.out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(a.out) as f: f.write_text(json.dumps(found, indent=1) + '\n')

if __name__ == '__main__': main()
