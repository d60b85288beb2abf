"""LoRA, a word of one's own and ControlNet: what a file adds to a frozen model, and that it adds nothing before it is
trained. Oracles: the base model itself, the update written as a matrix, diffusers and peft with the same weights."""
import copy, json
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from ldm_nb.attention import conditional_unet
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.beyond.adapters import (
    LINEAR, LoRALinear, add_lora, add_word, base_hash, cyanotype, diffusers_names, fit, keep_word, load_lora, load_word,
    lora_layers, merge_lora, off_line, save_lora, save_word, strip_lora, unmerge_lora)
from ldm_nb.beyond.controlnet import (
    LINES, ControlledUNet, ControlNet, add_control, agreement, load_control, outlines, parts_for_diffusers,
    save_control)
from ldm_nb.core import LatentDiffusion
from ldm_nb.embedders import TextEmbedder
from ldm_nb.interop.unets import unet_table, unet_to_diffusers
from ldm_nb.interop.weights import give, same
from ldm_nb.text import train_tokenizer
from ldm_nb.unet import Cond

def stirred(net, seed=0): # no weight is zero, so that every part counts
    torch.manual_seed(seed)
    for p in net.parameters(): nn.init.normal_(p, std=.15)
    return net.eval()

def unet(seed=0, **how):
    return stirred(conditional_unet(12, heads=2, **dict(ch=16, ch_mult=(1, 2), groups=8) | how), seed)

def asked(n=2, side=8, seed=1, **slots):
    torch.manual_seed(seed)
    return torch.randn(n, 4, side, side), torch.tensor([10., 700.])[:n], Cond(context=torch.randn(n, 5, 12), **slots)

CAPTIONS = ['a red house', 'a blue house at night', 'two trees', 'a lake']

def model(seed=0):
    torch.manual_seed(seed)
    ae = Autoencoder(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, mid_attn=False, groups=8)
    embedder = TextEmbedder(train_tokenizer(CAPTIONS, 90), dim=12, depth=1, heads=2, max_length=8)
    ldm = LatentDiffusion(ae, conditional_unet(12, heads=2, ch=16, ch_mult=(1, 2), groups=8), embedder,
                          prediction_type='v', size=16)
    return stirred(ldm, seed)

def trained_lora(net, seed=3, **how): # B as after a training
    layers = add_lora(net, **how)
    torch.manual_seed(seed)
    for m in layers.values(): nn.init.normal_(m.B, std=.3)
    return net.eval()

@torch.no_grad()
def far(a, b): return (a - b).abs().max().item()

# %% LoRA
@pytest.mark.parametrize('where', [None, LINEAR])
def test_a_new_lora_changes_nothing_and_alone_is_trained(where):
    net, (z, t, c) = unet(), asked()
    before = net(z, t, c)
    layers = add_lora(net, r=2, alpha=8, **dict(where=where) if where is not None else {})
    assert torch.equal(net(z, t, c), before)
    own = {f'{n}.{k}' for n in layers for k in 'AB'}
    assert {n for n, p in net.named_parameters() if p.requires_grad} == own
    assert len(layers) == (32 if where is None else sum(isinstance(m, nn.Linear) for m in unet().modules()))

def test_the_update_is_alpha_over_r_b_a():
    base = nn.Linear(6, 5).double()
    m = LoRALinear(copy.deepcopy(base), 3, 12).double()
    nn.init.normal_(m.B)
    x = torch.randn(4, 6, dtype=torch.float64)
    want = x@(base.weight + 12/3*m.B@m.A).T + base.bias
    assert far(m(x), want) < 1e-12

def test_merged_unmerged_and_stripped():
    net, (z, t, c) = unet(), asked()
    base, plain = net(z, t, c), base_hash(net)
    trained_lora(net, r=2)
    adapted = net(z, t, c)
    assert far(adapted, base) > .02
    assert base_hash(net) == plain
    merge_lora(net)
    merge_lora(net) # once is enough
    assert far(net(z, t, c), adapted) < 1e-4*adapted.abs().max()
    with pytest.raises(ValueError, match='unmerge_lora'): base_hash(net)
    whole = copy.deepcopy(net)
    strip_lora(whole)
    assert not lora_layers(whole) and torch.equal(whole(z, t, c), net(z, t, c))
    assert whole.state_dict().keys() == unet().state_dict().keys()
    unmerge_lora(net)
    for name, m in lora_layers(net).items(): assert far(m.weight, unet().get_submodule(name).weight) < 1e-6
    assert far(net(z, t, c), adapted) < 1e-4

