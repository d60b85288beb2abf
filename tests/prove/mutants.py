"""Files that something happened to, given to every door of the package: 5,000 of them, each made anew from its
number, opened by a process that is watched. What may come of it: the right shape and finite numbers, or one sentence
that names the file. Called by tests/prove/breaking.py; by hand, to see what one number does:

    python tests/prove/mutants.py --only 1234        (several: --only 7 1234)
    python tests/prove/mutants.py --inputs 500       the first 500; runs/breaking/inputs.jsonl keeps what is done"""
import argparse, contextlib, copy, csv, io, json, math, multiprocessing, os, random, re, resource, shutil, signal
import struct, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path

HANGS = 20                          # seconds of processor time; of the clock four times as many, on a busy machine
MEMORY = 6*2**30                    # bytes that one input may take
FINE = 'fine'
PRELOAD = ['ldm_nb.cli.recipes', 'ldm_nb.cli.evaluate', 'ldm_nb.cli.sample', 'ldm_nb.interop.pipelines',
           'ldm_nb.interop.compvis', 'ldm_nb.lab.watch', 'matplotlib.pyplot', 'tokenizers', 'transformers',
           'tensorboard', 'torchmetrics.image.fid', 'torchmetrics.image.kid', 'torchmetrics.image.inception',
           'scipy.stats', 'yaml']

# ---------------------------------------------------------------- what can happen to a file

LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'0'*64 + b'\nsize 12345678\n'
PAGE = b'<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Sign in to go on.</body></html>\n'
NUMBERS = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
ODD = (None, True, False, 0, -1, 1, 2, 7, 10**4, 2**31, 2**70, .5, -.5, 1e-30, 1e30, 1e308, '', 'x', 'é\u0000', '../x',
       [], {}, [1, 2], ['x'], [[]], {'x': 1}, 'nan', math.nan, math.inf)

def flips(rng, data): # some bytes become others
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 50))): data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)

def cut(rng, data): return data[:rng.randrange(len(data))]

def insert(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 64, 1000))) + data[at:]

def remove(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 2, 64, 1000)):]

def number(rng, data): # one near the beginning, where sizes and offsets are
    size, end = rng.choice((2, 4, 4, 8)), rng.choice('<>')
    if len(data) <= size: return cut(rng, data)
    at = rng.randrange(min(len(data) - size, rng.choice((32, 200, 2000))))
    code = {2: 'H', 4: 'I', 8: 'Q'}[size]
    v = rng.choice(NUMBERS + (rng.randrange(2**16),))
    return data[:at] + struct.pack(end + code, v & (256**size - 1)) + data[at + size:]

def zeros(rng, data):
    at = rng.randrange(len(data))
    return (data[:at] + bytes(rng.choice((8, 512, 10**6))) + data[at:])[:len(data)]

def empty(rng, data): return b''
def pointer(rng, data): return LFS
def page(rng, data): return PAGE
def utf16(rng, data): return data.decode('latin-1').encode('utf-16')
def all_zeros(rng, data): return bytes(len(data))
def twice(rng, data): return data + data

BYTES = [flips, flips, flips, cut, cut, insert, remove, number, number, number, zeros]
RARE = [empty, pointer, page, utf16, all_zeros, twice]

def paths(tree, at=()): # of every leaf and every branch but the root
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for k, v in items:
        yield *at, k
        yield from paths(v, (*at, k))

def change(rng, tree, odd=ODD): # one value becomes another, goes, or moves to another name
    every = list(paths(tree))
    if not every: return rng.choice(odd)
    *way, last = rng.choice(every)
    at = tree
    for k in way: at = at[k]
    what, old = rng.random(), at[last]
    if what < .12: del at[last]
    elif what < .2 and isinstance(at, dict): at[rng.choice(('x', f'{last}_', ''))] = at.pop(last)
    elif what < .35 and isinstance(old, (int, float)) and not isinstance(old, bool):
        at[last] = rng.choice((-old, old + 1, old - 1, old*2, old*1000, old/3, str(old)))
    elif what < .45: # a value from elsewhere in the file
        *there, name = rng.choice(every)
        other = tree
        for k in there: other = other.get(k) if isinstance(other, dict) else other[k] if k < len(other) else None
        at[last] = copy.deepcopy(other.get(name) if isinstance(other, dict) else None)
    else: at[last] = copy.deepcopy(rng.choice(odd))
    return tree

