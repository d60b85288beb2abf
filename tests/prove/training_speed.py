"""What a training step costs, and what each usual addition to it buys: the bars of chapter engine/11_cost.
Everything that is compared takes turns in one process.

    python tests/prove/training_speed.py  all of it: about 10 minutes on a quiet core, a third of it compiling
    python tests/prove/training_speed.py --quick  3 rounds in place of 15, no images of 256 pixels: about 4 minutes
    python tests/prove/training_speed.py --only diffusers compile
        these parts again; the others stay as the file has them

(a) bars: the laptop preset's text model, plain, then one thing at a time; (b) diffusers: one UNet in our modules and
in theirs, same weights, each in its usual loop; (c) pixels: one UNet on pixels and on latents (paper, Tab. 6); (d)
compile: five steps in float32, eager and compiled, the same weights and batches."""
import argparse, copy, itertools, json, shutil, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.embedders import TextEmbedder
from ldm_nb.paper.conditions import make_unet, shipped_vocab
from ldm_nb.engine.cost import activation_bytes, median_seconds, memory_estimate
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.diffusion import DiffusionLoss, Schedule, draw_t
from ldm_nb.engine.files import atomic_path
from ldm_nb.interop.unets import unet_from_diffusers
from ldm_nb.engine.presets import resolve_config
from ldm_nb.engine.devices import pick_device
from ldm_nb.engine.feeding import feed
from ldm_nb.engine.seeds import generator
from ldm_nb.unet import Cond

PRESET = resolve_config('diffusion', 'laptop')
# laptop preset, in their words
SHARED = dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(48, 96), layers_per_block=1,
              norm_num_groups=8, attention_head_dim=4, cross_attention_dim=128, class_embed_type='simple_projection',
              projection_class_embeddings_input_dim=128, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
              up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))


class Job:
    "The text model of the laptop preset, its batches of noise, and its loss."
    def __init__(self, device, n=PRESET['batch_size'], ch=4, side=16):
        self.device, self.n, self.shape, self.cards = device, n, (n, ch, side, side), Postcards(256, seed=0)
        self.ids = self.fresh()['text'].prepare([self.cards.caption(i) for i in range(256)])
        self.objective = DiffusionLoss(Schedule(), 'v')

    def fresh(self, **more):
        torch.manual_seed(0)
        text = TextEmbedder(shipped_vocab(), **PRESET['embedder'])
        return nn.ModuleDict(dict(net=make_unet(text, self.shape[1] if hasattr(self, 'shape') else 4,
                                                **PRESET['model'] | more), text=text)).to(self.device)

    def batch(self, step): return self.move(self.made(step))

    def move(self, batch): return [v.to(self.device) for v in batch]

    def made(self, step): # on the CPU
        rng = generator(0, 4, step)
        return [torch.randn(self.shape, generator=rng), self.ids[torch.randint(256, (self.n,), generator=rng)],
                draw_t(self.n, 1000, rng), torch.randn(self.shape, generator=rng)]

    def loaded(self, step): # as a run does that renders its pictures as it goes
        torch.stack([self.cards[i]['image']
                     for i in torch.randint(256, (self.n,), generator=generator(0, 9, step)).tolist()])
        return self.made(step)

    def loss(self, model, b):
        z0, ids, t, eps = b
        return self.objective(lambda z, t, c: model['net'](z, t, c).float(), z0, model['text'](ids), t, eps).mean()


def stepper(model, loss, batch, bf16=False, fused=False, clip=None, accumulate=1, after=None):
    """() -> the loss before one training step with some of the usual additions. loss: (model, batch) -> scalar;
    batch: number -> what it takes; after: called with the model after each step."""
    opt, count = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused), itertools.count()
    kind = next(model.parameters()).device.type
    def step():
        total = 0.
        for _ in range(accumulate):
            with torch.autocast(kind, torch.bfloat16, enabled=bf16): value = loss(model, batch(next(count)))/accumulate
            value.backward()
            total = total + value.detach()
        if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if after: after(model)
        return total.item()
    return step


def average(model, decay=.995, one_by_one=False): # -> what `stepper` calls after each step
    kept, follow = [p.detach().clone() for p in model.parameters()], get_ema_multi_avg_fn(decay)
    @torch.no_grad()
    def each(model):
        for a, p in zip(kept, model.parameters()): a.lerp_(p, 1 - decay)
    return each if one_by_one else lambda model: follow(kept, list(model.parameters()), 1)


