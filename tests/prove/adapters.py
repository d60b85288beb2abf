"""A style, a word and outlines taught to the shipped text model, and what it obeys before and after: the figures of
nbs/beyond/06_adapters and 07_controlnet.

    python tests/prove/adapters.py --what lora         cyanotypes: their judge, a LoRA of attention, of all linear
                                                       layers (two seeds), and that for longer
    python tests/prove/adapters.py --what inversion    a word for orange houses, two seeds; --word pink --only 0 for
                                                       pink ones, which the first stage cannot draw
    python tests/prove/adapters.py --what controlnet   outlines

One row for each (setting, seed) in data/results/adapters.json; a row that is there is not measured again. What was
trained is kept in the work folder, ready to be shipped. All on one thread of a CPU; minutes are of the processor."""
import argparse, json, time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from ldm_nb.beyond.adapters import (
    LINEAR, ATTENTION, add_lora, add_word, cyanotype, fit, keep_word, load_lora, off_line, save_lora,
    save_word)
from ldm_nb.beyond.controlnet import add_control, agreement, outlines, save_control
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets import scenes
from ldm_nb.datasets.captions import caption, parse_caption
from ldm_nb.datasets.images import to_float, to_uint8
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.engine.files import atomic_path
from ldm_nb.engine.seeds import generator
from ldm_nb.metrics.intervals import Tally, wilson
from ldm_nb.metrics.reader import caption_accuracy, damage, load_reader, read, save_reader, verdicts

BASE, HELD_OUT = 'postcards-text', 2024
SAMPLING = dict(steps=20, sampler='dpmpp_2m', guidance=3., batch_size=16)

# %% shared
def postcards(n: int, seed: int): # (n, 3, 64, 64), captions
    items = [Postcards(n, 64, seed)[i] for i in range(n)]
    return torch.stack([it['image'] for it in items]), [it['caption'] for it in items]

@torch.no_grad()
def latents(ldm, x): return torch.cat([ldm.autoencoder.encode(p) for p in x.split(50)])

@torch.no_grad()
def through(ldm, x): return torch.cat([ldm.autoencoder.reconstruct(p) for p in x.split(50)])

def three(m): return [round(v, 4) for v in (m.value, m.low, m.high)]
def share(right: list):
    v = sum(right)/len(right)
    return [round(k, 4) for k in (v, *wilson(v, len(right)))]

def mean(v): return three(Tally(v[:, None], torch.ones(len(v), 1)).measured())

def words_right(reader, x, captions, skip=()): # share of the captions' attributes, with an interval over the pictures
    rows = [{k: v for k, v in verdicts(s, parse_caption(c)).items() if k not in skip}
            for s, c in zip(read(reader, x.clamp(-1, 1)), captions)]
    num, den = (torch.tensor([[float(f(r))] for r in rows]) for f in (lambda r: sum(r.values()), len))
    return three(Tally(num, den).measured())

class Table: # rows of a json file
    def __init__(self, path: Path):
        self.path = path
        self.rows = json.loads(path.read_text())['rows'] if path.is_file() else []

    def has(self, setting, seed): return any((r['setting'], r['seed']) == (setting, seed) for r in self.rows)

    def add(self, setting, seed, **found):
        self.rows.append(dict(setting=setting, seed=seed, **found))
        print(setting, seed, found, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as f: f.write_text(json.dumps(dict(rows=self.rows), indent=1) + '\n')

def trained(ldm, z0, y, seed, **how): # -> processor minutes, mean loss of the last fifth
    start, losses = time.process_time(), []
    for step, loss in fit(ldm, z0, y, seed=seed, **how):
        losses.append(loss)
        if step % 100 == 0: print(step, f'{sum(losses[-100:])/100:.4f}', flush=True)
    return dict(minutes=round((time.process_time() - start)/60, 2), steps=len(losses),
                parameters=sum(p.numel() for p in ldm.parameters() if p.requires_grad))

# %% a style
def judge_of_cyanotypes(ldm, a): # the shipped reader, trained on, of cyanotypes that went through the first stage
    if (a.work/'judge/config.json').is_file(): return load_reader(a.work/'judge')
    reader, rng, start = load_reader(), generator(7), time.process_time()
    ds = Postcards(a.judge, 64, 7)
    items = [ds[i] for i in range(ds.n)]
    x = through(ldm, cyanotype(torch.stack([it['image'] for it in items])))
    want = {k: torch.tensor([v.index(it['scene'].attributes()[k]) for it in items])
            for k, v in scenes.ATTRIBUTES.items()}
    steps = 10*a.judge//32
    opt = torch.optim.AdamW(reader.train().parameters(), 1e-3)
    at = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(x), (32,), generator=rng)
        answers = reader.attributes(damage(x[i], rng))
        opt.zero_grad()
        sum(F.cross_entropy(answers[k], want[k][i]) for k in want).backward()
        opt.step()
        at.step()
    save_reader(reader.eval(), a.work/'judge')
    print(f'judge: {(time.process_time() - start)/60:.1f} min', flush=True)
    return reader

