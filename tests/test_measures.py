"What measures are given is checked; what they give is held to numbers that can be worked out by hand."
import math

import pytest
import scipy.stats
import torch
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.metrics import distances, intervals, judges, preferences, reader, reconstruction
from ldm_nb.metrics.evaluate import first_stage_tallies
from ldm_nb.metrics.intervals import jackknife

N = 24


@pytest.fixture(scope='module')
def pictures(): # in [-1, 1], from end to end
    return torch.rand(N, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2 - 1


@pytest.fixture(scope='module')
def measures(): # name -> what takes a set of pictures
    torch.manual_seed(0)
    r = reader.Reader().eval()
    ae = Autoencoder(4, 32, (1, 2), 1, groups=8).eval()
    network = distances.reader_features(r)
    mse = lambda x, y: (x - y).square().mean((1, 2, 3))
    known = lambda x: dict(image=-torch.ones(len(x), 3, 32, 32), label=torch.zeros(len(x), dtype=torch.long),
                           caption=['a winter night']*len(x), boxes=[torch.zeros(0, 5)]*len(x),
                           map=torch.zeros(len(x), 32, 32, dtype=torch.long), mask=torch.ones(len(x), 1, 32, 32),
                           small=-torch.ones(len(x), 3, 16, 16))
    kinds = {f'judge of {k}': lambda x, f=f: f(x, known(x), r, mse) for k, f in judges.JUDGES.items()}
    return kinds | {
        'embed': lambda x: distances.embed(network, x), 'psnr': lambda x: reconstruction.psnr(x, -torch.ones(x.shape)),
        'psnr, second': lambda x: reconstruction.psnr(-torch.ones(x.shape), x),
        'ssim': lambda x: reconstruction.ssim(x, -torch.ones(x.shape)),
        'ssim, second': lambda x: reconstruction.ssim(-torch.ones(x.shape), x), 'read': lambda x: reader.read(r, x),
        'captions': lambda x: reader.caption_accuracy(r, x, ['a winter night']*len(x)),
        'mean_psnr': lambda x: reconstruction.mean_psnr(ae, x), 'bits': lambda x: reconstruction.bits_per_pixel(ae, x),
        'reconstruction': lambda x: reconstruction.measure_reconstruction(ae, x, r, mse),
        'reader_fid': lambda x: reconstruction.reader_fid(r).update(x, real=True),
        'first stage': lambda x: first_stage_tallies(x, -torch.ones(x.shape), mse, 'cpu'),
        'preferences': lambda x: preferences.preference_pairs(x, x)}


WRONG = {'in [0, 1]': lambda x: x/2 + .5, 'bytes as fractions': lambda x: (x + 1)*127.5,
         'whole numbers': lambda x: ((x + 1)*127.5).long(), 'NaN': lambda x: x.where(x < .9, math.nan),
         'infinity': lambda x: x.where(x < .9, math.inf), 'no picture': lambda x: x[:0],
         'one without its axis': lambda x: x[0],
         'grey': lambda x: x[:, :1], 'channels last': lambda x: x.movedim(1, -1), 'flat': lambda x: x.flatten(1)}


@pytest.mark.parametrize('wrong', WRONG)
def test_every_measure_refuses(measures, pictures, wrong):
    for name, measure in measures.items():
        try: measure(WRONG[wrong](pictures))
        except ValueError as e: assert len(str(e)) > 30, name
        else: pytest.fail(f'{name} takes pictures {wrong}')


def test_every_measure_takes_bytes(measures, pictures):
    for name, measure in measures.items():
        if name != 'preferences': measure(((pictures + 1)*127.5).round().to(torch.uint8))
    a = measures['psnr'](((pictures + 1)*127.5).round().to(torch.uint8))
    assert (a - measures['psnr'](pictures)).abs().max() < .01


def test_a_black_a_white_and_a_grey_set_are_measured(measures, pictures): # what broken models draw
    for value in (-1., 0., 1.): measures['embed'](torch.full_like(pictures, value))
    with pytest.warns(UserWarning, match='if they are in'): measures['embed'](pictures[:3]/2 + .5)


ALGEBRA = {'fid': distances.fid, 'kid': distances.kid, 'precision': distances.precision_recall,
           'score': lambda a, b: distances.inception_score(b), 'all': lambda a, b: distances.set_measures(a, b, b),
           'jackknife': lambda a, b: jackknife(lambda p, q: distances.fid(p, q).reshape(1), a, b),
           'compare': lambda a, b: distances.compare(*(distances.Seen(v, v, (8, 8)) for v in (a, b)))}


@pytest.mark.parametrize('name', ALGEBRA)
def test_no_number_that_is_none_reaches_the_algebra(name, monkeypatch):
    "One would end the interpreter: MKL's eigenvalues of a matrix with NaN."
    seen = []
    for f in ('eigvals', 'eigvalsh', 'eigh', 'svd', 'svdvals', 'cholesky'):
        true = getattr(torch.linalg, f)
        monkeypatch.setattr(torch.linalg, f, lambda x, *a, true=true, **k: seen.append(bool(x.isfinite().all())) or
                            (true(x, *a, **k) if seen[-1] else pytest.fail('NaN in LAPACK')))
    a = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for value in (math.nan, math.inf, -math.inf, 1e200):
        b = a.clone()
        b[3, 1] = value
        with pytest.raises(ValueError): ALGEBRA[name](a, b)
    for few in (a[:0], a[:1], a[0]):
        if name == 'score' and few.shape == (1, 8): continue     # of one image it is 1
        with pytest.raises(ValueError): ALGEBRA[name](a, few)
    ALGEBRA[name](a, 2*a)
    assert all(seen) and bool(seen) == (name in ('fid', 'all', 'jackknife', 'compare'))


def test_intervals_refuse():
    x = torch.ones(40, 1)
    for wrong in (x[:0], x*math.nan, x[:, 0]):
        with pytest.raises(ValueError): intervals.bootstrap(wrong, wrong)
    for level in (0, 1, 95):
        with pytest.raises(ValueError): intervals.bootstrap(x, x, level)
        with pytest.raises(ValueError): jackknife(lambda s: s.mean(0), x, level=level)
    for bad in ((math.nan, 5), (.5, 0), (1.1, 5)):
        with pytest.raises(ValueError): intervals.wilson(*bad)


# by hand


def diagonal(sigma, mean, m=4): # features whose mean and (unbiased) covariance are exactly so
    k = len(sigma)
    signs = torch.tensor([[1 - 2*(i >> j & 1) for j in range(k)] for i in range(2**k)]*m, dtype=torch.float64)
    return signs*((len(signs) - 1)/len(signs))**.5*torch.tensor(sigma) + torch.tensor(mean)


def test_fid_of_two_gaussians(): # |m1 - m2|^2 + sum (s1 - s2)^2
    a, b = diagonal([1., 2., .5], [0., 0., 0.]), diagonal([3., 2., 1.5], [2., -1., 0.])
    assert distances.fid(a, b).item() == pytest.approx(4 + 1 + 4 + 0 + 1, abs=1e-4)
    assert distances.fid(a, a).item() == pytest.approx(0, abs=1e-4)


def test_kid_by_the_definition(): # the means leave out a row with itself
    a, b = diagonal([1., 2.], [0., 0.], 3), diagonal([1., 1.], [1., 0.], 3)
    k = lambda x, y: (x@y.T/2 + 1)**3
    own = lambda x: (k(x, x).sum() - k(x, x).diagonal().sum())/(len(x)*(len(x) - 1))
    want = own(a) + own(b) - 2*k(a, b).mean()
    assert distances.kid(a, b).item() == pytest.approx(want.item(), rel=1e-6)
    assert distances.kid(a, b, subset=len(a)//2).item() != pytest.approx(want.item(), rel=1e-3)


def test_inception_score_of_certain_and_of_vague_answers():
    certain = 60*torch.eye(5).repeat(4, 1)
    assert distances.inception_score(certain).item() == pytest.approx(5, rel=1e-5)          # of each class as many
    assert distances.inception_score(certain[:5].repeat_interleave(4, 0)).item() == pytest.approx(5, rel=1e-5)
    assert distances.inception_score(torch.zeros(20, 5)).item() == pytest.approx(1, rel=1e-6)
    p = torch.tensor([[.9, .1], [.1, .9]])
    want = math.exp(.9*math.log(.9/.5) + .1*math.log(.1/.5))                             # exp(KL to the mean)
    assert distances.inception_score(p.log().repeat(10, 1)).item() == pytest.approx(want, rel=1e-5)


def test_precision_and_recall_on_a_line():
    line = lambda *v: torch.tensor(v).double().reshape(-1, 1)
    got = distances.precision_recall(line(0, 1, 2, 3), line(.5, 1.5, 7., 10), k=1)
    assert [v.item() for v in got] == [.5, .75]         # drawn balls reach 1, 1, 3, 3: not as far as 3
    assert [v.item() for v in distances.precision_recall(line(0, 1, 2, 3), line(20, 21, 22), k=1)] == [0, 0]


def test_psnr_and_ssim_of_even_pictures():
    x = torch.zeros(2, 3, 16, 16)
    assert reconstruction.psnr(x, x + .2).tolist() == pytest.approx([20.]*2, abs=1e-4)   # 10 log10(4/.04)
    assert reconstruction.psnr(-x - 1, x + 1).tolist() == pytest.approx([0.]*2, abs=1e-5)
    assert reconstruction.psnr(x, x, most=100).tolist() == [100, 100]
    c = (.01*2)**2
    for a, b in ((.2, .6), (-.5, .5)):
        assert reconstruction.ssim(x + a, x + b).tolist() == pytest.approx([(2*a*b + c)/(a*a + b*b + c)]*2, abs=1e-4)


def test_jackknife_of_a_mean_is_students_interval():
    x = torch.arange(40.).double()[:, None]
    value, low, high = jackknife(lambda s: s.mean(0), x)
    blocks = torch.stack([x[torch.arange(40) % 10 == b].mean() for b in range(10)])
    half = scipy.stats.t.ppf(.975, 9)*blocks.std().item()/10**.5
    assert [v.item() for v in (value, low, high)] == pytest.approx([19.5, 19.5 - half, 19.5 + half], rel=1e-9)


def test_bootstrap_and_wilson():
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    low, high = intervals.bootstrap(x, torch.ones(400, 1))
    half = 1.96*x.std().item()/400**.5
    assert low == pytest.approx(x.mean().item() - half, abs=.25*half)
    assert high == pytest.approx(x.mean().item() + half, abs=.25*half)
    want = scipy.stats.binomtest(19, 20).proportion_ci(method='wilson')
    assert intervals.wilson(.95, 20) == pytest.approx((want.low, want.high), rel=1e-9)
    ratio = intervals.Tally(torch.tensor([[1., 0], [0, 3]]), torch.tensor([[2., 0], [2, 4]]))
    assert ratio.value() == pytest.approx((1/4 + 3/4)/2)


def test_answers_that_are_no_text_are_named(tmp_path):
    from ldm_nb.metrics.preferences import kept_answers
    (tmp_path/'answers.jsonl').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='answers.jsonl is text in UTF-16'): kept_answers(tmp_path/'answers.jsonl')
