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
# # Layouts and maps
#
# > Say where things are: by boxes, which are words, or by a map, which is a picture
#
# A caption says what is there. A layout says where: a list of boxes, each with the name of what is in it. A semantic map says it for every pixel. The paper draws from
# both, and by its two different roads: boxes are read as a sentence and go in through **cross-attention** (§4.3.1), a map lies beside the latent as further channels, by
# **concatenation** (§4.3.2). Both models of this chapter are 64x64, trained on two CPU cores; their cards are in `data/pretrained`.
#
# **You will be able to** draw from boxes and from maps, measure how well a drawing keeps to them, move one thing while the rest stays, and say which road suits
# which condition. Paper: §4.3.1, §4.3.2, Tab. 9, Fig. 8. Time: 30 minutes to read, two to run.

# %%
#| hide
import copy, json, os
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from fastcore.test import test_eq, test_fail
from IPython.display import Markdown
from ldm_nb.core import LatentDiffusion
from ldm_nb.data import CLASSES, Postcards, downsample, show_images, to_float
from ldm_nb.evaluate import drawn_boxes, judge_layout, judge_map, segment
from ldm_nb.reader import load_reader
from ldm_nb.runs import load_images

# %%
#| hide
TEST = bool(os.environ.get('IN_TEST'))
_ = torch.set_grad_enabled(False)
n, steps = (4, 8) if TEST else (32, 30)
COLOURS = {k: plt.cm.tab10(i) for i, k in enumerate(CLASSES)}

# %%
by_boxes, by_map = (LatentDiffusion.from_pretrained(f'postcards-{k}') for k in ('layout', 'map'))
reader, real = load_reader(), load_images('postcards', 64, 40, seed=77)                # postcards that neither model has seen
print(by_boxes.embedder.kind, 'goes in as context of width', by_boxes.net.context_dim, '|', by_map.embedder.kind, 'as', by_map.embedder.concat_ch, 'channels')
test_eq((by_map.net.in_ch, by_map.net.context_dim), (by_map.autoencoder.z_ch + by_map.embedder.concat_ch, None))


# %% [markdown]
# ## A layout is a sentence
#
# Three words a box: its class, its top left corner, its bottom right corner, corners rounded to a grid of 32 by 32 points. A transformer reads the sentence, cross-attention
# shows it to every place of the latent. Here are layouts of postcards that the model has never seen, and what it draws for them.

# %%
def boxed(x, layouts, title=None): # b 3 h w, a layout each: pictures with their boxes drawn over them
    fig = show_images(x, ncol=8, title=title)
    for ax, boxes in zip(fig.axes, layouts):
        for c, x0, y0, x1, y1 in boxes.tolist():
            ax.add_patch(plt.Rectangle((64*x0 - .5, 64*y0 - .5), 64*(x1 - x0), 64*(y1 - y0), fill=False, lw=1, ec=COLOURS[CLASSES[int(c)]]))
    return fig

layouts = real['boxes'][:n]
drawn = by_boxes.sample(layouts, steps=steps, seed=0)
boxed(drawn[:8], layouts[:8], 'drawn, with what was asked for: ' + ', '.join(f'{k}' for k in ('house', 'tree', 'lake', 'mountain', 'cloud', 'sun or moon')))
_ = boxed(to_float(real['image'][:8]), layouts[:8], 'the postcards that the layouts are of')

# %% [markdown]
# The boxes say nothing about the time of day or the season, so the model chooses them; nothing else is free. How well it keeps to the boxes is measured as the
# paper's readers would look: find the houses and trees in the drawing by the reader's segmentation (chapter 02), put a box about each, and compare with the box that was
# asked for: the intersection over the union, 1 where they are the same. Two trees that touch are found as one, and real pictures lose there too. That is the column `real`.

# %%
tallies = judge_layout(drawn, dict(boxes=layouts), reader, None)
for k, t in tallies.items(): print(f'{k:24}', t.measured())
same = judge_layout(to_float(real['image'][:n]), dict(boxes=layouts), reader, None)
assert same['layout: IoU of house'].value() > .8                                       # the judge itself, on real pictures


# %%
def table(name, keep): # rows of a table of `ldm-evaluate`
    found = json.loads(Path(f'../data/results/evaluate-{name}.json').read_text())
    rows = [f'| {k} | {m["value"]:.3f} | {m["low"]:.3f} to {m["high"]:.3f} | {"" if m["floor"] is None else format(m["floor"], ".3f")} | {m["n"]} |'
            for k, m in found['measures'].items() if any(w in k for w in keep)]
    how = f'`{found["command"]}`, {found["seconds"]:.0f} s on {found["device"]}, {found["threads"]} thread(s).'
    return Markdown('\n'.join(['| | drawn | 95 % interval | real | pictures |', '|---|---|---|---|---|', *rows, '', how]))

