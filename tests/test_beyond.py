"""What came after the paper: straight paths, transformers, few steps, better latents, guidance, alignment."""
import json
import shutil
from types import SimpleNamespace
import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, LCMScheduler
from ldm_nb.autoencoder import Autoencoder, load_autoencoder
from ldm_nb.beyond.alignment import Alignment, middle_features, middle_width, teacher_features
from ldm_nb.beyond.autoguidance import autoguide
from ldm_nb.beyond.dit import OURS, ClassVector, DiT, load_dit, make_dit, position_embedding
from ldm_nb.beyond.few_steps import ConsistencyLoss, TinyDecoder, consistency, fast_arguments
from ldm_nb.beyond.flow import StraightPath
from ldm_nb.beyond.latents import ScaleEquivariantLoss, spectrum
from ldm_nb.cli import recipes, train
from ldm_nb.core import LatentDiffusion
from ldm_nb.diffusion import Denoiser, Schedule
from ldm_nb.embedders import ClassEmbedder
from ldm_nb.engine.checkpoints import KNOWN_SETTINGS, differences, latest
from ldm_nb.guidance import Guidance, guide
from ldm_nb.losses import FirstStageLoss
from ldm_nb.metrics.reader import load_reader
from ldm_nb.oracle import Mixture
from ldm_nb.pretrained import paper_model, save_diffusers
from ldm_nb.samplers import SAMPLERS, ddim, sampling_sigmas
from ldm_nb.unet import Cond, UNet

QUIET = dict(quiet=True, device='cpu', precision='fp32')
MIXTURE = Mixture(torch.tensor([[2., 0.], [-1., 1.5], [-1., -1.5]], dtype=torch.float64), [.3, .5, .2], [.5, .3, .2])


def velocity(x, s): return (x - MIXTURE.denoise(x/(1 - s), s/(1 - s)))/s

def near(a, b, eps): assert (torch.as_tensor(a) - torch.as_tensor(b)).abs().max() < eps, (a, b)


# ---- the straight path ----

@pytest.mark.parametrize('steps', [1, 7, 50])
def test_euler_on_the_flow_is_ddim(steps):
    s = torch.linspace(.999, 0, steps + 1, dtype=torch.float64)
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flow = x
    for a, b in zip(s, s[1:]): flow = flow + (b - a)*velocity(flow, a)
    for z, _ in ddim(MIXTURE.denoise, x/(1 - s[0]), s/(1 - s)): pass
    near(flow, z, 1e-10)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=s[:-1].tolist())
    for t, a in zip(theirs.timesteps, s): x = theirs.step(velocity(x, a), t, x).prev_sample
    near(x, flow, 1e-5)

@pytest.mark.parametrize('shift', [1., 3.])
def test_a_flow_network_in_every_sampler(shift): # one that is exactly right gives what the exact denoiser gives
    path = StraightPath(shift=shift)
    def net(x, t, c):
        sigma = path.t_to_sigma(t.double())[:, None]
        z0_hat = MIXTURE.denoise(x.double()*(1 + sigma), sigma)
        return (x.double()*(1 + sigma) - z0_hat)/sigma - z0_hat
    sigmas = sampling_sigmas(path.sigma, 12, 'trailing', final_sigma=0.)
    z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))*(1 + sigmas[0]**2)**.5
    for name, sampler in SAMPLERS.items():
        tape = [torch.Generator().manual_seed(2) for _ in range(2)]
        noise = [lambda z, g=g: torch.randn(z.shape, generator=g, dtype=z.dtype) for g in tape]
        for ours, _ in sampler(Denoiser(net, path, 'flow'), z, sigmas, noise=noise[0]): pass
        for exact, _ in sampler(MIXTURE.denoise, z, sigmas, noise=noise[1]): pass
        near((ours - exact).norm(dim=1).median(), 0., 1e-3), name # t is float32 there

def test_a_shift_is_that_of_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.)
    path = StraightPath(shift=3.)
    near(path.sigma/(1 + path.sigma), theirs.sigmas.flip(0).double(), 1e-3)   # ours ends at 1 - 2**-12