def bars(job, rounds, compiled): # rows for the chart
    base, model = dict(bf16=True, fused=True), job.fresh
    last = lambda step: [v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for v in job.batch(step)]
    behind = feed(lambda step, rows: job.loaded(step), [slice(0, job.n)], 10**9, workers=1)
    quarter = lambda step: [v[:job.n//4] for v in job.batch(step)]
    ways = [('plain', model(), job.batch, {}), ('+ bf16', model(), job.batch, dict(bf16=True)),
            ('+ bf16, fused AdamW', model(), job.batch, base),
            ('channels-last', model().to(memory_format=torch.channels_last), last, base),
            ('clipping', model(), job.batch, base | dict(clip=1.)),
            ('average, tensor by tensor', m := model(), job.batch, base | dict(after=average(m, one_by_one=True))),
            ('average, all in one call', m := model(), job.batch, base | dict(after=average(m))),
            (f'4 x {job.n//4} accumulated', model(), quarter, base | dict(accumulate=4)),
            ('checkpointing', model(checkpoint=True), job.batch, base),
            ('loading in turn', model(), lambda step: job.move(job.loaded(step)), base),
            ('loading in the background', model(), lambda step: job.move(next(behind)), base)]
    if compiled: ways.insert(4, ('compiled', m := model(), job.batch, base)); m['net'].compile()
    steps = {name: stepper(m, job.loss, b, **how) for name, m, b, how in ways}
    seconds, out = median_seconds(steps, rounds, job.device), []
    for name, m, b, how in ways:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=how.get('bf16', False)):
            held = activation_bytes(job.loss, m, b(0), model=m)
        memory = memory_estimate(m, held, ema='after' in how)
        if job.device.type == 'cuda': # what was there before belongs to the others
            there = torch.cuda.memory_allocated() - sum(v for k, v in memory.items()
                                                        if k in ('weights', 'moments', 'ema'))
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
            memory['total'] = torch.cuda.max_memory_allocated() - there
        out.append(dict(name=name, seconds=seconds[name], samples_per_second=job.n/seconds[name],
                        megabytes=memory['total']/1e6, activations=held/1e6))
        print(f'{name:28} {out[-1]["samples_per_second"]:6.1f} samples/s {out[-1]["megabytes"]:6.1f} MB', flush=True)
    return out


def their_loop(net, told, z0, bf16): # as in diffusers' training examples
    import diffusers
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule='scaled_linear', beta_start=.0015,
                                        beta_end=.0195)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    def step():
        noise, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=z0.device)
        noisy = scheduler.add_noise(z0, noise, t)
        with torch.autocast(z0.device.type, torch.bfloat16, enabled=bf16):
            pred = net(noisy, t, return_dict=False, **told)[0]
        loss = F.mse_loss(pred.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        return loss.item()
    return step


def against_diffusers(device, rounds, n=PRESET['batch_size']):
    # fp32 and bf16: seconds of a step and ratios, ours to theirs
    import diffusers
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**SHARED).to(device)
    ours = unet_from_diffusers(dict(theirs.config, _class_name='UNet2DConditionModel'),
                               theirs.cpu().state_dict()).to(device)
    theirs, ours = theirs.to(device).train(), ours.train()
    z0 = torch.randn(n, 4, 16, 16)
    t = torch.randint(1000, (n,))
    context = torch.randn(n, 32, 128)
    vector = torch.randn(n, 128)
    z0, t, context, vector = (v.to(device) for v in (z0, t, context, vector))
    c, told = Cond(context=context, vector=vector), dict(encoder_hidden_states=context, class_labels=vector)
    with torch.no_grad(): difference = (ours(z0, t, c) - theirs(z0, t, **told).sample).abs().max().item()
    assert difference < 1e-5, f'outputs differ by {difference}'
    objective, out = DiffusionLoss(Schedule(), 'eps'), {}
    loss = lambda net, b: objective(lambda z, t, c: net(z, t, c).float(), z0, c,
                                    torch.randint(0, 1000, (n,), device=device), torch.randn_like(z0)).mean()
    for bf16 in (False, True):
        a, b = copy.deepcopy(ours), copy.deepcopy(theirs)
        def passes(net, call):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16): y = call(net)
            y.float().square().mean().backward()
            net.zero_grad()
        s = median_seconds(dict(
            ours=stepper(a, loss, lambda step: None, bf16, fused=True, clip=1.), theirs=their_loop(b, told, z0, bf16),
            our_network=lambda net=copy.deepcopy(ours): passes(net, lambda m: m(z0, t, c)),
            their_network=lambda net=copy.deepcopy(theirs): passes(net, lambda m: m(z0, t, **told).sample)),
                           rounds, device)
        out['bf16' if bf16 else 'fp32'] = s | dict(
            ratio=s['ours']/s['theirs'], network_ratio=s['our_network']/s['their_network'], difference=difference)
        print('bf16' if bf16 else 'fp32',
              {k: round(v, 4) for k, v in out['bf16' if bf16 else 'fp32'].items()}, flush=True)
    return out | dict(diffusers=diffusers.__version__)