def values(rng, data): # of JSON
    try: tree = json.loads(data)
    except ValueError: return flips(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))): tree = change(rng, tree)
    return json.dumps(tree, indent=1).encode()

def nested(rng, data): return b'['*200_000

def lines(rng, data): # of JSON lines, CSV, a vocabulary
    all_, k = data.splitlines(True), rng.random()
    if not all_: return data
    at = rng.randrange(len(all_))
    if k < .2: del all_[at]
    elif k < .4: all_.insert(at, all_[rng.randrange(len(all_))])
    elif k < .6: all_[at] = all_[at][:rng.randrange(len(all_[at]) + 1)]
    elif k < .7: all_[at] = all_[at].upper()
    elif k < .8: all_[at] = rng.choice((b'\n', b'\xff\xfe\n', b'null\n', b'[]\n', b'3\n', b'"x"\n', b',,,\n', b'"\n'))
    else: all_[at] = values(rng, all_[at]).replace(b'\n', b'') + b'\n'
    return b''.join(all_)

def header(rng, data): # of safetensors: names, types, shapes, offsets
    n = struct.unpack('<Q', data[:8])[0]
    tree = change(rng, json.loads(data[8:8 + n]), ODD + ('F64', 'I8', 'BOOL', 'F16', [0, 2**40], [2**40], [-1]))
    text = json.dumps(tree).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + n:]

def numbers(rng, data): # a tensor of NaN, infinity, zeros or absurd numbers, where the header stays
    from safetensors.torch import load, save
    import torch
    t = load(data)
    k = rng.choice(sorted(k for k in t if t[k].is_floating_point() and t[k].numel()))
    bad = rng.choice((math.nan, math.inf, -math.inf, 0., 1e30, -1e4))
    if rng.random() < .5: t[k] = torch.full_like(t[k], bad)
    else: t[k].view(-1)[rng.randrange(t[k].numel())] = bad
    return save(t, metadata=metadata(data))

def metadata(data):
    return json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]]).get('__metadata__')

def shapes(rng, data): # a tensor of another shape or type, a missing or an added one
    from safetensors.torch import load, save
    import torch
    t = load(data)
    k, what = rng.choice(sorted(t)), rng.random()
    if what < .25: del t[k]
    elif what < .4: t[k + 'x'] = t[k].clone()
    elif what < .6: t[k] = torch.zeros(rng.choice(((), (0,), (1,), (3, 3), (*t[k].shape, 1))))
    elif what < .8: t[k] = t[k].to(rng.choice((torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)))
    else: t[k] = t[k].flatten()[None].contiguous()
    return save(t, metadata=metadata(data))

def pickled(rng, data): # a leaf of what torch.save wrote
    import torch
    state = torch.load(io.BytesIO(data), weights_only=True)
    odd = ODD + (torch.zeros(()), torch.zeros(1), torch.zeros(3, 3), torch.full((4, 4), math.nan),
                 torch.ones(2, 2).long())
    for _ in range(rng.choice((1, 1, 2))):
        tensors = [p for p in paths(state) if torch.is_tensor(value(state, p))]
        if tensors and rng.random() < .3:
            *way, last = rng.choice(tensors)
            at = value(state, way)
            old = at[last]
            at[last] = rng.choice((lambda: old.double(), lambda: old.half(), lambda: old.flatten(), lambda: old[None],
                                   lambda: torch.full_like(old, math.nan) if old.is_floating_point() else old + 9,
                                   lambda: old.long(), lambda: old.float()*1e30))()
        else: state = change(rng, state, odd)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()

def value(tree, path):
    for k in path: tree = tree[k]
    return tree

