"The public API: shapes, range, the same seed, independence of n, and an error that speaks for each kind of bad input."
import json
import shutil
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_nb.core import LatentDiffusion
from ldm_nb.fast.compile import ContextFirst
from ldm_nb.data import ImageFolder, Postcards, show_images
from ldm_nb.engine.files import find_pretrained

NAME = 'postcards-text'
CAPTION = 'a red house on a snowy hill at night'
FEW = dict(steps=6, guidance=3.0, sampler='ddim', seed=0)


@pytest.fixture(scope='session')
def ldm(): return LatentDiffusion.from_pretrained(NAME)


@pytest.fixture(scope='session')
def eight(ldm): return ldm.sample(CAPTION, n=8, **FEW)


@pytest.fixture
def copy(tmp_path): return shutil.copytree(find_pretrained(NAME), tmp_path/'model') # a model folder to spoil


def test_sample(ldm, eight):
    assert eight.shape == (8, 3, 64, 64) and eight.dtype == torch.float32
    assert torch.isfinite(eight).all() and eight.min() >= -1.001 and eight.max() <= 1.001 and eight.std() > .05


def test_same_seed_same_images(ldm):
    a, b, c = (ldm.sample(CAPTION, n=2, **FEW | dict(seed=s)) for s in (5, 5, 6))
    assert torch.equal(a, b), 'same seed, other images'
    assert (a - c).abs().max() > .05, 'the seed is ignored'
    assert (a[0] - a[1]).abs().max() > .05, 'the images of one call are the same'


def test_item_does_not_depend_on_n(ldm, eight):
    for n in (1, 4): assert (ldm.sample(CAPTION, n=n, **FEW) - eight[:n]).abs().max() <= 1e-4, n


def test_several_prompts(ldm): # item j of prompt i has noise (seed, i*n + j)
    x = ldm.sample([CAPTION, CAPTION], n=2, **FEW)
    assert x.shape[0] == 4 and (x - ldm.sample(CAPTION, n=4, **FEW)).abs().max() <= 1e-4


def test_the_caption_matters(ldm, eight):
    other = ldm.sample('a summer landscape at noon', n=2, **FEW)
    assert (other - eight[:2]).abs().mean() > .05
    free = ldm.sample(CAPTION, n=2, **FEW | dict(guidance=0.0))
    assert ((free - ldm.sample('a summer landscape at noon', n=2, **FEW | dict(guidance=0.0))).abs().max() <=
            1e-4), 'guidance 0 is unconditional'


def test_stream(ldm, eight):
    steps = list(ldm.stream(CAPTION, n=2, **FEW))
    assert len(steps) in (FEW['steps'], FEW['steps'] + 1)
    z, z0 = steps[0]
    assert z.shape == z0.shape and z.shape[0] == 2 and .8 < z.std() < 1.2, 'it starts from unit noise'
    assert not torch.equal(steps[0][1], steps[-1][1])


def test_latents_are_the_starting_noise(ldm):
    noise = next(iter(ldm.stream(CAPTION, n=2, **FEW)))[0]
    g = torch.Generator().manual_seed(1)
    mine = torch.randn(noise.shape, generator=g)
    a, b = (ldm.sample(CAPTION, n=2, latents=mine, **FEW | dict(seed=s)) for s in (0, 1))
    assert torch.equal(a, b), 'with latents given and eta=0 the seed has no say'
    assert (a - ldm.sample(CAPTION, n=2, latents=-mine, **FEW)).abs().max() > .05


def test_compiled_once_and_the_same(ldm): # keys and values are there before the first call; without that it was twice
    made = []
    def backend(graph, inputs):
        made.append(1)
        return graph.forward
    fast = LatentDiffusion.from_pretrained(NAME)
    fast.net.compile(backend=backend)
    fast.wrapper = ContextFirst(fast.net) # as `compile` does
    for caption in (CAPTION, 'a lake at dusk'):
        assert torch.equal(fast.sample(caption, **FEW | dict(steps=2)), ldm.sample(caption, **FEW | dict(steps=2)))
    assert len(made) == 1


def test_size(ldm): assert ldm.sample(CAPTION, n=1, size=32, **FEW).shape == (1, 3, 32, 32)


def test_save_and_load(ldm, tmp_path):
    ldm.save_pretrained(tmp_path/'mine')
    assert {'config.json', 'model.safetensors'} <= {p.name for p in (tmp_path/'mine').iterdir()}
    again = LatentDiffusion.from_pretrained(tmp_path/'mine')
    assert (again.sample(CAPTION, n=1, **FEW) - ldm.sample(CAPTION, n=1, **FEW)).abs().max() < 1e-4


def test_doors(): # what users import hands on what stands elsewhere, and nothing else
    import ldm_nb.data, ldm_nb.pretrained
    assert set(ldm_nb.data.__all__) == {'Postcards', 'ImageFolder', 'show_grid', 'show_images'}
    assert set(ldm_nb.pretrained.__all__) == {'load_diffusers', 'load_compvis', 'save_diffusers', 'paper_model'}
    assert all(callable(getattr(m, n)) and getattr(m, n).__module__ != m.__name__
               for m in (ldm_nb.data, ldm_nb.pretrained) for n in m.__all__)
    assert show_images(Postcards(2, 16)[0]['image'][None]) is not None


