"""The JavaScript of the explainer against the Python of the course: the same noise, the same tokens, the same noise
levels, the same steps, the same pictures. Python is the oracle; the modules run in node, models in onnxruntime-web."""
import hashlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.beyond.dit import ClassVector, make_dit
from ldm_nb.beyond.few_steps import consistency
from ldm_nb.beyond.flow import StraightPath
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.captions import caption
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.scenes import CLASSES
from ldm_nb.diffusion import Schedule, to_z0
from ldm_nb.embedders import TextEmbedder
from ldm_nb.engine.seeds import ItemNoise
from ldm_nb.interop import onnx
from ldm_nb.paper.conditions import make_unet, shipped_vocab
from ldm_nb.paper.images import ImageEmbedder, InpaintEmbedder
from ldm_nb.paper.layouts import LayoutEmbedder
from ldm_nb.paper.maps import MapEmbedder
from ldm_nb.samplers import SAMPLERS, SPACINGS, sampling_sigmas
from ldm_nb.text import Tokenizer, words

NODE = shutil.which('node')
pytestmark = pytest.mark.skipif(NODE is None, reason="no node here, so the explainer's JavaScript was not run; "
                                                     'on Debian: apt install nodejs')
HERE = ROOT/'tests/explainer'
MODULES = Path(os.environ.get('LDM_NODE_MODULES', ROOT/'site/node_modules'))
VOCAB = shipped_vocab()


def answers(folder, **questions) -> dict: # by the name of the question
    asked, answered = folder/'questions.json', folder/'answers.json'
    asked.write_text(json.dumps(questions), encoding='utf-8')
    r = run(NODE, HERE/'answers.mjs', asked, answered)
    assert r.returncode == 0, r.stderr
    return json.loads(answered.read_text(encoding='utf-8'))


def far(a, b) -> float: # the largest difference
    a, b = (np.asarray(v, dtype=float) for v in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max()


# noise

def test_the_same_noise(tmp_path):
    rng = random.Random(0)
    seeds = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**53 - 1, *(rng.randrange(2**rng.randrange(1, 54)) for _ in range(60))]
    asked = [dict(seed=s, item=rng.choice([0, 1, 7, 1000]),
                  lengths=rng.choice([[1024, 1024], [16], [17, 1024], [5, 4, 1024, 3], [1, 16, 1, 1], [3072, 40]]))
             for s in seeds]
    got = answers(tmp_path, noise=asked)['noise']
    for q, streams in zip(asked, got):
        noise = ItemNoise(q['seed'], range(q['item'], q['item'] + 1))
        for n, mine in zip(q['lengths'], streams, strict=True):
            assert far(mine, noise(torch.empty(1, n))[0]) < 1e-6, q


def test_no_noise_of_an_impossible_seed(tmp_path):
    asked = [dict(seed=s, item=0, lengths=[16]) for s in (-1, .5, 2**53, None, '7')]
    for a in answers(tmp_path, noise=asked)['noise']: assert 'seed' in a['error'] and a['kind'] == 'input'


# text

