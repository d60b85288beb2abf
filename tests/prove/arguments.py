"""What `LatentDiffusion.sample` and the four commands make of arguments that nobody should give: numbers of a thousand
digits, tensors of other shapes, text where a number belongs, paths that lead nowhere. Each set is drawn from its number
alone, so that what was found can be called again.

    python tests/prove/arguments.py                   1,000 sets of each: a few minutes on one thread
    python tests/prove/arguments.py sample --n 60     fewer, of one
    python tests/prove/arguments.py sample --only 417 one, with its traceback

Right is: `sample` raises ValueError, FileNotFoundError or MemoryError, or gives finite pictures of the promised
shape, and leaves modes, default type, gradients and the global stream of random numbers alone. A command ends with 0,
or with 2 and one line (ldm-diagnose also with 1: it found something), and where it fails nothing is left behind."""
import argparse, contextlib, io, json, os, random, signal, sys, tempfile, time, traceback, warnings
from fractions import Fraction
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch import nn
from ldm_nb.attention import conditional_unet
from ldm_nb.autoencoder import Autoencoder, save_autoencoder
from ldm_nb.cli import diagnose, evaluate, sample, train
from ldm_nb.core import LatentDiffusion
from ldm_nb.embedders import ClassEmbedder, TextEmbedder
from ldm_nb.engine.files import data_path
from ldm_nb.guidance import Guidance
from ldm_nb.paper.hybrid import HybridEmbedder
from ldm_nb.paper.images import ImageEmbedder, InpaintEmbedder
from ldm_nb.paper.layouts import LayoutEmbedder
from ldm_nb.paper.maps import MapEmbedder
from ldm_nb.interop.embedders import VectorEmbedder
from ldm_nb.samplers import SAMPLERS, SPACINGS
from ldm_nb.text import load_vocab
from ldm_nb.unet import UNet

SIDE = 32 # pixels of the toy models
SECONDS = 60 # for one set

# ---- toy models, one of each condition ----

def models() -> dict: # name -> (model, what a right call says, prompts in it)
    torch.manual_seed(0)
    ae = Autoencoder(ch=16, num_res_blocks=1, groups=8)
    hole = torch.zeros(1, SIDE, SIDE)
    hole[:, 8:20, 8:20] = 1
    picture = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))*2 - 1
    text = TextEmbedder(load_vocab(data_path('tokenizer/vocab.txt')), dim=32, depth=1)
    kinds = dict(
        none=(None, {}, 1), text=(text, dict(y='a red house at night'), 1),
        classes=(ClassEmbedder(4, 32), dict(y=[1, 3]), 2),
        layout=(LayoutEmbedder(9, dim=32, depth=1), dict(y=[[1, 0, 0, .5, 1]]), 1),
        map=(MapEmbedder(9), dict(y=torch.zeros(SIDE, SIDE, dtype=torch.int64)), 1),
        x4=(ImageEmbedder(4), dict(image=picture[:, :, ::4, ::4]), 2),
        inpaint=(InpaintEmbedder(4), dict(image=picture[:1], mask=hole), 1),
        hybrid=(HybridEmbedder(said=text, around=InpaintEmbedder(4)), dict(y='dusk', image=picture[:1], mask=hole),
                1),
        vectors=(VectorEmbedder(8), dict(y=torch.ones(8)), 1))
    return {k: (toy(ae, e), asked, n) for k, (e, asked, n) in kinds.items()}

def toy(ae, embedder) -> LatentDiffusion:
    sizes = dict(in_ch=4 + getattr(embedder, 'concat_ch', 0), out_ch=4, ch=32, groups=8)
    net = (conditional_unet(embedder.context_dim, **sizes) if embedder and embedder.context_dim else UNet(**sizes))
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    return LatentDiffusion(ae, net, embedder, size=SIDE).train()

# ---- values ----

class Odd:
    "An object that knows nothing."
    def __repr__(self): return 'Odd()'

