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
# # Enlarging
#
# > Four times as many pixels a side: guessed by interpolation, by a regression, and drawn; why the numbers prefer what the eye does not; a cascade
#
# A small picture has lost something, and many large ones would have become it. Which of them to give back? Their mean, which is never far wrong and always
# a little blurred; or one of them, which is sharp, and may be another than the true one. The paper trains a latent diffusion model that draws one (§4.4).
#
# **You will be able to** enlarge pictures with `sample(image=)`, say what a regression trained on squared errors must converge to and why it is blurred, predict how many
# decibels a sample costs against a mean, and say how far the model can be trusted beyond the pictures that it was trained with. Paper: §4.4, Tab. 5. Time: 40
# minutes; the machine works five, of which training a regression takes four. The long tables come from `tests/prove/super_resolution.py`.

# %%
#| hide
import json, os, time
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.test import test_close, test_eq, test_fail
from matplotlib_inline.config import InlineBackend
from torch import nn

# %%
from ldm_nb.core import LatentDiffusion
from ldm_nb.data import Postcards, degrade, downsample, show_images, to_float
from ldm_nb.evaluate import enlarged
from ldm_nb.files import find_pretrained, weights_hash
from ldm_nb.layers import ResBlock
from ldm_nb.losses import FeatureDistance
from ldm_nb.reader import load_reader, read
from ldm_nb.reconstruction import psnr, ssim
from ldm_nb.runs import load_images

# %%
#| hide
TEST = bool(os.environ.get('IN_TEST'))
backend = InlineBackend.instance() # pictures as JPEG: grain makes heavy PNGs
backend.figure_formats, backend.print_figure_kwargs = {'jpeg'}, {'bbox_inches': 'tight', 'pil_kwargs': {'quality': 80}}
_ = torch.set_num_threads(1)

# %% [markdown]
# Postcards that no model of the course has seen: the small picture, interpolated, drawn, and the postcard it was made from.

# %%
SEED, STEPS = 2024, 50
ldm, reader = LatentDiffusion.from_pretrained('postcards-x4'), load_reader().requires_grad_(False)
cards = to_float(load_images('postcards', 64, 40, SEED, held_out=True)['image'])
small = downsample(cards)
def pixels(y, k=4): return F.interpolate(y, scale_factor=k, mode='nearest')     # to be shown
x, drawn = cards[:7], ldm.sample(image=small[:8], seed=SEED, steps=STEPS)
show_images(torch.cat([pixels(small[:7]), enlarged(small[:7], x), drawn[:7], x]), ncol=7, width=7.);

# %% [markdown]
# ## What the model is told
#
# The small picture $y$ itself, laid beside the noisy latent: $[\,z_t,\ y\,]$, and nothing else. With $f = 4$ the latent of the large picture has the size of the small
# picture, pixel by pixel; the paper says that its $\tau_\theta$ is the identity.

# %%
told = ldm.embedder.prepare(ldm.embedder.prompts(small[:2]), ldm.autoencoder)
test_eq(told, small[:2])
print(f'z_t {ldm.latent_shape(None)} and y {tuple(told.shape[1:])}: the first layer of the network takes {ldm.net.config["in_ch"]} channels')
test_eq(ldm.net.config['in_ch'], ldm.autoencoder.z_ch + 3)

# %% [markdown]
# Each pixel of $y$ is the mean of sixteen. Of 48 numbers three are left, and whatever has a mean of 0 in each block of 4x4 is gone:

# %%
lost = torch.randn(cards[:1].shape, generator=torch.Generator().manual_seed(0))*.2
lost = lost - pixels(downsample(lost))
a, b = cards[:1]*.7 + lost, cards[:1]*.7 - lost
print(f'two pictures, {psnr(a, b).item():.1f} dB apart; made small they differ by {(downsample(a) - downsample(b)).abs().max():.0e}')
test_close(downsample(a), downsample(b), eps=1e-6)

# %% [markdown]
# ## The answer that is never far wrong
#
# Train a network $g$ on the squared error, and it will tend to the **mean** of all pictures that the small one may have come from:
#
# $$\arg\min_{g}\ \mathbb E\,|x - g(y)|^2 = \mathbb E[x \mid y].$$
#
# **Predict**: for the two pictures above, which answer has the least squared error on average, and what does it look like?