@pytest.fixture(scope='module')
def trained(tmp_path_factory): # of 20 steps
    out = tmp_path_factory.mktemp('flow')/'run'
    recipes.train_diffusion(out, preset='tiny', path='flow', network='dit', n=40, **QUIET)
    return out

def test_a_flow_is_saved_and_loaded(trained):
    ldm = LatentDiffusion.from_pretrained(trained)
    assert (ldm.schedule.config, ldm.prediction_type) == (dict(kind='straight', shift=1., steps=1000), 'flow')
    assert ldm.net.kind == 'dit' and ldm.sample('a red house', steps=3).shape == (1, 3, 64, 64)
    assert torch.equal(ldm.sample('a house', steps=3),
                       LatentDiffusion.from_pretrained(trained).sample('a house', steps=3))
    assert '--network dit --path flow' in json.loads((trained/'config.json').read_text())['card']['command']

def test_a_run_goes_on_with_its_own_path_alone(trained):
    for other in (dict(path='paper'), dict(path='flow', shift=3.), dict(path='flow', prediction_type='v')):
        with pytest.raises(ValueError, match='path: flow then|shift: 1.0 then|prediction_type: flow then'):
            recipes.train_diffusion(trained, preset='tiny', network='dit', n=40, resume=True, **other, **QUIET)
    with pytest.raises(ValueError, match='path=.bent'): recipes.train_diffusion(trained, path='bent', **QUIET)
    with pytest.raises(ValueError, match='shift=2'): recipes.train_diffusion(trained, shift=2., **QUIET)

def test_a_checkpoint_without_a_path_is_of_the_paper():
    assert differences(dict(lr=1.), dict(lr=1., path='paper', shift=1., align=0.)) == []
    assert differences(dict(lr=1.), dict(lr=1., path='flow', shift=1.)) == ['path: paper then, flow now']

def test_a_config_of_another_path(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path/'model')
    config = json.loads((folder/'config.json').read_text())
    for schedule, says in ((dict(kind='straigth', shift=1., steps=1000), "did you mean 'straight'"),
                           (dict(kind='straight', shift='much', steps=1000), 'shift'),
                           (dict(kind='straight', shift=0.), 'shift')):
        (folder/'config.json').write_text(json.dumps(config | dict(schedule=schedule)))
        with pytest.raises(ValueError, match=says): LatentDiffusion.from_pretrained(folder)
    # none said: the paper's
    assert LatentDiffusion.from_pretrained('postcards-text').schedule.config == Schedule().config


# ---- the transformer ----

@pytest.fixture(scope='module')
def theirs():
    # theirs repeats the same embedders in each block, and counts frequencies otherwise than the published code
    torch.manual_seed(0)
    net = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8,
                                num_layers=3, sample_size=16, patch_size=2, num_embeds_ada_norm=10,
                                norm_num_groups=8).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
    state = net.state_dict()
    for k in state: # one embedder for all blocks
        if '.norm1.emb.' in k: state[k] = state['transformer_blocks.0.norm1.emb.' + k.split('.norm1.emb.')[1]]
    net.load_state_dict(state)
    return net

def published(state: dict) -> dict: # theirs in the names of the published code
    out = {'pos_embed': torch.zeros(1, 64, 96)}
    def put(ours, name, *k):
        out.update({f'{ours}.{w}': torch.cat([state[f'{name(x)}.{w}'] for x in k or ('',)])
                    for w in ('weight', 'bias')})
    emb = 'transformer_blocks.0.norm1.emb.'
    put('x_embedder.proj', lambda _: 'pos_embed.proj')
    put('t_embedder.mlp.0', lambda _: f'{emb}timestep_embedder.linear_1')
    put('t_embedder.mlp.2', lambda _: f'{emb}timestep_embedder.linear_2')
    out['y_embedder.embedding_table.weight'] = state[f'{emb}class_embedder.embedding_table.weight']
    for i in range(3):
        a, b = f'blocks.{i}.', f'transformer_blocks.{i}.'
        put(f'{a}attn.qkv', lambda x: f'{b}attn1.to_{x}', 'q', 'k', 'v')
        for ours, name in (('attn.proj', 'attn1.to_out.0'), ('mlp.fc1', 'ff.net.0.proj'), ('mlp.fc2', 'ff.net.2'),
                           ('adaLN_modulation.1', 'norm1.linear')): put(a + ours, lambda _: b + name)
    put('final_layer.adaLN_modulation.1', lambda _: 'proj_out_1')
    put('final_layer.linear', lambda _: 'proj_out_2')
    return out

