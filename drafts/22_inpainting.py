# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Filling holes
#
# > A model that is told what lies around a hole, one that was never told, and ways that need no model
#
# Part of a picture is missing: a scratch, a passer-by, a house that spoils the view. What belongs there? Often many things would do, so the answer is a
# sample, and what is known should come out as it went in. The paper trains a latent diffusion model for it (§4.5) by laying two things beside the noisy
# latent: the latent of the picture with its hole blanked, and the mask.
#
# **You will be able to** fill holes with `sample(image=, mask=)`, say what the model knows and what it cannot know, fill a hole with a model that was trained
# for something else and say in one number what that costs, and judge a filling by more than its looks. Paper: §4.5, Tab. 6 and 7. Time: 35 minutes; the
# machine works two. The long table comes from `tests/prove/inpainting.py`.

# %%
#| hide
import json, os, time
from dataclasses import replace
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.test import test_close, test_eq, test_fail
from matplotlib_inline.config import InlineBackend
from scipy.ndimage import distance_transform_edt
from skimage.restoration import inpaint_biharmonic

# %%
from ldm_nb.core import ItemNoise, LatentDiffusion
from ldm_nb.data import CLASSES, MASKS, Postcards, random_mask, random_scene, render, show_images, to_float
from ldm_nb.diffusion import Schedule
from ldm_nb.evaluate import wilson
from ldm_nb.files import find_pretrained, weights_hash
from ldm_nb.losses import FeatureDistance
from ldm_nb.reader import load_reader, read
from ldm_nb.runs import load_images
from ldm_nb.samplers import ddim, pairs, sampling_sigmas
from ldm_nb.unet import Cond

# %%
#| hide
TEST = bool(os.environ.get('IN_TEST'))
backend = InlineBackend.instance() # pictures as JPEG: grain makes heavy PNGs
backend.figure_formats, backend.print_figure_kwargs = {'jpeg'}, {'bbox_inches': 'tight', 'pil_kwargs': {'quality': 80}}
torch.set_num_threads(1)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# Postcards that no model of the course has seen, with three wide and three thin holes; `random_mask` (chapter 01) paints them with a brush. Below the holes
# what the model drew into them, and below that the postcards.

# %%
SEED, STEPS = 2024, 50
ldm, reader = LatentDiffusion.from_pretrained('postcards-inpaint'), load_reader()
cards = to_float(load_images('postcards', 64, 40, SEED, held_out=True)['image'])
holes = {kind: torch.stack([random_mask(np.random.default_rng([SEED, i]), 64, kind) for i in range(len(cards))]) for kind in ('wide', 'thin')}
x, m = cards[:6], torch.cat([holes['wide'][:3], holes['thin'][3:6]])
y = ldm.sample(image=x, mask=m, seed=SEED, steps=STEPS)
def blank(x, m): return torch.where(m > 0, 0., x)
show_images(torch.cat([blank(x, m), y, x]), ncol=6, width=7.);

# %% [markdown]
# ## What the model is told
#
# With $x$ the picture, $m$ the mask (1 = fill) and $\mathcal E$ the encoder, each step of the network sees
#
# $$\big[\,z_t,\ \ \mathcal E(x \odot (1 - m)),\ \ 2\,m_\downarrow - 1\,\big]$$
#
# along the channels: four of the noisy latent, four of the blanked picture, one of the mask, which is reduced to the size of the latent. No cross-attention
# takes part. The condition has the same places as what is to be drawn, so it can simply lie on top of it.

# %%
asked = ldm.embedder.prompts(dict(image=x, mask=m))
c, small = ldm.embedder.prepare(asked, ldm.autoencoder), F.max_pool2d(m, ldm.autoencoder.f)
test_close(c, torch.cat([ldm.autoencoder.encode(blank(x, m)), 2*small - 1], dim=1), eps=1e-6)
print(f'z_t {ldm.latent_shape(None)} and the condition {tuple(c.shape[1:])}: the first layer of the network takes {ldm.net.config["in_ch"]} channels')
test_eq(ldm.net.config['in_ch'], ldm.autoencoder.z_ch + c.shape[1])

