"""The paper's central experiment (§4.1, Fig. 6 and 7) in small: the same network, as many weights and as much time,
on latents of f = 1 (pixels), 2, 4, 8 and 16, by KL and by VQ. What has each learnt after a quarter, a half and the
whole of its time? The curves of chapter 16.

    python tests/prove/compression.py
        all points, two at a time on one thread each: six minutes of the processor to train a point
    python tests/prove/compression.py --seeds 1  another seed beside those that are in the file
    python tests/prove/compression.py --seeds 3 --out data/results/compression-samples.json --pictures
        samples, too: compression-samples.jpg, a row for each point, a column for each of the first eight captions
    python tests/prove/compression.py --minutes 0.1 --n 24 --first-steps 20 --out runs/tiny.json --work runs/tiny
        in miniature

First stages of f = 4 and 8 (KL) and 4 (VQ) are the shipped ones, the others are trained here first, into the work
folder. A point that is in the file is not done again."""
import argparse, json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from PIL import Image
from torch import nn
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.paper.conditions import make_embedder, make_unet, training_rows
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.cost import count_flops, on_paper
from ldm_nb.datasets.images import to_float, to_uint8
from ldm_nb.diffusion import DiffusionLoss, Schedule, draw_t
from ldm_nb.metrics.distances import Seen, embed, kid, fid, reader_features
from ldm_nb.metrics.judges import judge_text
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.reader import load_reader
from ldm_nb.metrics.reconstruction import mean_psnr
from ldm_nb.cli.recipes import train_autoencoder, trained_parts, with_parts
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.devices import keep_memory
from ldm_nb.engine.distributed import make_accelerator
from ldm_nb.engine.seeds import SampleRNG, batch_indices, generator
from ldm_nb.training import Trainer
from ldm_nb.unet import Cond

POINTS = ('kl-f1', 'kl-f2', 'kl-f4', 'kl-f8', 'kl-f16', 'vq-f4', 'vq-f8')
SHIPPED = {'kl-f4': 'ae-kl-f4', 'kl-f8': 'ae-kl-f8', 'vq-f4': 'ae-vq-f4'}
FIRST = dict(data='postcards', preset='laptop', n=20000, crop=48, batch_size=16, device='cpu', precision='fp32')
# so that attention is at 8x8 places, or at all there are
LEVELS = {1: (1, 1, 2, 2), 2: (1, 2, 2), 4: (1, 2), 8: (1, 2), 16: (1, 2)}
BATCH = {1: 4, 2: 8, 4: 16, 8: 32, 16: 64}  # the paper, too, gives small latents large batches (Tab. 13)
WEIGHTS, SHARES = 1.6e6, (.25, .5, 1.)


class Pixels(nn.Module):
    "f = 1: no first stage. Pixels are scaled to unit standard deviation like any latent."
    def __init__(self, shift, scale):
        super().__init__()
        self.f, self.z_ch, self.codebook = 1, 3, None
        self.register_buffer('shift', shift); self.register_buffer('scale', scale)

    def encode(self, x, **_): return (x - self.shift)*self.scale
    def decode(self, z): return z/self.scale + self.shift
    def reconstruct(self, x): return x

def first_stage(point: str, work: Path, steps: int, images) -> nn.Module:
    if point == 'kl-f1':
        some = to_float(images[:500])
        return Pixels(some.mean((0, 2, 3)).view(1, 3, 1, 1), 1/some.std((0, 2, 3)).view(1, 3, 1, 1))
    if point in SHIPPED: return load_autoencoder(SHIPPED[point])
    folder, (regulariser, f) = work/f'ae-{point}', point.split('-f')
    if not (folder/'config.json').is_file():
        train_autoencoder(folder, regulariser=regulariser, f=int(f), quiet=True, resume=True, steps=steps, **FIRST)
    return load_autoencoder(folder)

