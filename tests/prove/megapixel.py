"""A megapixel from a model trained at 64x64: a map of 1024x1024 with everything at the scale of the postcards, drawn
whole and in windows, decoded in tiles. The pictures and the table of chapter paper/15_megapixel.

    python tests/prove/megapixel.py  four minutes on two cores; writes data/results/megapixel.json and two pictures

Each way has a process of its own, so that its peak of memory is its own."""
import argparse, json, os, resource, subprocess, sys, time
from pathlib import Path
import torch
from PIL import Image
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_uint8
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.scenes import CLASSES, render
from ldm_nb.metrics.judges import segment
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.reader import load_reader
from ldm_nb.samplers import dpmpp_2m
from ldm_nb.fast.tiles import decode_large
from ldm_nb.engine.devices import keep_memory
from ldm_nb.engine.seeds import generator
from ldm_nb.unet import Cond

SKY, GROUND, TREE, HOUSE = (CLASSES.index(k) for k in ('sky', 'ground', 'tree', 'house'))


def stickers(n: int, seed: int) -> list: # of (class, mask): trees and houses as postcards have them
    from scipy.ndimage import find_objects, label
    out = []
    for i in range(n):
        m = render(Postcards(n, seed=seed).scene(i))['map']
        for c in (TREE, HOUSE):
            regions, _ = label(m == c)
            out += [(c, torch.from_numpy(regions[s] == k + 1)) for k, s in enumerate(find_objects(regions))
                    if (regions[s] == k + 1).sum() > 40]
    return out