# %% [markdown]
# The picture is blanked *before* it is encoded. Encoded whole and blanked in the latent, the places beside the hole would still know a little of what was in
# it: an encoder looks around (chapter 13e measured how far). That would be a leak in training, and in use there is nothing to leak.
#
# **Predict**: put noise where the hole is, in the picture itself, and fill it again with the same seed. How many pixels change?

# %%
noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))*2 - 1
other = ldm.sample(image=torch.where(m > 0, noise, x), mask=m, seed=SEED, steps=STEPS)
print(f'{(other != y).sum()} of {y.numel()} values differ')
test_eq(other, y)

# %% [markdown]
# None: what is under the mask never gets in. And the mask, is it needed? The hole is grey already, and nothing else in a postcard is quite that grey. But a
# grey wall might be. Here the network gets the same blanked latent twice, once with the true mask and once with one that says "nothing is missing".
# **Predict** the second row.

# %%
def walk(c, n=len(x), seed=SEED): # the decoded end of a walk, told c
    noise, sigmas = ItemNoise(seed, range(n)), ldm.plan(image=x, mask=m, steps=STEPS).sigmas
    z = noise(torch.empty(n, *ldm.latent_shape(None)))*(1 + sigmas[0].item()**2)**.5
    for z, _ in ddim(lambda z, s: ldm.denoise(z, s, Cond(concat=c)), z, sigmas): pass
    return ldm.decode(z)

full = torch.cat([c[:, :4], -torch.ones_like(small)], dim=1)
plain, denied = walk(c), walk(full)
show_images(torch.cat([plain, denied]), ncol=6, width=7.)
def grey(y): return (y.abs()*m).sum().item()/m.sum().item()/3
print(f'mean distance from grey in the holes: told of them {grey(plain):.2f}, not told {grey(denied):.2f}, the postcards {grey(x):.2f}')
assert grey(denied) < .5*grey(x)

# %% [markdown]
# Told that nothing is missing, it draws the grey: to it that is the picture. The mask is what makes a hole of it.

# %% [markdown]
# ## What is known comes out as it went in
#
# The first row above is what the decoder makes of the latents. The known part went through encoder, sampler and decoder, and came out a little different;
# `sample` puts the known pixels back. **Predict**: by how much did they differ, in steps of 1/255?

# %%
off = (plain - x).abs()[(m == 0).expand_as(x)]*127.5
print(f'known pixels, decoded: {off.mean():.1f} steps off on average, {off.max():.0f} at most')
test_eq(blank(y, m), blank(x, m))                                       # to the bit
test_close(torch.where(m > 0, y, 0.), torch.where(m > 0, plain, 0.), eps=1e-4)
assert off.max() > 3

# %% [markdown]
# To the bit, after this. The price is an edge of pixels, where what was drawn for a decoded picture meets the true one. Below we measure whether it shows.
#
# ## Wide and thin
#
# Five kinds of holes are drawn in training, in equal shares. A place of the latent must be filled if *any* of its sixteen pixels is: **predict** for which
# kind that costs most.

# %%
kinds = {k: torch.stack([random_mask(np.random.default_rng([1, i]), 64, k) for i in range(200)]) for k in MASKS}
for k, v in kinds.items(): print(f'{k:7} {v.mean():4.0%} of the pixels, {F.max_pool2d(v, ldm.autoencoder.f).mean():4.0%} of the latent')
show_images(torch.cat([v[:2] for v in kinds.values()]).expand(-1, 3, -1, -1)*2 - 1, [k for k in MASKS for _ in range(2)], ncol=10, width=7.);

# %% [markdown]
# A thin scratch takes more than twice its share: with f=4 the model must draw much again that is known. That is a price of working in the latent. The paper
# follows LaMa (Suvorov et al. 2022) and looks most at hard holes, which cover 40 to 50 % of the picture (Tab. 7).
#
# ## Without a model
#
# What should a model be better than? Three ways that know nothing of postcards. The mean colour of what is known; for each pixel the nearest known one; and
# the biharmonic surface, the smoothest one that fits the border, from scikit-image.

