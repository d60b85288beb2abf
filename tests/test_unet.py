"The UNet against both classes of diffusers with copied weights, mistakes that must be seen, released sizes."
import diffusers
import pytest
import torch
import torch.nn.functional as F
from ldm_nb.attention import conditional_unet
from ldm_nb.layers import Down, SelfAttention
from ldm_nb.interop.components import load_component
from ldm_nb.interop.unets import unet_from_diffusers
from ldm_nb.paper.published import paper_model
from ldm_nb.unet import Cond, UNet
from torch import nn

ATTN, CROSS, PLAIN, RESNET = 'AttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D', 'ResnetDownsampleBlock2D'
UNCONDITIONAL = { # arguments of diffusers' UNet2DModel
    'one layer, narrow heads': dict(down=(PLAIN, ATTN), layers_per_block=1, attention_head_dim=4),
    'two layers, one head': dict(down=(ATTN, ATTN), layers_per_block=2, attention_head_dim=None),
    'three levels of unequal width': dict(down=(PLAIN, ATTN, PLAIN), widths=(16, 48, 64), layers_per_block=2,
                                          attention_head_dim=16),
    'attention in the middle alone': dict(down=(PLAIN, PLAIN), layers_per_block=1, attention_head_dim=8),
    'one level': dict(down=(ATTN,), widths=(32,), layers_per_block=1, attention_head_dim=8),
    'scale and shift': dict(down=(PLAIN, ATTN), layers_per_block=1, attention_head_dim=8,
                            resnet_time_scale_shift='scale_shift', attn_norm_num_groups=8),
    'residual blocks resample': dict(down=(RESNET, ATTN, RESNET), widths=(16, 32, 32), layers_per_block=1,
                                     attention_head_dim=8,
                                     downsample_type='resnet', upsample_type='resnet'),
    'churches in small': dict(down=(ATTN, ATTN, RESNET), widths=(16, 32, 32), layers_per_block=2, attention_head_dim=8,
                              downsample_type='resnet',
                              upsample_type='resnet', resnet_time_scale_shift='scale_shift', attn_norm_num_groups=8),
    'classes': dict(down=(PLAIN, ATTN), layers_per_block=1, attention_head_dim=8, num_class_embeds=5),
    'sines before cosines': dict(down=(PLAIN, ATTN), layers_per_block=1, attention_head_dim=8, flip_sin_to_cos=False),
    'other channels out': dict(down=(PLAIN, ATTN), layers_per_block=1, attention_head_dim=8, out_channels=3,
                               in_channels=7)}
CONDITIONAL = { # arguments of diffusers' UNet2DConditionModel
    'Stable Diffusion in small': dict(down=(CROSS, CROSS, PLAIN), widths=(16, 32, 32), layers_per_block=2,
                                      attention_head_dim=8),
    'one head, one layer': dict(down=(PLAIN, CROSS), layers_per_block=1, attention_head_dim=1),
    'no cross-attention in a level': dict(down=(PLAIN, PLAIN), layers_per_block=2, attention_head_dim=4),
    'depth 3': dict(down=(CROSS, CROSS), layers_per_block=1, attention_head_dim=4, transformer_layers_per_block=3),
    'heads of one width, linear maps': dict(down=(CROSS, CROSS), layers_per_block=1, attention_head_dim=[2, 4],
                                            use_linear_projection=True),
    'scale and shift': dict(down=(CROSS, PLAIN), layers_per_block=1, attention_head_dim=2,
                            resnet_time_scale_shift='scale_shift'),
    'residual blocks resample': dict(down=(RESNET, RESNET), layers_per_block=1, attention_head_dim=2),
    'a vector': dict(down=(CROSS, PLAIN), layers_per_block=1, attention_head_dim=2,
                     class_embed_type='simple_projection',
                     projection_class_embeddings_input_dim=6),
    'classes': dict(down=(CROSS, PLAIN), layers_per_block=1, attention_head_dim=2, num_class_embeds=5)}


