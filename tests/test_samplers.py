"Whole trajectories, noise levels and the rescaled schedule against diffusers, at the settings of the released models."
import importlib

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from ldm_nb.diffusion import Denoiser, Schedule, betas
from ldm_nb.guidance import guide
from ldm_nb.oracle import Mixture
from ldm_nb.samplers import SAMPLERS, SPACINGS, sampling_sigmas, sampling_steps
from ldm_nb.unet import Cond

PAIRS = [(.0015, .0195), (.00085, .012)] # start and end of beta: faces, bedrooms, ImageNet; text-to-image
TOLERANCE = 1e-4 # of max|z|, at every step
SHAPE = (3, 4, 6, 6)


class Bounded:
    "A network that predicts eps, from a guess of z0 that stays bounded: (z_t - sqrt(abar) z0)/sqrt(1 - abar). Float64."
    def __init__(self, schedule, guess): self.schedule, self.guess = schedule, guess

    def __call__(self, z_t, t, c=None): # t: one step, or one a sample, integers in any type
        t = torch.as_tensor(t).double().reshape(-1)
        assert (t - t.round()).abs().max() < 1e-6, f't = {t.tolist()}: not on the grid'
        a = self.schedule.abar[t.round().long()].view(-1, 1, 1, 1)
        return (z_t.double() - a.sqrt()*self.guess(z_t.double(), a))/(1 - a).sqrt()


def network(): # seeded, convolutions that know the noise level, an answer within -2 ... 2
    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(5, 16, 3, padding=1).double(), torch.nn.Conv2d(16, 4, 3, padding=1).double()
    def guess(z_t, a):
        with torch.no_grad():
            return 2*last(3*first(torch.cat([z_t, a.sqrt().expand(len(z_t), 1, *z_t.shape[2:])], 1)).sin()).tanh()
    return guess


