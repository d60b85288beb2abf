"""Folders of diffusers, checkpoints and configs of the paper's code, mutated in hundreds of seeded ways: each opens, or
is refused in one sentence; none ends in another error, leaves its folder, or keeps building for ever."""
import copy
import json
import pickle
import random
import resource
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
import yaml
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.core import LatentDiffusion
from ldm_nb.interop.compvis import fetch_tokenizer, load_compvis
from ldm_nb.interop.embedders import FrozenText, reading
from ldm_nb.interop.pipelines import load_diffusers, save_diffusers
from ldm_nb.interop.weights import adopt, built_from, open_weights, read_pickle, same
from ldm_nb.attention import conditional_unet
from ldm_nb.paper.published import clip_text
from ldm_nb.unet import UNet
from safetensors.torch import load_file, save_file
from test_compvis import CLIP, TOY, checkpoint, modules, shaken

SECONDS = 20 # for one, on a busy machine


def tokenizer():
    from transformers import CLIPTokenizer
    letters = [chr(k) for k in range(ord('a'), ord('z') + 1)]
    words = ['<|startoftext|>', '<|endoftext|>', *letters, *(k + '</w>' for k in letters)]
    return CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=12)


@pytest.fixture(scope='module')
def whole(tmp_path_factory): # name -> folder: without a condition, with captions, and a checkpoint with its yaml
    torch.manual_seed(0)
    ae = lambda: Autoencoder(4, 32, (1, 1), 1, groups=8)
    plain = LatentDiffusion(ae(), UNet(ch=32, ch_mult=(1, 2), num_res_blocks=1, groups=8), size=32)
    net = conditional_unet(24, ch=32, ch_mult=(1, 2), num_res_blocks=1, groups=8, heads=4)
    text = LatentDiffusion(ae(), net, FrozenText.of(clip_text(**CLIP), tokenizer()), size=32)
    out = {k: save_diffusers(m, tmp_path_factory.mktemp(k)) for k, m in dict(plain=plain, text=text).items()}
    out['parts'] = shutil.copytree(out['plain'], tmp_path_factory.mktemp('parts')/'model') # an index and two files
    file = out['parts']/'unet/diffusion_pytorch_model.safetensors'
    tensors = load_file(file)
    names = {k: f'part-{i % 2}.safetensors' for i, k in enumerate(tensors)}
    for p in set(names.values()): save_file({k: v for k, v in tensors.items() if names[k] == p}, file.parent/p)
    file.unlink()
    (file.parent/f'{file.name}.index.json').write_text(json.dumps(dict(weight_map=names)))
    out['compvis'] = tmp_path_factory.mktemp('compvis')
    tensors = checkpoint([shaken(m, i) for i, m in enumerate(modules(TOY['classes']))], TOY['classes'])
    torch.save(dict(state_dict=tensors, global_step=3), out['compvis']/'model.ckpt')
    (out['compvis']/'config.yaml').write_text(yaml.safe_dump(TOY['classes']))
    return out


def load(folder, kind): # by the door that fits it, and drawn with: what opens works
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = load_compvis(folder/'model.ckpt') if kind == 'compvis' else load_diffusers(folder)
    if isinstance(model, LatentDiffusion): # without its model_index.json a folder may be another thing
        model.sample(**dict(text=dict(y='a'), compvis=dict(y=[3])).get(kind, {}), steps=2, size=32)
    return model


@contextmanager
def at_most(seconds): # fails the test rather than the afternoon
    def late(*_): raise AssertionError(f'took more than {seconds} s')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


VALUES = [None, True, -1, 0, 1, 3, 7, 10**6, 10**9, 10**30, .5, float('nan'), float('inf'), -1e300, '', 'x', '../../x',
          [], [0], [10**9]*2, [['x']], {}, {'a': 1}, ['DownBlock2D'], 'AutoencoderKL', 'UNet2DModel', 'linear',
          [None]*4, 'é'*300]
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438\n'


def places(config, path=()): # every entry of a config, as a list of keys
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [at for k, v in parts for at in [(*path, k), *places(v, (*path, k))]]


def changed(rng, config): # one to three entries gone, or another thing in their place
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (there := places(config)): break
        *way, last = rng.choice(there)
        part = config
        for k in way: part = part[k]
        if rng.random() < .25: del part[last]
        else: part[last] = copy.deepcopy(rng.choice(VALUES))
    return config


def mutate(rng, folder): # what was done, in words
    file = rng.choice(sorted(p for p in folder.rglob('*') if p.is_file()))
    data, words = file.read_bytes(), file.suffix in ('.json', '.yaml')
    if words and rng.random() < .7:
        config = changed(rng, json.loads(data) if file.suffix == '.json' else yaml.safe_load(data))
        file.write_text(json.dumps(config) if file.suffix == '.json' else yaml.safe_dump(config))
        return f'{file.name}: {json.dumps(config, default=str)[:300]}'
    how = rng.choice('cut flipped flipped flipped empty zeros pointer page gone deep other folder bytes'.split())
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 4, 30))): # most at the beginning, where a file says what it holds
        flipped[rng.randrange(min(len(data), rng.choice((64, 2000, len(data)))))] = rng.randrange(256)
    new = dict(cut=data[:rng.randrange(len(data))], flipped=bytes(flipped), empty=b'', zeros=bytes(len(data)),
               pointer=LFS, page=b'<!DOCTYPE html><html>log in</html>',
               deep=b'['*100_000, other=b'{"a": 1}', bytes=b'\xff\xfe\x00x')
    if how in new: file.write_bytes(new[how])
    else: file.unlink()
    if how == 'folder': file.mkdir()
    return f'{file.name}: {how}'