def odd_captions(n: int) -> list[str]: # what people paste, and what nobody would
    rng = random.Random(1)
    pieces = ['', ' ', '\t', '\n', '\r\n', '\x00', '\x07', '\x1f', '\x85', '\u200b', '\u200d', '\ufeff', '\xa0',
              '\u3000', '\u2028', '\ufffd', # spaces, controls, what has no width
              '\U0001f3e0', '\U0001f469\u200d\U0001f680', '\U0001f1f9\U0001f1f7', '\u2764\ufe0f', # emoji
              '\u623f\u5b50', '\u96ea\u5c71', '\U00020000', '\uf900', # Chinese
              '\u3072\u3089\u304c\u306a', '\u30ab\u30bf\u30ab\u30ca', '\u30ac', '\ud55c\uad6d\uc5b4',
              '\xe9', 'e\u0301', '\u1ec7', 'a\u0308\u0323', '\u0301', 'NA\xcfVE', '\xdcn\xef', '\u212b', # accents
              '\u0130stanbul', '\u0131I', '\u039f\u0394\u039f\u03a3', '\u03a3\u0391\u03a3', '\xdf', '\u1e9e', # cases
              '\ufb01', '\u01c5', '\u212a', '\U0001d4bd', '\U00010400', '\u0663', # letters like others
              '<b>house</b>', '&amp;', '<script>alert(1)</script>', '"\'`', '...', '!?', '\u2014', '\xab\xbb', '\xbf',
              '\u20ac', '+', '$', '^', '~', '[CLS]', '[PAD]', '##a', '#', '__proto__', 'constructor', 'a'*100, 'a'*101,
              'B'*99, 'house', 'Houses', 'RED', 'unhappily', 'lake', 'x', 'snow-covered', 'two', '42']
    odd = ['', ' ', 'a'*10000, 'a '*5000, 'house '*40, '\u96ea'*40, '\u0301'*50]
    while len(odd) < n:
        k = rng.choice([1, 2, 3, 5, 12, 40])
        odd.append(''.join(rng.choice(pieces) + rng.choice(['', '', ' ']) for _ in range(k)))
    return odd


def told(tokenizer, caption: str) -> list[str]: # words that Python warns of
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        tokenizer.check([caption])
    said = [str(w.message) for w in seen if 'never seen: ' in str(w.message)]
    return [said[0].partition('never seen: ')[2].partition('; what they do')[0]] if said else ['']


@pytest.mark.parametrize('kind', ['of the course', 'odd'])
def test_the_same_tokens(kind, tmp_path):
    if kind == 'odd': captions = odd_captions(1000)
    else:
        ds = Postcards(1000, 64, seed=11)
        rng = np.random.default_rng(0)
        captions = [caption(ds.scene(i), rng) for i in range(1000)]
    got = answers(tmp_path, captions=dict(condition=dict(vocab=VOCAB, max_length=16), captions=captions))['captions']
    tokenizer = Tokenizer(VOCAB, 16, too_long='warn')
    for c, mine in zip(captions, got, strict=True):
        theirs = tokenizer.bert.encode(c)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert mine['ids'] == tokenizer.frame(c), repr(c)
        assert mine['words'] == words(c), repr(c)
        assert mine['n'] == len(theirs.ids) and mine['tooLong'] == (len(theirs.ids) > 14)
        assert mine['fits'] == tokenizer.fitting(c), repr(c)
        shown = ', '.join(w[:30] for w in mine['unknown'])     # as the message shows them
        if c.strip(): assert [shown] == told(tokenizer, c), repr(c)


def test_every_letter(tmp_path): # but marks and punctuation that Unicode added after the tables of Python's library
    blocks = [(0, 0x700), (0x1e00, 0x2e40), (0x3000, 0x3200), (0x4dff, 0xd800, 37), (0xe000, 0xe010), (0xf900, 0x10000),
              (0x1f300, 0x1fa00), (0x2f7f0, 0x2fa30)]
    letters = [c for b in blocks for c in range(*b) if c != 0x61d]
    asked = dict(condition=dict(vocab=VOCAB, max_length=16), letters=letters)
    for c, mine in zip(letters, answers(tmp_path, letters=asked)['letters'], strict=True):
        assert mine == words(f'a{chr(c)}b'), f'U+{c:04X}'


# noise levels

PATHS = {'scaled_linear': Schedule(), 'linear': Schedule('linear', 1e-4, .02), 'cosine': Schedule('cosine'),
         'zero_snr': Schedule(zero_snr=True), 'straight': StraightPath(), 'shifted': StraightPath(shift=3.)}
COUNTS = [1, 2, 3, 4, 7, 10, 20, 25, 33, 50, 100, 128, 250, 333, 500, 777, 999, 1000]


def manifest_of(path) -> dict: return dict(path=path.config | dict(zero_snr=path.zero_snr, sigma=path.sigma.tolist()))