def arrays(rng, data): # of an .npz
    import numpy as np
    with np.load(io.BytesIO(data)) as f: a = dict(f)
    k, what = rng.choice(sorted(a)), rng.random()
    if what < .25: del a[k]
    elif what < .5: a[k] = a[k][:rng.randrange(len(a[k]) + 1)]
    elif what < .6: a[k] = a[k].astype(rng.choice(('float64', 'int8', 'uint16', 'U4', 'bool')))
    elif what < .7: a[k] = a[k][None]
    elif what < .8: a[k] = np.full_like(a[k], rng.choice((0, 255)))
    elif what < .9: a[k] = np.zeros(rng.choice(((), (0,), (3,), (2, 2))))
    else: a[k] = np.where(rng.random() < 2, a[k][::-1], a[k])[..., :-1] if a[k].ndim > 1 else a[k] + 1
    out = io.BytesIO()
    np.savez(out, **a)
    return out.getvalue()

KINDS = {'.json': [values]*24 + BYTES + RARE + [nested], '.jsonl': [lines]*8 + BYTES + RARE,
         '.csv': [lines]*8 + BYTES + RARE, '.txt': [lines]*6 + BYTES + RARE, '.yaml': [lines]*6 + BYTES + RARE,
         '.safetensors': [header]*7 + [numbers]*5 + [shapes]*5 + BYTES + RARE,
         '.pt': [pickled]*20 + BYTES + RARE, '.ckpt': [pickled]*16 + BYTES + RARE, '.npz': [arrays]*6 + BYTES + RARE}

def mutate(rng: random.Random, path: Path) -> list[str]: # the names of what happened
    "Change one file."
    done, data = [], path.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(KINDS.get(path.suffix, BYTES*3 + RARE))
        if not data: break
        try: data = kind(rng, data)
        except Exception: # a structured change of what an earlier one made unreadable
            kind = flips
            data = flips(rng, data)
        done.append(kind.__name__)
    path.write_bytes(data)
    return done

# ---------------------------------------------------------------- the doors

class Door:
    "Something valid in a folder, what of it is changed, and who opens it."
    def __init__(self, name, make, files, opens, weight=1):
        self.name, self.make, self.files, self.opens, self.weight = name, make, files, opens, weight

def finite(*tensors): # raises what is no allowed outcome
    import torch
    for v in tensors: assert torch.isfinite(v.float()).all(), 'not finite'

def picture(k=0, size=24): # an RGB image with some structure
    import numpy as np
    from PIL import Image
    y, x = np.mgrid[:size, :size + 6]
    return Image.fromarray(np.stack([(x*9 + k*40) % 256, (y*11) % 256, (x*y + k) % 256], -1).astype(np.uint8))

def make_pictures(suffix, **how):
    def make(folder: Path):
        for k, name in enumerate(('a', 'b', 'c')): # the one in the middle is changed
            if name == 'b': picture(k).save(folder/f'b{suffix}', **how)
            else: picture(k).save(folder/f'{name}.png')
    return make

def open_folder(folder: Path, size=16):
    from ldm_nb.datasets.sources import load_images
    got = load_images(str(folder), size, 10)
    assert got['image'].shape[1:] == (3, size, size) and 2 <= len(got['image']) <= 3, got['image'].shape
    if 'caption' in got: assert all(isinstance(c, str) for c in got['caption'])
    return len(got['image'])

def open_one(pattern):
    def opens(folder: Path):
        from ldm_nb.datasets import images
        im = images.open_picture(next(folder.glob(pattern)))
        x = images.to_float(__import__('numpy').asarray(images.to_rgb(im)).copy())
        assert x.ndim == 3 and x.shape[0] == 3 and x.abs().max() <= 1
        finite(x)
    return opens

def open_mask(folder: Path):
    from ldm_nb.datasets import images
    m = images.to_mask(images.open_picture(folder/'m.png'))
    assert m.ndim == 3 and m.shape[0] == 1 and ((m == 0) | (m == 1)).all(), (m.shape, m.unique()[:5])

def make_mask(folder: Path):
    from PIL import Image, ImageDraw
    im = Image.new('RGBA', (24, 24), (0, 0, 0, 0))
    ImageDraw.Draw(im).rectangle((5, 5, 15, 15), fill=(255, 40, 0, 255))
    im.save(folder/'m.png')

