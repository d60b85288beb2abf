"A network asked in patches, as the authors enlarge pictures of more than 128 pixels, against a loop written out here."
import pytest
import torch
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine import memory
from ldm_nb.engine.memory import bytes_to_sample
from ldm_nb.fast.tiles import PatchedNetwork, sample_in_patches
from ldm_nb.paper.images import ImageEmbedder
from ldm_nb.unet import Cond, UNet


def weight(y, x, side): # of one latent of a patch, as published: arrays from 0 to 1, the nearer edge, clipped
    y, x = y/(side - 1), x/(side - 1)
    return min(max(min(y, 1 - y, x, 1 - x), .01), .5)


def by_hand(net, z, t, c, side, stride): # latent by latent
    out = torch.zeros(len(z), 4, *z.shape[2:], dtype=torch.float64)
    total = torch.zeros(z.shape[2:], dtype=torch.float64)
    for top in range(0, z.shape[2] - side + 1, stride):
        for left in range(0, z.shape[3] - side + 1, stride):
            part = (..., slice(top, top + side), slice(left, left + side))
            answer = net(z[part], t, Cond(concat=c.concat[part], context=c.context, vector=c.vector)).double()
            for y in range(side):
                for x in range(side):
                    out[:, :, top + y, left + x] += weight(y, x, side)*answer[:, :, y, x]
                    total[top + y, left + x] += weight(y, x, side)
    return out/total


@torch.no_grad()
def test_patches_by_hand():
    torch.manual_seed(0)
    net = UNet(in_ch=7, out_ch=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, groups=8, attn_factors=(2,)).eval()
    for p in net.parameters(): p.add_(.05*torch.randn_like(p))
    z, t, c = torch.randn(2, 4, 24, 32), torch.tensor([3., 700.]), Cond(concat=torch.randn(2, 3, 24, 32))
    want = by_hand(net, z, t, c, 16, 8)
    got = PatchedNetwork(net, 16, 8)(z, t, c)
    assert (got - want).abs().max() < 1e-5 < 1e-2 < (net(z, t, c) - want).abs().max()
    got = PatchedNetwork(net.double(), 16, 8)(z.double(), t, Cond(concat=c.concat.double()))
    assert (got - want).abs().max() < 1e-5
    for side, stride in ((16, 0), (16, 17), (15, 8), (1, 1)):
        with pytest.raises(ValueError, match='side='): PatchedNetwork(net, side, stride)


def test_a_model_enlarges_in_patches(monkeypatch):
    torch.manual_seed(0)
    ae = Autoencoder(3, 32, (1, 1, 1), 1, groups=8, codes=16)
    net = UNet(in_ch=6, out_ch=3, ch=32, ch_mult=(1, 2), num_res_blocks=1, groups=8)
    torch.nn.init.normal_(net.conv_out.weight, std=.05)
    ldm = LatentDiffusion(ae, net, ImageEmbedder(4), size=64)
    small = torch.rand(3, 24, 24)*2 - 1
    seen, hook = [], net.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    whole = ldm.sample(image=small, steps=2)
    assert set(seen) == {(24, 24)}
    seen.clear()
    patched = sample_in_patches(ldm, 16, 8).sample(image=small, steps=2)
    hook.remove()
    assert set(seen) == {(16, 16)} and len(seen) == 2*4 and patched.shape == whole.shape == (1, 3, 96, 96)
    assert (patched - whole).abs().max() > 1e-3
    assert bytes_to_sample(ldm, (3, 64, 64), decode=False) == bytes_to_sample(ldm, (3, 16, 16), decode=False)
    need = bytes_to_sample(ldm, (3, 16, 16), decode=False)
    with monkeypatch.context() as m: # a patch stays as it is, however large the image; the decoder does not
        m.setattr(memory, 'free_bytes', lambda device: need)
        memory.check_sample_fits(ldm, (3, 4096, 4096), decode=False)
        with pytest.raises(MemoryError, match='at most'): memory.check_sample_fits(ldm, (3, 4096, 4096))
        m.setattr(ldm, 'wrapper', None)
        with pytest.raises(MemoryError, match='at most'): memory.check_sample_fits(ldm, (3, 4096, 4096), decode=False)
    assert torch.equal(sample_in_patches(ldm, 32, 16).sample(image=small, steps=2), whole) # and not patches of patches