# %%
def mean_colour(x, m):
    known = 1 - m
    return torch.where(m > 0, (x*known).sum((2, 3), keepdim=True)/known.sum((2, 3), keepdim=True).clamp(min=1), x)

def nearest(x, m):
    at = [distance_transform_edt(k[0] > 0, return_distances=False, return_indices=True) for k in m.numpy()]
    return torch.stack([p[:, i, j] for p, (i, j) in zip(x, at)])

def biharmonic(x, m):
    fill = lambda p, k: inpaint_biharmonic(p.permute(1, 2, 0).numpy(), k[0].numpy() > 0, channel_axis=-1)
    y = torch.stack([torch.from_numpy(fill(p, k)).permute(2, 0, 1).float() for p, k in zip(x, m)])
    return torch.where(m > 0, y.clamp(-1, 1), x)


# %% [markdown]
# A slope is as smooth as can be, so the biharmonic surface must restore it. The nearest pixel makes stairs of it, the mean colour a plain.

# %%
slope = (torch.linspace(-.8, .8, 64)[None, :] + torch.linspace(-.2, .2, 64)[:, None]).expand(1, 3, 64, 64).clone()
box = torch.zeros(1, 1, 64, 64)
box[..., 20:40, 16:36] = 1
simple = {'mean colour': mean_colour, 'nearest pixel': nearest, 'biharmonic': biharmonic}
worst = {k: (fill(slope, box) - slope).abs().max().item() for k, fill in simple.items()}
print('a slope, largest error: ' + ', '.join(f'{k} {v:.0e}' for k, v in worst.items()))
assert worst['biharmonic'] < 1e-4 and worst['nearest pixel'] > .1 and worst['mean colour'] > .3
for fill in simple.values(): test_eq(blank(fill(x, m), m), blank(x, m))


# %% [markdown]
# ## A model that was never told
#
# Any diffusion model of postcards knows what belongs into a hole. Chapter 13e used one that has only ever drawn whole pictures: at each step, where the
# picture is known, put what is known in the place of what the denoiser believes,
#
# $$\hat z_0 \leftarrow \begin{cases}\mathrm{denoise}(z, \sigma) & \text{in the hole}\\ \mathcal E(x) & \text{elsewhere.}\end{cases}$$
#
# Nothing is trained. Is it right? Try it where all is known: two numbers, both of variance 1, with a correlation of 0.9, and the first of them is given. Then
# the second is about $0.9\,z_1$, give or take $\sqrt{1 - 0.9^2}$. The exact denoiser is linear, so there is nothing to blame but the method. **Predict**: will
# the slope come out as 0.9?

# %%
CORR = .9
cov = torch.tensor([[1., CORR], [CORR, 1.]], dtype=torch.float64)
def exact(z, s): return z @ torch.linalg.inv(cov + s*s*torch.eye(2, dtype=torch.float64)) @ cov       # both numbers noisy
def informed(z, s, z1): # the second noisy, the first known: what a model can be trained to answer
    left = 1 - CORR**2
    return torch.stack([z1, CORR*z1 + left/(left + s*s)*(z[:, 1] - CORR*z1)], dim=1)

def resampled(denoise, z, sigmas, noise, times=1): # DDIM, each step taken `times` times, with fresh noise between
    for s, to in pairs(sigmas):
        for k in range(times):
            z0_hat = denoise(z, s)
            z = z0_hat + to/s*(z - z0_hat)
            if k < times - 1: z = z + (s*s - to*to)**.5*noise(z)
        yield z, z0_hat

def second(answer, times=1, n=20_000, steps=200): # slope on the first number, and the variance around it
    g = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=g, dtype=torch.float64)
    z1, sigmas = draw(torch.empty(n)), sampling_sigmas(Schedule().sigma, steps, last=0.)
    start = torch.stack([z1, torch.zeros(n)], dim=1)
    z = (start + sigmas[0]*draw(start)).double()
    for z, _ in resampled(lambda z, s: answer(z, s, z1), z, sigmas, draw, times): pass
    slope = (z[:, 1] @ z1/(z1 @ z1)).item()
    return slope, (z[:, 1] - slope*z1).var().item()