# %%
weights = torch.linspace(0, 1, 11)
errors = torch.stack([((a - g).square().mean() + (b - g).square().mean())/2 for g in (torch.lerp(a, b, w) for w in weights)])
print('error of an answer between the two: ' + ', '.join(f'{w:.1f}: {v:.4f}' for w, v in zip(weights[::2], errors[::2])))
test_eq(weights[errors.argmin()].item(), .5)
test_close(torch.lerp(a, b, .5), cards[:1]*.7, eps=1e-6)


# %% [markdown]
# The mean, in which all that was lost is absent. This is no fault of the network: a better one gets nearer to a blurred picture. Let us train one: bicubic
# interpolation, plus what five residual blocks (chapter 03) at the low resolution add to it. A thousand steps of eight postcards: **about four minutes** on one core,
# a second on a GPU; expect about 28 dB on held-out postcards, where bicubic has 24.6.

# %%
class Regression(nn.Module):
    def __init__(self, ch=64, blocks=5):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, ch, 3, padding=1), *[ResBlock(ch, groups=8) for _ in range(blocks)], nn.GroupNorm(8, ch), nn.SiLU(),
                                 nn.Conv2d(ch, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, y): return F.interpolate(y, scale_factor=4, mode='bicubic') + self.net(y)     # b 3 h w -> b 3 4h 4w

torch.manual_seed(0)
net, images = Regression(), load_images('postcards', 64, 500 if TEST else 4000, 0)['image']
count = lambda m: sum(p.numel() for p in m.parameters())
print(f'{count(net):,} parameters; the diffusion model has {count(ldm.net):,} and its decoder {count(ldm.autoencoder.decoder):,}')