@torch.no_grad()
def test_a_published_checkpoint_and_the_peer(theirs, tmp_path):
    torch.save(published(theirs.state_dict()), tmp_path/'dit.pt')
    net, classes = load_dit(tmp_path/'dit.pt', heads=4)
    z, t, y = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
    want = theirs(z, timestep=t, class_labels=y).sample[:, :4]
    # theirs divides the frequencies by 127, the paper's code by 128
    assert (net(z, t, classes(y)) - want).abs().max() > 1e-3
    net.max_period = DiT(dim=96, heads=4, freq_shift=1).max_period
    near(net(z, t, classes(y)), want, 1e-5)
    with pytest.raises(ValueError, match='heads='): load_dit(tmp_path/'dit.pt')
    torch.save(dict(published(theirs.state_dict()), extra=torch.zeros(1)), tmp_path/'odd.pt')
    with pytest.raises(ValueError, match='extra has no place'): load_dit(tmp_path/'odd.pt', heads=4)
    torch.save(dict(a=1), tmp_path/'no.pt')
    with pytest.raises(ValueError, match='no checkpoint of a DiT'): load_dit(tmp_path/'no.pt')

# the published table, and its largest to the last weight: with the fixed positions, 675,129,632
@pytest.mark.parametrize('size, millions', [('S', 33), ('B', 130), ('L', 458), ('XL', 675)])
def test_published_sizes(size, millions):
    for family in ('DiT', 'SiT'):
        net, classes = (paper_model(f'{family}-{size}/2{part}', 'meta') for part in ('', '/conditioner'))
        n = sum(p.numel() for m in (net, classes) for p in m.parameters()) + 256*net.dim
        assert round(n/1e6) == millions or (size, int(n/1e6)) == ('B', 130)
    if size == 'XL': assert n == 675_129_632

def test_positions():
    e = position_embedding(4, 6, 32)
    assert e.shape == (24, 32)
    near(e @ e.T, (e @ e.T).T, 1e-5)
    near((e*e).sum(1), torch.full((24,), 16.), 1e-4)
    assert (e @ e.T).argmax(1).tolist() == list(range(24))
    with pytest.raises(ValueError, match='multiple of 4'): position_embedding(2, 2, 30)

def test_a_new_transformer_returns_zero_and_learns():
    net = DiT(dim=48, depth=2, heads=4, context_dim=16, vector_dim=8)
    z, t = torch.randn(2, 4, 8, 12), torch.tensor([3., 700.5])
    c = Cond(context=torch.randn(2, 5, 16), vector=torch.randn(2, 8))
    assert torch.equal(net(z, t, c), torch.zeros_like(z))
    torch.manual_seed(0)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        loss = (net(z, t, c) - z.flip(0)).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < .2
    other = Cond(context=c.context.flip(0), vector=c.vector)
    assert (net(z, t, other) - net(z, t, c)).abs().max() > 1e-3 # it reads the tokens
    again = DiT(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    near(again(z, t, c), net(z, t, c), 1e-6)
    again.checkpoint = True
    near(torch.autograd.grad(again(z, t, c).sum(), again.embed.weight)[0],
         torch.autograd.grad(net(z, t, c).sum(), net.embed.weight)[0], 1e-4)
    for bad, says in ((lambda: net(z[..., :7], t, c), 'multiples of 2'), (lambda: net(z, t), 'needs a context'),
                      (lambda: DiT(dim=50, heads=4), 'do not divide'), (lambda: DiT(patch=0), 'patch=0'),
                      (lambda: DiT(dim=54, heads=2), 'multiple of 4')):
        with pytest.raises(ValueError, match=says): bad()

def test_patches_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match='choose 1, 2, 4, 8, 16'):
        recipes.train_diffusion(tmp_path, preset='tiny', network='dit', patch=3, n=8, **QUIET)
    with pytest.raises(ValueError, match='--network dit'):
        recipes.train_diffusion(tmp_path, preset='tiny', patch=4, n=8, **QUIET)
    with pytest.raises(ValueError, match='unet or dit'):
        recipes.train_diffusion(tmp_path, preset='tiny', network='cnn', n=8, **QUIET)

