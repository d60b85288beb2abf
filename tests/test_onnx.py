"""Exported models: every kind of condition and network, any size of the batch, against the model itself in PyTorch.
The oracle is the model; onnxruntime runs the files. What is asserted of a shipped model is in nbs/interop/10_onnx."""
import json

import pytest
import torch

from conftest import command, refused, run
from ldm_nb.attention import token_maps, watch_attention
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.beyond.dit import ClassVector, make_dit
from ldm_nb.beyond.flow import StraightPath
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.scenes import CLASSES
from ldm_nb.embedders import ClassEmbedder, TextEmbedder
from ldm_nb.paper.conditions import make_unet, shipped_vocab
from ldm_nb.paper.hybrid import HybridEmbedder
from ldm_nb.paper.images import ImageEmbedder, InpaintEmbedder
from ldm_nb.paper.layouts import LayoutEmbedder
from ldm_nb.paper.maps import MapEmbedder

pytest.importorskip('onnxscript', reason='onnxscript is not installed: nothing can be exported')
pytest.importorskip('onnxruntime', reason='onnxruntime is not installed: exported files cannot be run')
from onnxruntime import InferenceSession # noqa: E402
from ldm_nb.interop import onnx # noqa: E402
from ldm_nb.interop.onnx import NetworkGraph, OnnxModel, export_onnx, to_onnx # noqa: E402

SIZE = 16
small = dict(dim=16, depth=1, heads=2)
text = lambda pooled=False: TextEmbedder(shipped_vocab(), max_length=12, pooled=pooled, **small)
layout = lambda size=None: LayoutEmbedder(len(CLASSES), max_boxes=3, names=list(CLASSES), size=size, stages=1, **small)
boxes = [[['house', .1, .1, .6, .7]], []]
PARTS = {'text': lambda: text(True), 'layout': lambda: layout(SIZE), 'map': lambda: MapEmbedder(9, 4, stages=1),
         'inpaint': InpaintEmbedder} # one hybrid of them all: an export takes seconds
KINDS = {'text': text, 'class': lambda: ClassEmbedder(5, 16), 'layout': layout, 'x4': lambda: ImageEmbedder(2),
         'hybrid': lambda: HybridEmbedder(**{k: make() for k, make in PARTS.items()})}
PROMPTS = {'text': ['a red house', 'a lake'], 'class': [0, 4], 'layout': boxes}

@pytest.fixture(autouse=True, scope='module')
def first_stages_once(): # they are the same nearly everywhere, and an export takes seconds
    done, write = {}, onnx.to_onnx
    def cached(module, inputs, outputs, path, dtype=torch.float16):
        if not isinstance(module, onnx.DecoderGraph): return write(module, inputs, outputs, path, dtype)
        key = (type(module), *(v.double().sum().item() for v in module.state_dict().values()))
        if key not in done: done[key] = (write(module, inputs, outputs, path, dtype), path.read_bytes())
        path.write_bytes(done[key][1])
        return done[key][0]
    onnx.to_onnx = cached
    yield
    onnx.to_onnx = write

def made(kind: str, network: str = 'unet', codes=None, **more) -> LatentDiffusion: # all weights random, none zero
    torch.manual_seed(0)
    ae = Autoencoder(ch=8, ch_mult=(1, 1), num_res_blocks=1, groups=4, mid_attn=False, codes=codes)
    e = None if kind == 'none' else ClassVector(5, 16) if kind == 'class vector' else KINDS[kind]()
    if network == 'dit': net = make_dit(e, 4, dim=16, depth=1, heads=2)
    else: net = make_unet(e, 4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_factors=(2,), groups=4, heads=2)
    ldm = LatentDiffusion(ae, net, e, size=SIZE, **more)
    for p in ldm.parameters(): p.data += .1*torch.randn_like(p)
    return ldm.half().float().eval() # float16 can hold the weights

def rows_of(ldm, kind: str, n: int):
    e, hw = ldm.embedder, ldm.latent_shape()[1:]
    rows = lambda e, kind: (torch.randn(n, e.concat_ch, *hw) if kind in ('inpaint', 'x4') else
                            torch.randint(9, (n, SIZE, SIZE)) if kind == 'map' else
                            torch.arange(n) % 5 if kind == 'class vector' else
                            e.prepare((e.prompts(PROMPTS[kind])*n)[:n], ldm.autoencoder))
    return {k: rows(p, k) for k, p in e.parts.items()} if kind == 'hybrid' else rows(e, kind)

def same_slots(c, other) -> bool: # filled alike, and nearly equal
    return all(a is b if a is None or b is None else (a - b).abs().max() < 2e-5 for a, b in zip(c, other))

def check(ldm, kind: str, model: OnnxModel, n: int):
    z, t = torch.randn(n, *ldm.latent_shape()), 999*torch.rand(n)
    c = None
    with torch.no_grad():
        if ldm.embedder is not None:
            rows = rows_of(ldm, kind, n)
            c = ldm.embedder(rows)
            if 'embedder' in model.about['files']:
                got = model.embed(*(rows.values() if kind == 'hybrid' else [rows]))
                assert same_slots(got, c)
        want = ldm.net(z, t, c)
        assert want.abs().max() > .1 # or nothing is compared
        assert (model.net(z, t, c) - want).abs().max() < 5e-5*want.abs().max()
        decoded = ldm.autoencoder.decode(z)
        assert (model.run('decoder', [z])[0] - decoded).abs().max() < 5e-5*decoded.abs().max()
        encoded = ldm.autoencoder.encode(decoded)
        assert (model.encode(decoded) - encoded).abs().max() < 1e-4*encoded.abs().max()