# %%
held = lambda z, s, z1: torch.stack([z1, exact(z, s)[:, 1]], dim=1)
found = {'told': second(informed), 'held, not told': second(held)} | {f'held, each step {k} times': second(held, k) for k in (3, 10)}
for k, (slope, left) in found.items(): print(f'{k:26} slope {slope:.2f}, variance around it {left:.2f}')
print(f'{"exact":26} slope {CORR:.2f}, variance around it {1 - CORR**2:.2f}')
test_close(found['told'], (CORR, 1 - CORR**2), eps=.02)
assert found['held, not told'][0] < .55 and found['held, each step 3 times'][0] < found['held, each step 10 times'][0] < CORR


# %% [markdown]
# Half of the connection is lost. At the high noise levels, where it is decided what is large, the unconditional denoiser sees the known number only through
# noise; by the time it shows clearly, the second is settled. The one that is told sees it clean from the first step.
#
# RePaint (Lugmayr et al. 2022) gives the hole more chances: go down a step, add the noise back, go down again. It helps, at the price of as many calls more,
# and it does not quite arrive. Note also what it does to the variance: DDIM's steps are too coarse for so much fresh noise.
#
# The same with `postcards`, which was trained to draw postcards and nothing else. What should its encoder see of the hole? Nothing either: it gets the
# biharmonic filling.

# %%
free = LatentDiffusion.from_pretrained('postcards')
def held_to(x, m, seen, times=1, steps=STEPS, seed=SEED): # seen: the picture whose latents are held, where the hole does not touch them
    known, hole = free.autoencoder.encode(seen), F.max_pool2d(m, free.autoencoder.f) > 0
    noise, sigmas = ItemNoise(seed, range(len(x))), free.plan(steps=steps).sigmas
    unit, first = noise(known), sigmas[0].item()
    z = torch.where(hole, unit*(1 + first**2)**.5, known + first*unit)
    for _, z0_hat in resampled(lambda z, s: torch.where(hole, free.denoise(z, s), known), z, sigmas, noise, times): pass
    test_eq(torch.where(hole, 0., z0_hat), torch.where(hole, 0., known))          # held to the bit
    return torch.where(m > 0, free.decode(z0_hat), x)


# %% [markdown]
# A hole everywhere must give what the model draws without any; with each step taken once our walk is DDIM.

# %%
test_close(held_to(x[:2], torch.ones_like(m[:2]), x[:2], steps=5), free.sample(n=2, steps=5, seed=SEED), eps=1e-4)

# %% [markdown]
# ## Side by side
#
# Wide holes, then thin ones. The rows: the hole; nearest pixel; biharmonic; held but not trained for it; the same with each step three times; trained; the
# postcard.

# %%
def side_by_side(x, m):
    smooth = biharmonic(x, m)
    rows = [blank(x, m), nearest(x, m), smooth, held_to(x, m, smooth), held_to(x, m, smooth, times=1 if TEST else 3),
            ldm.sample(image=x, mask=m, seed=SEED, steps=STEPS), x]
    return show_images(torch.cat(rows), ncol=len(x), width=6.)

side_by_side(cards[:6], holes['wide'][:6]);

# %%
side_by_side(cards[:6], holes['thin'][:6]);

# %% [markdown]
# ## The table
#
# FID compares a set of filled postcards with other postcards, through the reader (chapter 12). The perceptual distance (chapter 05) is taken over the hole
# alone: at each layer of the reader only the places of the hole count, by their share of it. It compares with what was there, which is only one of the right
# answers. PSNR, too, is of the hole alone.

# %%
def in_hole(x, y, m): # (b,)
    unit, out = lambda h: F.normalize(h, dim=1, eps=1e-8), 0.
    for a, b in zip(reader.features(x), reader.features(y)):
        w = F.adaptive_avg_pool2d(m, a.shape[-2:])
        out = out + ((unit(a) - unit(b)).square().sum(1, keepdim=True)*w).sum((1, 2, 3))/w.sum((1, 2, 3))
    return out

test_close(in_hole(x, y, torch.ones_like(m)), FeatureDistance(reader.features)(x, y), eps=1e-5)      # a hole everywhere: the distance itself
test_eq(in_hole(x, x, m), torch.zeros(len(x)))

