"""What the adversarial term gains: the shipped first stage trained on, with it and without, three seeds each. The table of chapter 05a.

    python tests/prove/adversary.py          six runs, two at a time on one thread each: about 35 minutes on two cores

A run that is in the work folder is not done again."""
import argparse, json, multiprocessing, time
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.files import atomic_path
from ldm_nb.reader import load_reader
from ldm_nb.recipes import train_autoencoder
from ldm_nb.reconstruction import measure_reconstruction
from ldm_nb.runs import load_images

SETTINGS = dict(data='postcards', init='ae-kl-f4', n=20000, crop=64, batch_size=8, lr=3e-4, steps=1500, device='cpu', precision='bf16')
ADVERSARY = dict(adversary_start=500, adversary_warmup=500, adversary_weight=.1)

def train(folder: Path, seed: int, adversary: dict):
    if (folder/'config.json').is_file(): return
    torch.set_num_threads(1)
    train_autoencoder(folder, quiet=True, resume=True, seed=seed, **SETTINGS, **adversary)
    print(f'trained {folder.name}', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    p.add_argument('--n', type=int, default=2000, help='held-out postcards (default 2000)')
    p.add_argument('--work', type=Path, default=Path('runs/adversary'), help='where the weights go (default runs/adversary)')
    p.add_argument('--out', type=Path, default=Path('data/results/adversary.json'))
    p.add_argument('--workers', type=int, default=2, help='runs at a time, a thread each (default 2)')
    a, start = p.parse_args(), time.time()
    runs = [(a.work/f'{name}-{seed}', seed, more) for seed in a.seeds for name, more in (('without', {}), ('with', ADVERSARY))]
    with multiprocessing.get_context('spawn').Pool(a.workers) as pool: pool.starmap(train, runs, chunksize=1)
    torch.set_num_threads(1)
    images, rows = load_images('postcards', 64, a.n, seed=1)['image'], []
    for folder, seed, more in runs:
        m = measure_reconstruction(load_autoencoder(folder), images, load_reader())
        rows.append(dict(adversary=bool(more), seed=seed) | {k: round(m[k], 4) for k in ('psnr', 'ssim', 'perceptual', 'rfid')})
        print(rows[-1], flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    table = dict(command='python tests/prove/adversary.py', settings=SETTINGS, adversary=ADVERSARY, pictures=a.n, threads=1, runs=rows)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1))
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
