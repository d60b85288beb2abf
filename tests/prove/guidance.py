"""Guidance against accuracy, FID, precision and recall; and steps against quality and time, for two samplers. The
curves of chapter paper/11_captions. All points ask for the same held-out captions from the same noise, so that their
differences are paired.

    python tests/prove/guidance.py  15 points of 400 pictures: about 45 minutes on one thread
    python tests/prove/guidance.py --draw --device cuda
        only draws them, in a minute; what is said of time is measured on a CPU

Pictures that are in the work folder are not drawn again."""
import argparse, json, shlex, sys, time
from dataclasses import asdict
from pathlib import Path
import numpy as np
import torch
from scipy.ndimage import label
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_float, to_uint8
from ldm_nb.datasets.scenes import CLASSES
from ldm_nb.metrics.distances import Seen, compare, embed, fid, reader_features
from ldm_nb.metrics.evaluate import held_out
from ldm_nb.metrics.intervals import Measured, Tally, jackknife
from ldm_nb.metrics.judges import judge_text, segment
from ldm_nb.engine.files import atomic_path, find_pretrained, weights_hash
from ldm_nb.metrics.reader import load_reader

CHUNK = 100 # pictures that share one call, and so one seed

def drawn(ldm, captions: list, folder: Path, seed: int, **how
    ) -> tuple: # (n, 3, 64, 64) in [-1, 1], seconds of the CPU a picture, and where it was drawn
    "Draw, or take what was drawn before."
    path = folder/('-'.join(f'{k}{v}' for k, v in how.items()) + f'-{seed}-{len(captions)}.npz')
    if not path.is_file():
        start, parts = time.process_time(), []
        for k in range(0, len(captions), CHUNK):
            parts.append(to_uint8(ldm.sample(captions[k:k + CHUNK], seed=seed*10_000 + k//CHUNK,
                                             batch_size=CHUNK, **how)))
        spent = (time.process_time() - start)/len(captions)
        with atomic_path(path) as p, open(p, 'wb') as f:
            np.savez_compressed(f, x=np.concatenate(parts), seconds=spent, device=ldm.device.type)
        print(f'drew {path.name}', flush=True)
    kept = np.load(path)
    return to_float(kept['x']), float(kept['seconds']), str(kept['device'])

def timed(ldm, captions: list, hows: list, rounds: int = 3
    ) -> list: # of seconds of the CPU a picture, one for each way of sampling
    "Medians over rounds in which each way has its turn, so that what else the machine does falls on all of them."
    times = []
    for _ in range(rounds):
        for how in hows:
            start = time.process_time()
            ldm.sample(captions, seed=0, **how)
            times.append((time.process_time() - start)/len(captions))
    return torch.tensor(times).view(rounds, -1).median(0).values.tolist()

def seen(network, x) -> Seen: return Seen.cat([embed(network, part) for part in x.split(CHUNK)])

def twice(x, reader) -> dict: # of Tally: is there more than one house, more than one sun or moon?
    "Postcards have at most one of each. A region of fewer than 12 of the 4,096 pixels does not count."
    regions = lambda seg, name: int((np.bincount(label(seg == CLASSES.index(name))[0].flat)[1:] >= 12).sum())
    many = [[regions(m, 'house') > 1, regions(m, 'sun') + regions(m, 'moon') > 1] for m in segment(reader, x).numpy()]
    return {k: Tally(v, torch.ones_like(v), True)
            for k, v in zip(('two houses', 'two suns or moons'), torch.tensor(many).split(1, dim=1))}

def measures(x, a: dict, reader, network, reference: Seen, real: Seen
    ) -> dict: # drawn, and what is known of the pictures asked for
    "Sets, and captions; with how many questions of each caption were answered right, a digit a picture."
    tallies, fair = (judge_text(y, a, reader, None) | twice(y, reader) for y in (x, a['image']))
    out = compare(reference, seen(network, x), real) | {k: v.measured(fair[k]) for k, v in tallies.items()}
    every = tallies['caption: all']
    digits = lambda t: ''.join(str(int(v)) for v in t.flatten())
    return dict(measures={k: asdict(m) for k, m in out.items()}, right=digits(every.num), asked=digits(every.den))

