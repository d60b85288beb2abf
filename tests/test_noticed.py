"""What the chapters' own cells did not notice when one line of the package was changed (tests/prove/planted.py): each
of these tests fails on one such line."""
import itertools

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from ldm_nb.attention import CrossAttention, conditional_unet, watch_attention
from ldm_nb.autoencoder import Autoencoder, Codebook, measure_scale, pad_to
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.folders import ImageFolder
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.cache import encode_dataset
from ldm_nb.engine.callbacks import ExplosionGuard
from ldm_nb.engine.seeds import ItemNoise, SampleRNG, generator
from ldm_nb.embedders import TextEmbedder
from ldm_nb.layers import SelfAttention
from ldm_nb.paper.images import InpaintEmbedder
from ldm_nb.text import SPECIAL
from ldm_nb.training import Trainer
from ldm_nb.unet import Cond, UNet


def small_autoencoder(**more):
    torch.manual_seed(0)
    return Autoencoder(**dict(z_ch=2, ch=8, ch_mult=(1, 1), num_res_blocks=1, groups=4, mid_attn=False) | more)


def small_training(steps=12, seen=None, **more):
    "A trainer of one linear layer behind dropout; `seen` gets what each step's model was given, after dropout."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(.5), nn.Linear(6, 6))
    if seen is not None: model[0].register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))
    loss = lambda m, b, rng: (m(b) - b).square().mean()
    return Trainer(model, loss, lambda step, rows: torch.ones(4, 6)[rows], steps, batch_size=4, lr=.1, **more)


# ---------------------------------------------------------------- attention

def test_queries_then_keys_then_values_each_by_heads():
    torch.manual_seed(0)
    m, h = SelfAttention(8, heads=2, groups=4), torch.randn(1, 8, 3, 2)
    nn.init.normal_(m.out.weight)
    x = rearrange(m.norm(h), 'b c h w -> b (h w) c')
    q, k, v = (rearrange(x@w.T + b, 'b n (heads d) -> b heads n d', heads=2)
               for w, b in zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3)))
    y = rearrange((q@k.mT/2).softmax(-1)@v, 'b heads n d -> b n (heads d)')    # 2: the root of 4 channels a head
    want = h + rearrange(m.out(y), 'b (h w) c -> b c h w', h=3)
    torch.testing.assert_close(m(h), want)


def test_the_weights_that_are_watched_are_those_that_act():
    torch.manual_seed(0)
    net = conditional_unet(8, heads=2, ch=8, ch_mult=(1,), attn_factors=(1,), groups=4)
    attn = next(m for name, m in net.named_modules() if name.endswith('cross_attn'))
    for p in net.parameters(): nn.init.normal_(p, std=.6)                      # far from uniform weights
    acted = []
    attn.register_forward_hook(lambda m, args, out: acted.append((args, out.clone()))) # it is added to in place
    c = Cond(context=torch.randn(1, 5, 8))
    with watch_attention(net) as seen: net(torch.randn(1, 4, 4, 4), torch.tensor([500.]), c)
    weights = next(v[0] for k, v in seen.items() if net.get_submodule(k) is attn)
    (x, context), out = acted[0]
    _, v = attn.keys_values(context)
    torch.testing.assert_close(attn.out(rearrange(weights@v, 'b heads n d -> b n (heads d)')), out)
    assert isinstance(attn, CrossAttention) and weights.std() > .05


# ---------------------------------------------------------------- the first stage

def test_straight_through_leaves_the_codebook_alone():
    torch.manual_seed(0)
    book, raw = Codebook(8, 2), torch.randn(2, 2, 3, 3, requires_grad=True)
    q = book(raw)
    torch.testing.assert_close(q.quantized, q.nearest)
    by = torch.randn(2, 2, 3, 3)
    to_raw, to_code = torch.autograd.grad((q.quantized*by).sum(), [raw, book.embedding.weight], allow_unused=True)
    torch.testing.assert_close(to_raw, by)
    assert to_code is None or not to_code.any()


def test_scaled_latents_have_deviation_1_whatever_their_mean():
    ae, x = small_autoencoder(), torch.rand(64, 3, 8, 8)*2 - 1
    with torch.no_grad(): ae.quant.bias[:2] += torch.tensor([5., -3.])
    measure_scale(ae, x.split(16))
    z = ae.encode(x, torch.randn(64, 2, 4, 4)).detach()
    assert (z.mean((0, 2, 3)).abs() < .2).all() and ((z.std((0, 2, 3)) - 1).abs() < .2).all()


def test_padding_leaves_the_picture_where_it_is():
    x = torch.randn(1, 3, 5, 6)
    y = pad_to(x, 4)
    assert y.shape == (1, 3, 8, 8) and torch.equal(y[..., :5, :6], x)


# ---------------------------------------------------------------- training

def test_the_averaged_model_has_the_averaged_weights():
    t = small_training()
    for _ in t: pass
    got = t.averaged_model().state_dict()
    assert all(torch.equal(v, t.ema.state[k]) for k, v in got.items())
    assert any(not torch.equal(v, t.model.state_dict()[k]) for k, v in got.items())


def test_each_step_drops_other_numbers():
    seen = []
    for _ in small_training(4, seen): pass
    assert len(seen) == 4 and all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_a_resume_restores_the_running_mean_and_the_guard():
    whole, cut, back = (small_training(30, callbacks=[ExplosionGuard()]) for _ in range(3))
    for _ in whole: pass
    for step, _ in cut:
        if step == 15: break
    back.load_state_dict(cut.state_dict())
    assert back.mean == cut.mean is not None
    guards = [t.callbacks[0] for t in (whole, cut, back)]
    assert guards[2].state_dict() == guards[1].state_dict() and guards[1].first
    for _ in back: pass
    assert back.mean == whole.mean and guards[2].state_dict() == guards[0].state_dict()


