"""Schedule, forward process, prediction types, denoiser and loss: the numbers of the published models, the identities
of chapter 03 on every timestep, and what is refused."""
import pytest
import torch

from ldm_nb.diffusion import (PREDICTION_TYPES, Denoiser, DiffusionLoss, Schedule, abar_at, betas, draw_t, q_sample,
                              target, to_eps, to_z0)

schedule, ended = Schedule(), Schedule(zero_snr=True)
PUBLISHED = ((.0015, .0195), (.0015, .0155), (.0015, .0205), (.00085, .012))


def near(a, b, eps):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() < eps, (a, b)


@pytest.fixture
def some():
    g = torch.Generator().manual_seed(3)
    z0, eps, guess = torch.randn(3, 1000, 4, 2, generator=g, dtype=torch.float64)
    return z0, eps, guess, torch.arange(1000)


class Knows:
    "A network that gives one answer, and keeps what it was asked."
    def __init__(self, answer): self.answer = answer

    def __call__(self, z_t, t, c):
        self.z_t, self.t, self.c = z_t, t, c
        return self.answer


def test_published_schedules():
    # faces, bedrooms and ImageNet; churches; layouts and maps; text to image
    beta, left = betas('scaled_linear', .0015, .0195, 1000), 1.
    for b, a in zip(beta.tolist(), schedule.abar.tolist()):
        left *= 1 - b
        assert abs(left - a) < 1e-14
    near(beta[500], .00796318, 1e-8)
    near(schedule.abar[[0, 500, 999]], [.9985, .11492200, 1.42304e-4], 5e-9)
    near(Schedule(end=.0155).abar[[0, 500, 999]], [.9985, .15007005, 6.68665e-4], 5e-9)
    near(Schedule(end=.0205).abar[[0, 999]], [.9985, 9.69109e-5], 5e-10)
    near(Schedule(start=.00085, end=.012).abar[[0, 500, 999]], [.99915, .27633268, 4.66010e-3], 5e-9)


def test_other_kinds():
    def level(u): return torch.cos(torch.tensor((u + .008)/1.008*torch.pi/2, dtype=torch.float64))**2
    near(Schedule('cosine').abar[[0, 499, 998]], [level(u)/level(0) for u in (.001, .5, .999)], 1e-12)
    near(betas('linear', .001, .02, 3), [.001, .0105, .02], 1e-12)
    for bad in (dict(kind='sigmoid'), dict(start=0.), dict(start=.5, end=.1), dict(end=1.), dict(steps=1)):
        with pytest.raises(ValueError): Schedule(**bad)


@pytest.mark.parametrize('start, end', PUBLISHED)
def test_zero_terminal_snr(start, end):
    # the first value is kept, all differences of sqrt(abar) grow by one factor, the last value is nearly 0
    usual, bent = Schedule(start=start, end=end), Schedule(start=start, end=end, zero_snr=True)
    near(bent.abar[0], usual.abar[0], 1e-15)
    first = usual.abar[0].sqrt()
    stretch = bent.abar.sqrt()[:-1].diff()/usual.abar.sqrt()[:-1].diff()
    near(stretch, (first/(first - usual.abar[-1].sqrt())).expand(998), 1e-9)
    assert (bent.sigma.diff() > 0).all() and 0 < bent.abar[-1] <= 2**-24
    assert (bent.abar[-1] == 2**-24) == (start == .00085)       # elsewhere half of the one before is less


def test_a_saved_schedule_comes_back():
    again = Schedule(**ended.config)
    assert again.config == ended.config and torch.equal(again.abar, ended.abar)
    older = {k: v for k, v in schedule.config.items() if k != 'zero_snr'}
    assert not schedule.config['zero_snr'] and torch.equal(Schedule(**older).abar, schedule.abar)
    with pytest.raises(ValueError, match='at least 3'): Schedule(steps=2, zero_snr=True)


def test_the_two_clocks():
    # exact on the grid, inverse to each other between, clamped beyond
    for s in (schedule, Schedule('linear'), Schedule('cosine', steps=10), Schedule(steps=2), ended):
        t = torch.arange(len(s))
        between = t[:-1].double() + .37
        assert torch.equal(s.sigma_to_t(s.sigma), t.double()) and torch.equal(s.t_to_sigma(t), s.sigma)
        near(s.sigma_to_t(s.t_to_sigma(between)), between, 1e-9)
    near(schedule.t_to_sigma(500.5)**2, schedule.sigma[500]*schedule.sigma[501], 1e-12)
    near(schedule.sigma_to_t([0., 1e9]), [0, 999], 1e-12)
    for t in (1000, -.5):
        with pytest.raises(ValueError, match='0 ... 999'): schedule.t_to_sigma(t)
    for sigma in (float('nan'), -1.):
        with pytest.raises(ValueError, match='expected a noise level'): schedule.sigma_to_t(sigma)


