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
# # Without a word, and by class
#
# > The paper's first results in small: pictures from nothing but noise, pictures of a class, and how to tell whether they are any good
#
# An unconditional model is told nothing: it has to know what postcards are. A model of classes is told one of sixteen, the time of day and the season. These are the
# simplest models there are, so they are the place to ask what can go wrong: pictures that are not postcards, postcards that are missing, and pictures
# that were simply remembered.
#
# **You will be able to** read FID, precision and recall together, look for memorised training pictures, and say what guidance does to a class. Paper: §4.2, Tab. 1, §4.3.3, Tab. 3,
# App. E. Time: 30 minutes to read, two to run.

# %%
#| hide
import json, os
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from fastcore.test import test_eq, test_fail
from IPython.display import Markdown
from ldm_nb.core import LatentDiffusion
from ldm_nb.data import SEASONS, TIMES, show_images, to_float
from ldm_nb.evaluate import compare, embed, judge_class, reader_features
from ldm_nb.reader import load_reader, read
from ldm_nb.runs import load_images

# %%
#| hide
TEST = bool(os.environ.get('IN_TEST'))
_ = torch.set_grad_enabled(False)
n, steps = (24, 6) if TEST else (96, 30)
reader = load_reader()

# %%
plain, by_class = (LatentDiffusion.from_pretrained(k) for k in ('postcards', 'postcards-class'))
for name, m in (('postcards', plain), ('postcards-class', by_class)):
    print(f'{name}: {sum(p.numel() for p in m.net.parameters())/1e6:.2f} M parameters, told', m.embedder.kind if m.embedder else 'nothing')

# %% [markdown]
# ## From noise alone

# %%
drawn = plain.sample(n=n, steps=steps, seed=0)
_ = show_images(drawn[:24], ncol=8, title='drawn from noise, none chosen')

# %% [markdown]
# Three questions, three numbers (chapter 12). **FID**: how far apart are the clouds of features of drawn and real pictures? **Precision**: how many of the drawn lie where real pictures lie? **Recall**: how
# many of the real lie where drawn ones do? A model that draws one perfect postcard again and again has precision 1 and recall 0; one that draws all postcards badly, the reverse.
#
# The paper's Tab. 1 reports these three for its unconditional models, over Inception's features. Ours are over the features of the course's reader, so they compare with each other and with
# the column `real`, which is what real postcards get in the place of drawn ones, and not with the paper's.

# %%
def table(name, keep): # rows of a table of `ldm-evaluate`
    found = json.loads(Path(f'../data/results/evaluate-{name}.json').read_text())
    rows = [f'| {k} | {m["value"]:.3f} | {m["low"]:.3f} to {m["high"]:.3f} | {"" if m["floor"] is None else format(m["floor"], ".3f")} | {m["n"]} |'
            for k, m in found['measures'].items() if any(w in k for w in keep)]
    how = f'`{found["command"]}`, {found["seconds"]:.0f} s on {found["device"]}, {found["threads"]} thread(s).'
    return Markdown('\n'.join(['| | drawn | 95 % interval | real | pictures |', '|---|---|---|---|---|', *rows, '', how]))

table('postcards', ('FID', 'KID', 'precision', 'recall', 'IS'))

# %% [markdown]
# ## What it got wrong
#
# A number says how much, not what. The reader tells the attributes of drawn and of real postcards; where their shares differ, the model is wrong about the world. In the data every
# attribute is drawn evenly (chapter 01), so **predict** what each share should be.

# %%
real = load_images('postcards', 64, 80 if TEST else 400, seed=77)                                       # not trained on
count = lambda x, k: {v: sum(r[k] == v for r in x)/len(x) for v in dict.fromkeys(sorted((r[k] for r in x), key=str))}
seen, true = read(reader, drawn), read(reader, to_float(real['image']))
for k in ('time', 'season', 'house', 'trees', 'lake'):
    a, b = count(seen, k), count(true, k)
    print(f'{k:7}', ', '.join(f'{v}: {a.get(v, 0):.2f} ({b[v]:.2f})' for v in b))

# %% [markdown]
# In brackets what the reader finds in real ones. With so few pictures a share of .25 is known to about .09, two deviations of a binomial; what lies outside is the model's mistake.
#
# ## Were they remembered?
#
# 30,000 postcards were shown to a network of a million weights; it cannot have stored them, but it must be looked at. For each drawn picture the nearest training picture, by pixels
# after a blur and by the reader's features; beside it, as a yardstick, the nearest training picture of real postcards that were not in training.