@pytest.mark.parametrize('kind, n', [('plain', 80), ('parts', 50), ('text', 30), ('compvis', 40)])
def test_opens_or_is_refused_in_a_sentence(whole, kind, n, tmp_path):
    assert isinstance(load(whole[kind], kind), LatentDiffusion)
    opened, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(n):
        folder = shutil.copytree(whole[kind], tmp_path/str(seed))
        done = mutate(random.Random(f'{kind} {seed}'), folder)
        try:
            with at_most(SECONDS): load(folder, kind)
            opened += 1
        except (ValueError, OSError, MemoryError) as e:
            assert len(str(e)) > 20, (seed, done, e)
        except BaseException as e: # such are those of a tokenizer's Rust
            raise AssertionError(f'{kind}, seed {seed}, {done}: {type(e).__name__}: {e}') from e
        shutil.rmtree(folder)
    assert 0 < opened < n/2, 'some changes are harmless, most are not'
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, 'in kB: nothing absurd was made'


def rejected(says, f, *args):
    with at_most(SECONDS), pytest.raises(ValueError, match=says): f(*args)


def test_absurd_sizes_are_a_sentence_at_once(whole, tmp_path):
    for part, entry, value in (('unet', 'block_out_channels', [10**9]*2), ('unet', 'layers_per_block', 10**9),
                               ('unet', 'block_out_channels', [2**24]*2),
                               ('vqvae', 'latent_channels', 2**24), ('vqvae', 'layers_per_block', 10**6),
                               ('scheduler', 'num_train_timesteps', 10**12)):
        folder = shutil.copytree(whole['plain'], tmp_path/f'{entry}{len(str(value))}{part}')
        file = folder/part/('scheduler_config.json' if part == 'scheduler' else 'config.json')
        file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
        rejected('', load_diffusers, folder)
    for entry, value in (('model_channels', 10**9), ('num_res_blocks', 10**9), ('timesteps', 10**9)):
        config = copy.deepcopy(TOY['classes'])
        p = config['model']['params']
        (p if entry == 'timesteps' else p['unet_config']['params'])[entry] = value
        rejected(f'{entry}={value}', load_compvis, whole['compvis']/'model.ckpt', config)


def test_sizes_of_what_is_not_built_are_free(whole, tmp_path):
    "As in Stable Diffusion's own yaml; what refers to them is not, nor is the same list where it is built from."
    for entry in ('scheduler_config', 'data', 'lightning'):
        config = copy.deepcopy(TOY['classes'])
        at = config['model']['params'] if entry == 'scheduler_config' else config
        at[entry] = dict(target='LambdaLinearScheduler', params=dict(cycle_lengths=[10**13], num_blocks=10**3))
        (tmp_path/'config.yaml').write_text(yaml.safe_dump(config))
        assert isinstance(load_compvis(whole['compvis']/'model.ckpt', tmp_path/'config.yaml'), LatentDiffusion)
    config['model']['params']['unet_config']['params']['channel_mult'] = [1, 10**13]
    config['model']['params']['scheduler_config'] = config['model']['params']['unet_config'] # looked through first
    config['model']['params'] = dict(sorted(config['model']['params'].items()))
    rejected('channel_mult=10000000000000', load_compvis, whole['compvis']/'model.ckpt', config)
    config['model']['params']['scheduler_config'] = config
    rejected('contains itself', load_compvis, whole['compvis']/'model.ckpt', config)


def test_no_memory_and_no_network_are_no_damage(monkeypatch):
    for e, kind in ((torch.OutOfMemoryError('CUDA out of memory'), MemoryError), (OSError('offline'), OSError),
                    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
                    (RuntimeError('sizes'), ValueError)):
        for inside in (built_from('a'), reading('a', 'text model')):
            with pytest.raises(kind), inside: raise e
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='no text model .*Go online, or give a folder'): FrozenText('nobody/bert-none')
    with pytest.raises(OSError, match='no tokenizer .*give tokenizer='): fetch_tokenizer(None, 'nobody/bert-none')


def test_a_bert_without_a_pooler(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast
    torch.manual_seed(0)
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'dusk', 'sea']
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, intermediate_size=16,
                                       num_attention_heads=2, max_position_embeddings=8)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path/'vocab.txt').write_text('\n'.join(words))
    BertTokenizerFast(str(tmp_path/'vocab.txt')).save_pretrained(tmp_path)
    e = FrozenText(str(tmp_path)).eval() # else some captions are dropped
    with torch.no_grad(): want = model.bert(e.prepare(['dusk sea'])).last_hidden_state
    assert torch.equal(e(e.prepare(['dusk sea'])).context, want)
    assert isinstance(e.model[0], BertModel)
    tensors = load_file(tmp_path/'model.safetensors')
    del tensors['bert.embeddings.LayerNorm.weight']
    save_file(tensors, tmp_path/'model.safetensors', dict(format='pt'))
    rejected('LayerNorm.weight is not in its file', FrozenText, str(tmp_path))


