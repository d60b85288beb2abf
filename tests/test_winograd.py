"Convolutions with fewer multiplications: under a compiled network, in a training, and where they must step aside."
import copy
import pickle
import shutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ldm_nb.fast import winograd
from ldm_nb.attention import CrossAttention
from ldm_nb.unet import UNet
from ldm_nb.fast.compile import compile_network
from ldm_nb.fast.winograd import ApartLinear, PixelLinear, WinogradConv2d, for_cpu

pytestmark = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 1),
                         nn.Conv2d(24, 16, 3, padding=1, bias=False))

def gradients(net, x):
    y = net(x)
    net.zero_grad()
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]

def near(a, b): return all((x - y).norm() <= 1e-5*y.norm() + 1e-7 for x, y in zip(a, b))


@pytest.mark.parametrize('side', [32, 30]) # 256 tiles; sides that are no multiple of four
def test_compiled_training_and_answer(side):
    plain, fast = small(), small()
    compile_network(fast)
    assert [type(m) for m in fast
            if not isinstance(m, (nn.GroupNorm, nn.SiLU))] == [WinogradConv2d, PixelLinear, WinogradConv2d]
    x = torch.randn(4, 8, side, side)
    assert near(gradients(fast, x), gradients(plain, x))
    opt, other = (torch.optim.AdamW(n.parameters(), lr=.1, fused=True) for n in (fast, plain))
    opt.step(), other.step()
    with torch.no_grad(): assert near([fast(x)], [plain(x)])                    # with the new weights


def test_steps_aside(monkeypatch):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    plain = copy.deepcopy(net)
    x = torch.randn(2, 8, 32, 32)
    few = torch.randn(1, 8, 16, 16)
    called = []
    convolve = winograd.convolve
    assert for_cpu(net) == 1
    monkeypatch.setattr(winograd, 'convolve', lambda *a: called.append(1) or convolve(*a))
    torch.testing.assert_close(net(few), plain(few))                            # 16 tiles are too few
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(copy.deepcopy(net).to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))
    assert not called
    net(x)
    assert called
    assert net.to('meta')(x.to('meta')).shape == (2, 8, 32, 32)


def test_autocast_gives_the_types_it_always_gave(): # and the convolutions are left to it
    plain, x = small().to(memory_format=torch.channels_last), torch.randn(2, 8, 32, 32)  # in the layout of the other
    fast = copy.deepcopy(plain)
    for_cpu(fast)
    with torch.autocast('cpu', torch.bfloat16): a, b = fast(x), plain(x)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)


def test_which_layers_are_exchanged():
    kinds = dict(strided=nn.Conv2d(8, 8, 3, 2, 1), seven=nn.Conv2d(7, 8, 3, padding=1),
                 grouped=nn.Conv2d(8, 8, 3, padding=1, groups=2), unpadded=nn.Conv2d(8, 8, 3),
                 apart=nn.Conv2d(8, 8, 3, padding=2, dilation=2),
                 around=nn.Conv2d(8, 8, 3, padding=1, padding_mode='circular'), bare=nn.Linear(8, 8, bias=False),
                 five=nn.Conv2d(8, 8, 5, padding=2), up=nn.ConvTranspose2d(8, 8, 3, padding=1))
    assert for_cpu(nn.ModuleDict(kinds)) == 0 and all(type(m).__module__.startswith('torch') for m in kinds.values())
    net = nn.ModuleDict(dict(conv=nn.Conv2d(8, 8, 3, padding=1), point=nn.Conv2d(8, 5, 1), lin=nn.Linear(8, 8)))
    assert (for_cpu(net) == 3 and [type(m) for m in net.values()] == [WinogradConv2d, PixelLinear, ApartLinear] and
            for_cpu(net) == 0)


def test_a_changed_network_copies_pickles_and_keeps_its_names():
    net = UNet(ch=32, ch_mult=(1, 2), attn_factors=(2,), groups=8)
    names = list(net.state_dict())
    for_cpu(net)
    z, t = torch.randn(8, 4, 16, 16), torch.full((8,), 3.)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(other.state_dict()) == names and torch.equal(other(z, t), net(z, t))


def test_without_a_compiler_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    winograd.program.cache_clear(), winograd.built.cache_clear()
    with pytest.raises(OSError, match='no C\\+\\+ compiler'): winograd.program()
    assert for_cpu(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))) == 0
    monkeypatch.setenv('CXX', '/bin/false')
    with pytest.raises(OSError, match='could not compile'): winograd.program()


def test_gradients_by_finite_differences():
    # of the two functions themselves: linear in x and in w, so a difference is exact but for rounding
    rng = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(*s, generator=rng) for s in ((2, 5, 6, 8), (8, 8, 3, 3), (2, 5, 6, 8)))
    _, *kept = winograd.convolve(x, w)
    dx, dw = winograd.convolve_back(dy, *kept)
    for a, grad, f in ((x, dx, lambda v: winograd.convolve(v, w)[0]), (w, dw, lambda v: winograd.convolve(x, v)[0])):
        u = torch.randn(a.shape, generator=rng)
        left, right = ((f(a + u) - f(a - u))*dy).sum().item()/2, (grad*u).sum().item()
        assert abs(left - right) < 1e-4*(dy.norm()*f(u).norm()).item()


@pytest.mark.parametrize('b, n, m, d', [(2, 9, 77, 16), (1, 4, 1, 8), (3, 33, 128, 64), (2, 6, 17, 40)])
def test_attention_to_few(b, n, m, d):
    rng = torch.Generator().manual_seed(n)
    q, k, v = (3*torch.randn(b, s, 2*d, generator=rng).unflatten(2, (2, d)).transpose(1, 2) for s in (n, m, m))
    truth, plain = (F.scaled_dot_product_attention(q.to(t), k.to(t), v.to(t)) for t in (torch.float64, torch.float32))
    off, theirs = ((y - truth).square().mean().sqrt() for y in (winograd.attend_to_few(q, k, v), plain))
    assert off < 2*theirs + 1e-7, (off, theirs)  # large scores cost digits, here as there
    k[0, 0, 0, 0] = float('nan')
    assert winograd.attend_to_few(q, k, v)[0, 0].isnan().all()                  # a mistake stays visible


def test_attention_is_exchanged_and_steps_aside(monkeypatch):
    attn = CrossAttention(32, 24, heads=2)
    x, context, called, few = torch.randn(2, 8, 32), torch.randn(2, 5, 24), [], winograd.attend_to_few
    want = attn(x, context).detach()
    assert for_cpu(attn) == 2 and attn.attend is winograd.attend_fast           # and the layer behind it
    monkeypatch.setattr(winograd, 'attend_to_few', lambda *a: called.append(1) or few(*a))
    torch.testing.assert_close(attn(x, context), want)                             # with gradients: PyTorch's
    with torch.no_grad():
        attn(x, torch.randn(2, 200, 24)), attn(x[:, :3], context)                  # many keys; three queries
        assert not called
        torch.testing.assert_close(attn(x, context), want)
    assert called