def mixture(): # the exact denoiser of five clusters
    m = Mixture(1.5*torch.randn(5, *SHAPE[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64),
                [.3, .5, .7, .4, .6])
    return lambda z_t, a: m.denoise(z_t/a.sqrt(), ((1 - a)/a).sqrt().reshape(-1))


class Tape:
    "The same unit noise each time it is started."
    def __init__(self): self.g = torch.Generator().manual_seed(2)
    def __call__(self, like): return torch.randn(like.shape, generator=self.g, dtype=torch.float64).to(like.dtype)


# our sampler, its arguments; their scheduler, its arguments; our final sigma; the units of their z
EACH, ZERO, FIRST = dict(set_alpha_to_one=False), dict(set_alpha_to_one=True), None
CASES = {
    'ddim, eta 0': ('ddim', dict(eta=0.), 'DDIMScheduler', dict(clip_sample=False, **EACH), None, 'vp'),
    'ddim, eta 0, to 0': ('ddim', dict(eta=0.), 'DDIMScheduler', dict(clip_sample=False, **ZERO), 0., 'vp'),
    'ddim, eta 1': ('ddim', dict(eta=1.), 'DDIMScheduler', dict(clip_sample=False, **EACH), None, 'vp'),
    'ddpm': ('ddpm', {}, 'DDPMScheduler', dict(clip_sample=False, variance_type='fixed_small'), 0., 'vp'),
    'plms': ('plms', {}, 'PNDMScheduler', dict(skip_prk_steps=True, **EACH), None, 'vp'),
    'plms, to 0': ('plms', {}, 'PNDMScheduler', dict(skip_prk_steps=True, **ZERO), 0., 'vp'),
    'euler': ('euler', {}, 'EulerDiscreteScheduler', dict(final_sigmas_type='sigma_min'), None, 'sigma'),
    'euler, to 0': ('euler', {}, 'EulerDiscreteScheduler', dict(final_sigmas_type='zero'), 0., 'sigma'),
    'euler_a': ('euler_a', {}, 'EulerAncestralDiscreteScheduler', {}, 0., 'sigma'),
    'heun': ('heun', {}, 'HeunDiscreteScheduler', {}, 0., 'sigma'),
    'dpmpp_2m': ('dpmpp_2m', {}, 'DPMSolverMultistepScheduler',
                 dict(final_sigmas_type='sigma_min', lower_order_final=False), None, 'vp'),
    'dpmpp_2m, to 0': ('dpmpp_2m', {}, 'DPMSolverMultistepScheduler', dict(final_sigmas_type='zero'), 0., 'vp'),
}


def theirs(case, pair, steps, net, unit, monkeypatch):
    "The scheduler after the last step, and z after each step, in its own units."
    name, kwargs, scheduler, config, _, _ = CASES[case]
    if scheduler != 'DPMSolverMultistepScheduler': config = dict(config, timestep_spacing='leading', steps_offset=1)
    s = getattr(diffusers, scheduler)(num_train_timesteps=1000, beta_start=pair[0], beta_end=pair[1],
                                      beta_schedule='scaled_linear', **config)
    # its own 'leading' divides by steps + 1
    if scheduler == 'DPMSolverMultistepScheduler': s.set_timesteps(timesteps=sampling_steps(steps))
    else: s.set_timesteps(steps)
    tape = Tape()
    module = importlib.import_module(type(s).__module__)
    if hasattr(module, 'randn_tensor'):
        monkeypatch.setattr(module, 'randn_tensor',
                            lambda shape, dtype=None, **_: tape(torch.empty(shape, dtype=dtype)))
    z, path = unit*torch.as_tensor(s.init_noise_sigma, dtype=torch.float64), []
    for t in s.timesteps:
        z = s.step(net(s.scale_model_input(z, t), t), t, z, **kwargs).prev_sample
        path.append(z.double())
    if name == 'heun': path = path[1::2] + path[-1:]        # two calls a step, but for the last
    if name == 'plms': path = path[1:]                      # two calls in the first
    return s, path


def ours(case, schedule, sigmas, net, unit): # z after each step, in the units of the peer
    name, kwargs, _, _, _, units = CASES[case]
    start = unit*(1 + sigmas[0]**2).sqrt()
    path = SAMPLERS[name](Denoiser(net, schedule), start, sigmas, noise=Tape(), **kwargs)
    return [z/(1 + s**2).sqrt() if units == 'vp' else z for (z, _), s in zip(path, sigmas[1:], strict=True)]


def gaps(a, b): # of max|z|, one a step
    assert len(a) == len(b)
    return [((p - q).abs().max()/q.abs().max()).item() for p, q in zip(a, b)]


@pytest.mark.parametrize('steps', [10, 20, 50])
@pytest.mark.parametrize('pair', PAIRS, ids=str)
@pytest.mark.parametrize('guess', [network, mixture])
@pytest.mark.parametrize('case', CASES)
def test_trajectory(case, guess, pair, steps, monkeypatch, record_property):
    "Their schedulers as they come, with tables in float32; our sigmas in float64."
    schedule = Schedule(start=pair[0], end=pair[1])
    net = Bounded(schedule, guess())
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sigmas = sampling_sigmas(schedule.sigma, steps, final_sigma=CASES[case][4])
    _, peer = theirs(case, pair, steps, net, unit, monkeypatch)
    mine = ours(case, schedule, sigmas, net, unit)
    assert len(mine) == steps and max(z.abs().max() for z in mine) < 1e3
    gap = gaps(mine, peer)
    record_property('gap', max(gap))
    worst = max(gap)
    assert worst <= TOLERANCE, f'{case}, {steps} steps: off by {worst:.1e} of max|z| at step {gap.index(worst) + 1}'


@pytest.mark.parametrize('case', [c for c in CASES if CASES[c][2] in ('DDIMScheduler', 'PNDMScheduler')])
def test_trajectory_in_float64(case, monkeypatch):
    "Where the peer lets its table be replaced, nothing is left but round-off."
    schedule = Schedule()
    net = Bounded(schedule, network())
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    init = getattr(diffusers, CASES[case][2]).__init__
    def exact(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.alphas_cumprod = schedule.abar.clone()
        to_one = kwargs['set_alpha_to_one']
        self.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if to_one else schedule.abar[0]
    monkeypatch.setattr(getattr(diffusers, CASES[case][2]), '__init__', exact)
    _, peer = theirs(case, PAIRS[0], 20, net, unit, monkeypatch)
    sigmas = sampling_sigmas(schedule.sigma, 20, final_sigma=CASES[case][4])
    assert max(gaps(ours(case, schedule, sigmas, net, unit), peer)) < 1e-10


@pytest.mark.parametrize('pair', PAIRS, ids=str)
def test_spacings(pair):
    schedule = Schedule(start=pair[0], end=pair[1])
    config = dict(beta_start=pair[0], beta_end=pair[1], beta_schedule='scaled_linear')
    for spacing, counts in (('leading', (1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 250, 500)),
                            ('linspace', (2, 3, 7, 10, 20, 33, 50, 101, 333, 999)),
                            ('trailing', (1, 2, 3, 7, 10, 20, 27, 50, 101, 250, 400, 999, 1000))):
        peer = diffusers.PNDMScheduler(timestep_spacing=spacing, steps_offset=int(spacing == 'leading'),
                                       skip_prk_steps=True)
        for n in counts:
            if (spacing, n) == ('leading', 1): continue # a single step is the last one here, and t = 1 there
            peer.set_timesteps(n)
            t = sampling_steps(n, 1000, spacing)
            assert t == peer._timesteps[::-1].tolist(), (spacing, n)
            assert torch.equal(SPACINGS[spacing](schedule.sigma, n), schedule.sigma[t])
    peer = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing='linspace', **config)
    for n in (2, 10, 20, 50):
        peer.set_timesteps(n)
        ratio = sampling_sigmas(schedule.sigma, n, 'karras')[:-1]/peer.sigmas[:-1].double()
        assert (ratio - 1).abs().max() < 2e-4 and peer.sigmas[-1] == 0


@pytest.mark.parametrize('spacing', [k for k in SPACINGS if k != 'published'])
def test_step_counts(spacing): # those that crash or miscount in the published sampler
    sigma = Schedule().sigma
    for n in (3, 9, 27, 30, 36, 37, *range(101, 112), *range(251, 334), 400, *range(501, 1001)):
        s = sampling_sigmas(sigma, n, spacing)
        assert len(s) == n + 1 and (s.diff() < 0).all() and s[-1] >= 0, (spacing, n)


def test_the_published_list(): # as the authors' code lists them, whatever was asked for
    for n, first, count in ((30, 991, 31), (7, 995, 8), (50, 981, 50), (20, 951, 20)):
        t = sampling_steps(n, spacing='published')
        assert (t[0], len(t), t[-1]) == (first, count, 1)
    for n in (3, 9, 999, 1000):
        with pytest.raises(ValueError, match='does not exist'): sampling_steps(n, spacing='published')
    assert len(sampling_sigmas(Schedule().sigma, 30, 'published')) == 32


@pytest.mark.parametrize('name, w, golden', [('ddim', 1, .088617), ('ddim', 3, -.574077), ('ddim', 7.5, -1.344215),
                                             ('plms', 1, .128331), ('plms', 3, -.497346), ('plms', 7.5, -1.331549)])
def test_thirty_steps_as_published(name, w, golden): # numbers of the authors' samplers, which take 31
    schedule = Schedule(start=.0015, end=.0195)
    def eps(x, t, c): return .9*x + .3*torch.tanh(x + torch.sin(t/180) + c)
    denoise = Denoiser(eps, schedule, 'eps')
    def guided(z, s): return denoise(z, s, 0.).lerp(denoise(z, s, .5), w)
    sigmas = sampling_sigmas(schedule.sigma, 30, 'published')
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)*(1 + sigmas[0]**2)**.5
    *_, (z, _) = SAMPLERS[name](guided, z, sigmas)
    assert abs((z/(1 + sigmas[-1]**2)**.5).item() - golden) < 5e-6