def country(side: int = 1024, seed: int = 0
    ) -> torch.Tensor: # (side, side) class ids: one sky, one horizon, trees and houses of the postcards' size
    "A land that no postcard is large enough for."
    rng, x = generator(seed, 24), torch.arange(side)
    draw = lambda lo, hi: int(torch.randint(lo, hi, (1,), generator=rng))
    horizon = .4*side + .03*side*torch.sin(x/side*7) + .01*side*torch.sin(x/side*23)
    y = torch.arange(side)[:, None]
    out = torch.where(y > horizon, GROUND, SKY)
    for _ in range(side//40): # mountains behind the horizon
        at, high, half = draw(0, side), draw(12, 18), draw(12, 17)
        out[(y < horizon + 2) & (y > horizon - high + (x - at).abs()*high/half)] = CLASSES.index('mountain')
    for _ in range(side*side//40000): # lakes
        at, down, wide = draw(0, side), draw(int(.5*side), side), draw(16, 40)
        out[((x - at)/wide)**2 + ((y - down)/5)**2 < 1] = CLASSES.index('lake')
    for _ in range(side//60): # clouds of three puffs
        at, down = draw(0, side), draw(8, int(.3*side))
        for dx, r in ((-6, 3), (0, 4), (6, 3)):
            out[((x - at - dx)/1.5)**2 + (y - down)**2 < r*r] = CLASSES.index('cloud')
    out[(x - .7*side)**2 + (y - .12*side)**2 < 16] = CLASSES.index('sun')
    things = stickers(60, seed + 1)
    places = sorted((draw(int(.45*side), side - 2), draw(0, side - 24), draw(0, len(things)))
                    for _ in range(side*side//3500))
    for foot, left, k in places: # the far ones first
        c, m = things[k]
        m = m[:foot, :side - left]
        h, w = m.shape
        out[foot - h:foot, left:left + w][m] = c
    return out


def windows(n: int, size: int, stride: int) -> list: # starts of windows that cover n
    return sorted({min(k, n - size) for k in range(0, n - size + stride, stride)})

def windowed(denoise, concat: torch.Tensor, size: int = 32, stride: int = 24): # (z, sigma) -> z0_hat
    "A denoiser of windows near the size it was trained at; where they overlap, a mean that counts the inner ones more."
    edge = torch.minimum(torch.arange(size) + 1, torch.arange(size).flip(0) + 1).float().clamp(max=size - stride)
    weight = edge[:, None]*edge
    def by_windows(z, sigma):
        spots = [(y, x) for y in windows(z.shape[-2], size, stride) for x in windows(z.shape[-1], size, stride)]
        out, total = torch.zeros_like(z), torch.zeros_like(z[:, :1])
        cut = lambda v, y, x: v[..., y:y + size, x:x + size]
        for k in range(0, len(spots), 16):
            part = spots[k:k + 16]
            z0 = denoise(torch.cat([cut(z, *p) for p in part]), sigma,
                         Cond(concat=torch.cat([cut(concat, *p) for p in part])))
            for p, one in zip(part, z0.split(1)): cut(out, *p).add_(weight*one); cut(total, *p).add_(weight)
        return out/total
    return by_windows

@torch.no_grad()
def draw(ldm: LatentDiffusion, m: torch.Tensor, way: str, steps: int, seed: int
    ) -> torch.Tensor: # (1, 3, h, w); way: 'whole' or 'windows'
    plan = ldm.request(m, steps=steps, sampler='dpmpp_2m', seed=seed)
    if way == 'whole':
        for z, _ in ldm.sampling_loop(plan): pass
    else:
        e = ldm.embedder
        concat, sigma = e(e.prepare(plan.prompts)).concat, plan.sigmas[0].item()
        # the noise of `LatentDiffusion`
        z = torch.randn(1, *plan.shape, generator=generator(seed, 0, 0))*(1 + sigma**2)**.5
        for z, _ in dpmpp_2m(windowed(ldm.denoise, concat), z, plan.sigmas): pass
    return decode_large(ldm.autoencoder, z).clamp(-1, 1)

def agreement(x: torch.Tensor, m: torch.Tensor
    ) -> dict: # (1, 3, h, w), (h, w): read in squares of 64, the reader's size
    cut = lambda v: v.unfold(-2, 64, 64).unfold(-2, 64, 64)                 # ... h w -> ... rows columns 64 64
    seen = segment(load_reader(), cut(x)[0].permute(1, 2, 0, 3, 4).flatten(0, 1))
    want = cut(m).flatten(0, 1)
    iou = {c: ((seen == k) & (want == k)).sum().item()/max(1, ((seen == k) | (want == k)).sum().item())
           for k, c in enumerate(CLASSES) if (want == k).any()}
    return dict(pixels=(seen == want).double().mean().item(), mIoU=sum(iou.values())/len(iou), IoU=iou)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='postcards-map')
    p.add_argument('--side', type=int, default=1024, help='a multiple of 64 (default 1024)')
    p.add_argument('--steps', type=int, default=20, help='of dpmpp_2m (default 20)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--way', choices=['whole', 'windows'], help=argparse.SUPPRESS)
    p.add_argument('--out', type=Path, default=Path('data/results/megapixel.json'), help='the pictures lie beside it')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.way:
        keep_memory()
        ldm, m, start = LatentDiffusion.from_pretrained(a.model), country(a.side, a.seed), time.time()
        x = draw(ldm, m, a.way, a.steps, a.seed)
        seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
        Image.fromarray(to_uint8(x)[0]).save(a.out, 'jpeg', quality=80)
        print(json.dumps(dict(way=a.way, seconds=round(seconds, 1), peak_bytes=peak) | agreement(x, m)))
        raise SystemExit
    rows = []
    for way in ('whole', 'windows'):
        picture = a.out.with_name(f'{a.out.stem}-{way}.jpg')
        words = ['--model', a.model, *(f'--{k}={getattr(a, k)}' for k in ('side', 'steps', 'seed', 'threads')), '--way',
                 way, '--out', str(picture)]
        out = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print({k: v for k, v in rows[-1].items() if k != 'IoU'}, flush=True)
    table = dict(command='python tests/prove/megapixel.py', model=a.model, side=a.side, steps=a.steps,
                 sampler='dpmpp_2m', seed=a.seed, device='cpu', threads=a.threads, torch=torch.__version__, rows=rows)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1) + '\n')
    print(f'wrote {a.out}')