def anything(rng: random.Random): # a value that may stand anywhere, right nowhere or nearly so
    return rng.choice([
        lambda: None, lambda: '', lambda: 'x', lambda: '\udce9', lambda: '\0', lambda: 'a red house', lambda: b'ddim',
        lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 3, lambda: 10**30, lambda: -10**400,
        lambda: 10**5000,
        lambda: .5, lambda: -1e20, lambda: 1e308, lambda: float('nan'), lambda: float('inf'), lambda: 1j,
        lambda: Fraction(1, 3), lambda: np.int64(2), lambda: np.float16(.5), lambda: np.bool_(True),
        lambda: np.array(2),
        lambda: np.array(['a']), lambda: np.array([None]), lambda: np.datetime64('2020-01-01'), lambda: [],
        lambda: [1],
        lambda: [None], lambda: [[[]]], lambda: ['dusk', 3], lambda: ('a', 'b'), lambda: {}, lambda: {'y': 1},
        lambda: {'said': 'dusk'}, lambda: {1, 2}, lambda: range(3), lambda: (k for k in range(3)), lambda: Odd(),
        lambda: Odd, lambda: print, lambda: torch.tensor(.5), lambda: torch.tensor(3), lambda: torch.tensor(True),
        lambda: torch.zeros(0), lambda: torch.zeros(2), lambda: torch.zeros(3, SIDE, SIDE),
        lambda: torch.zeros(3, 0, 0),
        lambda: torch.full((3, SIDE, SIDE), float('nan')), lambda: torch.full((3, SIDE, SIDE), 200.),
        lambda: torch.zeros(3, SIDE, SIDE, dtype=torch.uint8),
        lambda: torch.zeros(3, SIDE, SIDE, dtype=torch.complex64),
        lambda: torch.zeros(3, SIDE, SIDE, device='meta'), lambda: torch.zeros(3, SIDE, SIDE).to_sparse(),
        lambda: torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True), lambda: torch.zeros(3, 7, 9),
        lambda: torch.zeros(1, SIDE, SIDE), lambda: torch.ones(SIDE, SIDE, dtype=torch.int64),
        lambda: torch.full((SIDE, SIDE), 9), lambda: torch.zeros(1, 4, 8, 8), lambda: torch.zeros(2, 4, 8, 8).half(),
        lambda: [torch.zeros(3, SIDE, SIDE), torch.zeros(3, 64, 64)], lambda: [torch.zeros(3, SIDE, SIDE)]*3,
        lambda: np.zeros((3, SIDE, SIDE))[:, ::-1], lambda: np.zeros((3, SIDE, SIDE), '>f4'),
        lambda: np.zeros((3, SIDE, SIDE), object), lambda: Image.new('RGB', (SIDE, SIDE)),
        lambda: Path('picture.png'),
        lambda: torch.device('cpu'), lambda: torch.float32, lambda: nn.Linear(2, 2), lambda: io.BytesIO(b''),
        lambda: torch.Generator(), lambda: slice(0, 2), lambda: [[1, 0, 0, 1, 1], [2, 'a', None, 1, 1]],
        lambda: [[float('nan')]*5], lambda: [[1, 0, 0, 10**400, 1]], lambda: ['a house']*3, lambda: 'house '*400,
        lambda: [0, 99], lambda: [True], lambda: [1.5], lambda: torch.ones(2, 8), lambda: torch.ones(3, 5, 8)])()

