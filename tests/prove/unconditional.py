"""What brings the unconditional model nearer to the data? The network of `postcards` (1.1 M weights), trained from
nothing with one thing changed at a time, and then drawn from twice: as it is, and guided by its own state after a
tenth of the training (autoguidance). FID as `ldm-evaluate` has it: 1,000 pictures, seed 2024, the reader's features.

    python tests/prove/unconditional.py             all settings: data/results/unconditional.json (an hour and a half)
    python tests/prove/unconditional.py --steps 20 --n 24 --out runs/tiny.json --work runs/tiny    in miniature

`equivariant` needs the first stage that tests/prove/paths.py names. A row that is in the file is not done again."""
import argparse, copy, json, time
from pathlib import Path
import torch
from ldm_nb.beyond.autoguidance import autoguide
from ldm_nb.cli.recipes import train_diffusion
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.evaluate import evaluate

UNIFORM = dict(logit_normal_share=0.)
SETTINGS = {'recipe': {}, 'uniform': UNIFORM, 'eps': dict(prediction_type='eps', **UNIFORM), 'flow': dict(path='flow'),
            'flow uniform': dict(path='flow', **UNIFORM), 'align': dict(align=.5),
            'eps align': dict(prediction_type='eps', align=.5, **UNIFORM),
            'equivariant': dict(autoencoder='runs/ae-equivariant')}
KEPT = ('FID', 'precision', 'recall')

def measured(ldm, n: int) -> dict:
    found = evaluate(ldm, n=n, steps=20, sampler='dpmpp_2m', seed=2024)
    return {k: [found[k].value, found[k].low, found[k].high] for k in KEPT}

def run(name: str, seed: int, weights: list[float], steps: int, n: int, work: Path, pictures: int) -> dict:
    early, start = {}, time.process_time()
    def watch(ldm, step):
        if step == steps//10: early['guide'] = copy.deepcopy(ldm)
        return dict(score=0.)
    ldm = train_diffusion(work/f'{name}-{seed}'.replace(' ', '-'), preset='small', condition='none', seed=seed,
                          steps=steps, n=pictures, save_every=steps//10, device='cpu', precision='fp32', quiet=True,
                          tracker=None, watch=watch, **SETTINGS[name])
    minutes = (time.process_time() - start)/60
    found = {}
    for w in weights:
        found[str(w)] = measured(ldm if w == 1 else autoguide(ldm, early['guide'], w), n)
        print(name, seed, w, {k: [round(x, 2) for x in v] for k, v in found[str(w)].items()}, flush=True)
    return dict(setting=name, seed=seed, steps=steps, n=n, minutes=minutes, guided=found, torch=torch.__version__)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=5000)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=SETTINGS)
    p.add_argument('--weights', type=float, nargs='+', default=[1., 2.], help='of the guidance; 1 is none')
    p.add_argument('--n', type=int, default=1000, help='pictures')
    p.add_argument('--pictures', type=int, default=30000, help='to train on')
    p.add_argument('--out', type=Path, default=Path('data/results/unconditional.json'))
    p.add_argument('--work', type=Path, default=Path('runs/unconditional'))
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in a.seeds:
        for name in a.settings:
            found = json.loads(a.out.read_text()) if a.out.is_file() else dict(rows=[])
            if (name, seed) in {(r['setting'], r['seed']) for r in found['rows']}: continue
            row = run(name, seed, a.weights, a.steps, a.n, a.work, a.pictures)
            found = json.loads(a.out.read_text()) if a.out.is_file() else dict(rows=[])
            found['rows'].append(row)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(a.out) as f: f.write_text(json.dumps(found, indent=1) + '\n')

if __name__ == '__main__': main()