table('postcards-layout', ('layout', 'FID', 'precision', 'recall'))

# %% [markdown]
# ## Move one box
#
# The same noise, the same boxes but one. **Predict**: when the house moves, what happens to the sky? To the trees? The noise decides all that the layout leaves
# open, and it is the same in every picture.

# %%
def moved(boxes, cls, dx): # the first box of a class, shifted by a share of the picture
    out = boxes.clone()
    k = (out[:, 0] == CLASSES.index(cls)).nonzero()[0, 0]
    out[k, 1::2] += dx
    return out

scene = torch.tensor([[CLASSES.index(c), *b] for c, *b in (('sun', .70, .08, .82, .20), ('house', .10, .48, .38, .80), ('tree', .80, .50, .92, .78))])
walk = [moved(scene, 'house', dx) for dx in torch.linspace(0, .40, 6).tolist()]
row = by_boxes.sample(walk, steps=steps, latents=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).expand(len(walk), -1, -1, -1))
_ = boxed(row, walk, 'one noise, one house on its way to the right')

# %%
HOUSE, places = CLASSES.index('house'), torch.arange(64)/64
found = [b[(b[:, 2] - b[:, 0]).argmax()] if len(b := drawn_boxes(s, HOUSE)) else torch.full((4,), torch.nan) for s in segment(reader, row).numpy()]
asked = [b[b[:, 0] == HOUSE][0, 1:] for b in walk]
for a, f in zip(asked, found): print(f'asked for {a[0]:.2f} to {a[2]:.2f}, found {f[0]:.2f} to {f[2]:.2f}')

# %% [markdown]
# And the rest? Compare the first and the last picture where neither house is, and set it beside two pictures of the same layout from different noises. The rest is not
# frozen (every place of the latent attends to every box), but it is far nearer than chance.

# %%
away = torch.ones(64, 64, dtype=torch.bool)
for b in (asked[0], asked[-1]): away[int(64*b[1]) - 3:int(64*b[3]) + 3, max(0, int(64*b[0]) - 3):int(64*b[2]) + 3] = False
other = by_boxes.sample(scene, n=4, steps=steps, seed=9)
apart = lambda x, y: (x - y)[..., away].abs().mean().item()
held, chance = apart(row[0], row[-1]), sum(apart(row[0], o) for o in other)/len(other)
print(f'mean difference away from the houses: {held:.3f} when the box moves, {chance:.3f} with another noise')
if not TEST: assert held < .7*chance

# %% [markdown]
# ## What it was never shown
#
# No postcard has two houses, and none has a house in the sky. A layout can ask for both. What comes is a matter of what the network made of its sentence: boxes it has
# seen singly, it may or may not combine.

# %%
H = lambda *b: [HOUSE, *b]
odd = [torch.tensor(b) for b in ([H(.05, .5, .33, .8), H(.62, .5, .9, .8)], [H(.36, .05, .64, .35)], [H(.1, .45, .9, .95)], [[CLASSES.index('lake'), .1, .8, .5, .97]]*1)]
strange = by_boxes.sample(odd, n=2, steps=steps, seed=4)
boxed(strange, [b for b in odd for _ in range(2)], 'two houses; a house in the sky; a giant one; a lake and nothing else')
count = [sum((b[:, 2] - b[:, 0] > .15).sum().item() for b in [drawn_boxes(s, HOUSE)] if len(b)) for s in segment(reader, strange).numpy()]
print('houses wider than a seventh of the picture, found by the reader:', count)

# %% [markdown]
# ## Insisting on it
#
# A layout can be left out in training, so guidance works (chapter 08): `w` = 1 draws what the network thinks, more insists.

# %%
for w in (1., 2., 4.):
    t = judge_layout(by_boxes.sample(layouts, steps=steps, guidance=w, seed=0), dict(boxes=layouts), reader, None)
    print(f'w={w:g}: ' + ', '.join(f'{k.removeprefix("layout: ")} {v.value():.3f}' for k, v in t.items() if 'IoU' in k))

# %% [markdown]
# ## A map lies beside the latent
#
# Each of the nine classes becomes a channel; the channels are averaged down to the size of the latent, and a 1x1 convolution mixes them. A network that is all
# convolutions near its ends sees, at every place, exactly what is to be there. Nothing has to be attended to, and no place is left open.

