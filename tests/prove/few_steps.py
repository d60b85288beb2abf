"""What a distilled model is worth: `postcards-text-fast` in 1, 2 and 4 steps beside its teacher in 50 at guidance 3, on
1,000 held-out captions, judged as `ldm-evaluate` does; the same with the large decoder; and the seconds of a picture on
one thread, in turn.

    python tests/prove/few_steps.py                 measures: data/results/few-steps.json (20 minutes on one core)
    python tests/prove/few_steps.py --progressive   trains a student by progressive distillation, too (20 minutes more)
    python tests/prove/few_steps.py --student runs/fast --n 40 --out runs/tiny.json    another student, in miniature

A part that is in the file is not done again."""
import argparse, copy, json, statistics, time
from pathlib import Path
import torch
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.sources import load_images
from ldm_nb.diffusion import Denoiser
from ldm_nb.engine.cache import cached_latents
from ldm_nb.engine.files import atomic_path
from ldm_nb.guidance import Guidance, guide
from ldm_nb.metrics.evaluate import evaluate
from ldm_nb.samplers import sampling_sigmas

KEPT = ('caption: all', 'caption: time', 'caption: season', 'caption: house colour', 'caption: trees', 'FID', 'recall')


def measured(ldm, n: int, **how) -> dict:
    start = time.process_time()
    rows = evaluate(ldm, n=n, **how)
    out = {k: [rows[k].value, rows[k].low, rows[k].high] for k in KEPT if k in rows}
    return out | dict(n=n, minutes=(time.process_time() - start)/60)

def seconds(teacher, student, n: int, repeats: int) -> dict: # of one picture of n in a call, medians of runs in turn
    ways = {'teacher 50': lambda s: teacher.sample('a red house at night', n=n, steps=50, guidance=3., seed=s)}
    ways |= {f'student {k}': lambda s, k=k: student.sample('a red house at night', n=n, steps=k, seed=s)
             for k in (1, 2, 4)}
    took = {k: [] for k in ways}
    for s in range(repeats + 1):
        for k, way in ways.items():
            start = time.perf_counter()
            way(s)
            took[k].append((time.perf_counter() - start)/n)
    return {k: statistics.median(v[1:]) for k, v in took.items()} # the first warms up

def progressive(teacher, iterations: int, batch: int = 24, seed: int = 0):
    # Salimans and Ho (2022), with guidance in the first round
    "Halve the steps five times, from 32 to 1: each student learns to take two steps of the last in one."
    torch.manual_seed(seed)
    images = load_images('postcards', 64, 12000, 0, quiet=True)
    moments = cached_latents(teacher.autoencoder, teacher.first_stage['hash'], images['image'],
                             torch.device('cpu'), quiet=True)
    z0s = teacher.autoencoder.to_latent(moments.moments(torch.arange(12000))[0]).float()
    ids, sigma, students, before = teacher.embedder.prepare(images['caption']), teacher.schedule.sigma, {}, None
    jump = lambda net: Denoiser(net, teacher.schedule, teacher.prediction_type)
    wide = lambda v: v.float().view(-1, 1, 1, 1)
    for count in (16, 8, 4, 2, 1):
        net = copy.deepcopy(before or teacher.net).requires_grad_(True)
        mean, grid = copy.deepcopy(net), sampling_sigmas(sigma, 2*count, 'trailing', final_sigma=0.)
        opt = torch.optim.Adam(net.parameters(), 5e-4, betas=(.9, .95))
        lr = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-4, iterations, pct_start=.05)
        for _ in range(iterations):
            i, k = torch.randint(len(z0s), (batch,)), 2*torch.randint(count, (batch,))
            s, mid, to = grid[k], grid[k + 1], grid[k + 2]
            z = z0s[i] + wide(s)*torch.randn_like(z0s[i])
            with torch.no_grad():
                c = teacher.embedder(ids[i])
                if before is None:
                    guess = guide(teacher.denoise, c, teacher.embedder.null(batch, (16, 16)), Guidance(3.))
                else: guess = lambda z, s: jump(before)(z, s, c)
                z1 = guess(z, s); z1 = z1 + wide(mid/s)*(z - z1)
                z2 = guess(z1, mid); z2 = z2 + wide(to/mid)*(z1 - z2)
                r = wide(to/s)
                aim = (z2 - r*z)/(1 - r)              # the z0_hat whose one step ends where the two did
            error = (jump(net)(z, s, c) - aim).square().mean((1, 2, 3))
            loss = (error*(1/s**2).clamp(1, 100).float()).mean() # the truncated weight of the paper, capped
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
            opt.step()
            lr.step()
            with torch.no_grad():
                for a, b in zip(mean.parameters(), net.parameters()): a.lerp_(b, .02)
        before = students[count] = mean.requires_grad_(False).eval()
        print(f'{count} steps: loss of the last batch {loss.item():.4f}', flush=True)
    return students

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--student', default='postcards-text-fast')
    p.add_argument('--teacher', default='postcards-text')
    p.add_argument('--n', type=int, default=1000)
    p.add_argument('--progressive', action='store_true')
    p.add_argument('--iterations', type=int, default=300, help='of each round of progressive distillation')
    p.add_argument('--out', type=Path, default=Path('data/results/few-steps.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    found = json.loads(a.out.read_text()) if a.out.is_file() else {}
    teacher, student = (LatentDiffusion.from_pretrained(k) for k in (a.teacher, a.student))
    def keep(name, make):
        if name in found: return
        found[name] = make()
        print(name, json.dumps(found[name]), flush=True)
        with atomic_path(a.out) as f: f.write_text(json.dumps(found, indent=1) + '\n')
    for k in student.fast['steps'][::-1]: keep(f'student {k}', lambda: measured(student, a.n, steps=k))
    if hasattr(student.autoencoder.decoder, 'config'): # beside it, the same network with the decoder it was made with
        large = copy.deepcopy(student)
        large.autoencoder = copy.deepcopy(teacher.autoencoder)
        for k in (4, 2, 1): keep(f'large {k}', lambda: measured(large, a.n, steps=k))
        keep('seconds large', lambda: {str(n): seconds(teacher, large, n, 40 if n == 1 else 3) for n in (1, 16)})
    keep('seconds', lambda: {str(n): seconds(teacher, student, n, 40 if n == 1 else 3) for n in (1, 16)})
    for k in (4, 2, 1): keep(f'teacher {k}', lambda: measured(teacher, a.n, steps=k, guidance=3.))
    keep('teacher 50', lambda: measured(teacher, a.n, steps=50, guidance=3.))
    if a.progressive and 'progressive 1' not in found:
        rounds = progressive(teacher, a.iterations)
        for k in (4, 2, 1):
            one = copy.deepcopy(teacher)
            one.net.load_state_dict(rounds[k].state_dict())
            one.sampling = dict(final_sigma=0., spacing='trailing')
            keep(f'progressive {k}', lambda: measured(one, a.n, steps=k, guidance=1.))

if __name__ == '__main__': main()
