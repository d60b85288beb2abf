"""Holes filled in held-out postcards, by the trained model, by an unconditional one that is held to what is known,
and by simpler ways; and houses taken away. The tables of chapter paper/13_inpainting.

    python tests/prove/inpainting.py  400 postcards, wide and thin holes, 300 houses: about 25 minutes on one thread

The chapter fills the first of these holes again, with functions of its own, and compares. What is in the work folder
is not done again, if the settings and the models are the same."""
import argparse, json, time
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from skimage.restoration import inpaint_biharmonic
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.seeds import ItemNoise
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.masks import random_mask
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.scenes import render
from ldm_nb.metrics.distances import embed, fid, reader_features
from ldm_nb.metrics.evaluate import frechet, held_out
from ldm_nb.metrics.intervals import Tally, wilson
from ldm_nb.engine.files import atomic_path, find_pretrained, weights_hash
from ldm_nb.metrics.reader import load_reader, read
from ldm_nb.metrics.reconstruction import mse_to_psnr
from ldm_nb.samplers import pairs

MODELS = ('postcards-inpaint', 'postcards')

# %% simple ways: pictures (b, 3, h, w) and masks (b, 1, h, w), 1 = fill
def mean_colour(x, m):
    known = 1 - m
    return torch.where(m > 0, (x*known).sum((2, 3), keepdim=True)/known.sum((2, 3), keepdim=True).clamp(min=1), x)

def nearest(x, m): # each pixel of the hole as the known one nearest to it
    at = [distance_transform_edt(k[0] > 0, return_distances=False, return_indices=True) for k in m.numpy()]
    return torch.stack([p[:, i, j] for p, (i, j) in zip(x, at)])

def biharmonic(x, m):
    fill = lambda p, k: inpaint_biharmonic(p.permute(1, 2, 0).numpy(), k[0].numpy() > 0, channel_axis=-1)
    y = torch.stack([torch.from_numpy(fill(p, k)).permute(2, 0, 1).float() for p, k in zip(x, m)])
    return torch.where(m > 0, y.clamp(-1, 1), x)

# %% the unconditional model, held to what is known
def resampled(denoise, z, sigmas, noise, times):
    # DDIM that takes each step `times` times, with fresh noise between (RePaint, Lugmayr et al. 2022)
    for s, to in pairs(sigmas):
        for k in range(times):
            z0_hat = denoise(z, s)
            z = z0_hat + to/s*(z - z0_hat)
            if k < times - 1: z = z + (s*s - to*to)**.5*noise(z)
        yield z, z0_hat

def held_to(ldm, x, m, seed, items, seen, steps, times=1):
    # seen: the picture whose latents are held, where the hole does not touch them
    known, hole = ldm.autoencoder.encode(seen), F.max_pool2d(m, ldm.autoencoder.f) > 0
    noise, sigmas = ItemNoise(seed, items), ldm.request(steps=steps).sigmas
    unit = noise(known)
    z = torch.where(hole, unit*(1 + sigmas[0].item()**2)**.5, known + sigmas[0].item()*unit)
    for _, z0_hat in resampled(lambda z, s: torch.where(hole, ldm.denoise(z, s), known), z, sigmas, noise, times): pass
    return torch.where(m > 0, ldm.decode(z0_hat), x)

# %% measures
def in_hole(features, x, y, m): # -> (b,): the perceptual distance of chapter 08, over the places of the hole
    unit, out = lambda h: F.normalize(h, dim=1, eps=1e-8), 0.
    for a, b in zip(features(x), features(y)):
        w = F.adaptive_avg_pool2d(m, a.shape[-2:])
        out = out + ((unit(a) - unit(b)).square().sum(1, keepdim=True)*w).sum((1, 2, 3))/w.sum((1, 2, 3))
    return out