def against(reference: Seen, first: Seen, other: Seen
    ) -> Measured: # the FID of `other` minus that of `first`, which share captions and noise
    v, low, high = (t.item() for t in jackknife(lambda r, p, q: (fid(r, q) - fid(r, p)).reshape(1),
                                                *(s.features for s in (reference, first, other))))
    return Measured(v, low, high, len(other.features))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=400, help='captions a point (default 400)')
    p.add_argument('--steps', type=int, default=20, help='of dpmpp_2m in the guidance curve (default 20)')
    p.add_argument('--weights', type=float, nargs='*', default=[0., 1., 1.5, 2., 3., 5., 8.],
                   help='of guidance (default 0 1 1.5 2 3 5 8)')
    p.add_argument('--few', type=int, nargs='*', default=[5, 10, 20, 50],
                   help='steps of ddim and dpmpp_2m at guidance 3 (default 5 10 20 50)')
    p.add_argument('--seed', type=int, default=2024, help='of the held-out postcards and of all noise (default 2024)')
    p.add_argument('--work', type=Path, default=Path('runs/guidance'), help='where the pictures go')
    p.add_argument('--draw', action='store_true', help='only draw')
    p.add_argument('--device', default='cpu', help='that draws: cpu or cuda (default cpu)')
    p.add_argument('--out', type=Path, default=Path('data/results/guidance.json'))
    a, start = p.parse_args(), time.time()
    torch.set_num_threads(1); torch.set_grad_enabled(False)
    a.work.mkdir(parents=True, exist_ok=True)
    ldm, reader = LatentDiffusion.from_pretrained('postcards-text').to(a.device), load_reader()
    network, (first, second) = reader_features(reader), held_out('postcards', 64, a.n, a.seed)
    about = dict(image=to_float(first['image']), caption=first['caption'])
    reference, real = (seen(network, to_float(d['image'])) for d in (second, first))
    asked_for = [('guidance', dict(sampler='dpmpp_2m', steps=a.steps, guidance=w)) for w in a.weights]
    asked_for += [('steps', dict(sampler=s, steps=k, guidance=3.)) for s in ('ddim', 'dpmpp_2m') for k in a.few]
    if a.draw:
        for part, how in asked_for: drawn(ldm, first['caption'], a.work, a.seed, **how)
        raise SystemExit
    points, plain, whole, devices = [], None, 0., set()
    ways = [how for part, how in asked_for if part == 'steps']
    cost = iter(timed(ldm.cpu(), first['caption'][:8], ways)) if ways else iter([])
    ldm.to(a.device)
    for part, how in asked_for:
        x, seconds, where = drawn(ldm, first['caption'], a.work, a.seed, **how)
        whole += seconds*a.n
        devices.add(where)
        point = dict(part=part, **how) | measures(x, about, reader, network, reference, real)
        if part == 'guidance' and how['guidance'] == 1: plain = seen(network, x)
        elif part == 'guidance' and plain:
            point['FID minus that of w=1'] = asdict(against(reference, plain, seen(network, x)))
        if part == 'steps': point['seconds'] = round(next(cost), 4)
        points.append(point)
        print(part, how, {k: round(point['measures'][k]['value'], 3)
                          for k in ('caption: all', 'FID', 'precision', 'recall')}, flush=True)
    table = dict(command=shlex.join(['python', 'tests/prove/guidance.py', *sys.argv[1:]]), model='postcards-text',
                 weights=weights_hash(find_pretrained('postcards-text')), n=a.n, seed=a.seed,
                 device=' and '.join(sorted(devices)), threads=1, torch=torch.__version__, seconds=round(whole, 1),
                 points=points)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, allow_nan=False) + '\n')
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