def captioned(kind):
    def make(folder: Path):
        rows = [dict(file_name=f'{n}.png', text=f'a {w} house on a hill')
                for n, w in zip('abc', ('red', 'blue', 'grüne'))]
        for k, r in enumerate(rows): picture(k).save(folder/r['file_name'])
        if kind == 'jsonl':
            text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
            (folder/'metadata.jsonl').write_text(text, 'utf-8')
            return
        with open(folder/'metadata.csv', 'w', newline='', encoding='utf-8') as f:
            w = csv.DictWriter(f, ['file_name', 'text'])
            w.writeheader()
            w.writerows(rows)
    return make

def small_ae(f=2):
    from ldm_nb.autoencoder import Autoencoder
    return Autoencoder(z_ch=2, ch=8, ch_mult=(1,)*(f.bit_length()), num_res_blocks=1, groups=4, mid_attn=False)

VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz',
         *('##' + c for c in 'abcdefghijklmnopqrstuvwxyz'), 'red', 'house', 'on', 'hill']

def small_ldm(length=8): # ids of a caption
    import torch
    from ldm_nb.attention import conditional_unet
    from ldm_nb.core import LatentDiffusion
    from ldm_nb.embedders import TextEmbedder
    torch.manual_seed(0)
    e = TextEmbedder(VOCAB, dim=8, depth=1, heads=2, max_length=length)
    net = conditional_unet(8, heads=2, in_ch=2, out_ch=2, ch=8, ch_mult=(1,), attn_factors=(1,), groups=4)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    return LatentDiffusion(small_ae(), net, e, size=8).eval()

def draws(ldm):
    import torch
    y = {} if ldm.embedder is None else dict(y='a red house')
    try: x = ldm.sample(**y, n=1, steps=2, seed=0, size=8)
    except ValueError as e: # absurd weights are known when something is drawn, and by no file
        if 'not finite' in str(e) or 'NaN or infinite' in str(e): return
        raise
    assert x.shape == (1, 3, 8, 8), x.shape
    finite(x)
    assert torch.is_tensor(x)

def open_model(folder: Path):
    from ldm_nb.core import LatentDiffusion
    draws(LatentDiffusion.from_pretrained(folder))

def make_first_stage(folder: Path):
    import torch
    from ldm_nb.autoencoder import save_autoencoder
    torch.manual_seed(0)
    save_autoencoder(small_ae(), folder)

def open_first_stage(folder: Path):
    import torch
    from ldm_nb.autoencoder import load_autoencoder
    ae = load_autoencoder(folder)
    y = ae.reconstruct(torch.zeros(1, 3, 8, 8))
    assert y.shape == (1, 3, 8, 8), y.shape
    if torch.isfinite(y).all(): return
    from ldm_nb.metrics.distances import embed               # absurd weights are known when pictures are measured
    try: embed(lambda x: (x.flatten(1), None), y)
    except ValueError: return
    finite(y)

def make_reader(folder: Path):
    import torch
    from ldm_nb.metrics.reader import Reader, save_reader
    torch.manual_seed(0)
    save_reader(Reader(widths=(8, 8, 8, 8, 8)), folder)

def open_reader(folder: Path):
    import torch
    from ldm_nb.metrics.reader import load_reader, read
    said = read(load_reader(folder), torch.zeros(2, 3, 64, 64))
    assert said and len(said) == 2

def small_run(folder: Path, steps=6):
    "A trainer as the recipes make it, in milliseconds."
    import torch
    from torch import nn
    from ldm_nb.engine.callbacks import ExplosionGuard, Log, SaveCheckpoints
    from ldm_nb.training import Trainer
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    saver = SaveCheckpoints(folder, every=2, keep=2, model=dict(width=8))
    loss = lambda m, b, rng: (m(b) + .01*rng((len(b), 4))).square().mean()
    return Trainer(model, loss, lambda step, rows: torch.full((4, 4), step/10.)[rows], steps, batch_size=4,
                   callbacks=[ExplosionGuard(8), Log(saver, 1), saver])

def make_run(folder: Path):
    for step, _ in small_run(folder):
        if step == 5: break

