"""How many bits does a diffusion model need for a picture, and at which timesteps are they spent? The bound of chapter
04 for two networks of one shape: on pixels, and on the latents of a first stage.

    python tests/prove/bits.py
        trains a pixel model and a latent model for 8 minutes of the processor each, one thread, measures these two
        and the shipped latent model on 256 pictures that none of them saw: data/results/bits.json
    python tests/prove/bits.py --minutes 0.05 --n 8 --strata 8 --out runs/tiny.json --work runs/tiny
        in miniature

The bound is that of DDPM (Ho et al. 2020, eq. 5), all T = 1000 terms, in bits per number of the picture (64 x 64 x 3):

    prior       KL( q(z_T | z0) || N(0, 1) )                                    exact
    noise       sum over t of KL( q(z_t-1 | z_t, z0) || p(z_t-1 | z_t) )        Monte Carlo, stratified in log SNR
    picture     - log p(x | z_1): each of the 256 values has the mass of a Gaussian over its bin (eq. 13). Its mean is
                z0_hat for pixels, decode(z0_hat) for latents; its width is one number, fitted on training pictures

so latents have the same bound of the same picture: the first two lines are what the latent model sends, the last is
what the first stage leaves out (`picture_share`). The encoder's mean is the latent; its posterior is far narrower than
the first noise level. A model whose training was interrupted goes on where it was saved."""
import argparse, json, math, time
from pathlib import Path
import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.sources import load_images
from ldm_nb.diffusion import DiffusionLoss, Schedule, abar_at, draw_t, q_sample, to_z0
from ldm_nb.engine.files import atomic_path
from ldm_nb.unet import UNet

LN2 = math.log(2)
SHAPE = dict(ch=40, ch_mult=(1, 2), attn_factors=(2,), groups=8)     # of the shipped model `postcards`
CHANNELS = dict(pixels=12, latents=4)
MODELS = dict(pixels='pixels', latents='latents', shipped='latents')  # what each sees
BATCH = dict(pixels=8, latents=32)
PICTURES = dict(pixels=10_000, latents=2000)    # to train on; to encode more would take longer than the training
LR = 1.5e-3


class Pixels(nn.Module):
    "No first stage: the picture is its own latent. The network sees 2 x 2 pixels as 12 channels; nothing is lost."
    def encode(self, x): return pixel_unshuffle(x, 2)               # b 3 64 64 -> b 12 32 32
    def decode(self, z): return pixel_shuffle(z, 2)

@torch.no_grad()
def encode(ae, images): # uint8 -> latents
    return torch.cat([ae.encode(to_float(part)) for part in images.split(64)])

def train(what: str, ae, images, minutes: float, seed: int, work: Path):
    "A network that predicts v, timesteps uniform, Adam, the learning rate falls with the processor's clock; averaged."
    file = work/f'{what}.pt'
    torch.manual_seed(seed)
    net = UNet(CHANNELS[what], CHANNELS[what], **SHAPE).to(memory_format=torch.channels_last)
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.995))
    opt = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.)
    step, spent, losses = 0, 0., []
    if file.is_file():
        state = torch.load(file, weights_only=False)
        net.load_state_dict(state['net']); mean.load_state_dict(state['mean']); opt.load_state_dict(state['opt'])
        step, spent, losses = state['step'], state['spent'], state['losses']
    schedule = Schedule()
    loss = DiffusionLoss(schedule, 'v')
    latents = None if what == 'pixels' else encode(ae, images)
    since, saved = time.process_time(), time.time()
    def save():
        with atomic_path(file) as p:
            torch.save(dict(net=net.state_dict(), mean=mean.state_dict(), opt=opt.state_dict(), step=step, spent=spent,
                            losses=losses), p)
    while spent < 60*minutes:
        g = torch.Generator().manual_seed(1000*seed + step)
        i = torch.randint(len(images), (BATCH[what],), generator=g)
        z0 = ae.encode(to_float(images[i])) if latents is None else latents[i]
        z0 = z0.contiguous(memory_format=torch.channels_last)
        t, eps = draw_t(len(z0), 1000, g), torch.randn(z0.shape, generator=g)
        for group in opt.param_groups: group['lr'] = LR*min(1., (step + 1)/100)*max(.02, 1 - spent/(60*minutes))
        with torch.autocast('cpu', torch.bfloat16): here = loss(net, z0, None, t, eps).mean()
        opt.zero_grad()
        here.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        mean.update_parameters(net)
        losses.append(here.item())
        step += 1
        now = time.process_time()
        spent, since = spent + now - since, now
        if time.time() - saved > 60:
            save()
            saved = time.time()
            print(f'{what}: {spent/60:.1f} of {minutes} minutes, step {step}, '
                  f'loss {sum(losses[-200:])/len(losses[-200:]):.4f}', flush=True)
    save()
    return mean.module.eval(), dict(trained_steps=step, batch_size=BATCH[what], trained_minutes=spent/60,
                                    precision='bf16', lr=LR, loss=sum(losses[-200:])/len(losses[-200:]))