# %%
result = json.loads(Path('../data/results/inpainting.json').read_text())
print(f'{result["command"]}: {result["seconds"]/60:.0f} minutes on {result["threads"]} thread; n = {result["n"]}, 95 % intervals')
def cell(v, digits=2): return f'{v["value"]:.{digits}f} [{v["low"]:.{digits}f}, {v["high"]:.{digits}f}]'
for kind, part in result['holes'].items():
    floor = next(iter(part['rows'].values()))['FID']['floor']
    print(f'\n{kind} holes: {part["pixels"]:.0%} of the pixels, {part["latents"]:.0%} of the latent; FID of other postcards {floor:.2f}')
    print(f'{"":34}{"FID":>22}{"perceptual, hole":>22}{"PSNR, hole":>24}')
    for k, r in part['rows'].items(): print(f'{k:34}{cell(r["FID"]):>22}{cell(r["perceptual"]):>22}{cell(r["PSNR"], 1):>24}')

# %% [markdown]
# Is that the table of this model, and are these the same ways? The first eight wide holes, filled and measured again here:

# %%
test_eq(result['weights'], {k: weights_hash(find_pretrained(k)) for k in result['weights']})
x8, m8, rows = cards[:8], holes['wide'][:8], result['holes']['wide']['rows']
again = {'nearest pixel': nearest(x8, m8), 'biharmonic': biharmonic(x8, m8), 'not trained for it': held_to(x8, m8, biharmonic(x8, m8), steps=result['steps']),
         'trained': ldm.sample(image=x8, mask=m8, seed=result['seed'], steps=result['steps'])}
for k, v in again.items():
    d, kept = in_hole(x8, v, m8), torch.tensor(rows[k]['first'])
    print(f'{k:20} here {d.mean():.4f}, in the table {kept.mean():.4f}')
    assert (d - kept).abs().max() < .02*kept.max()                     # other machines round otherwise, and 50 steps carry it along

# %% [markdown]
# PROSE-TABLE
#
# ## Does it join?
#
# Two pixels that are neighbours differ by some amount. Across the border of a hole they should differ as much as those of the true postcard do *at the same
# places*: 1 below is right, less is smeared, more is an edge. The same for neighbours inside the hole: less is too smooth.

# %%
for kind, part in result['holes'].items():
    print(f'\n{kind:34}{"across the border":>22}{"inside the hole":>22}')
    for k, r in part['rows'].items(): print(f'{k:34}{cell(r["edge"]):>22}{cell(r["inside"]):>22}')

# %% [markdown]
# And how far does an edge reach? The same differences by their distance from the border, here over the first wide holes:

# %%
def profile(x, m, reach=8): # mean difference of neighbours at -reach ... reach pixels from the border; above 0 in the hole
    deep, away = (np.stack([distance_transform_edt(v[0]) for v in k.numpy()])[:, None] for k in (m, 1 - m))
    at, total, count = torch.from_numpy(np.where(m.numpy() > 0, deep - .5, .5 - away)), 0., 0.
    for dim in (2, 3):
        k = ((at.narrow(dim, 1, 63) + at.narrow(dim, 0, 63))/2).round().clamp(-reach - 1, reach + 1).long().flatten() + reach + 1
        total = total + torch.bincount(k, x.diff(dim=dim).abs().mean(1).flatten(), 2*reach + 3)
        count = count + torch.bincount(k, minlength=2*reach + 3)
    return (total/count)[1:-1]

xs, ms = cards[:8 if TEST else 40], holes['wide'][:8 if TEST else 40]
filled = {'the postcards': xs, 'biharmonic': biharmonic(xs, ms), 'not trained for it': held_to(xs, ms, biharmonic(xs, ms)),
          'trained': ldm.sample(image=xs, mask=ms, seed=SEED, steps=STEPS)}
fig, ax = plt.subplots(figsize=(5.5, 2.6))
for k, v in filled.items(): ax.plot(range(-8, 9), profile(v, ms), 'k--' if v is xs else '-', label=k)
ax.set(xlabel='pixels from the border; right of 0: in the hole', ylabel='difference of neighbours', ylim=0); ax.axvline(0, c='k', lw=.5); ax.legend(fontsize=7);