@pytest.mark.parametrize('name', SAMPLERS)
def test_exactly_as_many_steps_as_asked(name):
    sigma, z = Schedule().sigma, torch.ones(1, 2, dtype=torch.float64)
    for n in (1, 2, 3, 9, 36, 111, 333, 400, 777):
        for final_sigma in (None, 0.):
            sigmas = sampling_sigmas(sigma, n, final_sigma=final_sigma)
            taken = list(SAMPLERS[name](lambda z, s: z/(1 + s**2), z*sigmas[0], sigmas))
            assert len(taken) == n and all(torch.isfinite(v).all() for pair in taken for v in pair), (name, n)


@pytest.mark.parametrize('pair', [*PAIRS, (.0015, .0155), (.0015, .0205)], ids=str)
def test_zero_terminal_snr(pair):
    b = betas('scaled_linear', *pair, 1000)
    peer = (1 - rescale_zero_terminal_snr(b.clone())).cumprod(0)
    schedule = Schedule(start=pair[0], end=pair[1], zero_snr=True)
    assert (schedule.abar[:-1] - peer[:-1]).abs().max() < 1e-12
    assert (schedule.abar[:-1]/peer[:-1] - 1).abs().max() < 1e-6
    assert peer[-1] < 1e-16 and 0 < schedule.abar[-1] <= 2**-24 and (schedule.sigma.diff() > 0).all()
    assert torch.equal(Schedule(**schedule.config).abar, schedule.abar)