def sized(make, f: int): # the widest network of at most `WEIGHTS`; make(ch, ch_mult, attn_factors) -> network
    mult = LEVELS[f]
    attn = tuple(sorted({min(2**(len(mult) - 1), max(1, 8//f))}))
    ch, net = 8, None
    while True:
        wider = make(ch, mult, attn)
        if sum(p.numel() for p in wider.parameters()) > WEIGHTS: return net
        ch, net = ch + 8, wider

def build(point: str, work: Path, first_steps: int, images: dict):
    ae = first_stage(point, work, first_steps, images['image']).eval().requires_grad_(False)
    embedder = make_embedder('text', images, ae, dim=128, depth=0, pooled=True)
    net = sized(lambda ch, mult, attn: make_unet(embedder, ae.z_ch, ch=ch, ch_mult=mult, attn_factors=attn, groups=8),
                ae.f)
    return LatentDiffusion(ae, net.to(memory_format=torch.channels_last), embedder, Schedule(), 'v')

def objective(ldm): # the loss of chapter 03, of scaled latents
    loss = DiffusionLoss(ldm.schedule, ldm.prediction_type)
    return lambda model, batch, draws: loss(model['net'], batch[0], model['embedder'](batch[3], draws),
                                            *batch[1:3]).mean()

@torch.no_grad()
def batches(ldm, images, seed: int): # every picture is encoded once, which is not counted
    rows, n = training_rows(ldm.embedder, images, ldm.autoencoder), BATCH[ldm.autoencoder.f]
    kept = torch.cat([ldm.autoencoder.encode(to_float(part)) for part in images['image'].split(64)])
    def batch(step, part):
        i, draws = batch_indices(len(kept), n, seed, step)[part], SampleRNG(generator(seed, 8, step), n, part)
        return kept[i], draws.each(lambda k, rng: draw_t(k, 1000, rng, .75)), draws(kept[i].shape), rows(i, draws)
    return batch, n

def measure(ldm, reader, base: Seen, data: dict, n: int, seed: int) -> tuple[dict, torch.Tensor]:
    start, network = time.process_time(), reader_features(reader)
    x = torch.cat([ldm.sample(data['caption'][k:k + 32], steps=15, sampler='dpmpp_2m', guidance=3., seed=seed + k)
                   for k in range(0, n, 32)])
    seconds, right = time.process_time() - start, judge_text(x, dict(caption=data['caption'][:n]), reader, None)
    seen = embed(network, x)
    share = lambda k: right[f'caption: {k}'].value()
    found = dict(fid=fid(base.features, seen.features).item(), kid=kid(base.features, seen.features).item(),
                 samples_a_second=n/seconds,
                 **{k: share(k) for k in ('time', 'season', 'house colour', 'trees', 'all')})
    return found, x

def strip(images) -> Image.Image: # c h w in [-1, 1], side by side
    return Image.fromarray(to_uint8(torch.cat(list(images), 2)))

def sheet(points, seed: int, work: Path, out: Path): # the strips one below the other: real postcards, then the points
    strips = [Image.open(work/f'samples-{point}-{seed}.png') for point in ('real', *points)]
    whole = Image.new('RGB', (strips[0].width, sum(s.height for s in strips)))
    for k, s in enumerate(strips): whole.paste(s, (0, k*s.height))
    whole.save(out, quality=85)

class Clock:
    "Seconds of the processor: what else the machine does, does not count."
    def __init__(self): self.spent = 0.; self.start()
    def start(self): self.since = time.process_time()
    def pause(self): self.spent, self.since = self(), None
    def __call__(self): return self.spent + (0. if self.since is None else time.process_time() - self.since)

def run(point: str, seed: int, minutes: float, n: int, work: Path, first_steps: int, pictures: int = 10000) -> dict:
    torch.set_num_threads(1)
    keep_memory()
    images, held = load_images('postcards', 64, pictures, 0), load_images('postcards', 64, 2*n, 2024, held_out=True)
    torch.manual_seed(seed)
    ldm, reader = build(point, work, first_steps, images), load_reader()
    held['caption'], fresh = held['caption'][:n], to_float(held['image'][n:])
    base, floor = embed(reader_features(reader), fresh), embed(reader_features(reader), to_float(held['image'][:n]))
    batch, size = batches(ldm, images, seed)
    part = trained_parts(ldm)
    trainer = Trainer(part, objective(ldm), batch, 10**6, size, lr=1.5e-3, seed=seed,
                      accelerator=make_accelerator('cpu', 'fp32'))
    clock = Clock()
    # falls with the clock, not with the steps
    trainer.lr_schedule = lambda step, steps: min(1., (step + 1)/100)*max(.02, 1 - clock()/(60*minutes))
    curve, left = [], list(SHARES)
    for step, _ in trainer:
        if clock() < left[0]*60*minutes: continue
        share = left.pop(0)
        clock.pause()
        found, x = measure(with_parts(ldm, trainer.averaged_model()), reader, base, held, n, seed)
        curve.append(dict(minutes=clock()/60, steps=step, loss=trainer.mean) | found)
        print(f'{point} seed {seed}, {share:.0%}: ' + ', '.join(f'{k} {v:.3g}' for k, v in curve[-1].items()),
              flush=True)
        part.train()
        clock.start()
        if not left: break
    work.mkdir(parents=True, exist_ok=True)
    for name, images in (('real', to_float(held['image'][:8])), (point, x[:8])):
        strip(images).save(work/f'samples-{name}-{seed}.png')
    with on_paper(part) as blank:
        z = torch.zeros(1, ldm.autoencoder.z_ch, 64//ldm.autoencoder.f, 64//ldm.autoencoder.f)
        flops = count_flops(lambda: blank['net'](z, torch.zeros(1), Cond(context=torch.zeros(1, 32, 128),
                                                                         vector=torch.zeros(1, 128))).sum())
    weights = sum(p.numel() for p in ldm.net.parameters())
    return dict(point=point, f=ldm.autoencoder.f, seed=seed, parameters=weights, ch=ldm.net.config['ch'],
                batch_size=size, flops=flops, curve=curve,
                psnr=None if ldm.autoencoder.f == 1 else mean_psnr(ldm.autoencoder, held['image'][n:]),
                floor=fid(base.features, floor.features).item())


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--points', nargs='*', default=POINTS, choices=POINTS, help='default: all')
    p.add_argument('--seeds', type=int, nargs='*', default=[0])
    p.add_argument('--minutes', type=float, default=6.,
                   help='of the processor to train a point, without measuring (default 6)')
    p.add_argument('--first-steps', type=int, default=1200, help='of a first stage that is not shipped (default 1200)')
    p.add_argument('--n', type=int, default=400, help='captions that judge (default 400)')
    p.add_argument('--work', type=Path, default=Path('runs/compression'))
    p.add_argument('--out', type=Path, default=Path('data/results/compression.json'))
    p.add_argument('--pictures', action='store_true', help='keep samples beside --out, as .jpg')
    p.add_argument('--workers', type=int, default=2, help='points at a time, a thread each (default 2)')
    a = p.parse_args()
    rows = json.loads(a.out.read_text())['rows'] if a.out.is_file() else []
    have = {(r['point'], r['seed']) for r in rows}
    todo = [(point, seed) for seed in a.seeds for point in a.points if (point, seed) not in have]
    how = [a.minutes, a.n, a.work, a.first_steps]
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context('spawn')) as pool:
        for job in [pool.submit(run, *t, *how) for t in todo]:
            rows.append(job.result())
            points, seeds = [k for k in POINTS if any(r['point'] == k for r in rows)], sorted({r['seed'] for r in rows})
            settings = (f'--minutes {a.minutes:g} --n {a.n} --first-steps {a.first_steps} '
                        f'--seeds {" ".join(map(str, seeds))}')
            table = dict(command=f'python tests/prove/compression.py --points {" ".join(points)} {settings}',
                         minutes=a.minutes, n=a.n, first_steps=a.first_steps, sampler='dpmpp_2m, 15 steps, guidance 3',
                         device='cpu', threads=1, torch=torch.__version__, rows=rows)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1) + '\n')
    if a.pictures: sheet(points, seeds[0], a.work, a.out.with_suffix('.jpg'))
    print(f'wrote {a.out}')