def test_what_cannot_be_a_lora():
    for r in (0, -1, 13): # keys and values are 12 wide
        with pytest.raises(ValueError, match=rf'rank {r} for a matrix of 32x12: expected 1 to 12'):
            add_lora(unet(), r=r, where='cross_attn.to_k')
    with pytest.raises(ValueError, match='no linear layer'): add_lora(unet(), where='nowhere')
    net = unet()
    with pytest.raises(ValueError, match='no LoRA'): save_lora(net, 'nothing.safetensors')
    add_lora(net, r=2)
    with pytest.raises(ValueError, match='already'): add_lora(net, r=2)

def test_saved_and_loaded(tmp_path):
    net, (z, t, c) = trained_lora(unet(), r=3, alpha=6), asked()
    path = save_lora(net, tmp_path/'a.safetensors', 'postcards-toy', dtype=torch.float32)
    again = unet()
    load_lora(again, path)
    assert torch.equal(again(z, t, c), net(z, t, c))
    assert {m.alpha for m in lora_layers(again).values()} == {6}
    half = unet()
    load_lora(half, save_lora(net, tmp_path/'b.safetensors', dtype=torch.float16))
    assert 0 < far(half(z, t, c), net(z, t, c)) < .01*net(z, t, c).abs().max()

def test_a_lora_of_another_model_is_refused_by_name(tmp_path):
    path = save_lora(trained_lora(unet(), r=2), tmp_path/'a.safetensors', 'postcards-toy')
    other, (z, t, c) = unet(seed=5), asked()
    before = other(z, t, c)
    said = f'postcards-toy with hash {base_hash(unet())}; this one has {base_hash(other)}'
    with pytest.raises(ValueError, match=said): load_lora(other, path)
    assert not lora_layers(other) and torch.equal(other(z, t, c), before)

def spoilt(path, to, change): # a copy of a file with other tensors
    from safetensors import safe_open
    tensors = load_file(path)
    with safe_open(path, 'pt') as f: said = f.metadata()
    change(tensors)
    save_file(tensors, to, said)
    return to

def test_files_that_do_not_fit(tmp_path):
    path = save_lora(trained_lora(unet(), r=2), tmp_path/'a.safetensors')
    key = 'mid.0.attn.blocks.0.cross_attn.to_q.lora_B.weight'
    def rename(d):
        for k in (key, key.replace('_B', '_A')): d[k.replace('blocks.0.cross_attn.to_q', 'nothing')] = d.pop(k)
    def shape(d): d[key] = torch.zeros(7, 2)
    def nan(d): d[key][0, 0] = float('nan')
    def odd(d): d['mid.0.attn.alpha'] = torch.ones(())
    for change, said in ((lambda d: d.pop(key), f"no tensor '{key}'"),
                         (rename, "'mid.0.attn.nothing' is no linear layer"),
                         (shape, r'\(7, 2\) times \(2, 32\), expected a matrix of \(32, 32\)'),
                         (nan, 'NaN'), (odd, "'mid.0.attn.alpha' is no part")):
        net = unet()
        with pytest.raises(ValueError, match=said): load_lora(net, spoilt(path, tmp_path/'b.safetensors', change))
        assert not lora_layers(net)

# %% LoRA, with diffusers and peft
def theirs(net): # the same UNet of diffusers, and the names of its linear layers
    from diffusers import UNet2DConditionModel
    config, tensors = unet_to_diffusers(net, 8)
    names = diffusers_names(unet_table(net, config))
    unet = UNet2DConditionModel(**{k: v for k, v in config.items() if k != '_class_name'})
    unet.load_state_dict(tensors)
    return unet.eval(), names

@torch.no_grad()
def answer(unet, z, t, c): return unet(z, t, c.context, return_dict=False)[0]

@pytest.mark.parametrize('where', [None, r'attn|ff|emb|time'])
def test_diffusers_reads_our_file(tmp_path, where):
    net, (z, t, c) = unet(), asked()
    (peer, names), base = theirs(net), net(z, t, c)
    trained_lora(net, r=3, alpha=6, **dict(where=where) if where else {})
    save_lora(net, tmp_path/'ours.safetensors', names=names, dtype=torch.float32)
    peer.load_lora_adapter(tmp_path, prefix=None, weight_name='ours.safetensors') # without the name: alpha = r
    assert far(net(z, t, c), base) > .01
    assert far(answer(peer, z, t, c), net(z, t, c)) < 1e-5*max(1, net(z, t, c).abs().max())