def test_classes_as_vectors():
    e = ClassVector(5, 12, names=list('abcde'))
    assert e(torch.tensor([1, 2])).vector.shape == (2, 12) and e(torch.tensor([1])).context is None
    assert torch.equal(e.null(2).vector, e.table.weight[-1].expand(2, -1)) and e.vector_dim == 12
    net = make_dit(e, 4, dim=32, depth=1, heads=2)
    assert net(torch.randn(2, 4, 4, 4), torch.tensor([1., 2.]), e(torch.tensor([0, 4]))).shape == (2, 4, 4, 4)
    assert len(OURS) == 10


# ---- few steps ----

def test_the_jump_is_that_of_the_lcm_scheduler(): # with its scalings at the boundary switched off
    theirs = LCMScheduler(beta_start=.0015, beta_end=.0195, beta_schedule='scaled_linear', timestep_scaling=1e9,
                          clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(4, original_inference_steps=50)
    schedule, t = Schedule(), theirs.timesteps
    sigmas = torch.cat([schedule.sigma[t], torch.zeros(1, dtype=torch.float64)])
    unit = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_t, g = unit*1., torch.Generator().manual_seed(1)
    for k in t.tolist():
        s = schedule.sigma[k]
        z = z_t*(1 + s**2)**.5
        eps = (z - MIXTURE.denoise(z, s))/s
        z_t = theirs.step(eps, k, z_t, generator=g).prev_sample
    g = torch.Generator().manual_seed(1)
    noise = lambda z: torch.randn(z.shape, generator=g, dtype=z.dtype)
    for z, _ in consistency(MIXTURE.denoise, unit*(1 + sigmas[0]**2)**.5, sigmas, noise=noise): pass
    near(z, z_t, 1e-4)

def test_what_a_distilled_model_takes():
    fast = dict(steps=[1, 2, 4], guidance=3.)
    assert fast_arguments(fast, None, None, 'ddim', 0., None) == (4, 1., (consistency, {}))
    assert fast_arguments(fast, 1, None, 'consistency', 0., None)[0] == 1
    for asked, says in (((50, None, 'ddim', 0., None), 'steps=50: .* for 1, 2 or 4 steps'),
                        ((4, 3., 'ddim', 0., None), 'guidance of 3 built in'),
                        ((4, None, 'heun', 0., None), "sampler='heun'"), ((4, None, 'ddim', .5, None), 'eta=0.5'),
                        ((4, None, 'ddim', 0., 'snow'), 'negative='), ((True, None, 'ddim', 0., None), 'steps=True')):
        with pytest.raises(ValueError, match=says): fast_arguments(fast, *asked)

def test_the_step_of_the_teacher_is_a_guided_step_of_ddim():
    teacher = LatentDiffusion.from_pretrained('postcards-text')
    c, g = teacher.embedder(teacher.embedder.prepare(['a red house', 'night'])), torch.Generator().manual_seed(0)
    loss, z = ConsistencyLoss(teacher, 3., grid=10), torch.randn(2, 4, 16, 16, generator=g)
    s, to = loss.sigmas[[0, 6]], loss.sigmas[[1, 7]]
    z = z*(1 + s.float().view(-1, 1, 1, 1)**2)**.5
    with torch.no_grad(): found = loss.step(z, s, to, c)
    for k in range(2):
        one = Cond(*(None if slot is None else slot[k:k + 1] for slot in c))
        denoise = guide(teacher.denoise, one, teacher.embedder.null(1), 3.)
        want, _ = next(ddim(denoise, z[k:k + 1], [s[k].item(), to[k].item()]))
        near(found[k], want[0], 1e-3)

def gaussian(v=.7): # a teacher that is exactly right for data of variance v, and where its paths begin and end
    return SimpleNamespace(schedule=Schedule(), prediction_type='x0', fast=None, embedder=SimpleNamespace(
        guidance=1., null=lambda n, hw: None),
                           denoise=lambda z, s, c: z*(v/(v + torch.as_tensor(s)**2).view(-1, 1, 1, 1)).float())

@pytest.mark.parametrize('wrong', [False, True])
def test_no_loss_for_a_student_that_knows_where_paths_end(monkeypatch, wrong):
    v, teacher = .7, gaussian()
    monkeypatch.setattr('ldm_nb.beyond.few_steps.guide', lambda denoise, c, null, w: lambda z, s: denoise(z, s, c))
    def net(z_t, t, c): # z shrinks along a path as sqrt(v + sigma^2) does
        s = teacher.schedule.t_to_sigma(t).view(-1, 1, 1, 1)
        # wrong: the mean, as the teacher says it
        return (z_t*(1 + s**2)**.5*(v/(v + s**2))**(1. if wrong else .5)).float()
    loss, g = ConsistencyLoss(teacher, grid=500, delta=1e-6), torch.Generator().manual_seed(0)
    k, c = torch.arange(0, 499, 20), Cond(vector=torch.zeros(25, 1))
    z0, eps = v**.5*torch.randn(25, 4, 8, 8, generator=g), torch.randn(25, 4, 8, 8, generator=g)
    found = loss(net, z0, c, k, eps)
    assert found.shape == (25,) and (found.max() > 1e-3 if wrong else found.max() < 1e-4)
    loss.target = lambda z_t, t, c: net(z_t, t, c)*1.2 # another aim
    assert loss(net, z0, c, k, eps).min() > 1e-3

def test_who_cannot_teach():
    with pytest.raises(ValueError, match='unconditional'): ConsistencyLoss(LatentDiffusion.from_pretrained('postcards'))
    teacher = LatentDiffusion.from_pretrained('postcards-class')
    with pytest.raises(ValueError, match='grid=1'): ConsistencyLoss(teacher, grid=1)
    teacher.embedder = ClassEmbedder(16, null=False)
    with pytest.raises(ValueError, match='guidance 1'): ConsistencyLoss(teacher, 3.)
    assert ConsistencyLoss(teacher, 1.).guidance == 1.
    teacher.fast = dict(steps=[1], guidance=3.)
    with pytest.raises(ValueError, match='distilled itself'): ConsistencyLoss(teacher)

def test_distil(tmp_path): # in miniature: a copy of the teacher, of other weights, that draws in 1, 2 and 4 steps
    student = recipes.distil(tmp_path/'fast', 'postcards-class', preset='tiny', n=40, steps=6, save_every=3, **QUIET)
    again = LatentDiffusion.from_pretrained(tmp_path/'fast')
    assert again.fast == dict(steps=[1, 2, 4], guidance=3.) and (tmp_path/'fast'/'samples.png').is_file()
    for k in (1, 2, 4): assert again.sample(3, steps=k).shape == (1, 3, 64, 64)
    assert torch.equal(again.sample(3), again.sample(3, steps=4))
    near(again.sample(3), student.sample(3), .05) # float16
    teacher = LatentDiffusion.from_pretrained('postcards-class')
    assert any(not torch.equal(a, b) for a, b in zip(again.net.parameters(), teacher.net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(again.embedder.parameters(), teacher.embedder.parameters()))
    with pytest.raises(ValueError, match='distilled for'): again.sample(3, steps=50)

def test_a_student_goes_on_where_it_stopped(tmp_path): # its target, too
    how = dict(preset='tiny', n=40, steps=6, save_every=3, keep=9, **QUIET)
    recipes.distil(tmp_path/'fast', 'postcards-class', **how)
    last = sorted((tmp_path/'fast'/'checkpoints').glob('*6.pt'))
    whole = LatentDiffusion.from_pretrained(tmp_path/'fast').net.state_dict()
    for p in (*last, tmp_path/'fast'/'config.json', tmp_path/'fast'/'model.safetensors'): p.unlink()
    again = recipes.distil(tmp_path/'fast', 'postcards-class', resume=True, **how).net.state_dict()
    assert last and all(torch.equal(whole[k], v.half().float()) for k, v in again.items())
    with pytest.raises(ValueError, match='grid: 40 then, 20 now'):
        recipes.distil(tmp_path/'fast', 'postcards-class', grid=20, resume=True, **how)

def test_a_tiny_decoder_is_saved_with_its_model(tmp_path):
    how = dict(preset='tiny', n=40, steps=6, save_every=3, **QUIET)
    recipes.distil(tmp_path/'fast', 'postcards-class', **how)
    ldm = recipes.distil_decoder(tmp_path/'small', str(tmp_path/'fast'), **how)
    assert ldm.autoencoder.decoder.config == dict(kind='tiny', widths=[64, 32], z_ch=4)
    again = LatentDiffusion.from_pretrained(tmp_path/'small')
    assert again.fast == dict(steps=[1, 2, 4], guidance=3.) # all else is the teacher's
    near(again.sample(3, steps=1), ldm.sample(3, steps=1), .05) # float16
    large = LatentDiffusion.from_pretrained(tmp_path/'fast')
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (again.decode(z) - large.decode(z)).abs().max() > .05
    assert torch.equal(again.autoencoder.encode(large.decode(z)), large.autoencoder.encode(large.decode(z)))
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), large.net.parameters()))
    with pytest.raises(ValueError, match='small decoder in the place'): save_diffusers(again.autoencoder, tmp_path/'no')
    with pytest.raises(ValueError, match='small decoder already'):
        recipes.distil_decoder(tmp_path/'twice', str(tmp_path/'small'), **how)