def open_run(folder: Path):
    from ldm_nb.engine.callbacks import SaveCheckpoints, find
    t = small_run(folder)
    done = find(t, SaveCheckpoints).resume(t)
    assert done in (0, 2, 4), done
    assert [s for s, _ in t] == list(range(done + 1, 7))
    assert all(math.isfinite(r['loss']) for r in find(t, type(t.callbacks[1])).rows)
    finite(*(v for v in t.model.state_dict().values()))

def open_log(folder: Path):
    from ldm_nb.lab.watch import follow_log
    got = [r for r in follow_log(folder, patience=.05, nap=.01) if r is not None]
    assert all(isinstance(s, int) and isinstance(v, float) for s, v in got), got

def make_unfinished(folder: Path): # a run of the recipes whose checkpoint is there and whose model is not
    from ldm_nb.cli.recipes import train_diffusion
    small = folder.parent/'small-first-stage'
    if not small.exists(): small.mkdir(); make_first_stage(small)
    data = folder.parent/'small-data'
    if not data.exists():
        data.mkdir()
        for k in range(8): picture(k).save(data/f'{k}.png')
    with contextlib.redirect_stdout(io.StringIO()):
        train_diffusion(folder, data=str(data), preset='tiny', autoencoder=str(small), condition='none', steps=4,
                        save_every=2, size=8, batch_size=2, model=dict(ch=8, ch_mult=(1,), attn_factors=(), groups=4),
                        device='cpu', precision='fp32', quiet=True)
    for name in ('config.json', 'model.safetensors'): (folder/name).unlink(missing_ok=True)

def make_cache(folder: Path):
    import torch
    from ldm_nb.engine.cache import encode_dataset
    torch.manual_seed(0)
    encode_dataset(small_ae(), 'abc', cache_pictures(), folder, shard=4, quiet=True)

def cache_pictures():
    import torch
    return (torch.arange(10*3*8*8) % 251).reshape(10, 3, 8, 8).to(torch.uint8)

def open_cache(folder: Path): # as it lies there
    import torch
    from ldm_nb.engine.cache import LatentCache
    mean, std = LatentCache(folder, 'abc').moments(torch.arange(10))
    assert mean.shape == std.shape == (10, 2, 4, 4), mean.shape
    finite(mean, std)

def fill_cache(folder: Path): # as a training asks for it: what is damaged is encoded again
    import torch
    from ldm_nb.engine.cache import encode_dataset
    torch.manual_seed(0)
    cache = encode_dataset(small_ae(), 'abc', cache_pictures(), folder, shard=4, quiet=True)
    mean, std = cache.moments(torch.arange(10))
    assert mean.shape == (10, 2, 4, 4), mean.shape
    finite(mean, std)
    want = small_moments(folder)
    assert torch.equal(mean, want), 'other latents than were encoded'

def small_moments(folder: Path):
    import torch
    from ldm_nb.datasets.images import to_float
    torch.manual_seed(0)
    with torch.no_grad(): return small_ae().posterior(to_float(cache_pictures())).mean.half().float()

def make_postcards(folder: Path):
    from ldm_nb.datasets.postcards import Postcards, render_all
    render_all(Postcards(20, 8), 1, folder)

def open_postcards(folder: Path):
    from ldm_nb.datasets.postcards import Postcards, render_all
    got = render_all(Postcards(20, 8), 1, folder)
    assert got['image'].shape == (20, 3, 8, 8) and got['map'].shape == (20, 8, 8), got['image'].shape
    assert len(got['boxes']) == len(got['caption']) == 20 and all(b.shape[1:] == (5,) for b in got['boxes'])
    assert str(got['image'].dtype) == str(got['map'].dtype) == 'torch.uint8', (got['image'].dtype, got['map'].dtype)
    finite(*got['boxes'])

@contextlib.contextmanager
def cache_at(folder: Path):
    old = os.environ.get('LDM_NB_CACHE')
    os.environ['LDM_NB_CACHE'] = str(folder)
    try: yield
    finally: os.environ.pop('LDM_NB_CACHE') if old is None else os.environ.update(LDM_NB_CACHE=old)

def make_photos(folder: Path):
    from ldm_nb.datasets.sources import load_images
    with cache_at(folder): load_images('photos', 8, 1000, 0)

