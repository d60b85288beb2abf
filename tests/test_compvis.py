"""Checkpoints of the paper's code: names, shapes and numbers against modules written here from its description, and
against diffusers' converters."""
import pickle
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from ldm_nb.interop import compvis
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.interop.compvis import first_stage_keys, load_compvis, text_keys, unet_keys
from ldm_nb.text import TokenTransformer
from ldm_nb.core import LatentDiffusion
from ldm_nb.paper.published import CONDITIONERS, FIRST_STAGES, UNETS, clip_text, paper_model
from ldm_nb.unet import Cond, UNet
from safetensors.torch import save_file
from torch import nn

# the published code's modules, from their description: the names that a checkpoint has, and what they compute


def gn(ch, eps=1e-5): return nn.GroupNorm(32, ch, eps=eps)


class Res(nn.Module):
    def __init__(self, ch, emb, out, scale_shift=False, way=None):
        super().__init__()
        self.scale_shift, self.way = scale_shift, way
        self.in_layers = nn.Sequential(gn(ch), nn.SiLU(), nn.Conv2d(ch, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out*(2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(gn(out), nn.SiLU(), nn.Dropout(0.), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if ch == out else nn.Conv2d(ch, out, 1)

    def forward(self, x, emb, context):
        h, e = self.in_layers[:2](x), self.emb_layers(emb)[..., None, None]
        if self.way == 'down': h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.way == 'up': h, x = (F.interpolate(v, scale_factor=2, mode='nearest') for v in (h, x))
        h = self.in_layers[2](h)
        if self.scale_shift: h = self.out_layers[1:](self.out_layers[0](h)*(1 + e.chunk(2, 1)[0]) + e.chunk(2, 1)[1])
        else: h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Down(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.op = nn.Conv2d(ch, ch, 3, stride=2, padding=1)

    def forward(self, x, *_): return self.op(x)


class Up(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x, *_): return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class LegacyAttention(nn.Module):
    def __init__(self, ch, heads):
        super().__init__()
        self.heads, self.norm, self.qkv, self.proj_out = heads, gn(ch), nn.Conv1d(ch, 3*ch, 1), nn.Conv1d(ch, ch, 1)

    def forward(self, x, *_):
        b, c, h, w = x.shape
        # heads first, then q, k, v
        y = self.qkv(self.norm(x).reshape(b, c, -1)).reshape(b*self.heads, 3*c//self.heads, h*w)
        q, k, v = y.split(c//self.heads, dim=1)
        s = (c//self.heads)**-.25
        a = torch.softmax(torch.einsum('bct,bcs->bts', q*s, k*s), -1)
        return x + self.proj_out(torch.einsum('bts,bcs->bct', a, v).reshape(b, c, -1)).reshape(b, c, h, w)


class CrossAttention(nn.Module):
    def __init__(self, ch, context, heads, dim):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(ch, heads*dim, bias=False),
                                           *(nn.Linear(context, heads*dim, bias=False) for _ in range(2)))

    def mix(self, x, context):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return ((q @ k.mT*q.shape[-1]**-.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class UNetAttention(CrossAttention):
    def __init__(self, ch, context, heads):
        super().__init__(ch, context, heads, ch//heads)
        self.to_out = nn.Sequential(nn.Linear(ch, ch), nn.Dropout(0.))

    def forward(self, x, context): return self.to_out(self.mix(x, context))


class Gate(nn.Module):
    def __init__(self, ch, out):
        super().__init__()
        self.proj = nn.Linear(ch, 2*out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x*F.gelu(gate)


class Feed(nn.Module):
    def __init__(self, ch, gate):
        super().__init__()
        self.net = nn.Sequential(Gate(ch, 4*ch) if gate else nn.Sequential(nn.Linear(ch, 4*ch), nn.GELU()),
                                 nn.Dropout(0.), nn.Linear(4*ch, ch))

    def forward(self, x): return self.net(x)


class Block(nn.Module):
    def __init__(self, ch, context, heads):
        super().__init__()
        self.attn1 = UNetAttention(ch, ch, heads)
        self.ff = Feed(ch, True)
        self.attn2 = UNetAttention(ch, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(ch) for _ in range(3))

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, ch, heads, depth, context):
        super().__init__()
        self.norm, self.proj_in = gn(ch, 1e-6), nn.Conv2d(ch, ch, 1)
        self.transformer_blocks = nn.ModuleList(Block(ch, context, heads) for _ in range(depth))
        self.proj_out = nn.Conv2d(ch, ch, 1)

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks: h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class PublishedUNet(nn.Module):
    def __init__(self, p, one_head=False): # unet_config.params; the code of 2021
        super().__init__()
        ch, mult, n, factors = p['model_channels'], p['channel_mult'], p['num_res_blocks'], p['attention_resolutions']
        res = lambda a, b, way=None: Res(a, 4*ch, b, p.get('use_scale_shift_norm', False), way)
        down, up = (((lambda c: res(c, c, 'down')), (lambda c: res(c, c, 'up'))) if p.get('resblock_updown')
                    else (Down, Up))

        def attention(c):
            heads = c//p['num_head_channels'] if 'num_head_channels' in p else p['num_heads']
            if not p.get('use_spatial_transformer'): return LegacyAttention(c, heads)
            return SpatialTransformer(c, 1 if one_head else heads, p['transformer_depth'], p['context_dim'])

        self.ch, c, f, skips = ch, ch, 1, [ch]
        self.time_embed = nn.Sequential(nn.Linear(ch, 4*ch), nn.SiLU(), nn.Linear(4*ch, 4*ch))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(p['in_channels'], ch, 3, padding=1)])])
        for level, m in enumerate(mult):
            for _ in range(n):
                self.input_blocks.append(nn.ModuleList([res(c, m*ch)] + ([attention(m*ch)] if f in factors else [])))
                c = m*ch
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([down(c)]))
                skips.append(c)
                f *= 2
        self.middle_block = nn.ModuleList([res(c, c), attention(c), res(c, c)])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(n + 1):
                parts, c = [res(c + skips.pop(), m*ch)], m*ch
                if f in factors: parts.append(attention(c))
                if level and i == n:
                    parts.append(up(c))
                    f //= 2
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(gn(c), nn.SiLU(), nn.Conv2d(c, p['out_channels'], 3, padding=1))

    def forward(self, x, t, context=None):
        angle = t[:, None].float()*torch.exp(-torch.log(torch.tensor(10000.))*torch.arange(self.ch//2)/(self.ch//2))
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], -1))
        run = lambda parts, h: [h := part(h) if isinstance(part, nn.Conv2d) else part(h, emb, context)
                                for part in parts][-1]
        kept = []
        for parts in self.input_blocks: kept.append(x := run(parts, x))
        x = run(self.middle_block, x)
        for parts in self.output_blocks: x = run(parts, torch.cat([x, kept.pop()], 1))
        return self.out(x)


class AERes(nn.Module):
    def __init__(self, ch, out):
        super().__init__()
        self.norm1 = gn(ch, 1e-6)
        self.conv1 = nn.Conv2d(ch, out, 3, padding=1)
        self.norm2 = gn(out, 1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if ch != out: self.nin_shortcut = nn.Conv2d(ch, out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x)


class AEAttention(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.norm, (self.q, self.k, self.v, self.proj_out) = gn(ch, 1e-6), (nn.Conv2d(ch, ch, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (m(h).flatten(2) for m in (self.q, self.k, self.v))
        a = torch.softmax(q.mT @ k*x.shape[1]**-.5, -1)
        return x + self.proj_out((v @ a.mT).reshape(x.shape))


class Half(nn.Module): # of a first stage
    def __init__(self, d, decoder):
        super().__init__()
        ch, mult, z, wide = d['ch'], d['ch_mult'], d['z_channels'], d.get('attn_type') != 'none'
        self.decoder = decoder
        c = d['ch']*(mult[-1] if decoder else 1)
        res = d['resolution']//(2**(len(mult) - 1) if decoder else 1)
        self.conv_in, levels = nn.Conv2d(z if decoder else d['in_channels'], c, 3, padding=1), {}
        mid = lambda c: nn.ModuleDict(dict(block_1=AERes(c, c)) | (dict(attn_1=AEAttention(c)) if wide else {}) |
                                      dict(block_2=AERes(c, c)))
        if decoder: self.mid = mid(c)
        for k in (reversed(range(len(mult))) if decoder else range(len(mult))):
            level = levels[k] = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(d['num_res_blocks'] + decoder):
                level.block.append(AERes(c, ch*mult[k]))
                c = ch*mult[k]
                if res in d['attn_resolutions'] and wide: level.attn.append(AEAttention(c))
            if decoder and k: level.upsample, res = Up(c), 2*res
            if not decoder and k < len(mult) - 1:
                level.downsample, res = nn.Module(), res//2
                level.downsample.conv = nn.Conv2d(c, c, 3, stride=2)
        setattr(self, 'up' if decoder else 'down', nn.ModuleList(levels[k] for k in range(len(mult))))
        if not decoder: self.mid = mid(c)
        self.norm_out = gn(c, 1e-6)
        self.conv_out = nn.Conv2d(c, d['out_ch'] if decoder else z*(1 + d['double_z']), 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        if self.decoder:
            for m in self.mid.values(): x = m(x)
        for level in (reversed(self.up) if self.decoder else self.down):
            for i, block in enumerate(level.block):
                x = block(x)
                if len(level.attn): x = level.attn[i](x)
            if hasattr(level, 'upsample'): x = level.upsample(x)
            if hasattr(level, 'downsample'): x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        if not self.decoder:
            for m in self.mid.values(): x = m(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PublishedFirstStage(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, embed = config['params']['ddconfig'], config['params']['embed_dim']
        twice = 1 + d['double_z']
        self.encoder, self.decoder = Half(d, False), Half(d, True)
        if not d['double_z']:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(config['params']['n_embed'], embed)
        self.quant_conv = nn.Conv2d(twice*d['z_channels'], twice*embed, 1)
        self.post_quant_conv = nn.Conv2d(embed, d['z_channels'], 1)

    def encode(self, x): return self.quant_conv(self.encoder(x))

    def decode(self, z): return self.decoder(self.post_quant_conv(z))


class PublishedText(nn.Module): # "transformer" of the BERTEmbedder
    def __init__(self, n_embed, n_layer, vocab_size=30522, max_seq_len=77, use_tokenizer=True):
        super().__init__()
        self.token_emb, self.pos_emb, self.attn_layers = nn.Embedding(vocab_size, n_embed), nn.Module(), nn.Module()
        self.pos_emb.emb, self.attn_layers.layers = nn.Embedding(max_seq_len, n_embed), nn.ModuleList()
        for _ in range(n_layer):
            attn = CrossAttention(n_embed, n_embed, 8, 64)
            attn.to_out = nn.Linear(512, n_embed)
            for part in (attn, Feed(n_embed, False)):
                self.attn_layers.layers.append(nn.ModuleList([nn.LayerNorm(n_embed), part]))
        self.norm, self.to_logits = nn.LayerNorm(n_embed), nn.Linear(n_embed, vocab_size)

    def forward(self, ids):
        x = self.token_emb(ids) + self.pos_emb.emb.weight
        for norm, part in self.attn_layers.layers:
            x = x + (part.to_out(part.mix(norm(x), norm(x))) if isinstance(part, CrossAttention) else part(norm(x)))
        return self.norm(x)


def clip_names(c, layers=12, hidden=768, inner=3072, words=49408, places=77):
    # name -> shape, as transformers had them when the files were made
    out = {'embeddings.token_embedding.weight': (words, hidden),
           'embeddings.position_embedding.weight': (places, hidden)}
    shapes = ({f'self_attn.{x}_proj': (hidden, hidden) for x in ('k', 'v', 'q', 'out')} |
              {'mlp.fc1': (inner, hidden), 'mlp.fc2': (hidden, inner)})
    for n, s in [(f'encoder.layers.{i}.{n}', s) for i in range(layers) for n, s in shapes.items()]:
        out |= {f'{n}.weight': s, f'{n}.bias': s[:1]}
    for n in [f'encoder.layers.{i}.layer_norm{k}' for i in range(layers) for k in (1, 2)] + ['final_layer_norm']:
        out |= {f'{n}.weight': (hidden,), f'{n}.bias': (hidden,)}
    return {f'{c}{k}': v for k, v in out.items()}


# what was released: the yaml of every model, in short

def first(ch_mult, z, n_embed=None, attn=(), ch=128, n=2, resolution=256, **more): # first_stage_config
    d = dict(double_z=n_embed is None, z_channels=z, resolution=resolution, in_channels=3, out_ch=3, ch=ch,
             ch_mult=list(ch_mult), num_res_blocks=n, attn_resolutions=list(attn), dropout=0.) | more
    if n_embed:
        return dict(target='ldm.models.autoencoder.VQModelInterface',
                    params=dict(embed_dim=z, n_embed=n_embed, ddconfig=d))
    return dict(target='ldm.models.autoencoder.AutoencoderKL',
                params=dict(embed_dim=z, monitor='val/rec_loss', ddconfig=d))


def unet(i, o, ch, mult, attn, **more): # unet_config.params
    return dict(image_size=32, in_channels=i, out_channels=o, model_channels=ch, attention_resolutions=list(attn),
                num_res_blocks=2, channel_mult=list(mult)) | more


def cross(context_dim, depth=1, **more):
    return dict(use_spatial_transformer=True, transformer_depth=depth, context_dim=context_dim, **more)


def ldm(first_stage, unet_params, end, image_size, cond, start=.0015, **more):
    encoders = 'ldm.modules.encoders.modules.'
    if isinstance(cond, tuple): cond = dict(target=cond[0] if '.' in cond[0] else encoders + cond[0], params=cond[1])
    return dict(model=dict(target='ldm.models.diffusion.ddpm.LatentDiffusion', params=dict(
        linear_start=start, linear_end=end, timesteps=1000, image_size=image_size, channels=unet_params['out_channels'],
        first_stage_config=first_stage,
        unet_config=dict(target='ldm.modules.diffusionmodules.openaimodel.UNetModel', params=unet_params),
        cond_stage_config=cond) | more))


FIRST = {'kl-f4': first((1, 2, 4), 3), 'kl-f8': first((1, 2, 4, 4), 4), 'kl-f16': first((1, 1, 2, 2, 4), 16, attn=[16]),
         'kl-f32': first((1, 1, 2, 2, 4, 4), 64, attn=[16, 8]), 'vq-f4': first((1, 2, 4), 3, 8192),
         'vq-f4-noattn': first((1, 2, 4), 3, 8192, attn_type='none'), 'vq-f8': first((1, 2, 2, 4), 4, 16384, [32]),
         'vq-f8-n256': first((1, 2, 2, 4), 4, 256, [32]), 'vq-f16': first((1, 1, 2, 2, 4), 8, 16384, [16])}
NONE, FACES = '__is_unconditional__', unet(3, 3, 224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32)
CLASSES = unet(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, **cross(512))
MAPS = ldm(FIRST['vq-f4'], unet(6, 3, 128, (1, 4, 8), (32, 16, 8), num_heads=8), .0205, 64,
           ('SpatialRescaler', dict(n_stages=2, in_channels=182, out_channels=3)), concat_mode=True)
LDM = {
    'celeba256': ldm(FIRST['vq-f4'], FACES, .0195, 64, NONE, concat_mode=False),
    'ffhq256': ldm(FIRST['vq-f4'], FACES, .0195, 64, NONE, concat_mode=False),
    'lsun_beds256': ldm(FIRST['vq-f4'], FACES, .0195, 64, NONE, concat_mode=False),
    'lsun_churches256': ldm(
        FIRST['kl-f8'], unet(4, 4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8, use_scale_shift_norm=True,
                             resblock_updown=True), .0155, 32, NONE,
        concat_mode=False, scale_by_std=True),
    'cin256': ldm(FIRST['vq-f8'], unet(4, 4, 256, (1, 2, 4), (4, 2, 1), num_head_channels=32, **cross(512)), .0195, 32,
                  ('ClassEmbedder', dict(embed_dim=512, key='class_label')), conditioning_key='crossattn'),
    'cin256-v2': ldm(FIRST['vq-f4'], CLASSES, .0195, 64, ('ClassEmbedder', dict(n_classes=1001, embed_dim=512)),
                     conditioning_key='crossattn'),
    'text2img256': ldm(FIRST['vq-f4'], unet(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, **cross(640)),
                       .0195, 64,
                       ('BERTEmbedder', dict(n_embed=640, n_layer=32)), conditioning_key='crossattn'),
    'layout2img-openimages256': ldm(
        FIRST['vq-f4'], unet(3, 3, 128, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32, **cross(512, 3)), .0205, 64,
        ('BERTEmbedder', dict(n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False)),
        conditioning_key='crossattn'),
    'txt2img-1p4B': ldm(FIRST['kl-f8'], unet(4, 4, 320, (1, 2, 4, 4), (4, 2, 1), num_heads=8, legacy=False,
                                             use_checkpoint=True, **cross(1280)), .012, 32,
                        ('BERTEmbedder', dict(n_embed=1280, n_layer=32)), .00085, conditioning_key='crossattn',
                        scale_factor=.18215),
    'sd-v1': ldm(FIRST['kl-f8'], unet(4, 4, 320, (1, 2, 4, 4), (4, 2, 1), num_heads=8, legacy=False, **cross(768)),
                 .012, 64, ('FrozenCLIPEmbedder', None),
                 .00085, conditioning_key='crossattn', scale_factor=.18215, use_ema=False),
    'rdm': ldm(FIRST['kl-f16'], unet(16, 16, 448, (1, 2, 3, 4), (4, 2, 1), num_head_channels=32,
                                     use_scale_shift_norm=False, **cross(768)), .015, 48,
               ('torch.nn.Identity', None), conditioning_key='crossattn', scale_factor=.22765929, scale_by_std=False),
    'semantic_synthesis256': MAPS,
    'semantic_synthesis512': dict(model=MAPS['model'] | dict(params=MAPS['model']['params'] | dict(image_size=128))),
    'bsr_sr': ldm(FIRST['vq-f4'], unet(6, 3, 160, (1, 2, 2, 4), (16, 8), num_head_channels=32), .0155, 64,
                  ('torch.nn.Identity', None), concat_mode=True),
    'inpainting_big': ldm(FIRST['vq-f4-noattn'],
                          unet(7, 3, 256, (1, 2, 3, 4), (8, 4, 2), num_heads=8, resblock_updown=True), .0205, 64,
                          '__is_first_stage__', concat_mode=True)}
ONE_HEAD = ('cin256', 'text2img256', 'layout2img-openimages256')


def modules(config, one_head=False, clip=None): # first stage, UNet and condition of a whole model
    p = config['model']['params']
    c = p['cond_stage_config']
    target, q = (c, {}) if isinstance(c, str) else (c['target'].rpartition('.')[2], c['params'] or {})
    cond = nn.Module()
    if target == 'ClassEmbedder': cond.embedding = nn.Embedding(q.get('n_classes', 1000), q['embed_dim'])
    if target == 'SpatialRescaler': cond.channel_mapper = nn.Conv2d(q['in_channels'], q['out_channels'], 1, bias=False)
    if target == 'BERTEmbedder': cond.transformer = PublishedText(**q)
    if target == '__is_first_stage__': cond = PublishedFirstStage(p['first_stage_config'])
    return PublishedFirstStage(p['first_stage_config']), PublishedUNet(p['unet_config']['params'], one_head), cond


def schedule(start, end, steps=1000): # the buffers
    b = torch.linspace(start**.5, end**.5, steps, dtype=torch.float64)**2
    a = torch.cumprod(1 - b, 0)
    return dict(betas=b.float(), alphas_cumprod=a.float(), sqrt_alphas_cumprod=a.sqrt().float(),
                logvar=torch.zeros(steps))


def checkpoint(parts, config, average=lambda v: v, extra=None): # name -> tensor, as the published code saves a model
    first_stage, net, cond = parts
    p = config['model']['params']
    out = ({f'model.diffusion_model.{k}': v for k, v in net.state_dict().items()} |
           schedule(p['linear_start'], p['linear_end']))
    out |= {f'model_ema.{f"diffusion_model.{k}".replace(".", "")}': average(v) for k, v in net.state_dict().items()}
    out |= {'model_ema.decay': torch.tensor(.9999), 'model_ema.num_updates': torch.tensor(7)}
    if p.get('scale_by_std'): out['scale_factor'] = torch.tensor(.9)
    out |= {f'first_stage_model.{k}': v for k, v in first_stage.state_dict().items()}
    return out | {f'cond_stage_model.{k}': v for k, v in cond.state_dict().items()} | (extra or {})


def shaken(net, seed=0): # every weight random, none so large that a small difference could hide
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_((1 if p.ndim == 1 and 'norm' in n and 'weight' in n else 0) + p/2 + .03*torch.randn_like(p))
    return net.eval()


def shapes(tensors): return {k: tuple(v.shape) for k, v in tensors.items()}


def asked_for(net, table): # name -> shape, of what a table of ours takes from a file
    ours = net.state_dict()
    return shapes({n: t for k, e in table.items() for n, t in zip(e.names, e.write(ours[k]), strict=True)})


# names and shapes, at full size

# tensors, as counted in the released files
COUNTS = {'celeba256': 368, 'cin256': 626, 'cin256-v2': 688, 'lsun_churches256': 520, 'txt2img-1p4B': 686}


@pytest.mark.parametrize('name', [*FIRST_STAGES, *UNETS])
def test_every_name_and_shape(name):
    ours = paper_model(name, 'meta')
    with torch.device('meta'):
        theirs = (PublishedFirstStage(FIRST[name]) if name in FIRST
                  else PublishedUNet(LDM[name]['model']['params']['unet_config']['params'], name in ONE_HEAD))
    assert asked_for(ours, (first_stage_keys if name in FIRST else unet_keys)(ours)) == shapes(theirs.state_dict())
    assert len(theirs.state_dict()) == COUNTS.get(name, len(theirs.state_dict()))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize('name', ['txt2img-1p4B', 'text2img256', 'layout2img-openimages256'])
def test_every_name_and_shape_of_the_text_encoders(name):
    ours = paper_model(f'{name}/conditioner', 'meta')
    with torch.device('meta'): theirs = PublishedText(**LDM[name]['model']['params']['cond_stage_config']['params'])
    assert asked_for(ours, text_keys(ours)) == shapes(theirs.state_dict())
    if ours.max_length == 77: assert len(theirs.state_dict()) == 422


def words(n): # a tokenizer, as far as it is asked
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *(f'w{i}' for i in range(n - 5))]
    return SimpleNamespace(get_vocab=lambda: {w: i for i, w in enumerate(vocab)})


def state_of(model): # all that decides what a model computes, but its weights
    e = model.embedder
    return (model.net.config, model.autoencoder.config, model.schedule.config, model.prediction_type, model.size,
            model.sampling, e and (type(e), e.config), [m.heads for m in model.net.modules() if hasattr(m, 'heads')],
            model.autoencoder.latent_scale.tolist())


def known(state): # attention factors that no level has mean nothing
    net = dict(state[0], attn_factors=sorted(state[0]['attn_factors']))
    return net, *state[1:]


@pytest.mark.parametrize('name', LDM)
def test_every_released_model_loads_whole(tmp_path, name):
    "At full size, without numbers: a file of meta tensors, by name and by yaml. A strict load leaves no name over."
    with torch.device('meta'): parts = modules(LDM[name], name in ONE_HEAD)
    extra = {}
    if name == 'sd-v1':
        extra = {k: torch.empty(s, device='meta')
                 for k, s in clip_names('cond_stage_model.transformer.text_model.').items()}
        assert len(extra) == 196
        extra['cond_stage_model.transformer.text_model.embeddings.position_ids'] = torch.arange(77)[None]
    torch.save({'state_dict': checkpoint(parts, LDM[name], extra=extra), 'global_step': 1}, tmp_path/'model.ckpt')
    by_name = load_compvis(tmp_path/'model.ckpt', name, tokenizer=words(30522))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        by_yaml = load_compvis(tmp_path/'model.ckpt', LDM[name], tokenizer=words(30522))
    assert known(state_of(by_name)) == known(state_of(by_yaml))
    assert by_name.source['weights'] == by_yaml.source['weights'] == ('raw' if name == 'sd-v1' else 'ema') # its use_ema
    assert by_name.sampling == {}
    assert bool([w for w in seen if 'use_ema: False' in str(w.message)]) == (name == 'sd-v1')
    seen = [w for w in seen if 'use_ema' not in str(w.message)]
    assert [str(w.message) for w in seen if 'channels a head' in str(w.message)] == [str(w.message) for w in seen]
    assert bool(seen) == (name in ONE_HEAD) and (not seen or f'the network of {name}' in str(seen[0].message))
    if name in ONE_HEAD: assert {m.heads for m in by_yaml.net.modules() if hasattr(m, 'heads')} == {1}
    assert sum(p.numel() for p in by_name.net.parameters()) == sum(p.numel() for p in parts[1].parameters())
    z, e = by_name.autoencoder.z_ch, by_name.embedder
    assert (by_name.net.in_ch == z + (e.concat_ch if e else 0) and
            by_name.net.context_dim == (e.context_dim if e else None))


@pytest.mark.parametrize('name', FIRST)
def test_every_released_first_stage_loads(tmp_path, name):
    with torch.device('meta'): theirs = PublishedFirstStage(FIRST[name])
    losses = {'loss.logvar': torch.zeros(()), 'loss.discriminator.main.0.weight': torch.ones(1),
              'loss.perceptual_loss.net.slice1.0.weight': torch.ones(1)}
    torch.save({'state_dict': theirs.state_dict() | losses}, tmp_path/'model.ckpt')
    by_name = load_compvis(tmp_path/'model.ckpt', name)
    by_yaml = load_compvis(tmp_path/'model.ckpt', dict(model=FIRST[name]))
    assert isinstance(by_name, Autoencoder) and by_name.config == by_yaml.config == paper_model(name, 'meta').config
    assert torch.equal(by_name.latent_scale, torch.ones(by_name.z_ch, 1, 1)) and not by_name.latent_shift.any()


# numbers, at toy size

SMALL = {'kl': first((1, 2), 4, ch=32, n=1, resolution=32), 'vq': first((1, 2), 3, 16, ch=32, n=1, resolution=32),
         'kl, attention below': first((1, 2, 2), 4, ch=32, n=2, resolution=64, attn=[32, 16]),
         'vq, no attention': first((1, 2), 3, 16, ch=32, n=1, resolution=32, attn=[32, 16], attn_type='none')}
TOY = {
    'faces': ldm(SMALL['vq'], unet(3, 3, 32, (1, 2, 3), (4, 2), num_head_channels=16), .0195, 16, NONE),
    'churches': ldm(SMALL['kl'], unet(4, 4, 32, (1, 2), (1, 2), num_heads=4, use_scale_shift_norm=True,
                                      resblock_updown=True), .0155, 16, NONE,
                    scale_by_std=True),
    'inpainting': ldm(SMALL['vq, no attention'], unet(7, 3, 32, (1, 2), (2,), num_heads=8, resblock_updown=True), .0205,
                      16, '__is_first_stage__'),
    'enlarging': ldm(SMALL['vq'], unet(6, 3, 32, (1, 2), (8,), num_head_channels=32), .0155, 16,
                     ('torch.nn.Identity', None), concat_mode=True),
    'maps': ldm(SMALL['vq'], unet(6, 3, 32, (1, 2), (8,), num_heads=2), .0205, 16,
                ('SpatialRescaler', dict(n_stages=1, in_channels=5, out_channels=3))),
    'classes': ldm(SMALL['kl'], unet(4, 4, 32, (1, 2), (1, 2), num_heads=1, **cross(24)), .0195, 16,
                   ('ClassEmbedder', dict(n_classes=1001, embed_dim=24)),
                   conditioning_key='crossattn'),
    'captions': ldm(SMALL['kl'], unet(4, 4, 32, (1, 2), (2, 1), num_heads=4, **cross(32)), .012, 16,
                    ('BERTEmbedder', dict(n_embed=32, n_layer=3, vocab_size=60, max_seq_len=9)), .00085,
                    conditioning_key='crossattn', scale_factor=.2),
    'layouts': ldm(SMALL['vq'], unet(3, 3, 32, (1, 2), (2,), num_heads=1, **cross(32, 3)), .0205, 16,
                   ('BERTEmbedder', dict(n_embed=32, n_layer=2, vocab_size=50, max_seq_len=11, use_tokenizer=False)),
                   conditioning_key='crossattn'),
    'retrieval': ldm(SMALL['kl, attention below'], unet(4, 4, 32, (1, 2), (2, 1), num_head_channels=16, **cross(24)),
                     .015, 8, ('torch.nn.Identity', None),
                     conditioning_key='crossattn', scale_factor=.3),
    'x0': ldm(SMALL['kl'], unet(4, 4, 32, (1,), (1,), num_heads=2), .0195, 16, NONE, parameterization='x0')}


@pytest.fixture(scope='module')
def saved(tmp_path_factory): # name -> (file, modules that made it)
    made = {}

    def save(name):
        if name not in made:
            parts = [shaken(m, i) for i, m in enumerate(modules(TOY[name]))]
            made[name] = tmp_path_factory.mktemp('toy')/'model.ckpt', parts
            torch.save({'state_dict': checkpoint(parts, TOY[name], lambda v: .9*v)}, made[name][0])
        return made[name]
    return save


def load(saved, name, **more):
    path, parts = saved(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_compvis(path, TOY[name], tokenizer=words(60), **more), parts


@torch.no_grad()
def unet_difference(ours, theirs): # the largest, on outputs of the size of 1
    torch.manual_seed(5)
    z, t = torch.randn(2, ours.in_ch, 16, 16), torch.tensor([3, 801])
    context = torch.randn(2, 6, ours.context_dim) if ours.context_dim else None
    want = theirs(z, t, context)
    assert .1 < want.std() < 10
    return (ours(z, t, Cond(context=context)) - want).abs().max().item()


@pytest.mark.parametrize('name', TOY)
@torch.no_grad()
def test_the_same_numbers_as_the_published_modules(saved, name):
    ours, (first_stage, net, _) = load(saved, name, ema=False)
    assert unet_difference(ours.net, net) <= 1e-5
    torch.manual_seed(6)
    x, p = torch.rand(2, 3, 32, 32)*2 - 1, TOY[name]['model']['params']
    scale, h = .9 if p.get('scale_by_std') else p.get('scale_factor', 1.), first_stage.encode(x)
    z = h.chunk(2, 1)[0] if ours.autoencoder.codebook is None else h
    assert (ours.autoencoder.encode(x) - scale*z).abs().max() <= 1e-5 and z.std() > .01
    if ours.autoencoder.codebook:
        far = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), first_stage.quantize.embedding.weight)
        z = F.embedding(far.argmin(1),
                        first_stage.quantize.embedding.weight).unflatten(0, (2, *z.shape[2:])).permute(0, 3, 1, 2)
    want = first_stage.decode(z)
    assert (ours.autoencoder.decode(scale*(h.chunk(2, 1)[0] if ours.autoencoder.codebook is None else h)) -
            want).abs().max() <= 1e-5 and want.std() > .01
    abar = schedule(p['linear_start'], p['linear_end'])['alphas_cumprod']
    assert ((ours.schedule.abar - abar).abs().max() <= 1e-6 and
            ours.prediction_type == p.get('parameterization', 'eps') and ours.size == 32)


@torch.no_grad()
def test_the_same_conditions(saved):
    ours, (_, _, cond) = load(saved, 'classes')
    assert torch.equal(ours.embedder(ours.embedder.prepare([3, 999])).context,
                       cond.embedding(torch.tensor([[3], [999]])))
    assert torch.equal(ours.embedder.null(1).context, cond.embedding(torch.tensor([[1000]])))

    ours, (_, _, cond) = load(saved, 'maps')
    m = torch.randint(0, 5, (2, 32, 32))
    want = cond.channel_mapper(F.interpolate(F.one_hot(m, 5).permute(0, 3, 1, 2).float(), scale_factor=.5,
                                             mode='bilinear'))
    assert (ours.embedder(ours.embedder.prepare(list(m))).concat - want).abs().max() <= 1e-6

    ours, (_, _, cond) = load(saved, 'captions')
    ids = ours.embedder.prepare(['w3 w7 w50', 'w1'])
    # [CLS] and [SEP] around what the vocabulary says, then [PAD]
    assert ids[0].tolist() == [2, 8, 12, 55, 3, 0, 0, 0, 0]
    want = cond.transformer(ids)
    assert (ours.embedder(ids).context - want).abs().max() <= 1e-5 and want.std() > .5
    assert (ours.embedder.null(1).context - cond.transformer(torch.tensor([[2, 3] + [0]*7]))).abs().max() <= 1e-5

    ours, (_, _, cond) = load(saved, 'layouts')
    ids = torch.randint(0, 50, (2, 11))
    assert (ours.embedder(ours.embedder.prepare(ours.embedder.prompts(ids))).context -
            cond.transformer(ids)).abs().max() <= 1e-5

    ours, y = load(saved, 'retrieval')[0], torch.randn(2, 1, 24)
    assert torch.equal(ours.embedder(ours.embedder.prepare(ours.embedder.prompts(y))).context,
                       y) and not ours.embedder.null(2).context.any()

    ours, (first_stage, _, cond) = load(saved, 'inpainting')  # pictures in [0, 1], the hole black, then all to [-1, 1]
    x, mask = torch.rand(3, 32, 32), torch.zeros(1, 32, 32)
    mask[:, 8:20, 3:17] = 1
    want = torch.cat([cond.encode(((1 - mask)*x)[None]*2 - 1), F.interpolate(mask[None]*2 - 1, size=(16, 16))], 1)
    assert (ours.embedder(ours.embedder.prepare(ours.embedder.prompts(dict(image=2*x - 1, mask=mask)),
                                                ours.autoencoder)).concat - want).abs().max() > 1e-3
    # in released files the second is a copy of the first
    for k, v in first_stage.state_dict().items(): cond.state_dict()[k].copy_(v)
    want[:, :3] = cond.encode(((1 - mask)*x)[None]*2 - 1)
    assert (ours.embedder(ours.embedder.prepare(ours.embedder.prompts(dict(image=2*x - 1, mask=mask)),
                                                ours.autoencoder)).concat - want).abs().max() <= 1e-5


PROMPTS = {'faces': {}, 'churches': {}, 'x0': {}, 'classes': dict(y=[3, 7]), 'captions': dict(y='w3 w4'),
           'layouts': dict(y=torch.arange(11)), 'retrieval': dict(y=torch.randn(1, 24)),
           'maps': dict(y=torch.zeros(32, 32, dtype=torch.long)), 'enlarging': dict(image=torch.zeros(3, 8, 8)),
           'inpainting': dict(image=torch.zeros(3, 32, 32), mask=torch.ones(1, 32, 32))}


@pytest.mark.parametrize('name', TOY)
def test_every_kind_draws(saved, name):
    x = load(saved, name)[0].sample(**PROMPTS[name], steps=3)
    assert x.shape == (2 if name == 'classes' else 1, 3, 32, 32) and x.isfinite().all()


def test_published_models_stop_at_step_0(saved):
    model = load(saved, 'faces')[0]
    assert model.request(steps=10).sigmas[-1] == model.schedule.sigma[0]


def test_the_average_is_taken(saved):
    (average, (_, net, _)), raw = load(saved, 'churches'), load(saved, 'churches', ema=False)[0]
    assert (torch.equal(average.net.conv_in.weight, .9*net.input_blocks[0][0].weight) and
            torch.equal(raw.net.conv_in.weight, net.input_blocks[0][0].weight))
    assert ((average.source['weights'], raw.source['weights']) == ('ema', 'raw') and
            average.source['scale'] == pytest.approx(.9))
    assert (average.sample(steps=3) - raw.sample(steps=3)).abs().max() > 1e-3


def test_the_config_decides_between_average_and_weights(saved):
    path, (_, net, _) = saved('churches')
    p = TOY['churches']['model']
    off = dict(model=p | dict(params=p['params'] | dict(use_ema=False)))
    with pytest.warns(UserWarning, match='also holds an average .* Give ema=True'): ours = load_compvis(path, off)
    assert torch.equal(ours.net.conv_in.weight, net.input_blocks[0][0].weight) and ours.source['weights'] == 'raw'
    assert load_compvis(path, off, ema=True).source['weights'] == 'ema'


def test_without_an_average_the_weights_are_taken_and_the_other_way_round(saved, tmp_path):
    path, (_, net, _) = saved('faces')
    tensors = torch.load(path)['state_dict']
    for gone, got in (('model_ema.', 'raw'), ('model.', 'ema')):
        torch.save({k: v for k, v in tensors.items() if not k.startswith(gone)}, tmp_path/'model.ckpt')
        for ema in (True, False):
            assert load_compvis(tmp_path/'model.ckpt', TOY['faces'], ema=ema).source['weights'] == got


# diffusers as the oracle

@pytest.mark.parametrize('heads, depth', [(1, 1), (4, 1), (2, 2)])
def test_a_unet_through_the_converter_of_diffusers(tmp_path, heads, depth):
    config = ldm(SMALL['kl'], unet(4, 4, 32, (1, 2, 2), (4, 1), num_heads=heads, **cross(24, depth)), .0195, 16,
                 ('torch.nn.Identity', None), conditioning_key='crossattn')
    tensors = checkpoint([shaken(m, 3) for m in modules(config)], config)
    peer = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=heads, cross_attention_dim=24,
        transformer_layers_per_block=depth, up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D', 'CrossAttnUpBlock2D'),
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D', 'CrossAttnDownBlock2D')).eval()
    peer.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), peer.config))
    torch.save({'state_dict': tensors}, tmp_path/'model.ckpt')
    assert unet_difference(load_compvis(tmp_path/'model.ckpt', config).net, lambda *a: peer(*a).sample) <= 1e-5


@torch.no_grad()
def test_a_first_stage_through_the_converter_of_diffusers(tmp_path):
    config = first((1, 2, 2), 4, ch=32, n=2, resolution=64)
    theirs = shaken(PublishedFirstStage(config))
    peer = diffusers.AutoencoderKL(block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=4,
                                   down_block_types=('DownEncoderBlock2D',)*3,
                                   up_block_types=('UpDecoderBlock2D',)*3).eval()
    peer.load_state_dict(convert_ldm_vae_checkpoint({f'first_stage_model.{k}': v
                                                     for k, v in theirs.state_dict().items()}, peer.config))
    save_file(theirs.state_dict(), tmp_path/'model.safetensors')
    ours, x = load_compvis(tmp_path/'model.safetensors', dict(model=config)), torch.rand(2, 3, 32, 48)*2 - 1
    z = peer.encode(x).latent_dist
    assert ((ours.posterior(x).mean - z.mean).abs().max() <= 1e-5 and
            (ours.posterior(x).logvar - z.logvar).abs().max() <= 1e-5)
    assert (ours.decode(z.mean) - peer.decode(z.mean).sample).abs().max() <= 1e-5


@torch.no_grad()
def test_the_text_encoder_against_that_of_diffusers(saved):
    ours, (_, _, cond) = load(saved, 'captions')
    new = {'token_emb.': 'model.embed_tokens.', 'pos_emb.emb.': 'model.embed_positions.', 'norm.': 'model.layer_norm.',
           'to_logits.': 'to_logits.'}
    for i in range(3):
        a, b, layer = f'attn_layers.layers.{2*i}.', f'attn_layers.layers.{2*i + 1}.', f'model.layers.{i}.'
        new |= {f'{a}0.': f'{layer}self_attn_layer_norm.', f'{b}0.': f'{layer}final_layer_norm.'}
        new |= {f'{b}1.net.0.0.': f'{layer}fc1.', f'{b}1.net.2.': f'{layer}fc2.'}
        new |= {f'{a}1.to_{x}.': f'{layer}self_attn.{x}_proj.' for x in ('q', 'k', 'v', 'out')}
    peer = LDMBertModel(LDMBertConfig(vocab_size=60, max_position_embeddings=9, encoder_layers=3, encoder_ffn_dim=128,
                                      encoder_attention_heads=8, head_dim=64, d_model=32)).eval()
    peer.load_state_dict({new[p] + k[len(p):]: v for k, v in cond.transformer.state_dict().items()
                          for p in new if k.startswith(p)})
    ids = torch.randint(0, 60, (2, 9))
    assert (ours.embedder(ids).context - peer(ids)[0]).abs().max() <= 1e-5


CLIP = dict(vocab_size=54, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)


@pytest.fixture
def small_clip(tmp_path, monkeypatch): # (config of a Stable Diffusion in small, its CLIP, a tokenizer of letters)
    from transformers import CLIPTokenizer
    monkeypatch.setitem(CONDITIONERS, 'sd-v1', (clip_text, CLIP))
    letters = [chr(k) for k in range(ord('a'), ord('z') + 1)]
    vocab = {w: i for i, w in enumerate(['<|startoftext|>', '<|endoftext|>', *letters, *(k + '</w>' for k in letters)])}
    config = ldm(SMALL['kl'], unet(4, 4, 32, (1, 2), (1,), num_heads=4, **cross(24)), .012, 16,
                 ('FrozenCLIPEmbedder', None), .00085, conditioning_key='crossattn', scale_factor=.18215)
    return config, shaken(clip_text(**CLIP)), CLIPTokenizer(vocab, [], model_max_length=12)


@torch.no_grad()
def test_stable_diffusion_in_small(tmp_path, small_clip):
    config, clip, tokenizer = small_clip
    text = {f'cond_stage_model.transformer.text_model.{k.removeprefix("text_model.")}': v
            for k, v in clip.state_dict().items()}
    text['cond_stage_model.transformer.text_model.embeddings.position_ids'] = torch.arange(12)[None]
    assert set(shapes(text)) - {'cond_stage_model.transformer.text_model.embeddings.position_ids'} == set(
        clip_names('cond_stage_model.transformer.text_model.', 2))
    save_file({k: v.half() if v.is_floating_point() else v
               for k, v in checkpoint([shaken(m, 3) for m in modules(config)], config, extra=text).items()},
              tmp_path/'model.safetensors')
    ours = load_compvis(tmp_path/'model.safetensors', config, tokenizer=tokenizer)
    ids = tokenizer(['a cat'], padding='max_length', return_tensors='pt')['input_ids']
    assert torch.equal(ours.embedder.prepare(['a cat']), ids)
    for p in clip.parameters(): p.copy_(p.half().float())
    assert torch.equal(ours.embedder(ids).context, clip(ids).last_hidden_state)
    assert {p.dtype for p in [*ours.parameters(), *ours.embedder.model[0].parameters()]} == {torch.float32}
    assert not any(b.is_meta for m in (ours, ours.embedder.model[0]) for b in m.buffers())
    assert ours.sample('a cat', steps=3).isfinite().all()


# mistakes that load without a word are seen

def test_a_mistake_is_seen(saved, monkeypatch):
    path, (_, net, _) = saved('faces')
    monkeypatch.setattr(compvis, 'per_head', lambda name, heads: compvis.matrix(name, 3))
    assert unet_difference(load_compvis(path, TOY['faces'], ema=False).net, net) > 1e-3
    monkeypatch.undo()
    assert unet_difference(load_compvis(path, TOY['faces'], ema=False).net, net) <= 1e-5
    path, (_, net, _) = saved('retrieval')
    assert unet_difference(load_compvis(path, TOY['retrieval'], ema=False, heads=1).net, net) > 1e-3
    assert unet_difference(load_compvis(path, TOY['retrieval'], ema=False, heads=dict(head_ch=16)).net, net) <= 1e-5
    with pytest.warns(UserWarning, match='if the model is older, give heads=1'):
        assert unet_difference(load_compvis(path, TOY['retrieval'], ema=False).net, net) <= 1e-5


@pytest.mark.parametrize('name, old, new', [('faces', 1e-5, 1e-6), ('churches', 1e-5, 1e-6), ('classes', 1e-6, 1e-5)])
def test_the_tolerance_would_show_another_eps(saved, name, old, new):
    ours, (_, net, _) = load(saved, name, ema=False)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm) and m.eps == old]
    for m in norms: m.eps = new
    try: assert norms and unet_difference(ours.net, net) > 3e-5
    finally:
        for m in norms: m.eps = old


# what is refused

def refused(saved, tmp_path, says, change, name='classes', config=None, **more):
    tensors = {k: v for k, v in (torch.load(saved(name)[0])['state_dict'] | change).items() if v is not None}
    torch.save({'state_dict': tensors}, tmp_path/'bad.ckpt')
    with pytest.raises(ValueError, match=says): load_compvis(tmp_path/'bad.ckpt', config or TOY[name], **more)


def test_one_wrong_name_is_named_with_its_nearest(saved, tmp_path):
    for old, new in (('first_stage_model.decoder.up.0.block.1.conv1.bias',
                      'first_stage_model.decoder.up.0.block.1.conv1.bais'),
                     ('model_ema.diffusion_modelout2bias', 'model_ema.diffusion_modelout2bais'),
                     ('cond_stage_model.embedding.weight', 'cond_stage_model.embeding.weight')):
        short = lambda n: n.removeprefix('first_stage_model.').removeprefix(
            'model_ema.diffusion_model').removeprefix('cond_stage_model.')
        refused(saved, tmp_path, f"no tensor '{short(old)}'; nearest: '{short(new)}'", {old: None, new: torch.ones(1)})
        refused(saved, tmp_path, f"e.g. '{short(new)}'; nearest: '{short(old)}'", {new: torch.ones(1)})
    refused(saved, tmp_path, "of no family, e.g. 'alphas_cumprd'; nearest: 'alphas_cumprod'",
            {'alphas_cumprd': torch.ones(1)})
    refused(saved, tmp_path, "condition: 1 tensors, e.g. 'x.weight', where the config says",
            {'cond_stage_model.x.weight': torch.ones(1)}, 'faces')
    refused(saved, tmp_path, "1 tensors have no place in ImageEmbedder",
            {'cond_stage_model.x.weight': torch.ones(1)}, 'enlarging')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_the_schedule_of_the_file_must_be_that_of_the_config(saved, tmp_path, dtype):
    right = schedule(.0015, .0195)['alphas_cumprod'].to(dtype)
    torch.save({'state_dict': torch.load(saved('classes')[0])['state_dict'] | dict(alphas_cumprod=right)},
               tmp_path/'model.ckpt')
    load_compvis(tmp_path/'model.ckpt', TOY['classes'])
    for other in (schedule(.0015, .0205), schedule(.00085, .012), schedule(.0015, .0195, 500)):
        refused(saved, tmp_path, 'another noise schedule', dict(alphas_cumprod=other['alphas_cumprod'].to(dtype)))


@pytest.mark.parametrize('name, says', [
    ('lora_unet_down_blocks_0_attentions_0.lora_up.weight', 'is a LoRA.*not supported'),
    ('unet.down_blocks.0.attentions.0.to_q.lora_A.weight', 'is a LoRA'),
    ('conditioner.embedders.1.model.ln_final.bias', 'is Stable Diffusion XL'),
    ('cond_stage_model.model.ln_final.bias', 'is Stable Diffusion 2'),
    ('control_model.zero_convs.0.0.weight', 'is a ControlNet'),
    ('model.diffusion_model.joint_blocks.0.x.weight', 'is a transformer'),
    ('down_blocks.0.resnets.0.conv1.weight', 'a component of diffusers: use load_component')])
def test_files_of_other_kinds_are_named(tmp_path, name, says):
    save_file({name: torch.ones(1)}, tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=says): load_compvis(tmp_path/'model.safetensors', 'sd-v1')


class Surprise:
    def __reduce__(self): return print, ('run',)


def test_code_in_a_file_is_refused(tmp_path, capsys):
    torch.save({'state_dict': {'a': torch.ones(1)}, 'callbacks': Surprise()}, tmp_path/'model.ckpt')
    with pytest.raises(ValueError, match='wants to run'): load_compvis(tmp_path/'model.ckpt', 'kl-f8')
    assert 'run\n' not in capsys.readouterr().out
    (tmp_path/'old.ckpt').write_bytes(pickle.dumps(Surprise(), 2))
    with pytest.raises(ValueError): load_compvis(tmp_path/'old.ckpt', 'kl-f8')


def test_where_the_config_is_found(saved, tmp_path):
    import yaml
    path = tmp_path/'logs/checkpoints/last.ckpt'
    path.parent.mkdir(parents=True)
    path.write_bytes(saved('faces')[0].read_bytes())
    with pytest.raises(ValueError, match='no config.yaml beside .*give config='): load_compvis(path)
    (tmp_path/'logs/configs').mkdir()
    (tmp_path/'logs/configs/2021-project.yaml').write_text(yaml.safe_dump(TOY['faces']))
    assert load_compvis(path).size == 32
    (path.parent/'config.yaml').write_text(
        yaml.safe_dump(ldm(SMALL['vq'], TOY['faces']['model']['params']['unet_config']['params'], .0195, 32, NONE)))
    assert load_compvis(path).size == 64 and load_compvis(path, tmp_path/'logs/configs/2021-project.yaml').size == 32
    (path.parent/'config.yaml').write_text('model: [')
    with pytest.raises(ValueError, match='is no yaml'): load_compvis(path)
    with pytest.raises(ValueError, match='does not describe a model'): load_compvis(path, {})
    with pytest.raises(ValueError, match='holds a UNet and the config describes none'): load_compvis(path, 'vq-f4')
    with pytest.raises(FileNotFoundError, match='no file'): load_compvis(path.with_name('none.ckpt'), 'vq-f4')


def test_without_a_tokenizer(saved, tmp_path):
    path, _ = saved('captions')
    with pytest.raises(ValueError, match='give tokenizer=, a folder that holds bert-base-uncased'):
        load_compvis(path, TOY['captions'], tokenizer=tmp_path)
    with pytest.raises(ValueError, match='a vocabulary of 61 tokens for a model of 60'):
        load_compvis(path, TOY['captions'], tokenizer=words(61))
    (tmp_path/'vocab.txt').write_text('\n'.join(words(60).get_vocab()))
    (tmp_path/'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_compvis(path, TOY['captions'], tokenizer=tmp_path).embedder.vocab == list(words(60).get_vocab())


def test_what_is_saved_loads_again(saved, tmp_path):
    for name in ('classes', 'captions', 'layouts', 'retrieval', 'churches'):
        model = load(saved, name)[0]
        again = LatentDiffusion.from_pretrained(model.save_pretrained(tmp_path/name))
        assert torch.equal(again.sample(**PROMPTS[name], steps=2), model.sample(**PROMPTS[name], steps=2)), name


def test_types(): # that the tables above speak of all there is
    assert set(FIRST) == set(FIRST_STAGES) and set(LDM) == set(UNETS) == set(compvis.RELEASED)
    assert (isinstance(paper_model('layout2img-openimages256/conditioner', 'meta'), TokenTransformer) and
            isinstance(paper_model('rdm', 'meta'), UNet))