def test_a_tiny_decoder_beside_a_first_stage_of_its_own(tmp_path):
    ae = Autoencoder(ch=16, groups=8, ch_mult=(1, 1, 2), num_res_blocks=1)
    ae.decoder = TinyDecoder((8, 8))
    ldm = LatentDiffusion(ae, UNet(ch=16, groups=8), size=16)
    ldm.save_pretrained(tmp_path/'own')
    assert torch.equal(LatentDiffusion.from_pretrained(tmp_path/'own').sample(steps=2), ldm.eval().sample(steps=2))
    config = json.loads((tmp_path/'own'/'config.json').read_text())
    for other, says in ((dict(kind='tiney', widths=[8, 8], z_ch=4), "did you mean 'tiny'"),
                        (dict(kind='tiny', widths=[8], z_ch=4), 'expected two'), (None, 'expected shape')):
        (tmp_path/'own'/'config.json').write_text(json.dumps(config | dict(decoder=other)))
        with pytest.raises(ValueError, match=says): LatentDiffusion.from_pretrained(tmp_path/'own')

def test_a_tiny_decoder_learns_the_large_one():
    ae, g = load_autoencoder('ae-kl-f4'), torch.Generator().manual_seed(0)
    raw = ae.latent_shift + torch.randn(4, 4, 16, 16, generator=g)/ae.latent_scale
    batch = raw, torch.zeros(4), torch.zeros(1), None
    loss, small = recipes.decoder_loss(ae, ae.decoder), TinyDecoder()
    assert loss(ae.decoder, batch, None) == 0
    opt = torch.optim.Adam(small.parameters(), 2e-3)
    first = loss(small, batch, None).item()
    for _ in range(40): opt.zero_grad(); loss(small, batch, None).backward(); opt.step()
    assert loss(small, batch, None) < .4*first