@pytest.mark.parametrize('kind', KINDS)
def test_every_condition(kind, tmp_path):
    ldm = made(kind)
    model = OnnxModel(export_onnx(ldm, tmp_path/'x'))
    for n in (1, 3): check(ldm, kind, model, n)
    about = model.about
    assert about['latent'] == dict(channels=4, factor=2, height=8, width=8) and about['format'] == 1
    assert ('embedder' in about['files']) == (kind != 'x4')
    if kind in ('text', 'class', 'layout'):
        with torch.no_grad(): null = ldm.embedder.null(2, (8, 8))
        assert same_slots(model.null(2), null)

@pytest.mark.parametrize('kind', ['text', 'class vector'])
def test_transformers(kind, tmp_path):
    ldm = made(kind, 'dit', schedule=StraightPath(shift=2.), prediction_type='flow')
    model = OnnxModel(export_onnx(ldm, tmp_path/'x'))
    for n in (1, 2): check(ldm, kind, model, n)
    assert model.about['path']['kind'] == 'straight' and model.about['path']['shift'] == 2
    assert model.about['path']['sigma'] == ldm.schedule.sigma.tolist()
    assert model.about['sampling']['spacing'] == 'trailing'

def test_codes_are_looked_up(tmp_path):
    ldm = made('none', codes=16)
    check(ldm, 'none', OnnxModel(export_onnx(ldm, tmp_path/'x')), 2)

def test_attention_is_where_each_position_looks(tmp_path):
    ldm = made('text')
    net = NetworkGraph(ldm.net, ['context'])
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([10., 900.])
    with torch.no_grad():
        c = ldm.embedder(['a red house', 'a lake'])
        with watch_attention(ldm.net) as seen: ldm.net(z, t, c)
        want = token_maps([w for calls in seen.values() for w in calls], (8, 8))
    inputs = dict(z=z, t=t, context=c.context)
    to_onnx(net, inputs, net.outputs, tmp_path/'net.onnx')
    got = InferenceSession(str(tmp_path/'net.onnx')).run(['attention'], {k: v.numpy() for k, v in inputs.items()})[0]
    assert got.shape == (2, 12, 8, 8) and (torch.tensor(got) - want).abs().max() < 1e-5

def test_same_first_stage_same_file(tmp_path, root): # a page then fetches it once; whatever else the model has
    a, b = made('none'), made('class').train()
    b.autoencoder.load_state_dict(a.autoencoder.state_dict())
    a.autoencoder.decoder = Wrapped(a.autoencoder.decoder) # another decoder: the encoder's file stays the same
    before = {k: v.clone() for k, v in b.state_dict().items()}
    x = dict(x=torch.zeros(2, 3, SIZE, SIZE))
    files = [to_onnx(onnx.EncoderGraph(m.autoencoder), x, ['z'], tmp_path/'encoder.onnx') for m in (a, b)]
    assert files[0]['sha256'] == files[1]['sha256']
    export_onnx(b, tmp_path/'b')
    # the model is left as it was, and the files say nothing of this machine
    assert b.training and b.net.training and all((before[k] == v).all() for k, v in b.state_dict().items())
    for f in (tmp_path/'b').iterdir():
        assert str(root).encode() not in f.read_bytes() and b'site-packages' not in f.read_bytes()

class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, z): return self.inner(z)

def test_numbers_that_float16_cannot_hold(tmp_path):
    net = made('none').net
    net.conv_in.weight.data[0, 0, 0, 0] = 1e5 # this table stays as it is
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([500.])
    to_onnx(NetworkGraph(net, []), dict(z=z.repeat(2, 1, 1, 1), t=t.repeat(2)), ['out'], tmp_path/'net.onnx')
    got = InferenceSession(str(tmp_path/'net.onnx')).run(None, dict(z=z.numpy(), t=t.numpy()))[0]
    with torch.no_grad(): want = net(z, t)
    assert (torch.tensor(got) - want).abs().max() < 1e-3*want.abs().max()

def test_refusals(tmp_path):
    ldm = made('none')
    with pytest.raises(ValueError, match='expected torch.float16'): export_onnx(ldm, tmp_path/'x', torch.bfloat16)
    ldm.embedder = type('Odd', (torch.nn.Module,), dict(kind='frozen'))()
    with pytest.raises(ValueError, match="'frozen' is not exported"): export_onnx(ldm, tmp_path/'x')
    assert not (tmp_path/'x').exists()
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): export_onnx(made('none'), tmp_path/'file')

def test_command(tmp_path):
    ldm = made('class')
    ldm.save_pretrained(tmp_path/'m')
    r = run(*command('ldm-sample'), '--model', tmp_path/'m', '--export', tmp_path/'x')
    assert r.returncode == 0, r.stderr
    assert 'network.onnx' in r.stdout and OnnxModel(tmp_path/'x').about['condition']['kind'] == 'class'
    for words in (('a house',), ('--guide', 'postcards'), ('--init', 'x.png')):
        r = run(*command('ldm-sample'), '--model', tmp_path/'m', '--export', tmp_path/'y', *words)
        assert '--export' in refused(r)

def test_damaged_files_are_refused(tmp_path):
    (tmp_path/'model.json').write_text(json.dumps(dict(files=dict(network=dict(
        file='network.onnx', bytes=9, sha256='0'*64, inputs=['z', 't'], outputs=['out'])))))
    (tmp_path/'network.onnx').write_bytes(b'12345678')
    with pytest.raises(ValueError, match='8 bytes, not the 9 .* export the model again'):
        OnnxModel(tmp_path).net(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match='it has no reader'): OnnxModel(tmp_path).run('reader', [])
    with pytest.raises(FileNotFoundError): OnnxModel(tmp_path/'nowhere')