@pytest.mark.parametrize('name', PATHS)
def test_the_same_noise_levels(name, tmp_path):
    path = PATHS[name]
    how = [dict(spacing=s, final_sigma=f, offset=o)
           for s in SPACINGS for f in (0., None, path.sigma[0].item()) for o in (0, 1)]
    asked = [dict(steps=n, sampling=h) for h in how for n in COUNTS]
    got = answers(tmp_path, levels=dict(manifest=manifest_of(path), asked=asked))['levels']
    compared = 0
    for q, mine in zip(asked, got, strict=True):
        try: want = sampling_sigmas(path.sigma, q['steps'], **q['sampling'])
        except ValueError: assert 'error' in mine and mine['kind'] == 'input'
        else:
            assert isinstance(mine, list), (mine, q)
            scale = want.clamp(min=1e-12)
            assert far(torch.tensor(mine, dtype=torch.float64)/scale, want/scale) < 1e-12
            compared += 1
    assert compared > 300


def test_impossible_counts(tmp_path):
    asked = [dict(sampling=dict(spacing='leading'), steps=n) for n in (0, -1, 1001, 10**9, 2.5, None, '20')]
    got = answers(tmp_path, levels=dict(manifest=manifest_of(PATHS['linear']), asked=asked))['levels']
    for a in got: assert 'steps is' in a['error'] and '1 to 1000' in a['error']


@pytest.mark.parametrize('name', PATHS)
def test_the_same_t(name, tmp_path):
    path = PATHS[name]
    sigmas = [0., *path.sigma.tolist()[::37], path.sigma[-1].item(), 2*path.sigma[-1].item(),
              *np.geomspace(path.sigma[0], path.sigma[-1], 99).tolist()]
    times = [0, 1, 500, 998, 999, .5, 3.25, 997.125]
    asked = dict(manifest=manifest_of(path), sigmas=[*sigmas, -1], times=[*times, 1000])
    got = answers(tmp_path, times=[asked])['times'][0]
    assert 'sigma' in got['t'].pop()['error'] and 't is 1000' in got['sigma'].pop()['error']
    assert far(got['t'], path.sigma_to_t(sigmas)) < 1e-9
    want = path.t_to_sigma(times)
    assert far(torch.tensor(got['sigma'], dtype=torch.float64)/want, torch.ones(len(times))) < 1e-12


def test_the_same_guess(tmp_path):
    rng = np.random.default_rng(0)
    some = lambda: rng.normal(size=64).tolist()
    asked = [dict(manifest=dict(path=p.config, prediction_type=kind), out=some(), z_t=some(), abar=a)
             for p in PATHS.values() for kind in ('eps', 'x0', 'v', 'flow') for a in (1e-4, .3, .9999)]
    for q, (z0, given) in zip(asked, answers(tmp_path, guesses=asked)['guesses'], strict=True):
        out, z_t = (torch.tensor(q[k], dtype=torch.float64)[None] for k in ('out', 'z_t'))
        path = StraightPath() if q['manifest']['path']['kind'] == 'straight' else Schedule()
        want = to_z0(q['manifest']['prediction_type'], out, z_t, q['abar'])[0]
        assert far(z0, want) < 1e-12*max(1, want.abs().max())
        assert far(given, path.net_input(z_t, q['abar'])[0]) < 1e-12


# steps

def denoise(z, sigma): # not linear, so that a wrong order of operations shows
    return z/(1 + sigma**2) + .1*(z/(1 + sigma**2)**.5).tanh()


@pytest.mark.parametrize('name', [*SAMPLERS, 'consistency'])
def test_the_same_steps(name, tmp_path):
    rng = np.random.default_rng(3)
    asked = []
    for path in (PATHS['linear'], PATHS['straight']):
        for spacing in SPACINGS:
            for steps in (1, 2, 5, 10, 50):
                for eta in ((0., .5, 1.) if name == 'ddim' else (0.,)):
                    s = sampling_sigmas(path.sigma, steps, spacing, final_sigma=0. if steps % 2 else None)
                    start, noise = s[0].item()*rng.normal(size=32), rng.normal(size=(len(s), 32))
                    asked.append(dict(sampler=name, sigmas=s.tolist(), eta=eta, start=start.tolist(),
                                      noise=noise.tolist()))
    sampler = consistency if name == 'consistency' else SAMPLERS[name]
    for q, mine in zip(asked, answers(tmp_path, trajectories=asked)['trajectories'], strict=True):
        start, noise = (torch.tensor(q[k], dtype=torch.float64) for k in ('start', 'noise'))
        left = iter(noise)
        more = dict(eta=q['eta']) if name == 'ddim' else {}
        theirs = sampler(denoise, start, q['sigmas'], noise=lambda z: next(left), **more)
        for (z, z0), (want_z, want_z0) in zip(mine, theirs, strict=True):
            assert far(z, want_z) < 1e-9*max(1, want_z.abs().max())
            assert far(z0, want_z0) < 1e-9*max(1, want_z0.abs().max())