def open_photos(folder: Path):
    from ldm_nb.datasets.sources import load_images
    with cache_at(folder): x = load_images('photos', 8, 1000, 0)['image']
    assert x.shape == (1000, 3, 8, 8) and str(x.dtype) == 'torch.uint8', (x.shape, x.dtype)

def make_vocabulary(folder: Path): (folder/'vocab.txt').write_text('\n'.join(VOCAB) + '\n')

def open_vocabulary(folder: Path):
    from ldm_nb.text import Tokenizer, load_vocab
    ids = Tokenizer(load_vocab(folder/'vocab.txt'), 64)(['a red house on a hill'])
    assert ids.shape == (1, 64)

def make_pipeline(folder: Path):
    from ldm_nb.interop.pipelines import save_diffusers
    save_diffusers(small_ldm(77), folder)

def open_pipeline(folder: Path):
    from ldm_nb.interop.pipelines import load_diffusers
    draws(load_diffusers(folder))

TARGET = 'ldm.modules.'
UNCONDITIONAL = dict(model=dict(target='ldm.models.diffusion.ddpm.LatentDiffusion', params=dict(
    linear_start=.0015, linear_end=.0195, timesteps=1000, image_size=4, channels=3, conditioning_key=None,
    scale_factor=.3,
    cond_stage_config='__is_unconditional__',
    unet_config=dict(target=TARGET + 'diffusionmodules.openaimodel.UNetModel', params=dict(
        image_size=4, in_channels=3, out_channels=3, model_channels=32, attention_resolutions=[], num_res_blocks=1,
        channel_mult=[1], num_head_channels=32)),
    first_stage_config=dict(target='ldm.models.autoencoder.AutoencoderKL', params=dict(
        embed_dim=3, lossconfig=dict(target='torch.nn.Identity'), ddconfig=dict(
            double_z=True, z_channels=3, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[], dropout=0.))))))

