"""Which first stage for pictures of one's own: take the shipped one, train it on, or train one from nothing? PSNR of
pictures that were kept back, after the same number of steps. Writes data/results/own-first-stage.json.

    python tests/prove/own_first_stage.py --data emoji=EMOJI/train cifar=CIFAR    about 25 minutes on one core

A row that is in the file is not measured again."""
import argparse, json, subprocess, sys
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.cli.recipes import keep_back
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.files import atomic_path
from ldm_nb.engine.presets import resolve_config
from ldm_nb.metrics.reconstruction import mean_psnr

WAYS = {'trained on': ['--init', 'ae-kl-f4', '--lr', '1.5e-3'], 'from nothing': []}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', nargs='+', required=True, help='NAME=FOLDER, several')
    p.add_argument('--steps', type=int, default=1000)
    p.add_argument('--work', type=Path, default=Path('runs/own-first-stage'))
    p.add_argument('--out', type=Path, default=Path('data/results/own-first-stage.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(a.out.read_text()) if a.out.is_file() else []
    there = {(r['data'], r['way'], r['steps']) for r in rows}
    def keep(**row):
        rows.append(row)
        print(json.dumps(row), flush=True)
        with atomic_path(a.out) as f: f.write_text(json.dumps(rows, indent=1) + '\n')
    for name, _, folder in (d.partition('=') for d in a.data):
        if (name, 'as shipped', 0) not in there:
            s = resolve_config('autoencoder', 'laptop')
            _, fresh = keep_back(load_images(folder, s['size'], s['n'], 0, quiet=True)['image'], folder, s)
            psnr = [mean_psnr(load_autoencoder('ae-kl-f4'), x) for x in fresh.values()]
            keep(data=name, way='as shipped', steps=0, minutes=0, psnr=round(psnr[0], 2), seed=0)
        for way, words in WAYS.items():
            if (name, way, a.steps) in there: continue
            out = a.work/f'{name}-{way.replace(" ", "-")}-{a.steps}'
            command = ['autoencoder', '--data', folder, '--preset', 'laptop', '--pixel-loss', 'l2', *words,
                       '--steps', str(a.steps), '--out', str(out), '--quiet', '--resume']
            subprocess.run([sys.executable, '-m', 'ldm_nb.cli.train', *command], check=True)
            card = json.loads((out/'config.json').read_text())['card']
            keep(data=name, way=way, steps=a.steps, minutes=round(60*card['hours'], 1),
                 psnr=next(iter(card['psnr'].values())), seed=0, threads=card['threads'], device=card['device'])

if __name__ == '__main__': main()