def steps_of(x, m):
    # -> sums of absolute differences of neighbours, (b,) each: across the border of the hole, and inside it
    across = inside = 0.
    for dim in (2, 3):
        d, edge = x.diff(dim=dim).abs().mean(1, keepdim=True), m.diff(dim=dim).abs()
        both = m.narrow(dim, 1, m.shape[dim] - 1)*m.narrow(dim, 0, m.shape[dim] - 1)
        across, inside = across + (d*edge).sum((1, 2, 3)), inside + (d*both).sum((1, 2, 3))
    return across, inside

@torch.no_grad()
def row(y, x, m, reference, floor, network, reader):
    # filled, true, holes; of the other postcards; -> name -> Measured, as dicts
    d, hole = in_hole(reader.features, x, y, m), m.sum((1, 2, 3))*3
    one = torch.ones(len(x), 1)
    mse = ((y - x)*m).square().sum((1, 2, 3))/hole
    (across, inside), (a, i) = steps_of(y, m), steps_of(x, m)
    tally = {'perceptual': Tally(d[:, None], one), 'PSNR': Tally(mse_to_psnr(mse.clamp(min=4e-10))[:, None], one),
             'edge': Tally(across[:, None], a[:, None]), 'inside': Tally(inside[:, None], i[:, None])}
    found = {'FID': frechet(reference, embed(network, y), floor)} | {k: t.measured() for k, t in tally.items()}
    return {k: asdict(v) for k, v in found.items()} | dict(first=d[:8].tolist())

# %% houses
def house_hole(boxes, size=64, margin=3): # (k, 5) -> (1, size, size): the box of the house and a little more
    x0, y0, x1, y1 = (boxes[boxes[:, 0] == 8][0, 1:]*size).tolist()
    m = torch.zeros(1, size, size)
    m[:, max(0, int(y0) - margin):int(np.ceil(y1)) + margin, max(0, int(x0) - margin):int(np.ceil(x1)) + margin] = 1
    return m

def chance(scene, m, rng, n=400):
    # the share of postcards like this one that have a house in the hole, if all around it is known
    places = [p for p in range(1, 7) if all(int(x*7) not in (p - 1, p) for x, *_ in scene.trees)]
    horizon, hill, phase = scene.ground
    size = m.shape[-1]
    x, depth, w = rng.choice(places, n)/7, rng.uniform(0, .8, n), rng.uniform(.23, .28, n)
    y = horizon + .03 - hill*np.cos(2*np.pi*(x - phase)) + .04 + .16*depth
    cols, rows = (np.flatnonzero(m[0].numpy().any(k))/size for k in (0, 1))
    fit = (((x - .6*w).clip(0) >= cols[0]) & ((x + .6*w).clip(max=1) <= cols[-1] + 1/size) &
           (y - 1.02*w >= rows[0]) & (y <= rows[-1] + 1/size))
    return .8*fit.mean()/(.8*fit.mean() + .2)                           # four of five postcards have a house

def take_away(ldm, n, seed, steps, batch_size, reader):
    ds = Postcards(4*n, 64, seed + 1)
    at = [i for i in range(ds.n) if ds.scene(i).house != 'none'][:n]
    items = [ds[i] for i in at]
    x, m = torch.stack([it['image'] for it in items]), torch.stack([house_hole(it['boxes']) for it in items])
    gone = to_float(np.stack([render(replace(it['scene'], house='none'))['image'] for it in items]))
    y = ldm.sample(image=x, mask=m, seed=seed, steps=steps, batch_size=batch_size)
    rng, out = np.random.default_rng(seed), {}
    for name, p in {'with': x, 'without': gone, 'mean colour': mean_colour(x, m), 'filled': y}.items():
        seen = [s['house'] != 'none' for s in read(reader, p)]
        out[name] = dict(zip(('value', 'low', 'high'), (sum(seen)/n, *wilson(sum(seen)/n, n))))
    # chance, seen or not
    return out | dict(n=n, each=[(round(chance(it['scene'], k, rng), 3), int(s)) for it, k, s in zip(items, m, seen)])