# ---- better latents ----

def test_the_spectrum_of_what_is_known():
    near(spectrum(torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0))), torch.ones(17), .15)
    x = torch.arange(32.)*2*torch.pi/32
    for k in (0, 1, 5, 16): # one wave lies in one ring
        s = spectrum((k*x).cos().expand(1, 1, 32, 32))
        assert s.argmax() == k and s.sum() - s[k] < 1e-10
    step = torch.zeros(1, 1, 32, 32); step[..., 16:] = 1 # mostly coarse
    assert spectrum(step)[1] > 20*spectrum(step)[8]
    with pytest.raises(ValueError, match='equal sides'): spectrum(torch.zeros(1, 1, 8, 4))

def test_the_price_of_not_scaling():
    torch.manual_seed(0)
    ae, x, noise = load_autoencoder('ae-kl-f4').eval(), torch.rand(2, 3, 32, 32)*2 - 1, torch.randn(2, 4, 8, 8)
    plain = FirstStageLoss()
    with torch.no_grad():
        more = ScaleEquivariantLoss(plain, .5)(ae, x, lambda shape: noise) - plain(ae, x, lambda shape: noise)
        pool = torch.nn.AvgPool2d(2)
        y = ae.decoder(ae.post_quant(pool(ae.posterior(x).mean)))
        near(more, .5*(y - pool(x)).abs().mean(), 1e-6)
    with pytest.raises(ValueError, match='weight'): ScaleEquivariantLoss(plain, 0)
    with pytest.raises(ValueError, match='Gaussian'):
        ScaleEquivariantLoss(plain, 1.)(load_autoencoder('ae-vq-f4'), x, torch.Generator())