# exported models

SIZE = 16 # pixels of the toy models
CAPTION = 'a red house at night, with two trees'
RED = torch.linspace(-1, 1, 3*SIZE*SIZE).reshape(3, SIZE, SIZE) # a picture
HOLE = torch.zeros(1, SIZE, SIZE)
HOLE[:, 3:9, 5:12] = 1
SMALL = dict(dim=16, depth=1, heads=2)
BOXES = [['house', .1, .2, .6, .7], ['tree', .51, .5, .9, 1]]
f32 = lambda x: dict(float32=x.flatten().tolist()) # becomes a typed array
u8 = lambda x: dict(uint8=x.int().flatten().tolist())
REGIONS = torch.arange(SIZE*SIZE).reshape(SIZE, SIZE) % 7 % 5 # a map of 5 classes
TINY = torch.linspace(1, -1, 3*8*8).reshape(3, 8, 8) # a picture as large as the latent
KINDS = { # its embedder; how the rest is made; a prompt for JavaScript; the same for Python's sample
    'text': (lambda: TextEmbedder(VOCAB, max_length=12, pooled=True, **SMALL), dict(prediction_type='v'),
             CAPTION, dict(y=CAPTION)),
    'class': (lambda: ClassVector(5, 16), dict(schedule=StraightPath(shift=2.), prediction_type='flow'), 3, dict(y=3)),
    'layout': (lambda: LayoutEmbedder(len(CLASSES), max_boxes=3, names=list(CLASSES), size=SIZE, stages=1, **SMALL),
               dict(schedule=Schedule(zero_snr=True), prediction_type='x0'), BOXES, dict(y=BOXES)),
    'inpaint': (InpaintEmbedder, dict(sampling={}), dict(image=f32(RED), mask=u8(HOLE)), dict(image=RED, mask=HOLE)),
    'map': (lambda: MapEmbedder(5, out_ch=3, stages=1), dict(prediction_type='v'), u8(REGIONS), dict(y=REGIONS)),
    'x4': (lambda: ImageEmbedder(factor=2), dict(prediction_type='x0'), dict(image=f32(TINY)), dict(image=TINY)),
    'none': (lambda: None, dict(schedule=StraightPath(), prediction_type='flow'), None, {}), # unconditional
}
DRAWN = dict(steps=20, seed=7)


def shake(module): # all weights random, none zero, and such as float16, in which they are stored, can hold
    for p in module.parameters(): p.data = (p.data + .1*torch.randn_like(p)).half().float()
    return module


def made(kind: str) -> LatentDiffusion: # all with the same first stage
    torch.manual_seed(0)
    ae = shake(Autoencoder(ch=8, ch_mult=(1, 1), num_res_blocks=1, groups=4, mid_attn=False))
    embedder, how, _, _ = KINDS[kind]
    e = embedder()
    if kind == 'class': net = make_dit(e, 4, dim=16, depth=1, heads=2)
    else: net = make_unet(e, 4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_factors=(2,), groups=4, heads=2)
    return LatentDiffusion(ae, shake(net), e and shake(e), size=SIZE, **how).eval()