# ---------------------------------------------------------------- random numbers, caches, recipes

def test_each_item_has_its_own_noise():
    x = ItemNoise(3, range(4))(torch.empty(4, 5))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(x, 2))
    assert torch.equal(ItemNoise(3, range(2, 3))(torch.empty(1, 5))[0], x[2])


@pytest.fixture(scope='module')
def many(): return torch.randint(256, (6, 3, 24, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_cache_does_not_depend_on_how_many_are_encoded_at_a_time(tmp_path, many):
    ae = small_autoencoder()
    got = [encode_dataset(ae, 'x', many, tmp_path/str(b), batch_size=b, shard=s, variants=('crops:2x8',), quiet=True)
           .moments(torch.arange(6), torch.ones(6, dtype=torch.long))[0] for b, s in ((6, 6), (2, 6), (1, 4))]
    for other in got[1:]: torch.testing.assert_close(other, got[0], rtol=1e-3, atol=1e-3)


def test_the_cache_holds_deviations(tmp_path, many):
    ae = small_autoencoder()
    with torch.no_grad(): ae.quant.bias[2:] -= 3.
    _, std = encode_dataset(ae, 'x', many, tmp_path/'cache', quiet=True).moments(torch.arange(6))
    with torch.no_grad(): want = (.5*ae.posterior(to_float(many)).logvar).exp()
    torch.testing.assert_close(std, want, rtol=1e-3, atol=1e-3)
    assert want.mean() < .4                                                    # far from 1, where all powers agree


def test_fresh_pictures_are_not_those_of_the_training():
    from ldm_nb.cli.recipes import keep_back
    s = dict(size=8, seed=3, n=300)
    images = load_images('postcards', s['size'], s['n'], s['seed'])['image']
    kept, fresh = keep_back(images, 'postcards', s)
    assert kept is images and list(fresh) == ['fresh postcards']
    known = {x.numpy().tobytes() for x in images}
    assert sum(x.numpy().tobytes() in known for x in fresh['fresh postcards']) == 0


def test_trained_to_fill_what_the_mask_marks(monkeypatch):
    from ldm_nb.paper import conditions
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    monkeypatch.setattr(conditions, 'random_mask', lambda rng, size: left)
    ae, images = small_autoencoder(), torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    rows = conditions.training_rows(InpaintEmbedder(2), dict(image=images), ae)
    row = rows(torch.arange(2), SampleRNG(generator(0), 2, slice(0, 2)))
    assert torch.equal(row[:, 2], (2*left[:, ::2, ::2] - 1).expand(2, 4, 4))   # 1 to fill, -1 to keep
    hidden = torch.where(left > 0, 0., to_float(images))
    torch.testing.assert_close(row[:, :2], ae.encode(hidden).detach())


def test_classes_are_numbered_from_0_by_their_names(tmp_path):
    for k, name in enumerate(('emu', 'cat', 'dog')):
        (tmp_path/name).mkdir()
        Image.new('RGB', (8, 8), (k*100, 0, 0)).save(tmp_path/name/'x.png')
    got = load_images(str(tmp_path), 8, 3)
    assert {int(x[0, 0, 0]): int(y) for x, y in zip(got['image'], got['label'])} == {0: 2, 100: 0, 200: 1}
    ds = ImageFolder(tmp_path, 8)
    assert {p.parent.name: ds[k]['label'] for k, p in enumerate(ds.files)} == dict(cat=0, dog=1, emu=2)


def test_postcards_of_two_seeds_share_none():
    a, b = ([Postcards(40, 8, seed).scene(i) for i in range(40)] for seed in (0, 1))
    assert not set(a) & set(b) and len(set(a)) == 40


def test_the_second_stage_learns_on_scaled_latents():
    from ldm_nb.cli.recipes import diffusion_loss
    ae = small_autoencoder()
    ae.latent_scale.fill_(7.)
    ae.latent_shift.fill_(.5)
    ldm, seen = LatentDiffusion(ae, UNet(in_ch=2, out_ch=2, ch=8, ch_mult=(1,), attn_factors=(), groups=4)), []
    raw, t, eps = torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, 4, 4)
    net = lambda z, t, c: seen.append(z) or torch.zeros_like(z)
    diffusion_loss(ldm)(dict(net=net), (raw, t, eps, None), None)
    torch.testing.assert_close(seen[0], ldm.schedule.abar[0].sqrt().float()*(raw - .5)*7.)


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope='module')
def told():
    e = TextEmbedder([*SPECIAL, 'red', 'blue'], dim=8, depth=0, heads=2, max_length=6)
    net = conditional_unet(8, heads=2, in_ch=2, out_ch=2, ch=8, ch_mult=(1,), attn_factors=(1,), groups=4)
    return LatentDiffusion(small_autoencoder(), net, e, size=8).eval()


def test_the_walk_starts_from_latents_and_noise(told):
    unit = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for steps, spacing in ((50, 'leading'), (20, 'karras')):
        request = told.request('red', n=3, steps=steps, spacing=spacing, latents=unit, guidance=1)
        z = told.start(request, range(3), None)
        torch.testing.assert_close(z, unit*(1 + request.sigmas[0].item()**2)**.5)


def test_images_of_one_prompt_lie_together(told):
    assert told.request(['red', 'blue'], n=2).prompts == ['red', 'red', 'blue', 'blue']