def pixels(device, rounds, side, n): # samples a second of one UNet on pixels and on latents, and parameters
    ae = load_autoencoder('ae-kl-f4').to(device).eval()
    jobs = dict(pixels=Job(device, n, 3, side), latents=Job(device, n, ae.z_ch, side//ae.f))
    images = torch.rand(n, 3, side, side, device=device)*2 - 1
    def encoded(step):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16): z = ae.to_latent(ae.posterior(images).mean)
        return [z.float(), *jobs['latents'].batch(step)[1:]]
    how = dict(bf16=True, fused=True)
    models = {k: j.fresh() for k, j in jobs.items()}
    steps = {k: stepper(models[k], j.loss, j.batch, **how) for k, j in jobs.items()}
    s = median_seconds(steps | dict(encoded=stepper(jobs['latents'].fresh(), jobs['latents'].loss, encoded, **how)),
                       rounds, device)
    size = {k: sum(p.numel() for p in m['net'].parameters()) for k, m in models.items()}
    out = dict(batch=n, parameters=size) | {k: n/v for k, v in s.items()}
    out |= dict(ratio=out['latents']/out['pixels'], encoded_ratio=out['encoded']/out['pixels'])
    print(f'{side} pixels', out, flush=True)
    return out


def compile_on_off(job, steps=5): # losses of the same steps, eager and compiled
    out = {}
    for name in ('eager', 'compiled'):
        model = job.fresh()
        if name == 'compiled': model['net'].compile()
        torch.manual_seed(1)
        step, start = stepper(model, job.loss, job.batch, fused=True), time.perf_counter()
        out[name] = [step()]
        first = time.perf_counter() - start
        out[name] += [step() for _ in range(steps - 1)]
    out |= dict(seconds=first, difference=max(abs(a - b) for a, b in zip(out['eager'], out['compiled'])))
    print('compile', out, flush=True)
    assert out['difference'] <= 1e-4
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='few rounds, small images alone')
    p.add_argument('--only', nargs='*', choices=['bars', 'diffusers', 'pixels', 'compile'],
                   help='parts to measure (default: all)')
    p.add_argument('--rounds', type=int, help='rounds of each thing that is timed (default 15, quick 3)')
    p.add_argument('--device', help='cpu, cuda (default: the best there is)')
    p.add_argument('--out', type=Path, default=Path('data/results/training-speed.json'))
    a = p.parse_args()
    start, device, rounds = time.time(), pick_device(a.device), a.rounds or (3 if a.quick else 15)
    parts = a.only or ['bars', 'diffusers', 'pixels', 'compile']
    compiler = bool(shutil.which('g++') or shutil.which('clang++'))
    found = json.loads(a.out.read_text()) if a.only and a.out.is_file() else {}
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    found |= dict(command='python tests/prove/training_speed.py' + ' --quick'*a.quick, device=name,
                  threads=torch.get_num_threads(), torch=torch.__version__, rounds=rounds)
    job = Job(device)
    if 'diffusers' in parts: found['diffusers'] = against_diffusers(device, rounds)
    if 'pixels' in parts:
        found['pixels'] = {'64': pixels(device, rounds, 64, 16)}
        if not a.quick: found['pixels']['256'] = pixels(device, 3, 256, 1)
    if 'bars' in parts: found['bars'] = bars(job, rounds, compiler)
    if 'compile' in parts and compiler: found['compile'] = compile_on_off(job)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(a.out) as path: path.write_text(json.dumps(found, indent=1) + '\n')
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