def export_all(models: dict, folder): # the first stage, which they share, is traced once
    first_stage, to_onnx = {}, onnx.to_onnx
    def once(module, inputs, outputs, path, dtype):
        if path.stem not in ('decoder', 'encoder'): return to_onnx(module, inputs, outputs, path, dtype)
        if path.stem in first_stage: shutil.copy(first_stage[path.stem][0], path)
        else: first_stage[path.stem] = path, to_onnx(module, inputs, outputs, path, dtype)
        return first_stage[path.stem][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, 'to_onnx', once)
        for kind, ldm in models.items(): ldm.export_onnx(folder/kind)


@pytest.fixture(scope='module')
def exported(tmp_path_factory): # a folder of toy models, and those models
    if not (MODULES/'onnxruntime-web').is_dir():
        pytest.skip(f'no onnxruntime-web in {MODULES}, so no exported model was run in JavaScript: npm ci in site/')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed: nothing can be exported')
    folder = tmp_path_factory.mktemp('exported')
    models = {kind: made(kind) for kind in KINDS}
    export_all(models, folder)
    quick = made('text') # as if it had been distilled
    quick.fast, quick.sampling = dict(steps=[1, 2, 4], guidance=3.), dict(spacing='trailing', final_sigma=0.)
    shutil.copytree(folder/'text', folder/'fast')
    about = json.loads((folder/'fast/model.json').read_text(encoding='utf-8'))
    about |= dict(fast=quick.fast, sampling=quick.sampling, guidance=1.)
    (folder/'fast/model.json').write_text(json.dumps(about), encoding='utf-8')
    return folder, models | dict(fast=quick)


def drawn(exported, tmp_path, **questions) -> dict: # by the name of the question
    asked, answered = tmp_path/'questions.json', tmp_path/'answers.json'
    asked.write_text(json.dumps(questions), encoding='utf-8')
    r = run(NODE, HERE/'draw.mjs', exported[0], MODULES/'onnxruntime-web', asked, answered)
    assert r.returncode == 0, r.stderr
    return json.loads(answered.read_text(encoding='utf-8'))


def same_path(mine, theirs, tolerance=1e-4): # of the largest number of each step
    for step, (z, z0_hat) in zip(mine, theirs, strict=True):
        for a, b in ((step['z'], z), (step['z0_hat'], z0_hat)):
            b = b.flatten()
            assert far(a, b) < tolerance*max(1, b.abs().max().item())


def test_the_same_drawing(exported, tmp_path): # every kind of condition, prediction, path and end; guided and not
    asked = []
    for kind, (_, _, prompt, _) in KINDS.items():
        weights = [None] if kind == 'none' else [3., 1., 0.]
        asked += [dict(model=kind, prompt=prompt, guidance=w, **DRAWN) for w in weights]
    for q, mine in zip(asked, drawn(exported, tmp_path, paths=asked)['paths'], strict=True):
        kind = q['model']
        same_path(mine, exported[1][kind].stream(**KINDS[kind][3], guidance=q['guidance'], **DRAWN))


def test_the_worker_draws_without_words(exported, tmp_path): # from a map, a small picture, nothing
    unit, kinds = ItemNoise(3, range(1))(torch.empty(1, 4, 8, 8)), ('map', 'x4', 'none')
    calls = [[dict(type='sample', model=kind, prompt=KINDS[kind][2], keep=True, **DRAWN),
              dict(type='inspect', handle='last', step=5),
              dict(type='noise', model=kind, x=f32(RED), t=500, seed=3, prompt=None)] for kind in kinds]
    got = iter(drawn(exported, tmp_path, calls=sum(calls, []))['calls'])
    for kind, sample, inside, noise in zip(kinds, got, got, got, strict=True):
        ldm = exported[1][kind]
        assert far(sample['result']['x'], ldm.sample(**KINDS[kind][3], **DRAWN).flatten()) < 1e-3
        r, path = inside['result'], list(ldm.stream(**KINDS[kind][3], **DRAWN))
        assert far(r['z0_hat'], path[5][1].flatten()) < 1e-3 and 'attention' not in r
        assert ('uncond' in r) == (kind != 'none') and far(r['guided' if 'guided' in r else 'cond'], r['z0_hat']) < 1e-3
        with torch.no_grad():
            ae, s = ldm.autoencoder, ldm.schedule.t_to_sigma(500).item()
            z = ae.to_latent(ae.posterior(RED[None]).mean) + s*unit
            null = ldm.embedder and ldm.embedder.null(1, hw=(8, 8))
            assert far(noise['result']['z0_hat'], ldm.denoise(z, s, null).flatten()) < 1e-3


