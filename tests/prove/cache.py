"""What the latent cache saves: training steps of the laptop preset on cached latents and with an encoder in the
loop, for chapter engine/10_cache.

    python tests/prove/cache.py             about 10 minutes on two idle cores
    python tests/prove/cache.py --quick     a few steps on few pictures, to see that it runs: 1 minute

The kinds take turns, one step each, so that whatever else the machine does slows them alike; medians are reported."""
import argparse, json, platform, statistics, tempfile, time
from pathlib import Path
import torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.engine.cache import encode_dataset
from ldm_nb.paper.conditions import make_embedder, make_unet, training_rows
from ldm_nb.datasets.images import to_float
from ldm_nb.diffusion import DiffusionLoss, Schedule, draw_t
from ldm_nb.engine.files import atomic_path, find_pretrained, weights_hash
from ldm_nb.paper.published import paper_model
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.presets import resolve_config
from ldm_nb.engine.devices import pick_device
from ldm_nb.engine.seeds import batch_indices, generator
from ldm_nb.training import EMA

OURS, PAPER = 'on the fly, ae-kl-f4', 'on the fly, kl-f4 of the paper'

class Step:
    "One training step, written out, on cached moments or with the encoder in the loop; `waits`: seconds of reading."
    def __init__(self, ae, images: dict, s: dict, device: torch.device, precision: str, cache=None):
        torch.manual_seed(s['seed'])
        self.ae = ae.to(device)
        self.images = images
        self.s = s
        self.device = device
        self.bf16 = precision == 'bf16'
        self.cache = cache
        embedder = make_embedder('text', images, ae, **s['embedder'])
        self.model = torch.nn.ModuleDict(dict(net=make_unet(embedder, ae.z_ch, **s['model']),
                                              embedder=embedder)).to(device).train()
        self.rows, self.objective = training_rows(embedder, images, ae), DiffusionLoss(Schedule(), 'v')
        self.opt = torch.optim.AdamW(self.model.parameters(), s['lr'], betas=(.9, .99), weight_decay=.01,
                                     fused=device.type in ('cpu', 'cuda'))
        self.ema, self.waits, self.times = EMA(self.model, s['ema']), [], []

    def read(self, i: torch.Tensor): # pictures or moments, as they lie in memory or on disk
        start = time.perf_counter()
        x = self.cache.moments(i) if self.cache else (to_float(self.images['image'][i]),)
        self.waits.append(time.perf_counter() - start)
        return [v.to(self.device) for v in x]

    def loss(self, step: int) -> torch.Tensor:
        i = batch_indices(len(self.images['image']), self.s['batch_size'], self.s['seed'], step)
        rng = generator(self.s['seed'], 3, step)
        x = self.read(i)
        if not self.cache:
            with torch.no_grad(): g = self.ae.posterior(x[0])
            x = g.mean.float(), (.5*g.logvar.float()).exp()
        mean, std = x
        z0 = self.ae.to_latent(mean + std*torch.randn(mean.shape, generator=rng).to(self.device))
        t, eps = draw_t(len(z0), 1000, rng, .75).to(self.device), torch.randn(z0.shape, generator=rng).to(self.device)
        c = self.model['embedder'](self.rows(i, rng), rng)
        return self.objective(lambda z, t, c: self.model['net'](z, t, c).float(), z0, c, t, eps).mean()

    def __call__(self): # timed; the loss is read back at the end, so the device has finished
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16): loss = self.loss(len(self.times))
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.opt.step()
        self.ema.update(self.model)
        if not torch.isfinite(loss): raise FloatingPointError('the loss is not finite')
        if self.device.type == 'cuda': torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)

