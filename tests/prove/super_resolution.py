"""Held-out postcards and photographs enlarged four times: bicubic, by a regression, and drawn by the trained model;
how far its samples scatter; and what happens when it is shown pictures four times as large as those it was trained
with. The tables of chapter paper/14_super_resolution.

    python tests/prove/super_resolution.py
        400 postcards, 400 photographs, about 25 minutes on one thread, 7 of them for the regression

The chapter enlarges the first of these pictures again, and compares. What is in the work folder is not done again,
if the settings and the models are the same."""
import argparse, json, time
from dataclasses import asdict
from pathlib import Path
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.masks import downsample
from ldm_nb.datasets.postcards import Postcards, render_all
from ldm_nb.metrics.distances import embed, fid, reader_features
from ldm_nb.metrics.evaluate import frechet, held_out, reconstruct
from ldm_nb.metrics.intervals import Tally
from ldm_nb.metrics.judges import enlarged, judge_text
from ldm_nb.engine.files import atomic_path, find_pretrained, load_into, weights_hash
from ldm_nb.layers import ResBlock
from ldm_nb.losses import FeatureDistance
from ldm_nb.metrics.reader import load_reader
from ldm_nb.metrics.reconstruction import psnr, ssim
from ldm_nb.datasets.sources import load_images

MODELS = ('postcards-x4', 'postcards-text')


class Regression(nn.Module):
    "Bicubic, and what residual blocks at the low resolution add to it."
    def __init__(self, ch=64, blocks=5):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, ch, 3, padding=1), *[ResBlock(ch, groups=8) for _ in range(blocks)],
                                 nn.GroupNorm(8, ch), nn.SiLU(), nn.Conv2d(ch, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, y): return F.interpolate(y, scale_factor=4, mode='bicubic') + self.net(y)