def test_every_sampler_of_a_model(exported, tmp_path):
    asked = [dict(sampler=s, steps=n, seed=n, guidance=3.) for s in SAMPLERS for n in (1, 20)]
    asked += [dict(sampler='ddim', steps=20, seed=2**40 + 3, guidance=3., eta=.5)]
    told = [dict(model='text', prompt=CAPTION, **q) for q in asked] + \
           [dict(model='fast', prompt=CAPTION, steps=n, seed=n) for n in (1, 2, 4)]
    got = drawn(exported, tmp_path, paths=told)['paths']
    for q, mine in zip(asked, got): same_path(mine, exported[1]['text'].stream(CAPTION, **q), 1e-3)
    for n, mine in zip((1, 2, 4), got[len(asked):], strict=True):
        same_path(mine, exported[1]['fast'].stream(CAPTION, steps=n, seed=n), 1e-3)


def test_the_worker_draws(exported, tmp_path):
    unit = ItemNoise(5, range(1))(torch.empty(1, 4, 8, 8))
    got = drawn(exported, tmp_path, calls=[
        dict(type='load', model='text'),
        dict(type='sample', model='text', prompt=CAPTION, previews=True, keep=True, guidance=3., **DRAWN),
        dict(type='inspect', handle='last', step=5),
        dict(type='inspect', handle='last', step=5, ask=False),
        dict(type='inspect', handle='last', step=20),
        dict(type='sample', model='inpaint', prompt=KINDS['inpaint'][2], previews=False, keep=True, **DRAWN),
        dict(type='sample', model='text', prompt=CAPTION, steps=2, keep=True, latents=f32(unit)),
        dict(type='inspect', handle=1, step=0),
        dict(type='noise', model='text', x=f32(RED), t=500, seed=3, prompt=' '),
        dict(type='encode', model='text', x=f32(RED)),
        dict(type='decode', model='text', z=f32(unit)),
    ])['calls']
    load, sample, inside, quick, beyond, filled, given, gone, noise, encoded, decoded = got
    ldm, fill = exported[1]['text'], exported[1]['inpaint']
    with torch.no_grad():
        sizes = {f['file']: f['bytes'] for k, f in load['result']['manifest']['files'].items() if k != 'encoder'}
        last = load['progress'][-1]
        assert last['loaded'] == last['total'] == sum(sizes.values())
        assert {p['file'] for p in load['progress']} == set(sizes)
        x = ldm.sample(CAPTION, guidance=3., **DRAWN)
        assert far(sample['result']['x'], x.flatten()) < 1e-3
        rgba = np.array(sample['result']['pixels'], dtype=float).reshape(SIZE, SIZE, 4)
        assert far(rgba[..., :3]/127.5 - 1, x[0].permute(1, 2, 0)) < 1/255 + 1e-3 and (rgba[..., 3] == 255).all()
        assert [s['i'] for s in sample['steps']] == list(range(20)) and all(s['of'] == 20 for s in sample['steps'])
        path = list(ldm.stream(CAPTION, guidance=3., **DRAWN))
        preview = np.array(sample['steps'][5]['preview'], dtype=float).reshape(SIZE, SIZE, 4)[..., :3]
        assert far(preview/127.5 - 1, ldm.decode(path[5][1])[0].permute(1, 2, 0)) < 1/255 + 1e-3

        r = inside['result']
        sigma = ldm.request(CAPTION, **DRAWN).sigmas[5].item()
        assert abs(r['sigma'] - sigma) < 1e-9*sigma and far(r['z_t'], path[4][0].flatten()) < 1e-3
        z = torch.tensor(r['z_t']).reshape(1, 4, 8, 8)*(1 + sigma**2)**.5
        cond = ldm.denoise(z, sigma, ldm.embedder([CAPTION]))
        uncond = ldm.denoise(z, sigma, ldm.embedder.null(1))
        assert far(r['cond'], cond.flatten()) < 1e-3 and far(r['uncond'], uncond.flatten()) < 1e-3
        assert far(r['guided'], r['z0_hat']) < 1e-3 and set(r['pictures']) == {'z_t', 'z0_hat', 'uncond', 'cond'}
        assert r['tokens'][:4] == ['[CLS]', 'a', 'red', 'house'] and len(r['tokens']) == 12
        maps = np.array(r['attention']).reshape(12, 8, 8)
        assert far(maps.sum(0), np.ones((8, 8))) < 1e-4
        assert set(quick['result']['pictures']) == {'z_t', 'z0_hat'} and 'cond' not in quick['result']
        assert 'no step 20' in beyond['error']['message'] and gone['error']['kind'] == 'forgotten'

        known = (HOLE == 0).expand(3, SIZE, SIZE).flatten()
        assert far(filled['result']['x'], fill.sample(image=RED, mask=HOLE, **DRAWN).flatten()) < 1e-3
        assert far(np.array(filled['result']['x'])[known], RED.flatten()[known]) == 0
        assert far(given['result']['x'], ldm.sample(CAPTION, steps=2, latents=unit).flatten()) < 1e-3

        ae, eps = ldm.autoencoder, ItemNoise(3, range(1))(torch.empty(1, 4, 8, 8))
        z0 = ae.to_latent(ae.posterior(RED[None]).mean)
        s = ldm.schedule.t_to_sigma(500).item()
        assert far(encoded['result']['z'], z0.flatten()) < 1e-3
        assert far(noise['result']['z_t'], ((z0 + s*eps)/(1 + s**2)**.5).flatten()) < 1e-3
        assert far(noise['result']['z0_hat'], ldm.denoise(z0 + s*eps, s, ldm.embedder.null(1)).flatten()) < 1e-3
        assert far(decoded['result']['x'], ldm.decode(unit).flatten()) < 1e-3


