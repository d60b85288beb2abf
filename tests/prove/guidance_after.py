"""Guidance after the paper, on the shipped text model: the plain weight, the weight in an interval of noise levels,
with rescaling, and away from a worse model instead of from no caption (autoguidance). All ask for the same held-out
captions from the same noise. The curves of nbs/beyond/04_guidance.

    python tests/prove/guidance_after.py            11 points of 400 pictures: data/results/guidance-after.json (15 min)
    python tests/prove/guidance_after.py --n 24 --steps 4 --guide-steps 20 --out runs/tiny.json --work runs/tiny

The worse model is the same network after 600 training steps of another seed. A point that is in the file is not
measured again."""
import argparse, json, time
from pathlib import Path
import torch
from ldm_nb.beyond.autoguidance import autoguide
from ldm_nb.cli.recipes import train_diffusion
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.files import atomic_path
from ldm_nb.guidance import Guidance
from ldm_nb.metrics.evaluate import evaluate

INTERVAL = (.3, 5.) # sigma
POINTS = [('plain', w) for w in (1., 3., 5., 8.)] + [('interval', w) for w in (3., 5., 8.)] + \
         [('rescale', w) for w in (5., 8.)] + [('auto', w) for w in (1.5, 2.)]
KEPT = ('FID', 'precision', 'recall', 'caption: all', 'caption: trees')

def model_and_weight(ldm, guide, way: str, w: float):
    if way == 'auto': return autoguide(ldm, guide, w), 1.
    ways = {'plain': w, 'interval': Guidance(w, interval=INTERVAL), 'rescale': Guidance(w, rescale=.7)}
    return ldm, ways[way]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=400)
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--guide-steps', type=int, default=600)
    p.add_argument('--out', type=Path, default=Path('data/results/guidance-after.json'))
    p.add_argument('--work', type=Path, default=Path('runs/guidance-after'))
    a = p.parse_args()
    torch.set_num_threads(1)
    if not (a.work/'config.json').is_file():
        train_diffusion(a.work, preset='laptop', seed=1, steps=a.guide_steps, device='cpu', precision='fp32',
                        quiet=True, tracker=None, watch=lambda ldm, step: {})
    ldm, guide = LatentDiffusion.from_pretrained('postcards-text'), LatentDiffusion.from_pretrained(a.work)
    found = json.loads(a.out.read_text()) if a.out.is_file() else dict(n=a.n, steps=a.steps, seed=2024, points=[])
    for way, w in POINTS:
        if (way, w) in {(q['way'], q['w']) for q in found['points']}: continue
        start = time.process_time()
        model, weight = model_and_weight(ldm, guide, way, w)
        rows = evaluate(model, n=a.n, steps=a.steps, sampler='dpmpp_2m', seed=2024, guidance=weight)
        q = dict(way=way, w=w, minutes=(time.process_time() - start)/60,
                 **{k: [rows[k].value, rows[k].low, rows[k].high] for k in KEPT})
        print(way, w, {k: round(q[k][0], 3) for k in KEPT}, flush=True)
        found['points'].append(q)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(a.out) as f: f.write_text(json.dumps(found, indent=1) + '\n')

if __name__ == '__main__': main()