def test_a_yaml_that_refers_to_itself_or_explodes(whole, tmp_path):
    nine = lambda v: ', '.join([v]*9)
    bomb = f'a0: &a0 [{nine("x")}]\n' + ''.join(f'a{k}: &a{k} [{nine(f"*a{k - 1}")}]\n' for k in range(1, 12))
    bomb += 'model: {target: *a11, params: *a11}\n'
    for text, says in ((bomb, 'more than 50000 entries'),
                       ('model: &m {target: LatentDiffusion, params: *m}', 'contains itself'),
                       ('model: ' + '['*50_000, 'is no yaml'), ('x'*2**21, 'bytes'),
                       ('- 1', 'expected names and values'),
                       ('model: !!python/object/apply:os.getcwd []', 'is no yaml')):
        (tmp_path/'config.yaml').write_text(text)
        rejected(says, load_compvis, whole['compvis']/'model.ckpt', tmp_path/'config.yaml')


def test_an_index_does_not_lead_out_of_its_folder(whole, tmp_path):
    folder = shutil.copytree(whole['parts'], tmp_path/'model')
    file = next(folder.glob('unet/*.index.json'))
    names = json.loads(file.read_text())['weight_map']
    outside = folder/'vqvae/diffusion_pytorch_model.safetensors'
    for name in ('../vqvae/' + outside.name, str(outside), '..', file.name):
        file.write_text(json.dumps(dict(weight_map=dict.fromkeys(names, name))))
        rejected('in its own folder', load_diffusers, folder)


def test_damaged_pickles(tmp_path):
    "In the format before 2020, where a pickle comes first: a damaged one may raise anything."
    torch.save(dict(weight=torch.ones(9)), tmp_path/'whole.pt', _use_new_zipfile_serialization=False)
    whole, rng = (tmp_path/'whole.pt').read_bytes(), random.Random(0)
    made = [b'\x80\x02h\x07.', b'\x80\x02]K\x01s.', b'\x80\x02K\x01K\x02R.', b'\x80\x02.', pickle.dumps(print)]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3))): data[rng.randrange(len(data))] = rng.randrange(256)
        made.append(bytes(data))
    refused = 0
    for data in made:
        (tmp_path/'x.ckpt').write_bytes(data)
        for read in (read_pickle, open_weights):
            try: read(tmp_path/'x.ckpt')
            except ValueError as e: refused += 1; assert 'x.ckpt' in str(e)
    assert 50 < refused < 400


def test_parts_of_two_models(whole, tmp_path):
    folder = shutil.copytree(whole['plain'], tmp_path/'model')
    save_diffusers(UNet(in_ch=3, out_ch=3, ch=32, ch_mult=(1, 2), num_res_blocks=1, groups=8), folder/'unet')
    rejected('Are the parts of one model', load_diffusers, folder)


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the system where a file is mapped')
@pytest.mark.parametrize('dtype, mapped', [(torch.float32, True), (torch.float16, False)]) # half must be converted
def test_weights_stay_in_the_file(tmp_path, dtype, mapped):
    tensors = {str(k): torch.ones(1024, 1024, dtype=dtype) for k in range(4)}
    save_file(tensors, tmp_path/'x.safetensors')
    torch.save(tensors, tmp_path/'x.ckpt')
    for file in (tmp_path/'x.safetensors', tmp_path/'x.ckpt'):
        with torch.device('meta'): net = torch.nn.ParameterDict({k: torch.ones(1024, 1024) for k in tensors})
        adopt(net, {k: same(k) for k in tensors}, open_weights(file))
        lines = [line.split() for line in open('/proc/self/maps') if line.rstrip().endswith(str(file))]
        at = [range(*(int(v, 16) for v in line[0].split('-'))) for line in lines]
        for v in net.values(): assert any(v.data_ptr() in r for r in at) == mapped and v.dtype == torch.float32, file
        assert net['3'].eq(1).all()


def test_changing_weights_does_not_change_the_file(whole, tmp_path):
    file = whole['plain']/'unet/diffusion_pytorch_model.safetensors'
    before = file.read_bytes()
    ldm = load_diffusers(whole['plain'])
    with torch.no_grad():
        for p in ldm.parameters(): p.zero_()
    assert file.read_bytes() == before and not torch.equal(load_diffusers(whole['plain']).net.conv_in.weight,
                                                           ldm.net.conv_in.weight)
    again = save_diffusers(load_diffusers(whole['plain']), shutil.copytree(whole['plain'], tmp_path/'same'))
    assert (again/'unet'/file.name).read_bytes() == before
    save_diffusers(load_diffusers(again), again) # over the file that is mapped
    assert (again/'unet'/file.name).read_bytes() == before