# %%
test_close(profile(xs, ms)[:7], profile(filled['trained'], ms)[:7], eps=1e-9)       # what is known is the same

# %% [markdown]
# PROSE-EDGE
#
# ## One hole, eight fillings
#
# The right half is gone, and eight noises are asked. What must they agree about, and what may they not?

# %%
half = torch.zeros(1, 64, 64)
half[..., 32:] = 1
some = ldm.sample(image=cards[6], mask=half, n=8, seed=3, steps=STEPS)
show_images(torch.cat([cards[6:7], blank(cards[6:7], half), some[:8]]), ncol=5, width=6.)
seen = read(reader, some)
for k in seen[0]: print(f'{k:10}', [r[k] for r in seen])

# %% [markdown]
# ## Taking a house away
#
# The use people think of first: mask a thing, and it is gone (the paper's Fig. 11). Mask a house with three pixels around it, and fill. **Predict**: will
# there be a house?
#
# Not "no, of course": the model was not asked for a postcard without a house, but for one that fits the rest, and four of five postcards have a house. How
# often there should be one can be worked out, for we know how postcards are made. A house stands at one of six places that its trees leave free, somewhat
# higher or lower, of this or that size. If a share $q$ of all these houses would lie in the hole entirely, then, since none is seen outside,
#
# $$P(\text{house} \mid \text{the rest}) = \frac{0.8\,q}{0.8\,q + 0.2}.$$

# %%
def house_box(x, y, w): return x - .6*w, y - 1.02*w, x + .6*w, y                       # as `draw_house` has it

def chance(scene, m, rng, n=400): # of a house in the hole, if all around it is known
    free = [p for p in range(1, 7) if all(int(t[0]*7) not in (p - 1, p) for t in scene.trees)]
    horizon, hill, phase = scene.ground
    x, depth, w = rng.choice(free, n)/7, rng.uniform(0, .8, n), rng.uniform(.23, .28, n)
    x0, y0, x1, y1 = house_box(x, horizon + .03 - hill*np.cos(2*np.pi*(x - phase)) + .04 + .16*depth, w)
    (c, r), side = (np.flatnonzero(m[0].numpy().any(k)) for k in (0, 1)), m.shape[-1]
    q = ((x0.clip(0)*side >= c[0]) & (x1.clip(max=1)*side <= c[-1] + 1) & (y0*side >= r[0]) & (y1*side <= r[-1] + 1)).mean()
    return .8*q/(.8*q + .2)


# %% [markdown]
# That formula must keep its word. One hole for all, at a fixed place, and thousands of scenes: of those that show no house outside it, how many have one
# inside?

# %%
hole = torch.zeros(1, 64, 64)
hole[:, 22:54, 14:46] = 1
rng, kept = np.random.default_rng(0), []
for _ in range(2000 if TEST else 8000):
    s = random_scene(rng)
    if s.house != 'none':
        (at, depth, w), (horizon, hill, phase) = s.house_at, s.ground
        x0, y0, x1, y1 = (v*64 for v in house_box(at, horizon + .03 - hill*np.cos(2*np.pi*(at - phase)) + .04 + .16*depth, w))
        if x0 < 14 or y0 < 22 or x1 > 46 or y1 > 54: continue                           # some of it is seen
    kept.append((s.house != 'none', chance(s, hole, rng)))
hidden, said = map(np.array, zip(*kept))
error = (said.mean()*(1 - said.mean())/len(said))**.5
print(f'of {len(said)} scenes without a visible house {hidden.mean():.3f} have one, {said.mean():.3f} by the formula, standard error {error:.3f}')
assert abs(hidden.mean() - said.mean()) < 4*error

# %% [markdown]
# Now the model: six houses, the holes, three fillings each; then the true postcards without the house, which the renderer can draw.

