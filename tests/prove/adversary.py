"""What the adversarial term gains, and what it costs to start it cold: the shipped ae-kl-f8 trained on without it
and with it, warmed up or from random weights, at two weights. The table and the curves of chapter
metrics/01_reconstruction.

    python tests/prove/adversary.py  nine runs, two at a time on one thread each: about 20 minutes on two cores
    python tests/prove/adversary.py --first ae-kl-f4
        the same question of a stage that loses little: six runs, about 30 minutes

A run that is in the work folder is not done again."""
import argparse, json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.reader import load_reader
from ldm_nb.cli.recipes import train_autoencoder
from ldm_nb.metrics.reconstruction import measure_reconstruction
from ldm_nb.datasets.sources import load_images

SETTINGS = dict(data='postcards', init='ae-kl-f8', f=8, n=20000, crop=64, batch_size=8, lr=3e-4, steps=450,
                save_every=50, device='cpu', precision='bf16')
VARIANTS = ({'without': {}} |
            {f'{strength}{start}': dict(adversary_start=150, adversary_warmup=warmup, adversary_weight=weight)
             for strength, weight in (('', .3), ('strong-', 1.)) for start, warmup in (('warm', 150), ('cold', 0))})
FINE = dict(SETTINGS, init='ae-kl-f4', f=4, crop=48, lr=2e-4, steps=900, save_every=300, pixel_loss='l2')
FINE_VARIANTS = {'without': {}, 'warm': dict(adversary_start=300, adversary_warmup=300, adversary_weight=.05)}
FIRST = {'ae-kl-f8': (SETTINGS, VARIANTS, 'adversary'), 'ae-kl-f4': (FINE, FINE_VARIANTS, 'adversary-f4')}

def train(folder: Path, seed: int, settings: dict, adversary: dict):
    if (folder/'config.json').is_file(): return
    torch.set_num_threads(1)
    train_autoencoder(folder, quiet=True, resume=True, seed=seed, **settings, **adversary)
    print(f'trained {folder.name}', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2],
                   help='of the runs without and warm (default 0 1 2); the others have seed 0 alone')
    p.add_argument('--first', choices=FIRST, default='ae-kl-f8', help='the first stage to train on (default ae-kl-f8)')
    p.add_argument('--n', type=int, default=500, help='held-out postcards (default 500)')
    p.add_argument('--work', type=Path, help='where the weights go (default runs/adversary, runs/adversary-f4)')
    p.add_argument('--out', type=Path, help='(default data/results/adversary.json, adversary-f4.json)')
    p.add_argument('--workers', type=int, default=2, help='runs at a time, a thread each (default 2)')
    a, start = p.parse_args(), time.time()
    settings, kinds, name = FIRST[a.first]
    a.work, a.out = a.work or Path('runs')/name, a.out or Path('data/results')/f'{name}.json'
    runs = [(kind, 0) for kind in kinds] + [(kind, seed) for seed in a.seeds if seed for kind in ('without', 'warm')]
    folders = [a.work/f'{kind}-{seed}' for kind, seed in runs]
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context('spawn')) as pool:
        list(pool.map(train, folders, [seed for _, seed in runs], [settings]*len(runs),
                      [kinds[kind] for kind, _ in runs]))
    torch.set_num_threads(1)
    images, rows = load_images('postcards', 64, a.n, seed=1)['image'], []
    for (kind, seed), folder in zip(runs, folders):
        m = measure_reconstruction(load_autoencoder(folder), images, load_reader())
        log = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
        curve = [(o['step'], o['dB fresh postcards']) for o in log if 'dB fresh postcards' in o]
        rows.append(dict(kind=kind, seed=seed) | {k: round(m[k], 6) for k in ('psnr', 'ssim', 'perceptual', 'rfid')} |
                    dict(curve=curve))
        print({k: v for k, v in rows[-1].items() if k != 'curve'}, flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    table = dict(command='python tests/prove/adversary.py' + f' --first {a.first}'*(a.first != 'ae-kl-f8'),
                 settings=settings, kinds=kinds, pictures=a.n, threads=1, runs=rows)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1))
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