def test_a_first_stage_is_trained_for_scale(tmp_path):
    how = dict(preset='tiny', n=40, steps=6, save_every=3, **QUIET)
    a, b = (recipes.train_autoencoder(tmp_path/k, **how, **more).state_dict()
            for k, more in (('a', {}), ('b', dict(scale_equivariance=.25))))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert 'scale_equivariance' in latest(tmp_path/'b')[0]['settings'].keys() <= KNOWN_SETTINGS # newer ones read it
    assert '--scale-equivariance 0.25' in json.loads((tmp_path/'b'/'config.json').read_text())['card']['command']


# ---- guidance by a worse model ----

def worse(name, amount=.01): # a model with noise on its weights, those of its embedder, too
    bad = LatentDiffusion.from_pretrained(name)
    for p in bad.parameters(): p.data += amount*torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return bad

def test_away_from_a_worse_model():
    good, bad = LatentDiffusion.from_pretrained('postcards'), worse('postcards')
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before, how = good.sample(steps=2), (good.request(n=2, steps=2), slice(0, 2))
    assert torch.equal(autoguide(good, bad, 1.).sample(steps=2), before)
    a, b = good.denoise(z, 3.), bad.denoise(z, 3.)
    near(autoguide(good, bad, 2.5).guided(*how)(z, 3.), b + 2.5*(a - b), 1e-4)
    part = autoguide(good, bad, Guidance(2.5, interval=(1., 2.))).guided(*how)
    assert torch.equal(part(z, 3.), a) and not torch.equal(part(z, 1.5), good.denoise(z, 1.5))
    near(autoguide(good, bad, Guidance(2.5, rescale=1.)).guided(*how)(z, 3.).flatten(1).std(1), a.flatten(1).std(1),
         1e-4)
    assert (autoguide(good, bad, 2.).sample(steps=2) - before).abs().max() > .01
    assert torch.equal(good.sample(steps=2), before) # is not changed
    with pytest.raises(ValueError, match='another condition'):
        autoguide(good, LatentDiffusion.from_pretrained('postcards-class'), 2.)
    bad.first_stage = dict(bad.first_stage, hash='0')
    with pytest.raises(ValueError, match='another first stage'): autoguide(good, bad, 2.)

def test_a_guide_reads_the_prompt_itself(): # with its own embedder, and guided as the model is
    ldm, g = LatentDiffusion.from_pretrained('postcards-class'), worse('postcards-class', .1)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    how = ldm.request(3, steps=2, guidance=3.), slice(0, 1)
    each = [guide(m.denoise, m.embedder(m.embedder.prepare([3])), m.embedder.null(1, (16, 16)), 3.)(z, 2.)
            for m in (g, ldm)]
    near(autoguide(ldm, g, 2.).guided(*how)(z, 2.), each[0] + 2*(each[1] - each[0]), 1e-3)
    assert autoguide(ldm, g, 2.).sample(3, steps=2, guidance=3.).shape == (1, 3, 64, 64)


# ---- features of a teacher ----

def test_alignment_is_an_angle():
    a = Alignment(8, 8)
    a.project = torch.nn.Identity()
    h = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    near(a(h, 5*h), torch.zeros(3), 1e-6)
    near(a(h, -h), 2*torch.ones(3), 1e-6)
    near(a(h, h.repeat_interleave(2, 2).repeat_interleave(2, 3)), torch.zeros(3), 1e-6) # of a finer teacher

