"""What scale equivariance does to a first stage: `ae-kl-f4`, and what tests/prove/paths.py trains it on to,
with the term. Reconstruction of 1,000 held-out postcards; how far half a latent is from half a picture,
and the power of each frequency of the latents. The table and the spectra of nbs/beyond/03_latents.

    python tests/prove/latents.py               data/results/latents.json (three minutes)
    python tests/prove/latents.py --n 24 --stages ae-kl-f4 --out runs/tiny.json"""
import argparse, json
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.beyond.latents import halved, spectrum
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.evaluate import evaluate_first_stage

@torch.no_grad()
def measured(ae, n: int, seed: int) -> dict:
    rows = evaluate_first_stage(ae, n=n, seed=seed)
    x = to_float(load_images('postcards', 64, n, seed, held_out=True)['image'])
    z = torch.cat([ae.encode(p) for p in x.split(50)])
    small = torch.cat([ae.decode(halved(p)) for p in z.split(50)])
    mse = (small.clamp(-1, 1) - halved(x)).square().mean((1, 2, 3))/4 # of pictures from 0 to 1
    found = {k.removeprefix('first stage: '): [m.value, m.low, m.high] for k, m in rows.items()}
    return found | {'half, dB': -10*mse.log10().mean().item(), 'spectrum': spectrum(z).tolist(),
                    'pictures': spectrum(x).tolist()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=1000)
    p.add_argument('--seed', type=int, default=2024)
    p.add_argument('--stages', nargs='+', default=['ae-kl-f4', 'runs/ae-equivariant'])
    p.add_argument('--out', type=Path, default=Path('data/results/latents.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    found = {Path(k).name: measured(load_autoencoder(k), a.n, a.seed) for k in a.stages}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(a.out) as f: f.write_text(json.dumps(dict(n=a.n, seed=a.seed, stages=found), indent=1) + '\n')
    for k, v in found.items(): print(k, {m: v[m] for m in ('PSNR', 'rFID', 'half, dB')})

if __name__ == '__main__': main()