def edges(schedule, strata: int): # first timestep of each group: groups are even in log SNR, none is empty
    log_snr = -2*schedule.sigma.log()
    wanted = torch.linspace(log_snr[0], log_snr[-1], strata + 1, dtype=torch.float64)[1:-1]
    at = torch.searchsorted(-log_snr, -wanted) + 1
    return [1] + sorted(set(at.clamp(2, len(schedule) - 1).tolist())) + [len(schedule)]

@torch.no_grad()
def denoised(net, schedule, z0, t, eps): # z0_hat of z_t, in float64
    z_t = q_sample(schedule, z0, t, eps)
    return to_z0('v', net(z_t, t).double(), z_t.double(), abar_at(schedule, t))

def bin_bits(x, mean, width): # uint8 values, mean in [-1, 1], width -> bits each: the mass of a Gaussian over its bin
    centre = x.double()/127.5 - 1
    low, high = (((centre + d/255) - mean)/width for d in (-1, 1))
    # both tails as tails: no difference of numbers near 1. The outermost bins reach to infinity
    flip = low > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    a = torch.where((x == 0) & ~flip | (x == 255) & flip, -torch.inf, a)
    b = torch.where((x == 255) & ~flip | (x == 0) & flip, torch.inf, b)
    upper, lower = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    return -(upper + torch.log1p(-(lower - upper).exp().clamp(max=1 - 1e-15)))/LN2

@torch.no_grad()
def measure(net, ae, schedule, images, known, strata: int, seed: int) -> dict:
    "Bits per number of the picture, picture by picture (n,), and noise-level by noise-level."
    size, abar = images[0].numel(), schedule.abar
    snr = abar/(1 - abar)
    g = torch.Generator().manual_seed(seed)
    draw = lambda z0: torch.randn(z0.shape, generator=g)
    first = lambda z0: torch.zeros(len(z0), dtype=torch.int64)
    def pictures(z0): return ae.decode(denoised(net, schedule, z0, first(z0), draw(z0)).float()).double()
    z0 = encode(ae, known)                                          # the width of the last term
    width = torch.cat([pictures(k) - to_float(x) for k, x in zip(z0.split(32), known.split(32))]).square().mean().sqrt()
    z0 = encode(ae, images)
    flat = z0.double().flatten(1)
    prior = .5*((abar[-1]*flat**2) - abar[-1] - (1 - abar[-1]).log() + 0*flat).sum(1)/LN2/size
    cut = edges(schedule, strata)
    groups, errors = [], []
    for low, high in zip(cut, cut[1:]):                             # timesteps low ... high - 1
        t = low + (torch.rand(len(z0), generator=g)*(high - low)).long()
        eps = draw(z0)
        z0_hat = torch.cat([denoised(net, schedule, a, b, c)
                            for a, b, c in zip(z0.split(32), t.split(32), eps.split(32))])
        square = (z0_hat - z0.double()).square().flatten(1).sum(1)  # n
        groups.append((high - low)*.5*(snr[t - 1] - snr[t])*square/LN2/size)
        errors.append((square*snr[t]/z0[0].numel()).mean().item())
    picture, miss = [], []
    for k, x in zip(z0.split(32), images.split(32)):
        mean = pictures(k)
        picture.append(bin_bits(x, mean, width).flatten(1).sum(1)/size)
        miss.append((mean - to_float(x)).square().flatten(1).mean(1))
    return dict(prior=prior, groups=torch.stack(groups), picture=torch.cat(picture), miss=torch.cat(miss), cut=cut,
                width=width.item(), errors=errors)

def interval(v): # mean and 95 % interval over pictures
    half = 1.96*v.std()/len(v)**.5
    return [round(o.item(), 5) for o in (v.mean(), v.mean() - half, v.mean() + half)]

def fitted(found: dict) -> torch.Tensor: # (groups, n)
    "The noise terms with the best variance of p(z_t-1 | z_t), one number for each group, in place of the posterior's."
    counts = torch.tensor([b - a for a, b in zip(found['cut'], found['cut'][1:])])[:, None]
    scale = found['size']/found['numbers']*LN2                      # bits of a pixel -> nats of a number of the latent
    excess = 2*found['groups']/counts*scale                         # |mean - mean|^2 over the posterior's variance
    best = excess.mean(1, keepdim=True)
    return counts*.5*(torch.log1p(best) + (1 + excess)/(1 + best) - 1)/scale