def make_compvis(folder: Path):
    import torch, yaml
    from ldm_nb.interop.compvis import first_stage_keys, unet_keys
    from ldm_nb.interop.weights import give
    from ldm_nb.autoencoder import Autoencoder
    from ldm_nb.unet import UNet
    (folder/'config.yaml').write_text(yaml.safe_dump(UNCONDITIONAL))
    torch.manual_seed(0)
    net = UNet(in_ch=3, out_ch=3, ch=32, ch_mult=(1,), num_res_blocks=1, attn_factors=(), head_ch=32)
    ae = Autoencoder(z_ch=3, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    state = {f'model.diffusion_model.{k}': v for k, v in give(net, unet_keys(net)).items()}
    state |= {f'first_stage_model.{k}': v for k, v in give(ae, first_stage_keys(ae)).items()}
    torch.save(dict(state_dict=state), folder/'model.ckpt')

def open_compvis(folder: Path):
    from ldm_nb.interop.compvis import load_compvis
    draws(load_compvis(folder/'model.ckpt', folder/'config.yaml'))

DOORS = [
    *(Door(f'folder with a {s[1:]}', make_pictures(s, **how), f'b{s}', open_folder, 2) for s, how in
      (('.png', {}), ('.jpg', {}), ('.webp', {}), ('.gif', {}), ('.bmp', {}), ('.tif', {}), ('.ppm', {}))),
    Door('folder with a tiff in CMYK', lambda f: (picture(1).convert('CMYK').save(f/'b.tif'), picture().save(f/'a.png'),
                                                  picture(2).save(f/'c.png')), 'b.tif', open_folder, 2),
    Door('folder with a packed tiff', make_pictures('.tif', compression='tiff_lzw'), 'b.tif', open_folder, 1),
    Door('one jpeg', make_pictures('.jpg'), 'b.jpg', open_one('b.*'), 2),
    Door('one png', make_pictures('.png'), 'b.png', open_one('b.*'), 2),
    Door('one tiff', make_pictures('.tif'), 'b.tif', open_one('b.*'), 2),
    Door('mask', make_mask, 'm.png', open_mask, 3),
    Door('metadata.jsonl', captioned('jsonl'), 'metadata.jsonl', open_folder, 4),
    Door('metadata.csv', captioned('csv'), 'metadata.csv', open_folder, 3),
    Door('model', lambda f: small_ldm().save_pretrained(f), '*', open_model, 10),
    Door('first stage', make_first_stage, '*', open_first_stage, 5),
    Door('reader', make_reader, '*', open_reader, 2),
    Door('checkpoint', make_run, 'checkpoints/step-0000004.pt', open_run, 8),
    Door('log, resumed', make_run, 'log.jsonl', open_run, 2),
    Door('log, followed', make_run, 'log.jsonl', open_log, 3),
    Door('unfinished run', make_unfinished, 'run.json', open_model, 3),
    Door('unfinished run, checkpoint', make_unfinished, 'checkpoints/step-*.pt', open_model, 2),
    Door('latent cache, opened', make_cache, '*', open_cache, 4),
    Door('latent cache, filled', make_cache, '*', fill_cache, 4),
    Door('postcards', make_postcards, '*/*.npz', open_postcards, 3),
    Door('photographs', make_photos, '*.safetensors', open_photos, 1),
    Door('vocabulary', make_vocabulary, 'vocab.txt', open_vocabulary, 3),
    Door('pipeline of diffusers', make_pipeline, '**/*', open_pipeline, 6),
    Door('checkpoint of the authors', make_compvis, '*', open_compvis, 5)]
TURNS = [d for d in DOORS for _ in range(d.weight)]
random.Random(0).shuffle(TURNS)

# ---------------------------------------------------------------- one input, and who watches

def seeds_of(work: Path, door: Door) -> Path: # a folder with what is valid, made once
    there = work/'valid'/re.sub(r'\W+', '-', door.name)
    if not (there/'.made').exists():
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir(parents=True)
        with cache_at(work/'cache'): door.make(there)
        (there/'.made').write_text('')
    return there

def try_input(n: int, seed: int, work: Path) -> dict:
    "Make input number n, open it, say what came of it."
    rng, door = random.Random(f'{seed} {n}'), TURNS[n % len(TURNS)]
    here = work/'now'
    shutil.rmtree(here, ignore_errors=True)
    try: shutil.copytree(seeds_of(work, door), here, symlinks=True)
    except Exception: # what is valid cannot be made: the door itself is broken
        return dict(n=n, door=door.name, outcome='FINDING: no door', says=traceback.format_exc()[-600:])
    (here/'.made').unlink()
    files = sorted(p for p in here.glob(door.files) if p.is_file())
    row = dict(n=n, door=door.name)
    if not files: return row | dict(outcome='not there', says='')
    path = rng.choice(files)
    row |= dict(file=str(path.relative_to(here)), kinds=mutate(rng, path))
    start = time.process_time()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), cache_at(work/'cache'):
            warnings.simplefilter('ignore')
            door.opens(here)
        return row | dict(outcome=FINE, says='', seconds=round(time.process_time() - start, 2))
    except BaseException as e:
        return row | judged(e, path, here) | dict(seconds=round(time.process_time() - start, 2))

ALLOWED = (ValueError, OSError, MemoryError, FloatingPointError)

def judged(e: BaseException, path: Path, here: Path) -> dict: # outcome and says
    "Whether an error may come of a damaged file: of an allowed kind, one sentence, with the name of the file."
    said = str(e)
    names = (str(here), *(p.name for p in path.parent.iterdir())) # weights and config: either may be blamed
    kind = 'refused'
    if isinstance(e, AssertionError): kind = 'FINDING: wrong result'
    elif not isinstance(e, ALLOWED): kind = 'FINDING: another error'
    elif isinstance(e, (UnicodeError, json.JSONDecodeError)): kind = 'FINDING: another error'
    elif not isinstance(e, FloatingPointError) and not any(k in said for k in names): kind = 'FINDING: names no file'
    elif '\n' in said or len(said) > 900: kind = 'FINDING: not one sentence'
    out = dict(outcome=kind, says=f'{type(e).__name__}: {said}'.replace(str(here), 'HERE')[:300])
    if kind.startswith('FINDING'): out['trace'] = traceback.format_exc()[-1500:].replace(str(here), 'HERE')
    return out