def measure(kinds: dict, rounds: int, warm: int, slow: int
    ) -> dict: # name -> Step; rounds after `warm` of them; the paper's encoder every `slow` rounds
    "Interleaved steps: name -> milliseconds (median), steps a second, times the cached step."
    for r in range(warm + rounds):
        for name, step in kinds.items():
            if name != PAPER or r % slow == 0: step()
        if r % 20 == 0: print(f'round {r} of {warm + rounds}', flush=True)
    kept = lambda name: kinds[name].times[1 if name == PAPER else warm:]
    base = statistics.median(kept('cached'))
    return {name: dict(ms=round(m*1e3, 2), steps_per_second=round(1/m, 3), times_cached=round(m/base, 3),
                       steps=len(kept(name))) for name in kinds for m in [statistics.median(kept(name))]}

def main(a):
    started, device = time.time(), pick_device(a.device)
    s = resolve_config('diffusion', 'laptop', n=a.n or (2000 if a.quick else None), seed=a.seed)
    rounds, warm, slow = a.rounds or (6 if a.quick else 200), 2 if a.quick else 10, 3 if a.quick else 10
    images, ae = load_images('postcards', s['size'], s['n'], s['seed']), load_autoencoder('ae-kl-f4')
    with tempfile.TemporaryDirectory() as tmp:
        start = time.time()
        cache = encode_dataset(ae, weights_hash(find_pretrained('ae-kl-f4')), images['image'], tmp, device)
        encoding, size = time.time() - start, sum(p.stat().st_size for p in Path(tmp).iterdir())/1e6
        paper = paper_model('kl-f4').eval()
        kinds = {'cached': Step(ae, images, s, device, a.precision, cache),
                 OURS: Step(ae, images, s, device, a.precision), PAPER: Step(paper, images, s, device, a.precision)}
        steps = measure(kinds, rounds, warm, slow)
        waits, times = (v[warm:] for v in (kinds['cached'].waits, kinds['cached'].times))
        share = statistics.median(w/t for w, t in zip(waits, times))
    saved = (steps[OURS]['ms'] - steps['cached']['ms'])/1e3
    out = dict(command='python tests/prove/cache.py' + a.words, seed=a.seed, device=device.type,
               machine=machine(device), threads=torch.get_num_threads(), torch=torch.__version__, precision=a.precision,
               batch_size=s['batch_size'], pictures=s['n'], size=s['size'], rounds=rounds,
               unet_parameters=sum(p.numel() for p in kinds['cached'].model['net'].parameters()),
               steps=steps, reader=dict(ms=round(statistics.median(waits)*1e3, 3), worst_ms=round(max(waits)*1e3, 3),
                                        share=round(share, 5)),
               encoding=dict(pictures=s['n'], seconds=round(encoding, 1), megabytes=round(size, 1),
                             paid_back_after_steps=round(encoding/saved) if saved > 0 else None),
               wall_seconds=round(time.time() - started, 1))
    with atomic_path(a.out) as p: p.write_text(json.dumps(out, indent=1) + '\n')
    print(json.dumps(out, indent=1))
    for what, met in (('the paper\'s encoder on the fly at least doubles the step', steps[PAPER]['times_cached'] >= 2),
                      ('the reader takes less than 2 % of a step', share < .02)):
        print(f'{"yes" if met else "NO":3} {what}')

def machine(device: torch.device) -> str:
    "What it ran on."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    names = ([o.split(':', 1)[1].strip() for o in info.read_text().splitlines() if o.startswith('model name')]
             if info.is_file() else [])
    return names[0] if names else platform.processor()

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='few steps on 2000 pictures')
    p.add_argument('--rounds', type=int,
                   help='steps of each kind after warming up (default 200; of the paper\'s encoder every tenth)')
    p.add_argument('--n', type=int, help='postcards (default as in the preset)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cpu, cuda, mps (default: the best there is)')
    p.add_argument('--precision', default='bf16', choices=('bf16', 'fp32'))
    p.add_argument('--out', type=Path, default=Path('data/results/cache.json'))
    a = p.parse_args()
    a.words = ''.join(f' --{k}' if v is True else f' --{k} {v}'
                      for k, v in vars(a).items() if v not in (None, False) and v != p.get_default(k))
    main(a)
