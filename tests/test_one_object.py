"`LatentDiffusion` with every condition, untrained but whole: reproducible, conditioned, saved, and what it refuses."
import copy

import numpy as np
import pytest
import torch
from torch import nn

from ldm_nb.attention import conditional_unet
from ldm_nb.autoencoder import Autoencoder, load_autoencoder
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.masks import random_mask
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.scenes import CLASSES
from ldm_nb.diffusion import Schedule
from ldm_nb.embedders import ClassEmbedder, TextEmbedder
from ldm_nb.engine.files import data_folders, open_model, save_model
from ldm_nb.guidance import Guidance
from ldm_nb.paper.hybrid import HybridEmbedder
from ldm_nb.paper.images import ImageEmbedder, InpaintEmbedder
from ldm_nb.paper.layouts import LayoutEmbedder
from ldm_nb.paper.maps import MapEmbedder
from ldm_nb.request import resolve_prompts
from ldm_nb.text import load_vocab
from ldm_nb.unet import UNet

SCENE = Postcards(2, 64, seed=8)
PICTURES = torch.stack([SCENE[k]['image'] for k in (0, 1)])
HOLE = random_mask(np.random.default_rng(0), 64, 'box')
UNIT = torch.zeros(1, 4, 16, 16)


def woken(net): # what starts at zero gets a little noise: a fresh UNet returns 0
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    return net


def text_embedder(): return TextEmbedder(load_vocab(data_folders()[0]/'tokenizer'/'vocab.txt'), dim=32, depth=1)


@pytest.fixture(scope='module')
def toy():
    torch.manual_seed(0)
    ae = Autoencoder(ch=16, num_res_blocks=1, groups=8)
    net = conditional_unet(context_dim=32, ch=32, groups=8)
    ldm = LatentDiffusion(ae, net, text_embedder())
    woken(ldm.net)
    return ldm.eval()


def another(toy, embedder):
    torch.manual_seed(0)
    sizes = dict(in_ch=4 + getattr(embedder, 'concat_ch', 0), out_ch=4, ch=32, groups=8)
    net = conditional_unet(embedder.context_dim, **sizes) if embedder and embedder.context_dim else UNet(**sizes)
    return LatentDiffusion(toy.autoencoder, woken(net), embedder)


def case(name, toy=None): # an embedder, and what `sample` is asked with
    torch.manual_seed(1)
    return {
        'none': lambda: (None, {}),
        'class': lambda: (ClassEmbedder(16, 32), dict(y=[3, 5])),
        'layout': lambda: (LayoutEmbedder(9, dim=32, depth=1, names=list(CLASSES)),
                           dict(y=[SCENE[0]['boxes'], SCENE[1]['boxes']])),
        'map': lambda: (MapEmbedder(9), dict(y=SCENE[0]['map'])),
        'x4': lambda: (ImageEmbedder(4), dict(image=PICTURES[:, :, ::4, ::4])),
        'inpaint': lambda: (InpaintEmbedder(4), dict(image=PICTURES, mask=HOLE)),
        'text and hole': lambda: (HybridEmbedder(said=text_embedder(), around=InpaintEmbedder(4)),
                                  dict(y='dusk', image=PICTURES, mask=HOLE))}[name]()


def near(a, b, eps=1e-4): assert a.shape == b.shape and (a - b).abs().max() < eps


def test_the_same_seed_is_the_same_picture_in_any_batch(toy):
    a = toy.sample('a red house at night', n=2, steps=5)
    assert a.shape == (2, 3, 64, 64) and a.dtype == torch.float32 and a.abs().max() <= 1
    assert torch.equal(a, toy.sample('a red house at night', n=2, steps=5))
    near(toy.sample('a red house at night', n=4, steps=5)[:2], a)
    how = dict(n=4, steps=5, sampler='ddpm')
    near(toy.sample('a red house at night', batch_size=3, **how), toy.sample('a red house at night', **how))
    assert (toy.sample('a red house at night', n=2, steps=5, seed=1) - a).abs().max() > .05
    assert len(list(toy.stream('dusk', steps=7))) == 7
    assert toy.sample(['dusk', 'dawn'], n=2, steps=2, size=(32, 64)).shape == (4, 3, 32, 64)
    z = torch.randn(1, 4, 16, 16)  # of DDIM all randomness is in the start
    assert torch.equal(toy.sample('dusk', steps=3, latents=z), toy.sample('dusk', steps=3, latents=z, seed=9))