BAD = [ # a call, and words of the sentence that answers it
    (dict(steps=0), 'steps is 0'), (dict(steps=10**9), '1 to 1000'), (dict(steps=2.5), 'steps is 2.5'),
    (dict(guidance=dict(number='NaN')), 'NaN'), (dict(guidance=1e9), 'guidance'), (dict(guidance='3'), 'guidance'),
    (dict(seed=-1), 'seed'), (dict(seed=2**53), 'seed'), (dict(seed=.5), 'seed'),
    (dict(sampler='magic'), 'no sampler'), (dict(sampler='constructor'), 'no sampler'),
    (dict(eta=2), 'eta'), (dict(eta=1, sampler='euler'), 'only ddim'),
    (dict(prompt=''), 'empty'), (dict(prompt=' \t\u200b'), 'empty'), (dict(prompt=7), 'caption'),
    (dict(prompt='house '*40), '40 tokens'), (dict(latents=dict(float32=[1, 2])), '256'),
    (dict(model='../secret'), 'no model'), (dict(model=None), 'no model'), (dict(type='dance'), 'no such call'),
    (dict(model='fast', steps=3), 'distilled'), (dict(model='fast', guidance=3), 'leave guidance out'),
    (dict(model='fast', sampler='heun'), 'jumps'), (dict(model='class', prompt=5), 'class'),
    (dict(model='layout', prompt=[['house', .5, 0, .2, 1]]), 'box 1'),
    (dict(model='layout', prompt=[['castle', 0, 0, 1, 1]]), 'castle'),
    (dict(model='layout', prompt=[['tree', 0, 0, 1, 1]]*4), '4 boxes'),
    (dict(model='inpaint', prompt=dict(image=dict(float32=[0.]))), 'picture'),
    (dict(model='map', prompt=u8(REGIONS + 4)), 'knows 0 to 4'), (dict(model='map', prompt=u8(TINY[0])), '16 x 16'),
    (dict(model='x4', prompt=dict(image=f32(RED))), '192'), (dict(model='x4', prompt='a house'), 'picture'),
    (dict(model='none', prompt='a house'), 'unconditional'), (dict(model='none', prompt=None, guidance=3), 'to guide'),
    (dict(type='encode', x=dict(float32=[0.]*7)), 'picture'), (dict(type='decode', z=None), 'latent'),
    (dict(type='noise', x=f32(RED), t=1000), 't is 1000'),
]