# %%
ds = Postcards(40, 64, SEED + 1)
items = [it for it in (ds[i] for i in range(14)) if it['scene'].house != 'none'][:6]
def house_hole(boxes, margin=3):
    x0, y0, x1, y1 = (boxes[boxes[:, 0] == CLASSES.index('house')][0, 1:]*64).tolist()
    m = torch.zeros(1, 64, 64)
    m[:, max(0, int(y0) - margin):int(np.ceil(y1)) + margin, max(0, int(x0) - margin):int(np.ceil(x1)) + margin] = 1
    return m

x, m = torch.stack([it['image'] for it in items]), torch.stack([house_hole(it['boxes']) for it in items])
gone = to_float(np.stack([render(replace(it['scene'], house='none'))['image'] for it in items]))
three = [ldm.sample(image=x, mask=m, seed=k, steps=STEPS) for k in range(3)]
show_images(torch.cat([x, blank(x, m), *three, gone]), ncol=6, width=6.);

# %%
h = result['houses']
print(f'{h["n"]} houses taken away; the reader finds a house in')
for k in ('with', 'without', 'mean colour', 'filled'): print(f'{k:12} {cell(h[k], 3)}')
by = np.array(h['each'])
print(f'by the formula, {by[:, 0].mean():.3f}')
for low, high in ((0, .3), (.3, .5), (.5, 1)):
    k = by[(low <= by[:, 0]) & (by[:, 0] < high)]
    print(f'where it says {low} to {high}: {len(k)} postcards, {k[:, 0].mean():.2f} by the formula, {k[:, 1].mean():.2f} seen, 95 % interval '
          '{:.2f} to {:.2f}'.format(*wilson(k[:, 1].mean(), len(k))))

# %% [markdown]
# PROSE-HOUSE
#
# Now paint out what you like (the panel is built in chapter 14a).

# %%
#| hide
from ldm_nb.canvas import mask_painter

# %%
mask_painter(ldm, cards[6])

# %% [markdown]
# ## Nothing, and everything
#
# A mask that covers all: nothing is known, so the pictures given cannot matter, and the model draws freely. One that covers nothing: the pictures come back.
# Both are holes that training never showed.

# %%
ones, zeros = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
free_hand = ldm.sample(image=cards[:8], mask=ones, seed=5, steps=STEPS)
test_eq(free_hand, ldm.sample(image=cards[8:16], mask=ones, seed=5, steps=STEPS))
test_eq(ldm.sample(image=cards[:8], mask=zeros, seed=5, steps=2), cards[:8])
show_images(free_hand, width=7.);

# %% [markdown]
# What does not fit is refused before the first step, in words:

# %%
def refused(**how):
    try: ldm.sample(steps=2, **how)
    except ValueError as e: return print('-', e)
    raise AssertionError('it was not refused')

refused(image=cards[0], mask=half*.5)
refused(image=cards[0], mask=half[:, :32, :32])
refused(image=cards[:3], mask=holes['wide'][:2])
refused(image=cards[0])
refused(image=cards[0]*127.5 + 127.5, mask=half)
refused(image=cards[0, :, :60, :60], mask=half[:, :60, :60])
refused(y='a red house', image=cards[0], mask=half)

# %% [markdown]
# ## Recap
#
# | symbol | shape | our name | in the paper |
# |---|---|---|---|
# | $m$ | `1 h w`, 1 = fill | `mask=`, `random_mask` | mask, §4.5 |
# | $\mathcal E(x \odot (1 - m))$ | `b z h/f w/f` | first channels of `InpaintEmbedder.prepare` | masked image, concatenated |
# | $m_\downarrow$ | `b 1 h/f w/f` | its last channel, 1 or -1 | mask, resized |
# | known pixels | `b 3 h w` | put back by `sample`, to the bit | |
# | held to what is known | | `where(hole, denoise(z, s), known)` | RePaint and others; no training |
# | wide, thin | | kinds of `random_mask` | LaMa's protocol, Tab. 7 |
#
# **Try next**: the model was also trained without any condition, one time in ten, so it can be guided: does `guidance=2` make the fillings fit better, or only
# alike? And give the held model a caption: `postcards-text` in the place of `postcards`, told what the whole picture shows.

# %%
#| hide
_ = torch.set_grad_enabled(True)     # as it was

# %%
#| hide
import nbdev; nbdev.nbdev_export()