def row(found: dict, schedule) -> dict:
    noise = found['groups'].sum(0)
    tight = fitted(found).sum(0)
    sent = found['prior'] + noise
    psnr = 10*(4/found['miss'].double()).log10()
    cut = found['cut']
    # the bits that are spent from the last timestep down to each edge: what has been sent when z_t is known
    left = torch.cat([found['groups'].flip(0).cumsum(0).flip(0), torch.zeros(1, len(noise))]) + found['prior']
    return dict(prior=interval(found['prior']), noise=interval(noise), sent=interval(sent),
                picture=interval(found['picture']),
                total=interval(sent + found['picture']), sent_fitted=interval(found['prior'] + tight),
                total_fitted=interval(found['prior'] + tight + found['picture']), psnr=interval(psnr),
                width=found['width'], edges=cut, log_snr=[(-2*schedule.sigma[t - 1].log()).item() for t in cut],
                spent=[interval(v) for v in found['groups']], sent_down_to=[interval(v) for v in left],
                loss_eps=found['errors'])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=8.)
    p.add_argument('--n', type=int, default=256)
    p.add_argument('--strata', type=int, default=24)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', nargs='*', choices=list(MODELS), help='these models')
    p.add_argument('--work', type=Path, default=Path('runs/bits'))
    p.add_argument('--out', type=Path, default=Path('data/results/bits.json'))
    p.add_argument('--note', default='', help='kept in the file')
    a = p.parse_args()
    torch.set_num_threads(1)
    a.work.mkdir(parents=True, exist_ok=True)
    start = time.time()
    ldm = LatentDiffusion.from_pretrained('postcards')
    stages = dict(pixels=Pixels(), latents=ldm.autoencoder)
    models = a.only or list(MODELS)
    images = {k: load_images('postcards', 64, PICTURES[k], 0)['image'] for k in {MODELS[m] for m in models}}
    nets = {m: (ldm.net, 'data/pretrained/postcards/config.json') if m == 'shipped' else
            train(m, stages[m], images[m], a.minutes, a.seed, a.work) for m in models}
    held = load_images('postcards', 64, a.n, 2024, held_out=True)['image']
    found = {}
    for k, (net, _) in nets.items():                                # measured once
        file = a.work/f'{k}-measured.pt'
        if not file.is_file():
            started = time.process_time()
            r = measure(net, stages[MODELS[k]], Schedule(), held, images[MODELS[k]][:a.n], a.strata, a.seed + 1)
            with atomic_path(file) as o: torch.save(r | dict(minutes=(time.process_time() - started)/60), o)
        found[k] = torch.load(file, weights_only=False)
        with torch.no_grad(): z0 = stages[MODELS[k]].encode(to_float(held[:1]))
        found[k] |= dict(size=held[0].numel(), numbers=z0.numel())
        print(k, 'measured', flush=True)
    if 'pixels' not in found: return
    rows = {k: row(f, Schedule()) | dict(parameters=sum(o.numel() for o in nets[k][0].parameters()),
                                         training=nets[k][1], measured_minutes=f['minutes']) for k, f in found.items()}
    def share(part, whole): # of the same pictures, so it is paired
        ratio = part.mean()/whole.mean()
        half = 1.96*(part - ratio*whole).std()/whole.mean()/len(whole)**.5
        return [round(o.item(), 5) for o in (ratio, ratio - half, ratio + half)]
    for k, f in found.items():
        sent, pixels = f['prior'] + f['groups'].sum(0), found['pixels']
        rows[k]['picture_share'] = share(f['picture'], sent + f['picture'])
        rows[k]['sent_over_pixels'] = share(sent, pixels['prior'] + pixels['groups'].sum(0) + pixels['picture'])
    with atomic_path(a.out) as o:
        o.write_text(json.dumps(dict(
            command='python tests/prove/bits.py', n=a.n, strata=a.strata, seed=a.seed, device='cpu', threads=1,
            torch=torch.__version__,
            unit='bits per number of the picture (64 x 64 x 3), mean and 95 % interval over pictures',
            seconds=round(time.time() - start), note=a.note, rows=rows), indent=1) + '\n')
    for k, r in rows.items():
        print(k, {o: r[o][0] for o in ('prior', 'noise', 'sent', 'picture', 'total', 'total_fitted', 'psnr',
                                       'picture_share', 'sent_over_pixels')})

if __name__ == '__main__': main()