# %%
maps = real['map'][:n].long()
painted = by_map.sample(list(maps), steps=steps, seed=0)
palette = torch.tensor([plt.cm.tab10(i)[:3] for i in range(len(CLASSES))])
shown = lambda m: palette[m].movedim(-1, 1)*2 - 1                                       # class ids as colours
_ = show_images(torch.cat([shown(maps[:8]), painted[:8], to_float(real['image'][:8])]), ncol=8, title='the map; drawn from it; the postcard that the map is of')

# %%
for k, t in judge_map(painted, dict(map=maps), reader, None).items(): print(f'{k:12}', t.measured())
same = judge_map(to_float(real['image'][:n]), dict(map=maps), reader, None)
assert same['map: pixels'].value() > .9                                                # the judge itself
table('postcards-map', ('map', 'FID', 'precision', 'recall'))

# %% [markdown]
# ## Paint on it
#
# A map can be edited like any picture. Put a house on a hill that had none: the same noise, the map changed in one place. **Predict** which drawing changes less
# elsewhere, that of a moved box or that of a painted map.

# %%
flat = next(m for m in maps if not (m == HOUSE).any() and not (m == CLASSES.index('lake')).any())
with_house = flat.clone()
with_house[38:52, 24:40] = HOUSE
for k in range(8): with_house[30 + k, 31 - k:33 + k] = HOUSE                          # the roof
with_lake = with_house.clone()
rows_, cols_ = torch.meshgrid(torch.arange(64), torch.arange(64), indexing='ij')
with_lake[((cols_ - 16)/11)**2 + ((rows_ - 57)/4)**2 < 1] = CLASSES.index('lake')
edits = [flat, with_house, with_lake]
one = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
edited = by_map.sample(edits, steps=steps, latents=one)
_ = show_images(torch.cat([shown(torch.stack(edits)), edited]), ncol=3, width=5, title='a map, a house painted on it, then a lake')

# %%
seen = segment(reader, edited)
share = lambda k, c: (seen[k] == CLASSES.index(c)).float().mean().item()
print(f'house: {share(0, "house"):.3f} of the picture before, {share(1, "house"):.3f} after; lake: {share(1, "lake"):.3f} before, {share(2, "lake"):.3f} after')
mask = (with_house != flat)[None, None].float()
far = torch.nn.functional.max_pool2d(mask, 13, 1, 6)[0, 0] == 0                        # more than six pixels from what was painted
print(f'mean difference more than six pixels away: {(edited[0] - edited[1])[:, far].abs().mean():.3f}')
if not TEST: assert share(1, 'house') > share(0, 'house') + .03

# %% [markdown]
# ## What is refused
#
# All of it before the first step.

# %%
test_fail(lambda: by_boxes.sample([['castle', .1, .1, .5, .5]]), contains="no class 'castle'; there are sky, sun")
test_fail(lambda: by_boxes.sample([['house', .5, .1, .2, .5]]), contains='expected x0 < x1 and y0 < y1')
test_fail(lambda: by_boxes.sample([['house', .5, .1, 1.2, .5]]), contains='expected fractions of the picture')
test_fail(lambda: by_map.sample(torch.full((64, 64), 12)), contains='this model knows 0 ... 8')
test_fail(lambda: by_map.sample(torch.zeros(64, 60, dtype=torch.int64)), contains='size 64x60')
test_fail(lambda: by_map.sample('a lake'), contains='is no map')

# %% [markdown]
# ## Recap
#
# | condition | how it goes in | our name | paper |
# |---|---|---|---|
# | layout, (k, 5) boxes | 3k tokens, cross-attention | `LayoutEmbedder` | §4.3.1, Tab. 9, App. E.2.1 |
# | semantic map, (h, w) ids | channels beside `z_t`, concatenation | `MapEmbedder` | §4.3.2, Fig. 8 |
# | IoU of asked and found boxes | by the reader's segmentation | `judge_layout` | |
# | mIoU of asked and drawn maps | by the reader's segmentation | `judge_map` | |
#
# Boxes are few, of any number, and overlap: a sentence suits them. A map has a value for every pixel: a picture suits it. Concatenation also has no fixed size, and chapter 24 uses that.
#
# **Limits.** Both models know nine classes and one kind of landscape. The judge is a small network of our own; what it gets wrong on real pictures stands beside each number.
#
# **Try next**: draw a layout of your own with `ldm-sample --model postcards-layout "house .2 .4 .5 .8, tree .6 .5 .7 .9"`, and train the layout model with
# boxes of half the postcards' classes only.

# %%
#| hide
_ = torch.set_grad_enabled(True)     # as it was

# %%
#| hide
import nbdev; nbdev.nbdev_export()