# %%
def train(net, images, steps, batch_size=8, lr=2e-3):
    rng, start = torch.Generator().manual_seed(0), time.time()
    opt = torch.optim.AdamW(net.parameters(), lr, (.9, .99))
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=.1)
    for k in range(steps):
        x = to_float(images[torch.randint(len(images), (batch_size,), generator=rng)])
        loss = (net(downsample(x)) - x).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); rate.step()
        if k % (steps//4) == steps//4 - 1: print(f'step {k + 1}: squared error {loss.item():.5f}, {time.time() - start:.0f} s')
    return net.eval()

train(net, images, 60 if TEST else 1000)
_ = torch.set_grad_enabled(False)

# %%
def guessed(y): return net(y).clamp(-1, 1)
distance = FeatureDistance(reader.features)
ways = {'bicubic': enlarged(small[:8], cards[:8]), 'regression': guessed(small[:8]), 'drawn': drawn}
for k, v in ways.items(): print(f'{k:11} PSNR {psnr(cards[:8], v).mean():.2f}   SSIM {ssim(cards[:8], v).mean():.3f}   perceptual {distance(cards[:8], v).mean():.3f}')
show_images(torch.cat([v[:7] for v in ways.values()] + [x]), ncol=7, width=7.)
if not TEST: assert psnr(cards, guessed(small)).mean() > psnr(cards, enlarged(small, cards)).mean() + 2

# %% [markdown]
# PROSE-LOOK
#
# ## The table
#
# The regression of this table learnt twice as long. Fidelity: PSNR and SSIM, against the true postcard. Looks: the perceptual distance (chapter 05), against
# the true postcard as well, and FID (chapter 12), against other postcards. Consistency: the result, made small again, against the small picture, in dB. "First
# stage" is the true postcard, encoded and decoded: no drawn picture can be expected to be nearer.

# %%
result = json.loads(Path('../data/results/super-resolution.json').read_text())
print(f'{result["command"]}: {result["seconds"]/60:.0f} minutes on {result["threads"]} thread; 95 % intervals')
def cell(v, digits): return f'{v["value"]:.{digits}f} [{v["low"]:.{digits}f}, {v["high"]:.{digits}f}]'
COLUMNS = dict(PSNR=1, SSIM=3, perceptual=3, FID=2, consistency=1)
def table(rows):
    print(f'{"":18}' + ''.join(f'{k:>24}' for k in COLUMNS))
    for k, r in rows.items(): print(f'{k:18}' + ''.join(f'{cell(r[c], d):>24}' for c, d in COLUMNS.items()))
    first = next(iter(rows.values()))['FID']
    print(f'n = {first["n"]}; FID of other such pictures {first["floor"]:.2f}')

table(result['tables']['postcards'])

# %% [markdown]
# Is it the table of this model? The first eight, measured again:

# %%
test_eq(result['weights'], {k: weights_hash(find_pretrained(k)) for k in result['weights']})
measures = dict(PSNR=psnr, SSIM=ssim, perceptual=distance)
for k in ('bicubic', 'drawn'):
    kept = result['tables']['postcards'][k]['first']
    here = {name: f(cards[:8], ways[k]) for name, f in measures.items()}
    print(f'{k:8} ' + ', '.join(f'{name} {v.mean():.4f} here, {np.mean(kept[name]):.4f} in the table' for name, v in here.items()))
    for name, v in here.items(): assert (v - torch.tensor(kept[name])).abs().max() < .02*max(kept[name])    # other machines round otherwise

# %% [markdown]
# The paper's table has the same shape (Tab. 5; x4 on ImageNet, to 256 pixels):
#
# | | FID (validation) | PSNR | SSIM |
# |---|---|---|---|
# | regression | 15.2 | 27.9 | .801 |
# | SR3 (diffusion of pixels) | 5.2 | 26.4 | .762 |
# | LDM-4, 100 steps | 2.8 | 24.4 | .69 |
#
# The regression wins both measures of fidelity, and nobody would choose its pictures. Blau and Michaeli (2018) proved that it must be so: beyond some point what
# looks more real is less near. Ours, as a plane; right is nearer, down looks better:

# %%
fig, ax = plt.subplots(figsize=(4.5, 2.8))
for k, r in result['tables']['postcards'].items():
    p, d = r['PSNR'], r['perceptual']
    ax.errorbar(p['value'], d['value'], [[d['value'] - d['low']], [d['high'] - d['value']]], [[p['value'] - p['low']], [p['high'] - p['value']]], fmt='o', ms=4)
    ax.annotate(k, (p['value'], d['value']), xytext=(5, 4), textcoords='offset points', fontsize=7)
_ = ax.set(xlabel='PSNR, dB', ylabel='perceptual distance', ylim=0)

# %% [markdown]
# PROSE-TABLE
#
# ## What a sample costs
#
# How much must fidelity lose? Let the samples $s_1, \dots, s_k$ and the truth $x$ all come from the same $p(x \mid y)$, of variance $V$. They are alike and independent, so for the mean of $k$ of them
#
# $$\mathbb E\,|x - \bar s_k|^2 = V + \frac{V}{k} .$$
#
# One sample has twice the error of the perfect regression. **Predict**: how many decibels is that? And how many does the mean of eight win back?

# %%
g = torch.Generator().manual_seed(0)
truth, samples = torch.randn(100_000, generator=g), torch.randn(100_000, 8, generator=g)      # V = 1
for k in (1, 2, 4, 8):
    v = (truth - samples[:, :k].mean(1)).square().mean().item()
    print(f'mean of {k}: error {v:.3f}, 1 + 1/k = {1 + 1/k:.3f}; {10*np.log10(v):.2f} dB worse than the mean of all')
    assert abs(v - (1 + 1/k)) < 4*(1 + 1/k)*(2/100_000)**.5             # four standard errors
test_close(10*np.log10(2), 3.01, eps=.001)

# %% [markdown]
# Three decibels, of which the mean of eight wins back two and a half. Is our model like that? Each of the first postcards of the table was drawn eight times. If its samples scatter as the truth
# does, the error of one is twice their variance, and the errors follow the line.

# %%
s = result['scatter']
error, ideal = {int(k): v for k, v in s['error'].items()}, {k: s['variance']*(1 + 1/k) for k in (1, 2, 4, 8)}
for k, v in error.items(): print(f'mean of {k}: {-10*np.log10(v):.2f} dB; if the truth scattered as its samples do {-10*np.log10(ideal[k]):.2f} dB')
print(f'regression {-10*np.log10(s["regression"]):.2f} dB, first stage {-10*np.log10(s["first_stage"]):.2f} dB (of the mean error of {s["n"]} postcards)')
bias, slope = np.linalg.lstsq(np.stack([np.ones(4), 1/np.array([1, 2, 4, 8])], axis=1), np.array([error[k] for k in (1, 2, 4, 8)]), rcond=None)[0]
print(f'error of the mean of k = {bias:.5f} + {slope:.5f}/k; the variance among samples is {s["variance"]:.5f}')
assert error[1] > error[2] > error[4] > error[8]
test_close(slope, s['variance'], eps=.02*s['variance'])                # that much is arithmetic

# %% [markdown]
# PROSE-SCATTER
#
# ## What varies and what holds
#
# One small picture, seven samples; then where they differ: the standard deviation of each pixel over 16 samples, white where it is large. **Predict** where.

# %%
one = 3
many = ldm.sample(image=small[one], n=4 if TEST else 16, seed=7, steps=STEPS)
spread = many.std(0, keepdim=True).mean(1, keepdim=True).expand(-1, 3, -1, -1)
show_images(torch.cat([pixels(small[one:one + 1]), many[:7][:3 if TEST else 7], spread/spread.max()*2 - 1, cards[one:one + 1]]), ncol=5, width=6.)
up = enlarged(small[one:one + 1], spread)
edges = up.diff(dim=-1).abs().mean(1)[..., :-1, :] + up.diff(dim=-2).abs().mean(1)[..., :-1]
print(f'correlation of the spread with the edges of the small picture: {np.corrcoef(edges.flatten(), spread[0, 0, :-1, :-1].flatten())[0, 1]:.2f}')
seen = read(reader, many)
for k in seen[0]: print(f'{k:10}', [r[k] for r in seen])

# %% [markdown]
# PROSE-VARIES
#
# ## True to the small picture
#
# Whatever is drawn should, made small again, be what it was made from. Nothing in the sampler insists on it; the network has learnt it. Where it must hold, it can be
# had for one line: repeat what is missing over each block,
#
# $$x' = x + \mathrm{up}\big(y - \mathrm{down}(x)\big), \qquad \mathrm{down}(x') = y, \quad\text{since}\quad \mathrm{down}(\mathrm{up}(r)) = r.$$

# %%
def put_right(x, y): return x + pixels(y - downsample(x))
r = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
test_close(downsample(pixels(r)), r, eps=1e-6)
right = put_right(drawn, small[:8])
test_close(downsample(right), small[:8], eps=1e-6)
print(f'drawn: {psnr(small[:8], downsample(drawn)).mean():.1f} dB to the small picture; put right, {psnr(small[:8], downsample(right)).mean():.0f} dB before it is cut to [-1, 1], '
      f'{psnr(small[:8], downsample(right.clamp(-1, 1))).mean():.0f} dB after')

# %% [markdown]
# PROSE-CONSISTENCY
#
# ## Photographs
#
# The model was trained on postcards, and so was its first stage. Crops of two photographs that nothing was trained on. **Predict**: will it draw trees into the coffee?

# %%
photos = to_float(load_images('photos', 64, 8, 5, held_out=True)['image'])
tiny = downsample(photos)
tried = [pixels(tiny), enlarged(tiny, photos), guessed(tiny), ldm.sample(image=tiny, seed=SEED, steps=STEPS), ldm.autoencoder.reconstruct(photos).clamp(-1, 1), photos]
show_images(torch.cat([v[:7] for v in tried]), ncol=7, width=7.);

# %% [markdown]
# Rows: the small picture, bicubic, regression, drawn, the photograph through the first stage, the photograph. In numbers:

# %%
table(result['tables']['photos'])

# %% [markdown]
# PROSE-PHOTOS
#
# ## Another way of becoming small
#
# Nor is every small picture the mean of blocks. The paper notes that a model trained with one way of shrinking does not carry over to others, and trains another, with
# the blur, noise and kernels of real cameras drawn at random (LDM-BSR, App. D.6.1). `degrade` of chapter 01 is such a camera.

# %%
spoilt = torch.cat([degrade(v[None], np.random.default_rng(k)) for k, v in enumerate(cards[:8])])
from_spoilt = ldm.sample(image=spoilt, seed=SEED, steps=STEPS)
show_images(torch.cat([pixels(spoilt[:7]), enlarged(spoilt[:7], x), from_spoilt[:7], x]), ncol=7, width=7.)
for k, y, v in (('mean of blocks', small[:8], drawn), ('a bad camera', spoilt, from_spoilt)):
    print(f'{k:15} perceptual: bicubic {distance(cards[:8], enlarged(y, v)).mean():.3f}, drawn {distance(cards[:8], v).mean():.3f}; '
          f'PSNR {psnr(cards[:8], enlarged(y, v)).mean():.1f} and {psnr(cards[:8], v).mean():.1f} dB')

# %% [markdown]
# PROSE-DEGRADE
#
# ## What is refused
#
# The factor belongs to the model: a picture of 16 pixels becomes one of 64, and nothing else.

# %%
def refused(**how):
    try: ldm.sample(steps=2, **how)
    except ValueError as e: return print('-', e)
    raise AssertionError('it was not refused')

refused(image=small[0], size=32)
refused(image=small[0], size=128)
refused(image=small[0, :, :15])
refused(image=small[0], mask=torch.ones(1, 16, 16))
refused(y='a red house', image=small[0])
refused(image=[small[0], cards[0]])
refused()

# %% [markdown]
# ## A cascade
#
# The network is convolutional, and so is the first stage: a picture of 64 pixels is taken as well, and becomes one of 256. So a caption can be drawn at 256 pixels by two small
# models: `postcards-text` draws 64x64, `postcards-x4` enlarges it. Large systems are built so, and the paper enlarges samples of
# its class-conditional model to 1024 pixels (App. D.6.1). But here the second model has never seen a picture of 64 pixels: all it knows is houses three pixels wide. **Predict**
# what goes wrong. The fourth picture is for comparison: the renderer can draw postcards at any size.

# %%
said = ['a red house on a snowy hill at night, with two trees', 'a yellow house on a summer hill at noon, with a lake', 'an autumn landscape at dusk with mountains'][:1 if TEST else 3]
first = LatentDiffusion.from_pretrained('postcards-text').sample(said, steps=STEPS, guidance=3., seed=3)
second = ldm.sample(image=first, seed=SEED, steps=4 if TEST else STEPS)
real = to_float(Postcards(1, 256, SEED)[0]['image'][None].mul(127.5).add(127.5).round().byte())
show_images(torch.cat([pixels(first[:1]), enlarged(first[:1], second), second[:1], real]), ['64 pixels', 'bicubic', 'drawn', 'a postcard of 256 pixels'], ncol=4, width=9.);

# %%
if len(second) > 1: show_images(second[1:], said[1:], ncol=2, width=6.)
print(f'made small again: {psnr(first, downsample(second)).mean():.1f} dB')

# %% [markdown]
# Fifty captions, judged by the reader before and after; the large picture is scaled to 64 for it. And postcards that exist at 256 pixels: shrunk to 64, enlarged again, and compared with the truth.

# %%
c, large = result['cascade'], result['large']
print(f'{c["n"]} captions: {cell(c["right"]["64"], 3)} of what they ask for at 64, {cell(c["right"]["256"], 3)} at 256; consistency {cell(c["consistency"], 1)} dB')
print(f'\n{large["n"]} postcards, 64 to 256')
for k, r in large['rows'].items(): print(f'{k:18}' + ''.join(f'{m} {cell(r[m], d)}   ' for m, d in COLUMNS.items() if m != 'FID'))

# %% [markdown]
# What is of the wrong scale shows in the spectrum: how much of a picture's variation is in waves of how many cycles across it. Up to 32 cycles the small picture of 64 pixels knows; the rest is to be drawn.

# %%
fig, ax = plt.subplots(figsize=(5.5, 2.8))
for k, v in large['spectrum'].items():
    if k != 'drawn, put right': ax.loglog(range(1, len(v)), v[1:], 'k--' if k == 'real' else '-', lw=1, label=k)
ax.axvline(32, c='k', lw=.5); ax.set(xlabel='cycles a side', ylabel='power'); ax.legend(fontsize=7)
power = {k: np.array(v) for k, v in large['spectrum'].items()}
for k, v in power.items(): print(f'{k:18} of the real power, ' + ', '.join(f'{a} to {b} cycles {v[a:b].sum()/power["real"][a:b].sum():.2f}' for a, b in ((1, 16), (16, 32), (32, 64), (64, 128))))

# %% [markdown]
# PROSE-CASCADE
#
# ## Recap
#
# | symbol | shape | our name | in the paper |
# |---|---|---|---|
# | $y$ | `b 3 h/4 w/4` | `image=`, `downsample` | low-resolution conditioning |
# | $\tau_\theta$ | | `ImageEmbedder.prepare`: the identity, where the sizes agree | identity, §4.4 |
# | $\mathbb E[x \mid y]$ | `b 3 h w` | `Regression` | image regression, Tab. 5 |
# | $V + V/k$ | | error of the mean of $k$ samples | |
# | consistency | dB | `downsample` of the result against $y$ | |
# | $x'$ | `b 3 h w` | `put_right` | |
# | cascade | | `sample(caption)`, then `sample(image=)` | |
#
# **Try next**: cut the picture of 64 pixels into sixteen of 16, enlarge each, and put them together: is the scale right now, and what is wrong instead? Then train with
# `ldm-train diffusion --condition x4` on a folder of photographs.

# %%
#| hide
_ = torch.set_grad_enabled(True)     # as it was

# %%
#| hide
import nbdev; nbdev.nbdev_export()
