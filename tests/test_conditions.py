"Every condition as a command: trained for two steps, saved, sampled from files and words; and what each refuses."
import numpy as np
import pytest
import torch
from PIL import Image
from ldm_nb.paper.conditions import NEEDS
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.datasets.scenes import CLASSES, render
from ldm_nb.cli.estimate import dry_run
from ldm_nb.cli.sample import main as sample_command
from ldm_nb.cli.train import main as train_command

BOXES = 'house .2 .4 .5 .8, tree .6 .5 .7 .9'


@pytest.fixture(scope='module')
def files(tmp_path_factory): # pictures, a mask and a map of one postcard
    folder, drawn = tmp_path_factory.mktemp('files'), render(Postcards(1, seed=5).scene(0))
    Image.fromarray(drawn['image']).save(folder/'picture.png')
    Image.fromarray(drawn['image'][::4, ::4]).save(folder/'small.png')
    Image.fromarray(drawn['map'].astype(np.uint8)).save(folder/'map.png')
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 8:30] = 255
    Image.fromarray(mask).save(folder/'mask.png')
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory): # condition -> folder of a model, trained when first asked for
    folder = tmp_path_factory.mktemp('models')
    def get(condition):
        out = folder/condition
        words = f'diffusion --condition {condition} --preset tiny --steps 2 --n 40 --quiet --out'.split()
        if not out.is_dir(): train_command([*words, str(out)])
        return out
    return get


def draw(trained, condition, tmp_path, *words):
    out = tmp_path/f'{condition}.png'
    sample_command(['--model', str(trained(condition)), '--n', '2', '--steps', '2', '--out', str(out),
                    *map(str, words)])
    assert Image.open(out).size[0] > 100
    return LatentDiffusion.from_pretrained(trained(condition))


@pytest.mark.parametrize('condition, words, channels', [
    ('none', [], 4), ('class', ['3'], 4), ('layout', [BOXES], 13), ('map', ['--map', 'map.png'], 12),
    ('x4', ['--image', 'small.png'], 7),
    ('inpaint', ['--image', 'picture.png', '--mask', 'mask.png'], 9),
    ('text+inpaint', ['a red house', '--image', 'picture.png', '--mask', 'mask.png'], 9),
    ('class+map', ['3', '--map', 'map.png'], 12), ('class', ['3', '--negative', '2'], 4),
    ('text', ['a red house', '--init', 'picture.png', '--strength', '.5', '--negative', 'snowy'], 4),
    ('layout', [BOXES, '--negative', 'tree .1 .1 .5 .5'], 13),
    ('text+inpaint', ['dusk', '--negative', 'snowy', '--image', 'picture.png', '--mask', 'mask.png'], 9)])
def test_every_condition(trained, files, tmp_path, condition, words, channels):
    ldm = draw(trained, condition, tmp_path, *[files/w if w.endswith('.png') else w for w in words])
    assert ldm.net.in_ch == channels


@pytest.mark.parametrize('condition, words, says', [
    ('layout', ['a house'], 'expected boxes like'), ('layout', ['castle 0 0 1 1'], "no class 'castle'; there are sky"),
    ('layout', ['house .5 .5 .4 .8'], 'top left first'), ('layout', ['house .5 .5 1.4 .8'], 'fractions of the picture'),
    ('layout', [', '.join(['tree .1 .1 .2 .2']*17)], '17 boxes, where 16 fit'),
    ('layout', [], 'told what to draw: layout'),
    ('map', ['dusk'], 'give --map'), ('map', ['dusk', '--map', 'map.png'], 'on images alone'),
    ('map', ['--map', 'map.png', '--negative', 'dusk'], 'not conditioned on words'),
    ('map', ['--map', 'picture.png'], 'expected (h, w) class ids'),
    ('map', ['--map', 'bad.png'], 'the map has ids [200]'),
    ('x4', ['--image', 'small.png', '--mask', 'mask.png'], 'this model does not fill images'),
    ('x4', ['--image', 'small.png', '--size', '128'], 'asks for 64x64'),
    ('inpaint', ['--image', 'picture.png'], 'fills images: give --mask'), ('x4', [], 'enlarges images: give --image'),
    ('inpaint', ['--image', 'picture.png', '--mask', 'small.png'], 'expected the same size'),
    ('none', ['--map', 'map.png'], 'not conditioned on maps'),
    ('none', ['--image', 'picture.png'], 'to start from one use --init'),
    ('text', ['dusk', '--image', 'picture.png'], 'use --init'),
    ('class', ['99'], 'class 99: this model knows'), ('class', ['3', '--init', 'no-such.png'], '--init'),
    ('text', ['dusk', '--eta', '.5', '--sampler', 'euler'], 'only ddim'),
    ('class', ['3', '--strength', '.5'], 'give --init'),
    ('class', ['3', '--guidance', '1', '--negative', '2'], 'no use at guidance 1'),
    ('text', ['dusk', '--negative', ''], 'an empty caption')])
def test_refused(trained, files, tmp_path, capsys, condition, words, says):
    if 'bad.png' in words: Image.fromarray(np.full((64, 64), 200, np.uint8)).save(files/'bad.png')
    words = [str(files/w) if w.endswith('.png') else w for w in words]
    trained(condition)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        sample_command(['--model', str(trained(condition)), '--steps', '2', '--out', str(tmp_path/'x.png'), *words])
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(err) == 1 and says in err[0], err
    assert not (tmp_path/'x.png').exists()


def test_a_condition_that_data_lack_is_refused_before_anything_is_written(tmp_path, capsys):
    for k in range(3): Image.new('RGB', (64, 64), (k*90, 0, 0)).save(tmp_path/f'{k}.png')
    for condition, says in (('map', 'semantic maps, which only postcards have'), ('text', 'metadata.jsonl'),
                            ('smell', 'expected none (alone), text, layout')):
        words = ['--data', str(tmp_path), '--condition', condition, '--preset', 'tiny', '--quiet', '--out',
                 str(tmp_path/'out')]
        with pytest.raises(SystemExit): train_command(['diffusion', *words])
        assert says in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_known_pixels_come_back_exactly(trained, files):
    ldm, picture = LatentDiffusion.from_pretrained(trained('inpaint')), torch.rand(3, 64, 64)*2 - 1
    mask = torch.zeros(1, 64, 64)
    mask[:, 10:30, 10:30] = 1
    x = ldm.sample(image=picture, mask=mask, n=2, steps=2)
    assert torch.equal(x[1][:, mask[0] == 0], picture[:, mask[0] == 0]) and not torch.equal(x[1], picture)


def test_boxes_of_postcards_reach_the_layout(trained):
    ldm, boxes = LatentDiffusion.from_pretrained(trained('layout')), Postcards(1, seed=5)[0]['boxes']
    assert ldm.embedder.names == list(CLASSES)
    a, b = (ldm.embedder.prepare(ldm.embedder.prompts(y))
            for y in (boxes, [[CLASSES[int(c)], *at] for c, *at in boxes.tolist()]))
    assert torch.equal(a, b)


@pytest.mark.parametrize('condition', ['none', *NEEDS, 'text+inpaint'])
def test_a_dry_run_of_every_condition(condition, tmp_path, capsys):
    dry_run('diffusion', tmp_path/'dry', 'tiny', 'cpu', 'fp32', condition=condition)
    assert 'ten timed steps' in capsys.readouterr().out and not (tmp_path/'dry').exists()