def test_bad_input_is_told_and_the_worker_goes_on(exported, tmp_path):
    base = dict(type='sample', model='text', prompt=CAPTION, steps=2)
    texts = ['\U0001f3e0 \u96ea <b>', 'a'*10000]
    got = drawn(exported, tmp_path, calls=[base | q for q, _ in BAD] + [base | dict(prompt=t) for t in texts])['calls']
    for (q, word), a in zip(BAD, got):
        assert 'error' in a, q
        e = a['error']
        assert e['kind'] == 'input' and word in e['message'] and not e['cancelled'], (q, e)
    assert all('result' in a for a in got[len(BAD):])


def test_cancelling(exported, tmp_path): # each call is answered once; the newest is drawn
    base = dict(type='sample', model='text', prompt=CAPTION)
    older = [base | dict(steps=500, cancelAt=3), *[base | dict(steps=500, cancelAt='at once')]*8]
    got = drawn(exported, tmp_path,
                atOnce=dict(load=dict(type='load', model='text'), calls=[*older, base | dict(steps=5)]),
                calls=[dict(type='load', model='inpaint', cancelAt='at once'), dict(type='load', model='inpaint')])
    seen, counts = got['atOnce']['seen'], got['atOnce']['counts']
    assert counts == [1]*10 and got['atOnce']['left'] == 0
    assert all(a['error']['cancelled'] for a in seen[:9])
    assert seen[0]['steps'] == 4 and not any(a['steps'] for a in seen[1:9])
    assert seen[9]['result'] and seen[9]['steps'] == 5
    assert 9 <= got['atOnce']['questions'] <= 4 + 5 + 3 # the worker stops, too, a step or so later
    assert 'result' in got['calls'][1]


def test_short_jobs_go_between_the_steps_of_a_long_one(exported, tmp_path): # the fast model has been warmed
    long, short = dict(type='sample', model='text', steps=60), dict(type='sample', model='fast', steps=4)
    calls = [dict(prompt=CAPTION, **q) for q in (long, short, short)]
    got = drawn(exported, tmp_path, order=dict(load=['text', 'fast'], calls=calls))['order']
    assert got['order'] == ['fast', 'fast', 'text'] and got['questions'] == 1


def renamed(folder, name: str): # a copy of the text model whose embedder has another hash: a note at its end
    shutil.copytree(folder/'text', folder/name)
    file, about = folder/name/'embedder.onnx', json.loads((folder/name/'model.json').read_text(encoding='utf-8'))
    data = file.read_bytes() + b'\x32' + bytes([len(name)]) + name.encode() # field 6 of ONNX's ModelProto, doc_string
    file.write_bytes(data)
    about['files']['embedder'] |= dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder/name/'model.json').write_text(json.dumps(about), encoding='utf-8')


def test_files_that_do_not_arrive(exported, tmp_path):
    faults = ['missing', 'short', 'long', 'damaged', 'breaks-off', 'damaged-once']
    for f in faults: renamed(exported[0], f)
    got = drawn(exported, tmp_path, arrivals=dict(faults=faults, file='embedder.onnx'))['arrivals']
    for fault, (first, again) in got.items():
        assert 'result' in again, (fault, again)
        if fault == 'damaged-once': assert 'result' in first # asked for anew, past the caches
        else:
            e = first['error']
            assert e['kind'] == 'arrival' and e['message'].endswith('Try again.'), (fault, e)
            assert 'embedder.onnx' in e['message']


def test_a_runtime_that_fails(exported, tmp_path):
    got = drawn(exported, tmp_path, runtime='text')['runtime']
    assert got['simd']['error']['kind'] == 'simd' and got['broken']['error']['kind'] == 'worker'
    assert 'result' in got['again']
    assert got['workers'] == 1 # a new one, for the retry