# what the authors' own samplers give, run by hand: a latent of one number that starts at 1, a network that answers
# .9 x + .3 tanh(x + sin(t/180) + c), c = .5, null 0, their `linear` schedule, eta 0. Steps -> guidance 1, 3, 7.5
WEIGHTS = (1., 3., 7.5)
AUTHORS = {
    'ddim': {5: (-.018479, -.677319, -1.466614), 10: (.049987, -.618643, -1.375897), 20: (.086115, -.566147, -1.348873),
             50: (.108442, -.533595, -1.338209), 250: (.120433, -.516821, -1.335015),
             30: (.088617, -.574077, -1.344215)},
    'plms': {5: (.022483, -.200403, .167809), 10: (.137807, -.287490, .805510), 20: (.143343, -.438155, -.971809),
             50: (.131486, -.487338, -1.330729), 250: (.125204, -.508020, -1.334418),
             30: (.128331, -.497346, -1.331549)}}


def answer(z, t, c): # the network: b c h w, (b,), its condition as context (b, 1, 1)
    t = torch.as_tensor(t).double().reshape(-1, 1, 1, 1)
    return .9*z + .3*torch.tanh(z + torch.sin(t/180) + c.context[..., None])


def drawn(name, sigmas, w, schedule): # the last z_t, which began as 1
    said, nothing = (Cond(context=torch.full((1, 1, 1), v, dtype=torch.float64)) for v in (.5, 0.))
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)*(1 + sigmas[0]**2).sqrt()
    for z, _ in SAMPLERS[name](guide(Denoiser(answer, schedule), said, nothing, w), z, sigmas): pass
    return (z/(1 + sigmas[-1]**2).sqrt()).item()


@pytest.mark.parametrize('steps', AUTHORS['ddim'])
@pytest.mark.parametrize('name', AUTHORS)
def test_what_the_authors_samplers_give(name, steps):
    "Their six digits: 2e-6 off at most; PLMS with few steps and a large weight, which magnifies float32, 3e-6."
    schedule = Schedule('scaled_linear', .0015, .0195)
    assert len(sampling_steps(30, spacing='published')) == 31       # 991, 958, ..., 1: not as many as asked
    sigmas = sampling_sigmas(schedule.sigma, steps, 'published')
    for w, want in zip(WEIGHTS, AUTHORS[name][steps]):
        off = abs(drawn(name, sigmas, w, schedule) - want)
        assert off < (3e-6 if (name, steps, w) == ('plms', 10, 7.5) else 2e-6), (w, off)
    if 1000 % steps == 0: assert torch.equal(sigmas, sampling_sigmas(schedule.sigma, steps)) # ours are the same there