# %%
trained_on = load_images('postcards', 64, 2000 if TEST else 30000, seed=0)['image']
small = lambda x: torch.nn.functional.avg_pool2d(x, 4).flatten(1)
keys = torch.cat([small(to_float(p)) for p in trained_on.split(1000)])
nearest = lambda x: torch.cdist(small(x), keys).min(1)
own, fresh = nearest(drawn), nearest(to_float(real['image'][:n]))
print(f'distance to the nearest training picture: drawn {own.values.median():.2f}, fresh real ones {fresh.values.median():.2f} (medians)')
close = own.values.argsort()[:8]
_ = show_images(torch.cat([drawn[close], to_float(trained_on[own.indices[close]])]), ncol=8, title='the eight drawn pictures nearest to a training picture, and that picture')
assert own.values.median() > .5*fresh.values.median()                                  # copies would be at 0

# %% [markdown]
# The test itself must be able to find a copy, so give it one:

# %%
copy = (to_float(trained_on[5:6]) + .05*torch.randn(1, 3, 64, 64)).clamp(-1, 1)
d, where = nearest(copy)
test_eq(where.item(), 5)
assert d.item() < .2*fresh.values.min()

# %% [markdown]
# ## Fewer steps
#
# The paper's models take 100 to 500 steps of DDIM. Against the number of steps, with the same noise: how far are the pictures from those of the most steps, and do they look the worse for it?

# %%
few = (4, 8) if TEST else (5, 10, 20, 50)
walks = {k: plain.sample(n=8, steps=k, seed=1) for k in few}
for k, x in walks.items(): print(f'{k:3} steps: apart from those of {few[-1]} by {(x - walks[few[-1]]).abs().mean():.3f}')
_ = show_images(torch.cat(list(walks.values())), ncol=8, title='the same noise, ' + ', '.join(map(str, few)) + ' steps')

# %% [markdown]
# ## One of sixteen
#
# The class goes in as one token by cross-attention, as in the paper's model of ImageNet (§4.3.3). Rows are times of day, columns seasons; the noise is the same in all of them. **Predict** what the sixteen have in common.

# %%
unit = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8)).expand(16, -1, -1, -1)
grid = by_class.sample(list(range(16)), steps=steps, latents=unit)
_ = show_images(grid, [f'{t}, {s}' for t in TIMES for s in SEASONS], ncol=4, width=6)

# %%
asked = torch.arange(16).repeat_interleave(1 if TEST else 4)
x = by_class.sample(asked.tolist(), steps=steps, seed=2)
for k, t in judge_class(x, dict(label=asked), reader, None).items(): print(f'{k:15}', t.measured())
table('postcards-class', ('class', 'FID', 'precision', 'recall'))

# %% [markdown]
# ## Guidance, or the price of being sure
#
# `w` = 1 is the model as it is, `w` = 0 the same network told nothing. More makes the class clearer and, past some point, the pictures alike (§4.3.3, Tab. 3). Precision and recall show it from two sides.

# %%
labels = torch.arange(16).repeat(2 if TEST else 8)
features = reader_features(reader)
base = embed(features, to_float(real['image'][:len(labels)]))
rows = {}
for w in (1., 6.) if TEST else (0., 1., 3., 8.):
    x = by_class.sample(labels.tolist(), steps=8 if TEST else 15, sampler='dpmpp_2m', guidance=w, seed=3)
    right = judge_class(x, dict(label=labels), reader, None)['class: both'].value()
    set_of = compare(base, embed(features, x))
    rows[w] = (right, set_of['precision'].value, set_of['recall'].value)
    print(f'w={w:g}: class right {right:.2f}, precision {rows[w][1]:.2f}, recall {rows[w][2]:.2f}')
if not TEST: assert rows[3.][0] > rows[0.][0] + .5                                     # told nothing, one in sixteen is right

# %%
test_fail(lambda: by_class.sample(16), contains='this model knows 0 ... 15')
test_fail(lambda: plain.sample('a house'), contains='this model is unconditional')

# %% [markdown]
# ## Recap
#
# | quantity | our name | paper |
# |---|---|---|
# | distance of two clouds of features | FID, `compare` | Tab. 1, 3 |
# | share of the drawn among the real, and the reverse | precision, recall | Tab. 1, 3 |
# | class by one token | `ClassEmbedder`, cross-attention | §4.3.3 |
# | nearest training picture | here | App. |
#
# **Limits.** A million weights, half an hour of two cores, sixteen classes. FID is over our own reader's features. What the first stage cannot show (grain), no sample has.
#
# **Try next**: `ldm-evaluate --model postcards --eta 1`, and `--steps 10`: does noise on the way help? For which number of steps?

# %%
#| hide
_ = torch.set_grad_enabled(True)     # as it was

# %%
#| hide
import nbdev; nbdev.nbdev_export()