def regression(path, steps, batch_size=8, lr=2e-3): # trained to the least squared error; path: of its weights
    torch.manual_seed(0)
    net, rng = Regression(), torch.Generator().manual_seed(0)
    if path.is_file(): return load_into(net, load_file(path), str(path)).eval()
    images = load_images('postcards', 64, 4000, 0)['image']
    opt = torch.optim.AdamW(net.parameters(), lr, (.9, .99))
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=.1)
    for k in range(steps):
        x = to_float(images[torch.randint(len(images), (batch_size,), generator=rng)])
        loss = (net(downsample(x)) - x).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); rate.step()
        if k % 500 == 499: print(f'regression, step {k + 1}: {loss.item():.5f}', flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return net.eval()

def put_right(x, small): return (x + F.interpolate(small - downsample(x), scale_factor=4, mode='nearest')).clamp(-1, 1)

def rough(x):
    # as a network of `embed`: how much neighbours differ, in steps of 1/255, at sixteen places; it sees the grain,
    # to which the reader is blind
    return F.adaptive_avg_pool2d((x - F.avg_pool2d(x, 3, 1, 1)).abs()*127.5, 4).flatten(1), None

def row(y, x, small, other, network, distance): # drawn, true, small; other pictures of the kind
    one = torch.ones(len(x), 1)
    tally = dict(PSNR=psnr(x, y, 100)[:, None], SSIM=ssim(x, y)[:, None], perceptual=distance(x, y)[:, None],
                 consistency=psnr(small, downsample(y), 100)[:, None])
    tally = {k: Tally(v, one) for k, v in tally.items()}
    far = lambda net: frechet(seen := embed(net, other), embed(net, y),
                              fid(seen.features, embed(net, x).features).item())
    found = {k: t.measured() for k, t in tally.items()} | dict(FID=far(network), grain=far(rough))
    return {k: asdict(v) for k, v in found.items()} | {'first': {k: t.num[:8, 0].tolist() for k, t in tally.items()}}

def table_of(data, ldm, net, a, network, distance): # all ways, on one kind of picture
    first, second = held_out(data, 64, a.n, a.seed)
    x, other = to_float(first['image']), to_float(second['image'])
    small, rows = downsample(x), {}
    drawn = ldm.sample(image=small, seed=a.seed, steps=a.steps, batch_size=a.batch_size)
    ways = {'bicubic': enlarged(small, x), 'regression': torch.cat([net(k) for k in small.split(50)]).clamp(-1, 1),
            'drawn': drawn, 'drawn, put right': put_right(drawn, small),
            'first stage': reconstruct(ldm.autoencoder, x, 50, 'cpu')}
    for way, y in ways.items():
        rows[way] = row(y, x, small, other, network, distance)
        print(f'{data} {way:20}' + ', '.join(f'{k} {v["value"]:.3f}' for k, v in rows[way].items() if k != 'first'),
              flush=True)
    return rows

def scatter(ldm, net, a):
    # squared errors, pixels in [0, 1], of the mean of k samples; and how far samples lie from each other
    x = to_float(held_out('postcards', 64, a.n, a.seed)[0]['image'][:a.scatter])
    small = downsample(x)
    many = ldm.sample(image=small, n=8, seed=a.seed + 1, steps=a.steps,
                      batch_size=a.batch_size).reshape(len(x), 8, *x.shape[1:])
    error = lambda y: ((y - x)/2).square().mean((1, 2, 3))
    mean = {k: torch.stack([error(part.mean(1)) for part in many.split(k, dim=1)]).mean(0) for k in (1, 2, 4, 8)}
    return dict(n=len(x), error={k: v.mean().item() for k, v in mean.items()}, variance=(many/2).var(1).mean().item(),
                regression=error(net(small).clamp(-1, 1)).mean().item(),
                first_stage=error(reconstruct(ldm.autoencoder, x, 50, 'cpu')).mean().item())

def spectrum(x): # (b, 3, h, h) -> (h/2,): mean power of the grey picture at each whole frequency, cycles a side
    h = x.shape[-1]
    w = torch.hann_window(h, periodic=False)
    waves = torch.fft.fft2((x.mean(1) - x.mean((1, 2, 3)).view(-1, 1, 1))*w*w[:, None])
    power = torch.fft.fftshift(waves.abs().square(), dim=(1, 2)).mean(0)/h**2
    c = torch.arange(h) - h//2
    r = (c[:, None]**2 + c**2).sqrt().round().long().flatten()
    return (torch.bincount(r, power.flatten())/torch.bincount(r))[:h//2]

def large(ldm, net, a, distance):
    # 64 -> 256: shown what it was never trained with; there is a truth, for postcards can be drawn at any size
    x = to_float(render_all(Postcards(a.large, 256, a.seed))['image'])
    small, one = downsample(x), torch.ones(a.large, 1)
    drawn = ldm.sample(image=small, seed=a.seed, steps=a.steps, batch_size=4)
    ways = {'bicubic': enlarged(small, x), 'regression': net(small).clamp(-1, 1), 'drawn': drawn,
            'drawn, put right': put_right(drawn, small)}
    rows = {k: dict(PSNR=psnr(x, y, 100)[:, None], SSIM=ssim(x, y)[:, None], perceptual=distance(x, y)[:, None],
                    consistency=psnr(small, downsample(y), 100)[:, None]) for k, y in ways.items()}
    return dict(n=a.large,
                rows={k: {m: asdict(Tally(v, one).measured()) for m, v in r.items()} for k, r in rows.items()},
                spectrum={k: spectrum(y).tolist() for k, y in dict(real=x, **ways).items()})

def cascade(ldm, a, reader, distance): # caption -> 64 -> 256
    first = held_out('postcards', 64, a.n, a.seed)[0]
    known = dict(caption=first['caption'][:a.cascade])
    small = LatentDiffusion.from_pretrained(MODELS[1]).sample(known['caption'], guidance=3., seed=a.seed, steps=a.steps,
                                                              batch_size=a.batch_size)
    y = ldm.sample(image=small, seed=a.seed, steps=a.steps, batch_size=4)
    said = {k: judge_text(v, known, reader, distance)['caption: all'].measured()
            for k, v in (('64', small), ('256', y))}
    back = Tally(psnr(small, downsample(y), 100)[:, None], torch.ones(len(y), 1)).measured()
    return dict(n=len(y), right={k: asdict(m) for k, m in said.items()}, consistency=asdict(back))

def once(path, said, make):
    # the result of `make` and its seconds, or what is there of a run of the same settings and models
    if path.is_file() and (old := json.loads(path.read_text()))['said'] == said: return old['found'], old['seconds']
    start, found = time.time(), make()
    with atomic_path(path) as p:
        p.write_text(json.dumps(dict(said=said, found=found, seconds=(seconds := time.time() - start))))
    return found, seconds

def main(a):
    torch.set_num_threads(a.threads)
    reader, ldm = load_reader().requires_grad_(False), LatentDiffusion.from_pretrained(MODELS[0])
    network, distance = reader_features(reader), FeatureDistance(reader.features)
    net = regression(a.work/f'regression-{a.regression}.safetensors', a.regression)
    count = lambda m: sum(p.numel() for p in m.parameters())
    table = dict(command=f'python tests/prove/super_resolution.py --n {a.n} --scatter {a.scatter} --large {a.large} '
                         f'--cascade {a.cascade} --steps {a.steps} --regression {a.regression} --seed {a.seed}',
                 seed=a.seed, n=a.n, steps=a.steps, device='cpu', threads=a.threads, torch=torch.__version__,
                 weights={k: weights_hash(find_pretrained(k)) for k in MODELS}, regression_steps=a.regression,
                 parameters=dict(regression=count(net), network=count(ldm.net), decoder=count(ldm.autoencoder.decoder)))
    said = json.loads(json.dumps(table))
    make = dict(scatter=lambda: scatter(ldm, net, a), large=lambda: large(ldm, net, a, distance),
                cascade=lambda: cascade(ldm, a, reader, distance))
    alone = said | dict(weights={MODELS[0]: said['weights'][MODELS[0]]})      # what does not look at captions
    with torch.no_grad():
        first = {data: once(a.work/f'{data}.json', alone, lambda: table_of(data, ldm, net, a, network, distance))
                 for data in ('postcards', 'photos')}
        table['tables'], seconds = {k: found for k, (found, _) in first.items()}, sum(s for _, s in first.values())
        for name in make:
            table[name], took = once(a.work/f'{name}.json', said if name == 'cascade' else alone, make[name])
            seconds += took
            print(name, {k: v for k, v in table[name].items() if k != 'spectrum'}, flush=True)
    table['seconds'] = round(seconds, 1)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table) + '\n')
    print(f'wrote {a.out} after {table["seconds"]/60:.1f} minutes')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, d, h in (('n', 400, 'pictures of each kind to enlarge, and as many to compare with'),
                    ('scatter', 100, 'postcards enlarged eight times over'),
                    ('large', 24, 'postcards enlarged from 64 to 256'), ('cascade', 50, 'captions to draw at 256'),
                    ('steps', 50, 'of the sampler'),
                    ('regression', 2000, 'steps of eight postcards that the regression learns for'),
                    ('seed', 2024, 'of pictures and noise'),
                    ('batch-size', 25, 'pictures at a time'), ('threads', 1, 'of the CPU')):
        p.add_argument(f'--{k}', type=int, default=d, help=f'{h} (default {d})')
    p.add_argument('--work', type=Path, default=Path('runs/super-resolution'),
                   help='where the weights of the regression go')
    p.add_argument('--out', type=Path, default=Path('data/results/super-resolution.json'))
    main(p.parse_args())