@pytest.mark.parametrize('bad, says', [
    (dict(y=[]), 'a caption or a list'), (dict(y=7), 'a caption'), (dict(y=None), 'told what to draw: text'),
    (dict(y=' '), 'empty caption'), (dict(image=PICTURES[0]), 'To start from one, give it as init'),
    (dict(strength=.5), 'give init='), (dict(init=PICTURES[0], strength=0.), 'strength=0'),
    (dict(init=PICTURES[:1, :, :32], size=64), '32x64 to start from, and 64x64 to sample'),
    (dict(n=3, init=PICTURES), '2 images to start from and 3 to sample'),
    (dict(negative=['dawn', 'noon']), '2 negative prompts'), (dict(guidance=float('nan')), 'guidance=nan'),
    (dict(spacing='odd'), 'spacing'), (dict(eta=.5, sampler='euler'), 'only ddim takes eta'),
    (dict(negative='dawn', guidance=1), 'no use at guidance 1'), (dict(n=1.5), 'n=1.5'),
    (dict(batch_size=0), 'batch_size=0'), (dict(sampler=['ddim']), 'no sampler'),
    (dict(init='a.png'), 'an image to start from'), (dict(size='64'), 'size='), (dict(guidance='3'), "guidance='3'"),
    (dict(n=0), 'n=0'), (dict(eta=2.), 'eta=2'), (dict(steps=0), 'steps=0'), (dict(sampler='magic'), 'ddim'),
    (dict(size=50), 'nearest: 48x48'), (dict(latents=UNIT[:, :3]), 'latents (1, 3, 16, 16)')])
def test_a_bad_request_is_refused_in_words(toy, bad, says):
    with pytest.raises(ValueError) as e: toy.sample(**dict(y='dusk') | bad)
    assert says in str(e.value)


def test_what_cannot_fit_is_refused(toy):
    for call in (toy.sample, toy.stream):
        with pytest.raises(MemoryError, match='are free: at most'): call('dusk', size=2**18)


def test_caption_guidance_and_negative_prompt_matter(toy):
    one = lambda y, w: toy.sample(y, steps=4, guidance=w)
    assert torch.equal(one('dusk', 0.), one('a red house', 0.))
    assert not torch.equal(toy.sample('dusk', steps=4, negative='a red house'), one('dusk', None))
    assert torch.equal(one('dusk', None), one('dusk', 3.)) and torch.equal(one('dusk', Guidance(3.)), one('dusk', 3.))
    assert not torch.equal(one('dusk', 1.), one('dusk', 3.))
    assert not torch.equal(one('dusk', 3.), one('a red house', 3.))


def test_from_an_image(toy):
    kept = {s: (toy.sample('dusk', steps=10, init=PICTURES[0], strength=s) -
                toy.autoencoder.reconstruct(PICTURES[:1])).abs().mean().item() for s in (.1, .5, 1.)}
    assert kept[.1] < kept[.5] and kept[.1] < kept[1.]
    assert len(list(toy.stream('dusk', steps=10, init=PICTURES[0], strength=.3))) == 3
    near(toy.sample('dusk', n=3, steps=10, init=PICTURES[0], strength=.5, batch_size=2)[:1],
         toy.sample('dusk', steps=10, init=PICTURES[0], strength=.5))


def test_in_the_middle_of_a_training_the_model_is_only_borrowed(toy):
    toy = copy.deepcopy(toy).train()
    toy.autoencoder.eval()
    modes, state = [m.training for m in toy.modules()], torch.get_rng_state()
    steps = toy.stream('dusk', steps=4)
    next(steps)
    assert [m.training for m in toy.modules()] == modes  # between two steps
    del steps
    torch.set_default_dtype(torch.float64)
    try: twice = toy.sample('dusk', steps=2)
    finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(toy.sample('dusk', steps=2), twice)
    assert [m.training for m in toy.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_in_half_precision_the_loop_stays_in_float32(toy):
    half = copy.deepcopy(toy).to(torch.bfloat16)
    seen, was = [], half.net.forward
    half.net.forward = lambda z, t, c: (seen.append((z.dtype, c.context.tokens.dtype)), was(z, t, c))[1]
    z, z0 = next(iter(half.stream('dusk', steps=5)))
    assert (z.dtype, z0.dtype, set(seen)) == (torch.float32, torch.float32, {(torch.bfloat16, torch.bfloat16)})
    del half.net.forward
    assert (half.sample('dusk', steps=5) - toy.sample('dusk', steps=5)).abs().mean() < .02
    half.sample('dusk', steps=5, init=torch.zeros(3, 64, 64), strength=.5)  # encoded in bfloat16, too: no error


@pytest.mark.parametrize('name', ['none', 'class', 'layout', 'map', 'x4', 'inpaint', 'text and hole'])
def test_every_condition(toy, name, tmp_path):
    embedder, asked = case(name)
    model = another(toy, embedder)
    x = model.sample(**asked, n=2, steps=3, seed=5)
    assert x.shape == (2*len(resolve_prompts(embedder, **asked)), 3, 64, 64)
    near(model.sample(**asked, n=2, steps=3, seed=5, batch_size=3), x)
    assert not torch.equal(x[0], x[1])  # one prompt, two noises
    if embedder is not None: assert (model.sample(**asked, n=2, steps=3, seed=5, guidance=0.) - x).abs().max() > 1e-4
    again = LatentDiffusion.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again.sample(**asked, n=2, steps=3, seed=5), x)
    if 'mask' in asked:
        known = HOLE[0] == 0
        assert torch.equal(x[0][:, known], PICTURES[0][:, known]) and not torch.equal(x[0], PICTURES[0])