def toy(cls, down, widths=(32, 64), **config):
    # a peer's network, all weights random; those that add to the main path small, lest an eps hide behind them
    torch.manual_seed(0)
    config = dict(in_channels=4, out_channels=4, norm_num_groups=8) | config
    if cls is diffusers.UNet2DConditionModel: config['cross_attention_dim'] = 20
    net = cls(block_out_channels=widths, down_block_types=down,
              up_block_types=tuple(d.replace('Down', 'Up') for d in reversed(down)), **config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(.05*torch.randn_like(p))
            if any(k in name for k in ('conv_in', 'conv2', 'proj_out', 'to_out')): p.mul_(.1)
    return net, dict(net.config, _class_name=cls.__name__)


def asked(config): # the same question in our words and in theirs
    torch.manual_seed(1)
    z, t, more, ours = torch.randn(2, config['in_channels'], 16, 24), torch.tensor([7, 911]), {}, {}
    if 'cross_attention_dim' in config: ours['context'] = more['encoder_hidden_states'] = torch.randn(2, 5, 20)
    if config['num_class_embeds']:
        more['class_labels'] = torch.tensor([3, 1])
        ours['vector'] = F.one_hot(more['class_labels'], config['num_class_embeds']).float()
    if config['class_embed_type']: ours['vector'] = more['class_labels'] = torch.randn(2, 6)
    return (z, t, Cond(**ours)), ((z, t), more)


@torch.no_grad()
def difference(ours, theirs, config): # the largest, on outputs that are of the size of 1
    a, (b, more) = asked(config)
    want = theirs(*b, **more).sample
    assert .1 < want.std() < 10 and want.shape[1] == config['out_channels']
    return (ours(*a) - want).abs().max().item()


EVERY = [pytest.param(cls, v, id=f'{cls.__name__}: {k}')
         for cls, table in ((diffusers.UNet2DModel, UNCONDITIONAL), (diffusers.UNet2DConditionModel, CONDITIONAL))
         for k, v in table.items()]


@pytest.mark.parametrize('cls, arguments', EVERY)
def test_the_same_outputs_as_diffusers(cls, arguments):
    theirs, config = toy(cls, **arguments)
    assert difference(unet_from_diffusers(config, theirs.state_dict()), theirs, config) <= 1e-5


def eps(old, new): # of every group norm
    def change(net):
        for m in net.modules():
            if isinstance(m, nn.GroupNorm) and m.eps == old: m.eps = new
    return change


def heads(net):
    for m in net.modules():
        if hasattr(m, 'heads'): m.heads *= 2


def padding(net):
    for m in net.modules():
        if isinstance(m, Down): m.asymmetric, m.conv.padding = True, (0, 0)


def exchanged(part, pieces=2):
    # the pieces of every weight whose name has this part, each in the place of the one before
    @torch.no_grad()
    def change(net):
        for n, p in net.named_parameters():
            if part in n: p.copy_(p.roll(len(p)//pieces, dims=0))
    return change


@pytest.mark.parametrize('cls, arguments, mistake', [
    pytest.param(diffusers.UNet2DModel, UNCONDITIONAL['one layer, narrow heads'], eps(1e-5, 1e-6), id='eps'),
    pytest.param(diffusers.UNet2DModel, UNCONDITIONAL['one layer, narrow heads'], heads, id='heads'),
    pytest.param(diffusers.UNet2DModel, UNCONDITIONAL['one layer, narrow heads'], padding, id='padding'),
    pytest.param(diffusers.UNet2DModel, UNCONDITIONAL['scale and shift'], exchanged('res.emb'),
                 id='shift before scale'),
    pytest.param(diffusers.UNet2DModel, UNCONDITIONAL['one layer, narrow heads'], exchanged('qkv', 3),
                 id='query, key, value'),
    pytest.param(diffusers.UNet2DConditionModel, CONDITIONAL['Stable Diffusion in small'], eps(1e-5, 1e-6),
                 id='eps of residual blocks'),
    pytest.param(diffusers.UNet2DConditionModel, CONDITIONAL['Stable Diffusion in small'], eps(1e-6, 1e-5),
                 id='eps before transformers'),
    pytest.param(diffusers.UNet2DConditionModel, CONDITIONAL['one head, one layer'], heads, id='number of heads'),
    pytest.param(diffusers.UNet2DConditionModel, CONDITIONAL['depth 3'], exchanged('ff.proj'), id='halves of GEGLU')])
def test_a_mistake_is_seen(cls, arguments, mistake): # the tolerance above would be worth nothing without this
    theirs, config = toy(cls, **arguments)
    ours = unet_from_diffusers(config, theirs.state_dict())
    mistake(ours)
    assert difference(ours, theirs, config) > 5e-5


def test_without_groups_the_middle_has_no_norm():
    "With scale and shift diffusers leaves it out; our attention has one, so this is refused."
    theirs, config = toy(diffusers.UNet2DModel, **(UNCONDITIONAL['scale and shift'] | dict(attn_norm_num_groups=None)))
    with pytest.raises(ValueError, match='attn_norm_num_groups=None: expected 8'):
        unet_from_diffusers(config, theirs.state_dict())


@pytest.mark.parametrize('cls, arguments', [EVERY[0].values, (diffusers.UNet2DConditionModel,
                                                              CONDITIONAL['heads of one width, linear maps'])])
def test_a_folder_of_diffusers(tmp_path, cls, arguments):
    theirs, config = toy(cls, **arguments)
    theirs.save_pretrained(tmp_path)
    ours = load_component(tmp_path)
    assert difference(ours, theirs, config) <= 1e-5
    again = (conditional_unet if ours.context_dim else UNet)(**ours.config)
    again.load_state_dict(ours.state_dict())
    assert difference(again.eval(), theirs, config) <= 1e-5
    (tmp_path/'diffusion_pytorch_model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='has no diffusion_pytorch_model.safetensors; there is config.json'):
        load_component(tmp_path)


SIZES = { # millions, as counted from the released configs
    'celeba256': 274.06, 'ffhq256': 274.06, 'lsun_beds256': 274.06, 'lsun_churches256': 294.97, 'cin256': 394.98,
    'cin256-v2': 400.92, 'txt2img-1p4B': 872.30,
    'text2img256': 403.62, 'layout2img-openimages256': 246.28, 'semantic_synthesis256': 215.23,
    'semantic_synthesis512': 215.23, 'bsr_sr': 113.62,
    'inpainting_big': 387.25, 'sd-v1': 859.52, 'rdm': 1335.5, 'txt2img-1p4B/conditioner': 581.99,
    'text2img256/conditioner': 186.15,
    'layout2img-openimages256/conditioner': 58.86, 'sd-v1/conditioner': 123.06}


@pytest.mark.parametrize('name', SIZES)
def test_released_sizes(name):
    net = paper_model(name, device='meta')
    assert all(p.is_meta for p in net.parameters())
    assert round(sum(p.numel() for p in net.parameters())/1e6, 1 if name == 'rdm' else 2) == SIZES[name]


def test_the_2021_models_have_one_head():
    for name in ('cin256', 'cin256-v2', 'layout2img-openimages256', 'text2img256'):
        assert {m.heads for m in paper_model(name, device='meta').modules() if hasattr(m, 'heads')} == {1}, name
    widths = {m.qkv.in_features//m.heads for m in paper_model('celeba256', device='meta').modules()
              if hasattr(m, 'qkv')}
    assert widths == {32}


def small(context_dim=None, **more): # a network of ours, all weights random
    torch.manual_seed(0)
    make = (lambda **k: conditional_unet(context_dim, **k)) if context_dim else UNet
    net = make(**(dict(ch=32, ch_mult=(1, 2), attn_factors=(1, 2), head_ch=16, groups=8) | more))
    with torch.no_grad():
        for p in net.parameters(): p.add_(.05*torch.randn_like(p))
    return net


VARIANTS = [dict(), dict(scale_shift=True, resblock_updown=True), dict(context_dim=20, depth=2),
                    dict(vector_dim=6)]


def question(net): # z, t, c
    c = Cond(context=torch.randn(2, 5, 20) if net.context_dim else None,
             vector=torch.randn(2, 6) if net.vector_dim else None)
    return torch.randn(2, 4, 16, 16), torch.tensor([3, 800]), c


@pytest.mark.parametrize('config', VARIANTS)
def test_checkpointing_changes_no_bit(config):
    net, found = small(**config, dropout=.2).train(), []
    z, t, c = question(net)
    z.requires_grad_()
    for net.checkpoint in (False, True):
        torch.manual_seed(5) # the same dropout
        net.zero_grad()
        z.grad = None
        out = net(z, t, c)
        out.square().mean().backward()
        found.append([out.detach(), z.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all(g.abs().max() > 0 for g in found[0])
    torch.manual_seed(6)
    assert not torch.equal(net(z, t, c), found[0][0]) # there was dropout to get wrong


@pytest.mark.parametrize('config', VARIANTS)
def test_channels_last_gives_the_same(config):
    net = small(**config).eval()
    z, t, c = question(net)
    with torch.no_grad():
        a = net(z, t, c)
        b = net.to(memory_format=torch.channels_last)(z.contiguous(memory_format=torch.channels_last), t, c)
    assert not net.conv_in.weight.is_contiguous() and a.std() > .1
    assert (a - b).abs().max() <= 1e-5


def test_old_configs_still_load():
    config = {k: v for k, v in UNet(groups=8).config.items() if k not in ('heads', 'head_ch')}
    old, new = UNet(**config), UNet(groups=8)
    old.load_state_dict(new.state_dict())
    assert old.config == new.config and old.config['heads'] == 1


@pytest.mark.parametrize('attn, norms, everything', [
    (None, False, False), (None, True, True), (lambda c: SelfAttention(c, groups=4), False, True)])
def test_what_sees_the_whole_input(attn, norms, everything):
    # convolutions see a square; group norm and attention see all, which is why a crop's prediction differs from the
    # crop of a prediction (fast/01_tiles, paper/15_megapixel)
    torch.manual_seed(1)
    net = UNet(1, 1, ch=16, ch_mult=(1, 2), attn_factors=(), groups=4, attn=attn or (lambda c: None))
    for p in net.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=(1/p[0].numel())**.5)
    for m in list(net.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.GroupNorm) and not norms: setattr(m, name, nn.Identity())
    z = torch.randn(1, 1, 80, 80, requires_grad=True)
    net(z, torch.tensor([500]))[0, 0, 40, 40].backward()
    assert (z.grad[0, 0, :, :8].abs().max() > 0) == everything
