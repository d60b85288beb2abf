"""First stages of every factor, trained alike and measured: the sweep of chapter
metrics/01_reconstruction, beside the paper's Tab. 8.

    python tests/prove/autoencoders.py  all points, two at a time on one thread each: about 30 minutes on two cores
    python tests/prove/autoencoders.py --points kl-f4-c4 vq-f4-c3  those alone, and the table of what is there

A point that is in the work folder is not trained again."""
import argparse, json, multiprocessing, re, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.engine.files import atomic_path, load_model
from ldm_nb.metrics.reader import load_reader
from ldm_nb.cli.recipes import train_autoencoder
from ldm_nb.metrics.reconstruction import measure_reconstruction
from ldm_nb.datasets.sources import load_images

EQUAL = [f'kl-f{f}-c4' for f in (2, 4, 8, 16, 32)]
TAB8 = ['kl-f2-c2', 'kl-f4-c3', 'kl-f16-c16', 'vq-f4-c3', 'vq-f8-c4']
SETTINGS = dict(data='postcards+photos', n=20000, crop=64, batch_size=8, lr=2e-3, steps=500, seed=0, device='cpu',
                precision='bf16')

def train(name: str, folder: Path):
    if (folder/'config.json').is_file(): return
    torch.set_num_threads(1)
    regulariser, f, z_ch = re.fullmatch(r'(kl|vq)-f(\d+)-c(\d+)', name).groups()
    train_autoencoder(folder, regulariser=regulariser, f=int(f), z_ch=int(z_ch), quiet=True, resume=True, **SETTINGS)
    print(f'trained {name}', flush=True)

def measure(name: str, folder: Path, n: int) -> dict:
    torch.set_num_threads(1)
    ae, card, reader = load_autoencoder(folder), load_model(folder)[0]['card'], load_reader()
    out = dict(name=name, f=ae.f, z_ch=ae.z_ch, parameters=sum(p.numel() for p in ae.parameters()),
               train_minutes=round(card['hours']*60, 1))
    for data in ('postcards', 'photos'):
        m = measure_reconstruction(ae, load_images(data, 64, n, seed=1, held_out=True)['image'], reader)
        out[data] = {k: round(v, 4) for k, v in m.items()}
    print(name, {k: out['postcards'][k] for k in ('psnr', 'rfid')}, flush=True)
    return out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--points', nargs='*', default=EQUAL + TAB8, help='default: ' + ' '.join(EQUAL + TAB8))
    p.add_argument('--n', type=int, default=400, help='held-out pictures of each kind (default 400)')
    p.add_argument('--work', type=Path, default=Path('runs/autoencoders'),
                   help='where the weights go (default runs/autoencoders)')
    p.add_argument('--out', type=Path, default=Path('data/results/autoencoders.json'))
    p.add_argument('--workers', type=int, default=2, help='points trained at a time, a thread each (default 2)')
    a, start = p.parse_args(), time.time()
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context('spawn')) as pool:
        folders = [a.work/k for k in a.points]
        list(pool.map(train, a.points, folders))
        rows = list(pool.map(measure, a.points, folders, [a.n]*len(folders)))
    table = dict(command='python tests/prove/autoencoders.py', settings=SETTINGS, pictures=a.n, threads=1,
                 train_minutes=round(sum(r['train_minutes'] for r in rows), 1), points=rows)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1))
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