def ways(x, m, a): # name -> a call that fills
    trained, free = (LatentDiffusion.from_pretrained(k) for k in MODELS)
    smooth = biharmonic(x, m)
    parts = [range(k, min(len(x), k + a.batch_size)) for k in range(0, len(x), a.batch_size)]
    def held(times=1):
        return torch.cat([held_to(free, x[p.start:p.stop], m[p.start:p.stop], a.seed, p, smooth[p.start:p.stop],
                                  a.steps, times) for p in parts])
    return {'mean colour': lambda: mean_colour(x, m), 'nearest pixel': lambda: nearest(x, m),
            'biharmonic': lambda: smooth, 'not trained for it': held,
            f'the same, each step {a.times} times': lambda: held(a.times),
            'trained': lambda: trained.sample(image=x, mask=m, seed=a.seed, steps=a.steps, batch_size=a.batch_size)}

def once(path, said, make): # the result of `make`, or what is there of a run of the same settings and models
    if path.is_file() and (old := json.loads(path.read_text()))['said'] == said: return old['found']
    found = make()
    with atomic_path(path) as p: p.write_text(json.dumps(dict(said=said, found=found)))
    return found

@torch.no_grad()
def main(a):
    torch.set_num_threads(a.threads)
    start, reader = time.time(), load_reader()
    network = reader_features(reader)
    first, second = held_out('postcards', 64, a.n, a.seed)
    x, reference = to_float(first['image']), embed(network, to_float(second['image']))
    floor = fid(reference.features, embed(network, x).features).item()
    table = dict(command=f'python tests/prove/inpainting.py --n {a.n} --houses {a.houses} --steps {a.steps} '
                         f'--times {a.times} --seed {a.seed}', seed=a.seed, n=a.n, steps=a.steps, device='cpu',
                 threads=a.threads, torch=torch.__version__,
                 weights={k: weights_hash(find_pretrained(k)) for k in MODELS})
    said, table['holes'] = dict(table), {}
    for kind in ('wide', 'thin'):
        m = torch.stack([random_mask(np.random.default_rng([a.seed, i]), 64, kind) for i in range(len(x))])
        table['holes'][kind] = dict(pixels=m.mean().item(), latents=F.max_pool2d(m, 4).mean().item(), rows={})
        def measured(fill):
            since, y = time.time(), fill()
            assert torch.equal(torch.where(m > 0, 0., y), torch.where(m > 0, 0., x))  # what is known is as it was
            return row(y, x, m, reference, floor, network, reader) | dict(seconds=round(time.time() - since, 1))
        for k, (way, fill) in enumerate(ways(x, m, a).items()):
            found = table['holes'][kind]['rows'][way] = once(a.work/f'{kind}-{k}.json', said, lambda: measured(fill))
            print(f'{kind} {way:36}' +
                  ', '.join(f'{k} {v["value"]:.3f}' for k, v in found.items() if isinstance(v, dict)), flush=True)
    table['houses'] = once(a.work/'houses.json', said,
                           lambda: take_away(LatentDiffusion.from_pretrained(MODELS[0]), a.houses, a.seed, a.steps,
                                             a.batch_size, reader))
    print({k: v for k, v in table['houses'].items() if k != 'each'}, flush=True)
    table['seconds'] = round(time.time() - start, 1)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table) + '\n')
    print(f'wrote {a.out} after {table["seconds"]/60:.1f} minutes')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, d, h in (('n', 400, 'postcards to fill, and as many to compare with'),
                    ('houses', 300, 'houses to take away'), ('steps', 50, 'of the sampler'),
                    ('times', 3, 'that each step is taken in one of the rows'),
                    ('seed', 2024, 'of postcards, holes and noise'), ('batch-size', 25, 'pictures at a time'),
                    ('threads', 1, 'of the CPU')):
        p.add_argument(f'--{k}', type=int, default=d, help=f'{h} (default {d})')
    p.add_argument('--work', type=Path, default=Path('runs/inpainting'), help='where what is done is kept')
    p.add_argument('--out', type=Path, default=Path('data/results/inpainting.json'))
    main(p.parse_args())