def test_moments_of_a_noised_sample():
    n, g = 10_000, torch.Generator().manual_seed(4)
    z0 = torch.tensor([-1.5, 0., .3, 2.], dtype=torch.float64)
    for t in (0, 150, 500, 999):
        a = schedule.abar[t]
        z_t = q_sample(schedule, z0.expand(n, 4), torch.full((n,), t),
                       torch.randn(n, 4, generator=g, dtype=torch.float64))
        assert ((z_t.mean(0) - a.sqrt()*z0).abs() < 4*((1 - a)/n)**.5).all()
        assert ((z_t.var(0) - (1 - a)).abs() < 4*(1 - a)*(2/n)**.5).all()


@pytest.mark.parametrize('t, says', [(1000, '0 ... 999'), (-1, '0 ... 999'), (.5, 'integers')])
def test_timesteps_outside_are_refused(t, says):
    with pytest.raises(ValueError, match=says):
        q_sample(schedule, torch.zeros(1, 2), torch.tensor([t]), torch.zeros(1, 2))


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_round_trips(some, prediction_type):
    z0, eps, _, t = some
    for s in (schedule, ended):
        z_t, out = q_sample(s, z0, t, eps), target(prediction_type, z0, eps, s.abar)
        if s is schedule or prediction_type != 'eps': near(to_z0(prediction_type, out, z_t, s.abar), z0, 1e-10)
        near(to_eps(prediction_type, out, z_t, s.abar), eps, 1e-10)


def test_float32_loses_what_it_must(some):
    # eps to z0 divides by sqrt(abar), 0.012 at the end, which magnifies rounding
    z0, eps, _, t = some
    z = to_z0('eps', eps.float(), q_sample(schedule, z0.float(), t, eps.float()), schedule.abar)
    assert ((z.double() - z0).abs().flatten(1).max(1).values < 1e-6/schedule.abar.sqrt()).all()
    with pytest.raises(ValueError, match='eps, x0, v'): to_z0('epsilon', z0, z0, .5)


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_a_denoiser_asks_in_the_units_of_the_network(some, prediction_type):
    z0, eps, _, t = some
    net = Knows(target(prediction_type, z0, eps, schedule.abar))
    z_t = q_sample(schedule, z0, t, eps)
    z = z_t/schedule.abar.sqrt().view(-1, 1, 1)
    near(Denoiser(net, schedule, prediction_type)(z, schedule.sigma, 'a red house'), z0, 1e-10)
    near(net.z_t, z_t, 1e-12)
    assert torch.equal(net.t, t.double()) and net.c == 'a red house'


def test_v_where_no_signal_is_left(some):
    z0, eps, _, t = some
    v = target('v', z0, eps, ended.abar)
    z = q_sample(ended, z0, t, eps)/ended.abar.sqrt().view(-1, 1, 1)
    near(Denoiser(Knows(v), ended, 'v')(z, ended.sigma), z0, 1e-10)
    near(v[-1], -z0[-1], 1e-3)
    with pytest.raises(ValueError, match='pure noise'): Denoiser(Knows(v), ended)


def test_one_sigma_for_all():
    net = Knows(torch.zeros(2, 4))
    Denoiser(net, schedule)(torch.ones(2, 4), float(schedule.t_to_sigma(10.25)))
    near(net.t, [10.25, 10.25], 1e-5)
    assert (net.t.dtype, net.z_t.dtype) == (torch.float32, torch.float32)
    with pytest.raises(ValueError, match='eps, x0, v'): Denoiser(net, schedule, 'noise')
    with pytest.raises(ValueError, match=r'\(2, 4\) to \(2, 5\)'): Denoiser(net, schedule)(torch.ones(2, 5), 1.)


def test_timesteps_are_uniform():
    share = torch.bincount(draw_t(100_000, 10, torch.Generator().manual_seed(7)), minlength=10)/100_000
    assert len(share) == 10 and ((share - .1).abs() < 4*(.09/100_000)**.5).all()


def test_more_timesteps_from_the_middle():
    # t/T = sigmoid(nu), nu ~ N(-1/2, 1): half of these lie below T sigmoid(-1/2) = 0.378 T
    t = draw_t(100_000, 1000, torch.Generator().manual_seed(7), logit_normal_share=.75)
    assert abs((t < 378).float().mean() - (.75*.5 + .25*.378)) < 4*.5/100_000**.5 and 0 <= t.min() and t.max() < 1000


@pytest.mark.parametrize('loss, small, large', [('l2', .25, 9.), ('l1', .5, 3.), ('huber', .125, 2.5)])
def test_losses_of_an_error_of_known_size(loss, small, large):
    z0, eps, t = torch.zeros(3, 5), torch.randn(3, 5), torch.tensor([0, 400, 999])
    for miss, want in ((.5, small), (3., large)):
        near(DiffusionLoss(schedule, loss=loss)(lambda z_t, t, c: eps + miss, z0, None, t, eps), [want]*3, 1e-5)


def test_a_loss_refuses(some):
    z0, eps, _, t = some
    with pytest.raises(ValueError, match="'huber'"): DiffusionLoss(schedule, loss='l3')
    with pytest.raises(ValueError, match='eps, x0, v'): DiffusionLoss(schedule, prediction_type='score')
    with pytest.raises(ValueError, match='same shape'):
        DiffusionLoss(schedule)(lambda z_t, t, c: z_t[:, :1], z0, None, t, eps)
    with pytest.raises(ValueError, match='integers'): abar_at(schedule, torch.tensor([1.]))