def fitting(name: str, rng: random.Random): # a value of the right kind, at its edges
    return dict(n=lambda: rng.choice([1, 2, 3, np.int32(2)]), steps=lambda: rng.choice([1, 2, 3]),
                guidance=lambda: rng.choice([0, 1, 3., -2, 1000, Guidance(3, .7), Guidance(3, interval=(.5, 2.)),
                                             np.float32(2)]), sampler=lambda: rng.choice(list(SAMPLERS)),
                eta=lambda: rng.choice([0, 1, .5, 1e-300]), seed=lambda: rng.choice([0, 2**70, 10**300, np.int64(5)]),
                size=lambda: rng.choice([SIDE, (SIDE, 48), [16, 16]]),
                strength=lambda: rng.choice([1, .5, 1e-9, .999]), spacing=lambda: rng.choice(list(SPACINGS)),
                batch_size=lambda: rng.choice([1, 2, 10**30]),
                negative=lambda: rng.choice(['dawn', 2, [[0, 0, 0, 1, 1]], None]),
                latents=lambda: torch.randn(rng.choice([1, 2]), 4, SIDE//4, SIDE//4),
                init=lambda: torch.zeros(3, SIDE, SIDE), image=lambda: torch.zeros(3, SIDE, SIDE),
                mask=lambda: torch.ones(1, SIDE, SIDE),
                y=lambda: rng.choice(['dusk', ['dusk', 'dawn'], 2, [0, 1], None]))[name]()

ARGUMENTS = ('y', 'n', 'steps', 'guidance', 'sampler', 'eta', 'seed', 'size', 'latents', 'image', 'mask', 'negative',
             'init', 'strength', 'spacing', 'batch_size')

def sample_arguments(number: int, asked: dict) -> dict: # of the condition; what `sample` is called with
    rng = random.Random(f'sample {number}')
    out = dict(asked, steps=rng.choice([1, 2, 3]))
    for name in rng.sample(ARGUMENTS, rng.choice([0, 1, 1, 1, 2, 2, 3])):
        out[name] = fitting(name, rng) if rng.random() < .4 else anything(rng)
    return out

# ---- one set of `sample` ----

def globals_now(ldm) -> tuple:
    return ([m.training for m in ldm.modules()], torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_rng_state().tolist()[:40], random.getstate()[1][:5], np.random.get_state()[1][:5].tolist())

def try_sample(number: int, toys: dict) -> str: # 'refused', 'drew', or what is wrong
    name = list(toys)[number % len(toys)]
    ldm, asked, count = toys[name]
    how, before = sample_arguments(number, asked), globals_now(ldm)
    try: x = ldm.sample(**how)
    except (ValueError, FileNotFoundError, MemoryError) as e:
        if not str(e).strip(): return f'wrong: {type(e).__name__} without words'
        return 'refused' if globals_now(ldm) == before else 'wrong: what is global was changed, and it raised'
    if globals_now(ldm) != before: return 'wrong: what is global was changed'
    f = ldm.autoencoder.f
    r = ldm.request(**{k: v for k, v in how.items() if k != 'batch_size'})
    wide = how.get('size') or (SIDE, SIDE)
    hw = tuple(wide) if isinstance(wide, (tuple, list)) else (wide, wide)
    if 'y' not in how or how['y'] is asked.get('y'): # nothing else decides how many
        if 'image' not in how or how['image'] is asked.get('image'):
            if len(r) != count*int(how.get('n', 1)): return f'wrong: {len(r)} pictures of {count} prompts'
            if 'init' not in how and (r.shape[1]*f, r.shape[2]*f) != hw: return f'wrong: {r.shape} for {hw}'
    if x.shape != (len(r), 3, r.shape[1]*f, r.shape[2]*f): return f'wrong: {tuple(x.shape)}'
    if not x.isfinite().all() or x.abs().max() > 1 or x.dtype != torch.float32: return 'wrong: not finite, or outside'
    return 'drew'

# ---- the commands ----

WORDS = ('', ' ', 'x', '0', '-1', '1', '2', '1.5', '1e999', 'nan', '-inf', '9'*30, '9'*5000, 'None', 'caf\udce9',
         'a\0b', 'a\nb', '💥', '.', '..', '/', '~', '~nobody/x', '/dev/null', 'n'*300, '%s', '{0}', '$x', '-',
         'picture.png', 'broken.png', 'empty.png', 'lost.png', 'file', 'folder', 'folder/x.png', 'nowhere/x.png',
         'text', 'postcards+', 'checkpoint.pt', 'notes.json')
SMALL = ('0', '1', '2', '3', '-1', '1.5', '', 'x', '9'*30, 'nan')
FILES = ('picture.png', 'other.png', 'mask.png', 'map.png', 'broken.png', 'empty.png', 'file', 'folder',
         'nowhere.png', '', '/dev/null', 'lost.png', 'notes.json', '~')
OUT = ('out.png', 'out.jpg', 'out.pdf', 'out.txt', 'out', 'file/x.png', 'nowhere/x.png', 'folder', '', 'lost.png',
       'null.png', '~/x.png', 'n'*246 + '.png', 'n'*300 + '.png', 'link.png')
MODELS = ('text', 'text', 'classes', 'none', 'map', 'inpaint', 'x4', 'layout', 'folder', 'damaged', 'no-such',
          '', 'ae', '.')
PROMPTS = ('a red house', 'dusk', '2', '99', 'house .2 .4 .5 .8', 'house', '', ' ', '²', 'caf\udce9', 'a\0b', '$x',
           '%d', '9'*5000, 'tree nan 0 1 1', 'house '*99)
RIGHT = (['a red house', '--model', 'text'], ['--model', 'none'], ['2', '--model', 'classes'],
         ['--model', 'map', '--map', 'map.png'], ['--model', 'x4', '--image', 'picture.png'],
         ['--model', 'inpaint', '--image', 'picture.png', '--mask', 'mask.png'], ['1 0 0 .5 1', '--model', 'layout'])
SEEDS = ('0', '7', '-1', '1.5', 'x', '9'*30)

COMMANDS = { # name -> (main, words that are always there, option -> values; None: it takes none)
    'ldm-sample': (
        sample.main, lambda rng: [*(rng.choice(RIGHT) if rng.random() < .8 else
                                    [*rng.sample(PROMPTS, rng.choice([0, 1, 2])), '--model', rng.choice(MODELS)]),
                                  '--n', '1', '--steps', '1', '--out', 'out.png', '--device', 'cpu'],
        {'--model': MODELS, '--out': OUT, '--n': SMALL, '--steps': SMALL,
         '--guidance': (*SMALL, '3', '1e20', '-1e20'),
         '--eta': (*SMALL, '.5'), '--seed': SEEDS, '--size': (*SMALL, '32', '32x48', '4x', 'x', '16x16', '33', '9'*9),
         '--image': FILES, '--mask': FILES, '--map': FILES, '--init': FILES, '--strength': (*SMALL, '.5', '1e-300'),
         '--negative': PROMPTS, '--sampler': (*SAMPLERS, 'x', ''), '--spacing': (*SPACINGS, 'x', ''),
         '--device': ('cpu', 'cuda:9', 'x', '', 'meta'), '--batch-size': SMALL, '--frobnicate': WORDS}),
    'ldm-train': (
        train.main,
        lambda rng: [rng.choice(['autoencoder', 'diffusion', 'reader', 'x'] if rng.random() < .1 else
                                ['autoencoder', 'diffusion', 'diffusion']),
                     '--preset', 'tiny', '--out', 'run', '--quiet', '--tracker', 'none', '--device', 'cpu',
                     '--on', 'a100', '--dry-run'],
        {'--data': ('postcards', 'photos', 'folder', 'file', 'nowhere', '', 'postcards+', '~', 'torchvision:X'),
         '--preset': ('tiny', 'laptop', 'x', '', 'paper'), '--out': ('', '~/r', 'file', 'file/r', 'lost.png', 'new'),
         '--init': ('', 'folder', 'text', 'ae', 'no-such'), '--f': SMALL, '--regulariser': ('kl', 'vq', 'x', ''),
         '--autoencoder': ('ae', 'ae-kl-f4', 'text', 'folder', '', 'no-such'), '--tokenizer': ('shipped', 'x', ''),
         '--condition': ('none', 'text', 'class', 'x', '', 'text+inpaint', 'text+x', '+', 'none+text'),
         **{k: SMALL for k in ('--steps', '--batch-size', '--lr', '--n', '--accumulate', '--workers', '--save-every',
                               '--log-every', '--keep', '--z-ch', '--codes', '--crop', '--kl-weight', '--beta',
                               '--restarts', '--perceptual-weight', '--adversary-start', '--adversary-warmup',
                               '--adversary-weight')},
         '--seed': SEEDS, '--pixel-loss': ('l1', 'l2', 'x', ''), '--beta-on': ('commitment', 'codebook', 'x'),
         '--perceptual': ('none', 'lpips', 'x', ''), '--precision': ('fp32', 'bf16', 'x', ''), '--on': WORDS,
         '--device': ('cpu', 'cuda:9', 'x', ''), '--checkpointing': None, '--channels-last': None, '--resume': None,
         '--frobnicate': WORDS}),
    'ldm-evaluate': (evaluate.main,
                     lambda rng: ['--model', rng.choice(['text', 'none', 'ae']), '--n', '20', '--steps', '1',
                           '--device', 'cpu', '--sampler', 'x' if rng.random() < .95 else 'ddim'],
              {'--model': MODELS, '--data': ('postcards', 'photos', 'folder', 'file', 'nowhere', '', 'torchvision:X'),
               '--out': ('t.json', 'new/t.json', 'file/t.json', 'folder', '', 'lost.png', '/dev/null', 'n'*300),
               '--n': ('20', '19', '0', '-1', 'x', '', '1.5'), '--steps': SMALL, '--guidance': (*SMALL, '1e20'),
               '--eta': (*SMALL, '.5'), '--seed': SEEDS, '--batch-size': SMALL, '--sampler': (*SAMPLERS, 'x', ''),
               '--features': ('reader', 'x', ''), '--device': ('cpu', 'x', ''), '--frobnicate': WORDS}),
    'ldm-diagnose': (diagnose.main, lambda rng: [rng.choice(['text', 'none', 'folder', 'x4']), '--n', '8',
                                          '--data', 'postcards' if rng.random() < .4 else 'nowhere'],
              {'--data': ('postcards', 'folder', 'file', 'nowhere', '', 'photos'), '--n': SMALL, '--seed': SEEDS,
               '--sampler': ('ddim', 'plms', 'x', ''),
               '--checkpoint': (*FILES, 'checkpoint.pt', 'list.pt', 'other.pt'),
               '--frobnicate': WORDS})}

def command_words(command: str, number: int) -> list[str]:
    rng = random.Random(f'{command} {number}')
    _, always, options = COMMANDS[command]
    words = always(rng)
    for k in rng.sample(list(options), rng.choice([0, 1, 1, 1, 2, 2, 3])):
        values = options[k]
        words += [k] if values is None else [k, rng.choice(values) if rng.random() < .8 else rng.choice(WORDS)]
    if command == 'ldm-train' and rng.random() < .05:
        words = [w for w in words if w not in ('--on', 'a100', '--dry-run')][:9]
    return words

def prepare(folder: Path, toys: dict): # what the words of a command may name
    for k, (ldm, _, _) in toys.items():
        if k not in ('hybrid', 'vectors'): ldm.save_pretrained(folder/k)
    save_autoencoder(toys['none'][0].autoencoder, folder/'ae')
    rng = np.random.default_rng(0)
    for k, size in (('picture', (SIDE, SIDE)), ('other', (70, 50)), ('mask', (SIDE, SIDE)), ('map', (SIDE, SIDE))):
        top = 9 if k == 'map' else 256
        a = rng.integers(0, top,
                         (size[1], size[0]) if k in ('map', 'mask') else (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(a).save(folder/f'{k}.png')
    (folder/'broken.png').write_bytes((folder/'picture.png').read_bytes()[:300])
    (folder/'empty.png').write_bytes(b'')
    (folder/'file').write_text('a file')
    (folder/'notes.json').write_text('{"a": 1')
    (folder/'folder').mkdir()
    for name, to in (('lost.png', 'nowhere.png'), ('null.png', '/dev/null'), ('link.png', 'picture2.png')):
        (folder/name).symlink_to(to)
    (folder/'picture2.png').write_bytes((folder/'picture.png').read_bytes())
    damaged = toys['text'][0].save_pretrained(folder/'damaged')/'model.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (folder/'checkpoint.pt').write_bytes(b'PK\x03\x04 cut short')
    torch.save([1, 2], folder/'list.pt')
    torch.save(dict(format=2, settings={}, ema={'a': torch.zeros(2)}), folder/'other.pt')

def files(folder: Path) -> dict: # name -> size and time of change, of all that lies there
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns)
            for p in folder.rglob('*') if not p.is_dir() and 'cache' not in p.parts[:len(folder.parts) + 1]}

def try_command(command: str, number: int, folder: Path) -> str: # in `folder`; 'refused', 'did it', or what is wrong
    words, before = command_words(command, number), files(folder)
    said, out, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try: COMMANDS[command][0](words)
        except SystemExit as e: code = e.code
    lines = [line for line in said.getvalue().splitlines() if not line.startswith('warning: ')]
    after = files(folder)
    if code in (0, None) or command == 'ldm-diagnose' and code == 1:
        for p in after.keys() - before.keys():
            path = folder/p
            if path.is_file() and not path.is_symlink(): path.unlink()
        return 'did it'
    if code != 2: return f'wrong: exit code {code!r}'
    if len(lines) != 1 or not lines[0].startswith('error: ') or len(lines[0]) < 15: return f'wrong: said {lines}'
    if after != before: return f'wrong: left {sorted(set(after.items()) ^ set(before.items()))[:3]}'
    return 'refused'

# ---- all of it ----

class TooLong(BaseException):
    "A set that did not end."

@contextlib.contextmanager
def at_most(seconds: int):
    def stop(*_): raise TooLong
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

@contextlib.contextmanager
def workplace(toys: dict): # a folder of its own, which is also the home folder
    with tempfile.TemporaryDirectory() as tmp:
        folder, here, home = Path(tmp).resolve(), Path.cwd(), {k: os.environ.get(k) for k in ('HOME', 'LDM_NB_CACHE')}
        prepare(folder, toys)
        os.chdir(folder)
        os.environ.update(HOME=str(folder), LDM_NB_CACHE=home['LDM_NB_CACHE'] or str(folder/'cache'))
        try: yield folder
        finally:
            os.chdir(here)
            for k, v in home.items():
                if v is None: del os.environ[k]
                else: os.environ[k] = v

def prove(what: str, numbers, toys: dict, folder: Path, loud: bool = False) -> dict: # counts; wrong: number -> words
    counts, wrong = {}, {}
    for number in numbers:
        try:
            with at_most(SECONDS), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                found = try_sample(number, toys) if what == 'sample' else try_command(what, number, folder)
        except TooLong: found = f'wrong: not done after {SECONDS} s'
        except Exception as e:
            if loud: traceback.print_exc()
            found = f'wrong: {type(e).__name__}: {e}'[:200]
        if found.startswith('wrong'): wrong[number] = found
        counts[found.split(':')[0]] = counts.get(found.split(':')[0], 0) + 1
    return dict(counts=counts, wrong=wrong)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', nargs='*', default=['sample', *COMMANDS], help=f'sample (of LatentDiffusion), '
                                                                        f'{", ".join(COMMANDS)} (default: all)')
    p.add_argument('--n', type=int, default=1000, help='sets of each')
    p.add_argument('--only', type=int, help='the number of one set')
    a = p.parse_args()
    torch.set_num_threads(1)
    toys, failed = models(), False
    with workplace(toys) as folder:
        for what in a.what:
            start = time.process_time()
            if a.only is not None:
                name = list(toys)[a.only % len(toys)]
                print(name,
                      sample_arguments(a.only, toys[name][1]) if what == 'sample' else command_words(what, a.only))
            r = prove(what, range(a.n) if a.only is None else [a.only], toys, folder, loud=a.only is not None)
            print(json.dumps(dict(what=what, seconds=round(time.process_time() - start)) | r, indent=1), flush=True)
            failed |= bool(r['wrong'])
    sys.exit(failed)

if __name__ == '__main__': main()