def style_row(judge, x, captions):
    d = off_line(x)
    each = {k: round(v, 3) for k, (v, _) in caption_accuracy(judge, x.clamp(-1, 1), captions).items()}
    return dict(off=mean(d), met=share((d < .1).tolist()), words=words_right(judge, x, captions), each=each)

LORAS = {'attention r4': (dict(r=4, where=ATTENTION), 600, (0,)), 'linear r4': (dict(r=4, where=LINEAR), 600, (0, 1)),
         'linear r4, longer': (dict(r=4, where=LINEAR), 1800, (0,))} # layers, steps, seeds

def lora(a, table):
    ldm = LatentDiffusion.from_pretrained(BASE)
    judge, (real, captions) = judge_of_cyanotypes(ldm, a), postcards(a.n, HELD_OUT)
    if not table.has('lora: real', 0):
        table.add('lora: real', 0, **style_row(judge, through(ldm, cyanotype(real)), captions))
    if not table.has('lora: before', 0):
        x = ldm.sample(captions, seed=0, **SAMPLING)
        table.add('lora: before', 0, **style_row(load_reader(), x, captions))
    x, y = postcards(64, 11)
    z0 = latents(ldm, cyanotype(x))
    for setting, (how, steps, seeds) in LORAS.items():
        for seed in seeds:
            if table.has(f'lora: {setting}', seed) or a.only not in (None, seed): continue
            torch.manual_seed(seed)
            ldm = LatentDiffusion.from_pretrained(BASE)
            ldm.requires_grad_(False)
            add_lora(ldm.net, **how)
            cost = trained(ldm, z0, y, seed, steps=a.steps or steps, lr=a.lr or 4e-3)
            path = a.work/f'{setting.replace(", ", "-").replace(" ", "-")}-{seed}.safetensors'
            save_lora(ldm.net, path, BASE)
            ldm = LatentDiffusion.from_pretrained(BASE)
            load_lora(ldm.net, path)
            s = ldm.sample(captions, seed=0, **SAMPLING)
            table.add(f'lora: {setting}', seed, **style_row(judge, s, captions), **cost)

# %% a word
NEW_WALL = dict(orange=(.95, .50, .12), pink=(.93, .50, .62)) # the first stage cannot draw the second

@contextmanager
def wall(word): # inside, postcards can have a house of this colour
    scenes.WALL[word] = NEW_WALL[word]
    try: yield
    finally: del scenes.WALL[word]

def houses(n: int, seed: int, word: str): # -> (n, 3, 64, 64), captions that name the colour
    x, captions = [], []
    for i in range(8*n):
        s = replace(scenes.random_scene(np.random.default_rng([seed, i]), house='red'), house=word)
        said = caption(s, np.random.default_rng([seed, i, 1])).replace('a orange', 'an orange')
        if f'{word} house' not in said: continue
        with wall(word) if word in NEW_WALL else nullcontext(): x.append(to_float(scenes.render(s)['image']))
        captions.append(said)
        if len(x) == n: return torch.stack(x), captions

@torch.no_grad()
def wall_colour(reader, x, word): # -> the colour that most pixels of each house are nearest to
    table = scenes.WALL | {word: NEW_WALL[word]}
    found = []
    for seen, p, m in zip(read(reader, x), x, reader.segment(x).argmax(1)):
        light = np.array(scenes.LIGHT[seen['time']])**.7
        parts = [np.array(c)*light for c in (*table.values(), (.42, .27, .20), (.25, .16, .12))]
        pane = (1., .88, .45) if seen['time'] in ('night', 'dusk') else (.25, .32, .42)
        colours = torch.tensor(np.array([*parts, pane]), dtype=torch.float32)         # walls, roof, door, pane
        pixels = (p[:, m == scenes.CLASSES.index('house')].T + 1)/2                   # n 3
        votes = torch.cdist(pixels, colours).argmin(1).bincount(minlength=len(colours))[:len(table)]
        found.append(list(table)[votes.argmax()] if votes.sum() else 'none')
    return found