def test_of_two_conditions_each_has_an_effect(toy):
    model = another(toy, case('text and hole')[0])
    change = lambda **how: model.sample(**dict(dict(y='dusk', image=PICTURES[0], mask=HOLE, steps=3) | how))
    plain = change()
    for how in (dict(y='dawn'), dict(image=PICTURES[1]), dict(mask=1 - HOLE), dict(negative='a red house'),
                dict(guidance=5)):
        assert not torch.equal(change(**how), plain), how


def test_a_bad_prompt_in_the_last_batch_stops_the_first(toy):
    before = []
    watch = toy.net.register_forward_hook(lambda *_: before.append(1))
    for y in (['dusk']*3 + [' '], ['dusk']*3 + ['a house '*40]):
        with pytest.raises(ValueError, match='caption'): toy.sample(y, steps=2, batch_size=2)
    watch.remove()
    assert not before


def test_pure_noise_is_left_from_its_end(toy):
    zero = LatentDiffusion(toy.autoencoder, toy.net, toy.embedder, Schedule(zero_snr=True), prediction_type='v')
    assert zero.request('dusk', steps=10).sigmas[0] == zero.schedule.sigma[-1]


@pytest.mark.parametrize('name, asked, says', [
    ('map', dict(y=SCENE[0]['map'], size=32), 'asks for 64x64'), ('map', {}, 'told what to draw: map'),
    ('map', dict(y=[SCENE[0]['map'], SCENE[0]['map'][:32]]), 'one call samples one size'),
    ('inpaint', dict(image=PICTURES), 'image=, mask='), ('inpaint', {}, 'image= and mask='),
    ('x4', dict(y='dusk', image=PICTURES), 'image alone'),
    ('x4', dict(image=PICTURES[0], mask=HOLE), 'without a mask'),
    ('x4', dict(image=PICTURES[0, :, :3, :3]), 'multiples of 8'), ('none', dict(y='dusk'), 'unconditional'),
    ('none', dict(negative='dusk'), 'unconditional'), ('none', dict(guidance=3), 'unconditional'),
    ('layout', dict(y=[['castle', 0, 0, 1, 1]]), 'castle')])
def test_what_each_condition_refuses(toy, name, asked, says):
    with pytest.raises(ValueError) as e: another(toy, case(name)[0]).sample(**asked)
    assert says in str(e.value)


def test_a_map_says_how_large(toy):
    assert another(toy, case('map')[0]).sample(SCENE[0]['map'][:32], steps=2).shape == (1, 3, 32, 64)


def test_saved_and_loaded(toy, tmp_path):
    toy.save_pretrained(tmp_path/'toy')
    again = LatentDiffusion.from_pretrained(tmp_path/'toy')
    assert torch.equal(again.sample('dusk', n=2, steps=5), toy.sample('dusk', n=2, steps=5))
    _, config, tensors = open_model(tmp_path/'toy', 'latent-diffusion')
    save_model(tmp_path/'other', dict(kind='reader'), {})
    save_model(tmp_path/'thin', config | dict(net=config['net'] | dict(ch=64)), tensors)
    stage = dict(name='ae-kl-f4', hash='0'*16)
    old = LatentDiffusion(load_autoencoder('ae-kl-f4'), toy.net, toy.embedder, first_stage=stage)
    old.save_pretrained(tmp_path/'old')
    for name, says in (('other', "'reader', not a latent diffusion model"), ('thin', 'expected shape'),
                       ('old', 'train the model again')):
        with pytest.raises(ValueError) as e: LatentDiffusion.from_pretrained(tmp_path/name)
        assert says in str(e.value)
    with pytest.raises(FileNotFoundError, match='Known names'): LatentDiffusion.from_pretrained('no-such-model')


def test_a_broken_decoder_is_no_picture(toy):
    broken = copy.deepcopy(toy)
    with torch.no_grad(): next(broken.autoencoder.decoder.parameters()).fill_(float('nan'))
    with pytest.raises(ValueError, match='NaN or infinite'): broken.sample('dusk', steps=2)