def lora_config(**how):
    from peft import LoraConfig
    return LoraConfig(r=3, lora_alpha=6, init_lora_weights=False,
                      target_modules=['to_q', 'to_k', 'to_v', 'to_out.0'], **how)

def test_we_read_the_file_of_diffusers(tmp_path):
    net, (z, t, c) = unet(), asked()
    (peer, names), base = theirs(net), net(z, t, c)
    torch.manual_seed(0)
    peer.add_adapter(lora_config())
    peer.save_lora_adapter(tmp_path)
    load_lora(net, tmp_path/'pytorch_lora_weights.safetensors', names)
    assert len(lora_layers(net)) == 32 and far(net(z, t, c), base) > .01
    assert far(answer(peer, z, t, c), net(z, t, c)) < 1e-5*max(1, net(z, t, c).abs().max())

def test_peft_reads_ours_and_we_read_its(tmp_path):
    from peft import get_peft_model, set_peft_model_state_dict
    net, (z, t, c) = unet(), asked()
    peer, names = theirs(net)
    torch.manual_seed(0)
    peer = get_peft_model(peer, lora_config())
    peer.save_pretrained(tmp_path/'peft')
    loaded = unet()
    load_lora(loaded, tmp_path/'peft/adapter_model.safetensors', names)
    assert {m.scale for m in lora_layers(loaded).values()} == {2.}
    assert far(answer(peer, z, t, c), loaded(z, t, c)) < 1e-5*max(1, loaded(z, t, c).abs().max())
    trained_lora(net, r=3, alpha=6)
    path = save_lora(net, tmp_path/'ours.safetensors', names=names, dtype=torch.float32)
    said = set_peft_model_state_dict(peer, {f'base_model.model.{k}': v for k, v in load_file(path).items()})
    assert not said.unexpected_keys
    assert far(answer(peer, z, t, c), net(z, t, c)) < 1e-5*max(1, net(z, t, c).abs().max())