def word_row(reader, x, captions, word):
    found = wall_colour(reader, x, word)
    return dict(colour=share([f == word for f in found]), found={k: found.count(k) for k in sorted(set(found))},
                words=words_right(reader, x, captions, skip=('house colour', 'house present')))

def inversion(a, table):
    reader, word = load_reader(), a.word
    x, captions = houses(a.n, HELD_OUT, word)
    ldm = LatentDiffusion.from_pretrained(BASE)
    if not table.has(f'{word}: real', 0):
        old = [houses(40, 5, k) for k in ('red', 'yellow', 'blue', 'white')]
        right = [f == k for k, (p, _) in zip(('red', 'yellow', 'blue', 'white'), old)
                 for f in wall_colour(reader, through(ldm, p), word)]
        table.add(f'{word}: real', 0, **word_row(reader, through(ldm, x), captions, word), judge=share(right))
    if not table.has(f'{word}: before', 0):
        table.add(f'{word}: before', 0, **word_row(reader, ldm.sample(captions, seed=0, **SAMPLING), captions, word))
    shown, y = houses(16, 12, word)
    z0 = latents(ldm, shown)
    for seed in (0, 1):
        if table.has(f'{word}: after', seed) or a.only not in (None, seed): continue
        ldm = LatentDiffusion.from_pretrained(BASE)
        add_word(ldm, word, like='red')
        cost = trained(ldm, z0, y, seed, steps=a.steps or 200, lr=a.lr or .02)
        keep_word(ldm)
        save_word(ldm, word, a.work/f'{word}-{seed}.safetensors', BASE)
        s = ldm.sample(captions, seed=0, **SAMPLING)
        table.add(f'{word}: after', seed, **word_row(reader, s, captions, word), **cost)

# %% outlines
def strip_of(path: Path, *rows): # (8, 3, 64, 64) each, in [-1, 1]: one JPEG
    x = torch.stack([torch.cat(list(r), dim=2) for r in rows])          # rows 3 64 512
    Image.fromarray(to_uint8(torch.cat(list(x), dim=1))).save(path, quality=80, progressive=True)

def control_row(reader, x, lines, captions):
    return dict(agree=mean(agreement(lines, x)), words=words_right(reader, x, captions))

def controlnet(a, table):
    ldm, reader = LatentDiffusion.from_pretrained(BASE), load_reader()
    real, captions = postcards(a.n, HELD_OUT)
    lines = outlines(real)
    if not table.has('outlines: real', 0):
        table.add('outlines: real', 0, **control_row(reader, through(ldm, real), lines, captions),
                  other=mean(agreement(lines, real.roll(1, 0))))
    if not table.has('outlines: before', 0):
        s = ldm.sample(captions, seed=0, **SAMPLING)
        table.add('outlines: before', 0, **control_row(reader, s, lines, captions))
    if table.has('outlines: after', 0): return
    x, y = postcards(a.pictures, 13)
    z0 = latents(ldm, x)
    torch.manual_seed(0)
    add_control(ldm)
    cost = trained(ldm, z0, dict(text=y, control=list(outlines(x))), 0, steps=a.steps or 1000, lr=a.lr or 1e-3)
    save_control(ldm, a.work/'outlines-0.safetensors', BASE)
    s = ldm.sample(captions, image=lines, seed=0, **SAMPLING)
    plain = LatentDiffusion.from_pretrained(BASE).sample(captions[:8], seed=0, **SAMPLING)
    strip_of(a.out.with_name('adapters-outlines.jpg'), (1 - 2*lines[:8]).expand(-1, 3, -1, -1), plain, s[:8])
    table.add('outlines: after', 0, **control_row(reader, s, lines, captions), **cost)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--what', choices=('lora', 'inversion', 'controlnet'), required=True)
    p.add_argument('--n', type=int, help='held-out captions (default 160, 96 and 120)')
    p.add_argument('--steps', type=int, help='of a training')
    p.add_argument('--pictures', type=int, default=1000, help='that the ControlNet is trained on (default 1000)')
    p.add_argument('--only', type=int, help='this seed')
    p.add_argument('--word', default='orange', choices=NEW_WALL)
    p.add_argument('--lr', type=float, help='of a training')
    p.add_argument('--judge', type=int, default=1000, help='postcards that the judge is trained on (default 1000)')
    p.add_argument('--out', type=Path, default=Path('data/results/adapters.json'))
    p.add_argument('--work', type=Path, default=Path('runs/adapters'))
    a = p.parse_args()
    torch.set_num_threads(1)
    a.n = a.n or dict(lora=160, inversion=96, controlnet=120)[a.what]
    globals()[a.what](a, Table(a.out))