def serve(pipe, seed: int, work: str, loud: bool = False):
    "In a process of its own: numbers come in, rows go out."
    os.setsid()
    multiprocessing.set_start_method(None, force=True)         # of its own processes: as usual here
    import torch
    torch.set_num_threads(1)
    os.environ |= dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not loud:
        out = os.open(Path(work)/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
    while (n := pipe.recv()) is not None: pipe.send(try_input(n, seed, Path(work)))

def used(pid: int) -> float: # seconds of processor time
    try: fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError: return 0.
    return sum(map(int, fields[11:15]))/os.sysconf('SC_CLK_TCK')

class Watched:
    "A process that tries inputs, and is replaced when it dies or hangs."
    def __init__(self, ctx, seed: int, work: Path): self.ctx, self.seed, self.work, self.p = ctx, seed, work, None

    def start(self):
        self.pipe, theirs = self.ctx.Pipe()
        self.p = self.ctx.Process(target=serve, args=(theirs, self.seed, str(self.work)))
        self.p.start()
        theirs.close()

    def end(self):
        if self.p is None: return
        with contextlib.suppress(ProcessLookupError): os.killpg(self.p.pid, signal.SIGKILL)
        self.p.join()
        self.p = None

    def __call__(self, n: int) -> dict:
        if self.p is None: self.start()
        self.pipe.send(n)
        began, cpu, row = time.time(), used(self.p.pid), dict(n=n, door=TURNS[n % len(TURNS)].name)
        while True:
            try:
                if self.pipe.poll(.2): return self.pipe.recv()
            except (EOFError, ConnectionError):
                self.p.join(5)
                row |= dict(outcome='FINDING: crash', says=f'exit code {self.p.exitcode}')
                self.end()
                return row
            if used(self.p.pid) - cpu > HANGS or time.time() - began > 6*HANGS:
                self.end()
                return row | dict(outcome='FINDING: hang', says=f'{time.time() - began:.0f} s')

def context(): # one process imports everything, once, and forks each run: a process of its own in milliseconds
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(PRELOAD)
    return ctx

def try_inputs(numbers, seed: int, work: Path, rows: Path | None = None, say=print, until: float = math.inf
    ) -> list[dict]:
    "All of these numbers; those whose rows are there already are taken from there."
    done = {}
    if rows and rows.is_file():
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            if row['seed'] == seed: done[row['n']] = row
    work.mkdir(parents=True, exist_ok=True)
    watched = Watched(context(), seed, work)
    try:
        for k, n in enumerate(numbers):
            if n in done: continue
            if time.time() > until: break
            done[n] = row = watched(n) | dict(seed=seed)
            if rows:
                rows.parent.mkdir(parents=True, exist_ok=True)
                with open(rows, 'a') as f: f.write(json.dumps(row) + '\n')
            if row['outcome'].startswith('FINDING'): say(f'{n}: {row["door"]}: {row["outcome"]}: {row["says"]}')
            elif k % 500 == 0: say(f'{k} of {len(numbers)} inputs')
    finally: watched.end()
    return [done[n] for n in numbers if n in done]

def counted(rows: list[dict]) -> dict: # door -> outcome -> how many
    doors = {d.name: Counter() for d in DOORS}
    for r in rows: doors[r['door']][r['outcome']] += 1
    return {k: dict(v) for k, v in doors.items() if v}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--inputs', type=int, default=5000)
    p.add_argument('--first', type=int, default=0)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', type=int, nargs='+', help='numbers of inputs; says all that is known of them')
    p.add_argument('--door', help='only inputs of doors with this in their name')
    p.add_argument('--rows', type=Path, default=Path('runs/breaking/inputs.jsonl'))
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        numbers = a.only or [n for n in range(a.first, a.first + a.inputs)
                             if not a.door or a.door in TURNS[n % len(TURNS)].name]
        got = try_inputs(numbers, a.seed, Path(tmp), None if a.only or a.door else a.rows)
        for r in got if a.only else []: print('\n'.join(f'{k}: {v}' for k, v in r.items()), '\n')
        print(json.dumps(counted(got), indent=1))
        sys.exit(any(r['outcome'].startswith('FINDING') for r in got))