def test_an_alpha_for_each_layer_is_refused(tmp_path):
    net = trained_lora(unet(), r=2)
    path = save_lora(net, tmp_path/'a.safetensors')
    about = dict(r=2, lora_alpha=2, alpha_pattern={'to_q': 4})
    (tmp_path/'adapter_config.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match='alpha for each layer'): load_lora(unet(), path)

# %% training
def test_training_moves_the_adapter_alone_and_the_same_way_twice():
    z0, ends = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        ldm = model()
        torch.manual_seed(0)
        add_lora(ldm.net, r=2)
        ldm.autoencoder.requires_grad_(False)
        ldm.embedder.requires_grad_(False)
        before = {k: v.clone() for k, v in ldm.state_dict().items()}
        torch.manual_seed(len(ends)) # it has a generator of its own
        ends.append([loss for _, loss in fit(ldm, z0, CAPTIONS + CAPTIONS[:2], steps=4, batch_size=3, lr=.01)])
        moved = {k for k, v in ldm.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {f'net.{n}.{k}' for n in lora_layers(ldm.net) for k in 'AB'}
        assert not ldm.embedder.training
        next(fit(ldm, z0[:1], ['a lake'], steps=2)) # and where the loop ends early
        assert not ldm.embedder.training
    assert ends[0] == ends[1]

def test_what_cannot_be_trained():
    ldm = model().requires_grad_(False)
    with pytest.raises(ValueError, match='nothing to train'): next(fit(ldm, torch.randn(1, 4, 4, 4), ['a lake'], 1))
    add_lora(ldm.net, r=2)
    with pytest.raises(ValueError, match='2 latents and 1 prompts'):
        next(fit(ldm, torch.randn(2, 4, 4, 4), ['a lake'], 1))

# %% the style
def test_cyanotypes_lie_on_their_line():
    x = torch.rand(3, 3, 8, 8)*2 - 1
    assert far(off_line(cyanotype(x, colour=0.)), torch.zeros(3)) < 1e-6
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert far(cyanotype(grey, .3), cyanotype(grey, 0.)) < 1e-6 # grey has no colour to keep
    assert (off_line(cyanotype(x)) < off_line(x)).all()
    assert far(cyanotype(torch.ones(1, 3, 1, 1)), torch.ones(1, 3, 1, 1)) < 1e-6

# %% a word
def test_a_word_starts_as_another_and_alone_is_trained():
    ldm = model()
    old = copy.deepcopy(ldm.embedder)
    v = add_word(ldm, 'pink', like='red')
    e = ldm.embedder
    assert torch.equal(e(['a lake at night']).context, old(['a lake at night']).context)
    assert torch.equal(e(['a pink house']).context, old(['a red house']).context)
    assert [n for n, p in ldm.named_parameters() if p.requires_grad] == ['embedder.token.new']
    before = {k: w.clone() for k, w in ldm.state_dict().items()}
    for _ in fit(ldm, torch.randn(2, 4, 4, 4), ['a pink house', 'a pink house'], steps=3, batch_size=4, lr=.1): pass
    moved = {k for k, w in ldm.state_dict().items() if not torch.equal(w, before[k])}
    assert moved == {'embedder.token.new'} and v is ldm.embedder.token.new
    assert torch.equal(e(['a lake at night']).context, old(['a lake at night']).context)

def test_a_word_in_a_file(tmp_path):
    ldm = model()
    v = add_word(ldm, 'pink', like='red')
    nn.init.normal_(v)
    keep_word(ldm)
    path = save_word(ldm, 'pink', tmp_path/'pink.safetensors', 'postcards-toy')
    assert load_file(path).keys() == {'pink'} and path.stat().st_size < 1000
    again = model()
    assert load_word(again, path) == 'pink'
    assert torch.equal(again.embedder(['a pink house']).context, ldm.embedder(['a pink house']).context)
    whole = LatentDiffusion.from_pretrained(again.save_pretrained(tmp_path/'whole')) # saved like any model
    assert torch.equal(whole.sample('a pink house', steps=2), again.sample('a pink house', steps=2))
    with pytest.raises(ValueError, match='postcards-toy with hash'): load_word(model(seed=3), path)
    with pytest.raises(ValueError, match="'pink': expected one new word"): load_word(again, path)

def test_words_that_cannot_be_added(tmp_path):
    for word in ('red', 'Pink', 'light pink', 'pink-ish', ''):
        with pytest.raises(ValueError, match='one new word'): add_word(model(), word, like='red')
    with pytest.raises(ValueError, match="like='mauve'"): add_word(model(), 'pink', like='mauve')
    with pytest.raises(ValueError, match=r'a vector of \(3,\): expected \(12,\)'):
        add_word(model(), 'pink', torch.zeros(3))
    with pytest.raises(ValueError, match='not in the vocabulary'): save_word(model(), 'pink', tmp_path/'x.safetensors')
    ldm = model()
    ldm.embedder = None
    with pytest.raises(ValueError, match='no captions'): add_word(ldm, 'pink', like='red')

# %% ControlNet
def test_a_new_controlnet_changes_no_bit_of_a_picture():
    ldm, lines = model(), (torch.rand(1, 16, 16) < .1).float()
    before = ldm.sample(CAPTIONS, steps=3, seed=1)
    control = add_control(ldm)
    assert torch.equal(ldm.sample(CAPTIONS, image=lines, steps=3, seed=1), before)
    trained = {n for n, p in ldm.named_parameters() if p.requires_grad}
    assert trained == {f'net.control.{n}' for n, _ in control.named_parameters()}
    stirred(control)
    after = ldm.sample(CAPTIONS, image=lines, steps=3, seed=1)
    assert far(after, before) > .01
    assert not torch.equal(ldm.sample(CAPTIONS, image=1 - lines, steps=3, seed=1), after)
    ldm.net.strength = 0.
    assert torch.equal(ldm.sample(CAPTIONS, image=lines, steps=3, seed=1), before)

def test_the_null_caption_sees_the_outlines_too():
    ldm, lines = model(), (torch.rand(1, 16, 16) < .1).float()
    add_control(ldm)
    rows = ldm.embedder.prepare(ldm.embedder.prompts(dict(text='a lake', control=lines)), ldm.autoencoder)
    null = ldm.embedder.null(1, (4, 4), rows)
    assert torch.equal(null.concat[0], lines)
    assert torch.equal(null.context, model().embedder.null(1).context)

def test_the_first_step_moves_the_zeros_alone():
    ldm = model()
    add_control(ldm)
    control = ldm.net.control
    before = {k: v.clone() for k, v in control.state_dict().items()}
    lines = [(torch.rand(1, 16, 16) < .1).float()]*2
    told = dict(text=CAPTIONS[:2], control=lines)
    for step, _ in fit(ldm, torch.randn(2, 4, 4, 4), told, steps=2, batch_size=2):
        moved = {k.split('.')[0] for k, v in control.state_dict().items() if not torch.equal(v, before[k])}
        if step == 1: assert moved == {'zeros', 'zero_mid'}
    assert 'hint' in moved and 'down' in moved and 'mid' in moved

def test_diffusers_has_the_same_controlnet():
    from diffusers import ControlNetModel
    net, (z, t, c) = unet(vector_dim=None), asked()
    control = stirred(ControlNet(net, picture_ch=3), seed=4)
    config, _ = unet_to_diffusers(net, 8)
    table = unet_table(net, config)
    own = parts_for_diffusers(control)
    table = {k: same(own[k]) if k in own else table[k] for k in control.state_dict()}
    wanted = ('in_channels', 'down_block_types', 'block_out_channels', 'layers_per_block', 'norm_num_groups',
              'norm_eps', 'cross_attention_dim', 'transformer_layers_per_block', 'attention_head_dim')
    peer = ControlNetModel(**{k: config[k] for k in wanted}, conditioning_embedding_out_channels=(16, 32, 64))
    peer.load_state_dict(give(control, table))
    (whole, _), picture = theirs(net), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        added, added_mid = control(z, t, c._replace(concat=picture))
        down, mid = peer.eval()(z, t, c.context, picture, return_dict=False)
        assert len(added) == len(down)
        for a, b in zip((*added, added_mid), (*down, mid)): assert far(a, b) < 1e-5*max(1, b.abs().max())
        want = whole(z, t, c.context, down_block_additional_residuals=down, mid_block_additional_residual=mid,
                     return_dict=False)[0]
        got = ControlledUNet(net, control)(z, t, c._replace(concat=picture))
    assert far(got, want) < 1e-5*max(1, want.abs().max()) and far(got, net(z, t, c)) > .1

def test_a_controlnet_in_a_file(tmp_path):
    ldm, lines = model(), (torch.rand(1, 16, 16) < .1).float()
    stirred(add_control(ldm))
    path = save_control(ldm, tmp_path/'c.safetensors', 'postcards-toy', dtype=torch.float32)
    again = model()
    load_control(again, path)
    assert torch.equal(again.sample('a lake', image=lines, steps=2), ldm.sample('a lake', image=lines, steps=2))
    other = model(seed=3)
    with pytest.raises(ValueError, match='save_control'): ldm.save_pretrained(tmp_path/'whole')
    with pytest.raises(ValueError, match='postcards-toy with hash'): load_control(other, path)
    assert not hasattr(other.net, 'control')
    lora = save_lora(trained_lora(unet(), r=2), tmp_path/'l.safetensors')
    with pytest.raises(ValueError, match='no ControlNet'): load_control(other, lora)
    key = 'zeros.1.weight'
    with pytest.raises(ValueError, match=f"no tensor '{key}'"):
        load_control(model(), spoilt(path, tmp_path/'d.safetensors', lambda d: d.pop(key)))

def test_pictures_and_models_that_do_not_fit_a_controlnet():
    ldm = model()
    add_control(ldm)
    with pytest.raises(ValueError, match='already'): add_control(ldm)
    with pytest.raises(ValueError, match='image='): ldm.sample('a lake')
    for lines, said in ((torch.zeros(3, 16, 16), r'\(3, 16, 16\): expected \(1, h, w\)'),
                        (torch.full((1, 16, 16), 2.), '0, 1')):
        with pytest.raises(ValueError, match=said): ldm.sample('a lake', image=lines)
    z, t, c = asked(side=4)
    with pytest.raises(ValueError, match=r'None: expected \(2, 1, 16, 16\)'): ldm.net(z, t, c)
    with pytest.raises(ValueError, match='conditioned on tokens'):
        add_control(LatentDiffusion(ldm.autoencoder, nn.Conv2d(4, 4, 1)))

def test_outlines_agree_with_their_picture_and_by_chance():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 32, 32)*2 - 1
    lines = outlines(x)
    assert (lines.mean((1, 2, 3)) - LINES).abs().max() < 1e-3 and set(lines.unique().tolist()) == {0., 1.}
    assert torch.equal(agreement(lines, x), torch.ones(8))
    assert abs(agreement(lines, torch.rand(8, 3, 32, 32)).mean() - LINES) < .03
    step = torch.full((1, 3, 20, 20), -1.)
    step[..., 10:] = 1.
    assert torch.equal(outlines(step).sum(2)[0, 0], torch.tensor([0.]*9 + [20.]*2 + [0.]*9))