def test_postcards():
    item = Postcards(n=8, size=64, seed=0)[3]
    assert {'image', 'caption', 'label', 'boxes', 'map', 'scene'} <= set(item)
    assert (item['image'].shape == (3, 64, 64) and item['image'].dtype == torch.float32 and
            item['image'].abs().max() <= 1)
    assert item['map'].shape == (64, 64) and item['map'].dtype == torch.int64
    assert item['boxes'].shape[-1] == 5 and item['boxes'][:, 1:].min() >= 0 and item['boxes'][:, 1:].max() <= 1
    assert torch.equal(Postcards(n=4, size=64, seed=0)[3]['image'], item['image']), 'rendering depends on n'
    assert not torch.equal(Postcards(n=4, size=64, seed=1)[3]['image'], item['image'])


# ---- bad input: what came, what was expected, what to do ----

def complaint(f, *kinds) -> str:
    with pytest.raises(kinds or (ValueError, FileNotFoundError)) as e: f()
    assert len(str(e.value)) >= 30, f'a bare message: {e.value!r}'
    return str(e.value)


@pytest.mark.parametrize('given, says', [
    (dict(n=0), 'n=0'), (dict(n=-2), 'n=-2'), (dict(steps=0), 'steps=0'), (dict(steps=-1), 'steps=-1'),
    (dict(sampler='nope'), 'ddim'),
    (dict(size=50), '50'), (dict(size=0), '0'), (dict(seed=-1), 'seed=-1')], ids=str)
def test_bad_arguments(ldm, given, says): assert says in complaint(lambda: ldm.sample(CAPTION, **FEW | given))


@pytest.mark.parametrize('caption', ['', '   ', [], [CAPTION, '']])
def test_empty_caption(ldm, caption): complaint(lambda: ldm.sample(caption, **FEW))


def test_unknown_words(ldm):
    with pytest.warns(UserWarning, match='zqxjk'): ldm.sample('a zqxjk house at night', n=1, **FEW | dict(steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        ldm.sample(CAPTION, n=1, **FEW | dict(steps=1))


def test_unknown_name():
    says = complaint(lambda: LatentDiffusion.from_pretrained('no-such-model'))
    assert 'no-such-model' in says and NAME in says, 'the error lists the known names'


def test_no_config(copy):
    (copy/'config.json').unlink()
    assert 'config.json' in complaint(lambda: LatentDiffusion.from_pretrained(copy))


@pytest.mark.parametrize('spoil', [lambda b: b[:len(b)//2], lambda b: b[:-1], lambda b: b'',
                                   lambda b: b'PK\x03\x04' + b[4:]], ids=['half', 'last byte', 'empty', 'zip'])
def test_damaged_weights(copy, spoil):
    f = copy/'model.safetensors'
    f.write_bytes(spoil(f.read_bytes()))
    assert 'model.safetensors' in complaint(lambda: LatentDiffusion.from_pretrained(copy))


def test_foreign_weights(copy):
    save_file({'some.weight': torch.zeros(2)}, copy/'model.safetensors')
    assert str(copy) in complaint(lambda: LatentDiffusion.from_pretrained(copy))


def test_weights_that_do_not_fit(copy):
    w = load_file(copy/'model.safetensors')
    key = next(k for k, v in w.items() if v.dim() == 4)
    shape = tuple(w[key].shape)
    w[key] = torch.zeros(1, 2, 3, 3)
    save_file(w, copy/'model.safetensors')
    says = complaint(lambda: LatentDiffusion.from_pretrained(copy))
    assert key in says and '(1, 2, 3, 3)' in says and str(shape) in says, says


def test_config_that_is_not_json(copy):
    (copy/'config.json').write_text('{"half": ')
    assert 'config.json' in complaint(lambda: LatentDiffusion.from_pretrained(copy))


def test_config_of_something_else(copy):
    (copy/'config.json').write_text(json.dumps(dict(model_type='bert')))
    complaint(lambda: LatentDiffusion.from_pretrained(copy))


def test_unwritable_output(ldm, tmp_path):
    (tmp_path/'file').write_text('')
    assert 'file' in complaint(lambda: ldm.save_pretrained(tmp_path/'file/model'), OSError)


def test_image_folder(tmp_path):
    for name in ('empty', 'rubbish', 'mixed'): (tmp_path/name).mkdir()
    (tmp_path/'rubbish/notes.txt').write_text('no image')
    (tmp_path/'mixed/notes.txt').write_text('no image')
    Image.new('RGB', (40, 30)).save(tmp_path/'mixed/a.png')
    assert 'empty' in complaint(lambda: ImageFolder(tmp_path/'empty', 32))
    with pytest.warns(UserWarning, match='skipped 1 .*notes.txt'):
        complaint(lambda: ImageFolder(tmp_path/'rubbish', 32))
    with pytest.warns(UserWarning, match='skipped 1 .*notes.txt'): ds = ImageFolder(tmp_path/'mixed', 32)
    assert len(ds) == 1 and ds[0]['image'].shape == (3, 32, 32)
    complaint(lambda: ImageFolder(tmp_path/'nowhere', 32))