@pytest.mark.parametrize('net', [UNet(ch=16, groups=8), DiT(dim=24, depth=4, heads=2)], ids=['unet', 'dit'])
def test_the_middle_is_taught_and_what_comes_before(net):
    for m in net.modules(): # a new network ends in zeros, a new transformer's blocks are gated off
        for p in m.parameters(recurse=False): torch.nn.init.normal_(p, std=.05)
    x, z = torch.rand(2, 3, 64, 64)*2 - 1, torch.randn(2, 4, 16, 16)
    with middle_features(net) as seen: net(z, torch.tensor([3., 500.]))
    assert seen[0].shape == (2, middle_width(net), 8, 8)
    teacher = teacher_features(load_reader(), x)
    assert teacher.shape == (2, 80, 8, 8) and not teacher.requires_grad
    Alignment(middle_width(net), 80)(seen[0], teacher).mean().backward()
    taught = {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(k.startswith(('down', 'blocks.1')) for k in taught)
    assert not any(k.startswith(('up', 'blocks.2', 'conv_out', 'out')) for k in taught)
    net(z, torch.tensor([3., 500.]))
    assert len(seen) == 1 # nobody listens any more

def test_an_aligned_model_is_a_plain_one(tmp_path):
    how = dict(preset='tiny', condition='none', n=40, steps=6, save_every=3, **QUIET)
    a = recipes.train_diffusion(tmp_path/'a', align=.5, **how).net.state_dict()
    b = recipes.train_diffusion(tmp_path/'b', **how).net.state_dict()
    assert a.keys() == b.keys() and any(not torch.equal(a[k], b[k]) for k in a)
    assert LatentDiffusion.from_pretrained(tmp_path/'a').sample(steps=2).shape == (1, 3, 64, 64)
    assert 'align' in latest(tmp_path/'a')[0]['settings'].keys() <= KNOWN_SETTINGS
    assert '--align 0.5' in json.loads((tmp_path/'a'/'config.json').read_text())['card']['command']
    with pytest.raises(ValueError, match='align: 0.5 then, 0.0 now'):
        recipes.train_diffusion(tmp_path/'a', resume=True, **how)

def test_a_path_and_a_prediction_that_do_not_go_together(tmp_path, capsys): # said before anything is loaded
    with pytest.raises(ValueError, match='ends in pure noise'):
        recipes.train_diffusion(tmp_path/'run', data='no such folder', path='flow', prediction_type='eps', **QUIET)
    with pytest.raises(ValueError, match='align=-1'):
        recipes.train_diffusion(tmp_path/'run', data='no such folder', align=-1., **QUIET)
    with pytest.raises(ValueError, match='leave compile out'):
        recipes.train_diffusion(tmp_path/'run', data='no such folder', align=.5, compile=True, **QUIET)
    for how, says in ((dict(regulariser='vq'), 'expected a Gaussian'), (dict(f=16, crop=48), 'must divide half')):
        with pytest.raises(ValueError, match=says):
            recipes.train_autoencoder(tmp_path/'ae', preset='tiny', n=40, scale_equivariance=.25, **how, **QUIET)
    with pytest.raises(SystemExit): train.main(['decoder', '--out', str(tmp_path/'run')])
    assert 'give --teacher' in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_a_guide_on_the_command_line(tmp_path, capsys):
    from ldm_nb.cli import evaluate, sample
    how = ['--model', 'postcards', '--steps', '2', '--n', '1', '--device', 'cpu', '--out']
    sample.main([*how, str(tmp_path/'plain.png')])
    sample.main([*how, str(tmp_path/'same.png'), '--guide', 'postcards'])     # from itself there is no way
    sample.main([*how, str(tmp_path/'auto.png'), '--guide', 'postcards', '--guide-weight', '3'])
    assert (tmp_path/'plain.png').read_bytes() == (tmp_path/'same.png').read_bytes()
    for more, says in ((['--guide', 'postcards-class'], 'another condition'), (['--guide-weight', '2'], 'give --guide'),
                       (['--guide', 'postcards', '--guide-weight', 'nan'], 'guidance=nan')):
        for main, out in ((sample.main, 'no.png'), (evaluate.main, 'no.json')):
            with pytest.raises(SystemExit): main(['--model', 'postcards', '--out', str(tmp_path/out), *more])
            assert says in capsys.readouterr().err
    fast = LatentDiffusion.from_pretrained('postcards-text-fast')
    with pytest.raises(ValueError, match='built in'): autoguide(fast, fast, 2.)
