"Folders of pictures as people have them: what is left out, what is a class, which caption belongs to which picture."
import errno
import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ldm_nb.cli.recipes import own_vocabulary, word_rows
from ldm_nb.cli.sample import sample_arguments, sample_parser
from ldm_nb.data import ImageFolder, show_images
from ldm_nb.datasets import folders, sources
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.build import FORMAT
from ldm_nb.engine.checkpoints import check_settings
from ldm_nb.engine.presets import model_config
from ldm_nb.embedders import ClassEmbedder, TextEmbedder
from ldm_nb.paper.conditions import fit_captions, make_embedder, prompts_like, training_rows
from ldm_nb.text import Tokenizer, train_tokenizer


def put(folder, *names): # a picture each
    for k, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (k, 0, 0)).save(folder/name)
    return folder


def words_of(make): # what it warns of, as one text, and what it gives
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        out = make()
    return ' | '.join(str(o.message) for o in w), out


def test_one_message_for_all_that_is_skipped(tmp_path):
    put(tmp_path, 'a.png', 'b.png')
    Image.effect_noise((64, 64), 50).save(tmp_path/'cut.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:1000])
    (tmp_path/'plot.eps').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n')
    (tmp_path/'clip.mpg').write_bytes(b'\0\0\1\xb3' + bytes(100))
    (tmp_path/'bomb.pgm').write_bytes(b'P5 60000 60000 255\n')
    (tmp_path/'link').write_text('../' + tmp_path.name)
    said, ds = words_of(lambda: ImageFolder(tmp_path, 8))
    assert [p.name for p in ds.files] == ['a.png', 'b.png']
    assert said.count('skipped') == 1 and 'skipped 5 file(s): 1 damaged (cut.png)' in said, said
    assert '1 link that became text (link); 2 no picture (clip.mpg, plot.eps); 1 too large (bomb.pgm)' in said, said
    said, data = words_of(lambda: load_images(str(tmp_path), 8, 10))
    assert data['image'].shape == (2, 3, 8, 8) and data['image'].dtype == torch.uint8 and said.count('skipped') == 1


def test_hidden_and_linked_folders(tmp_path):
    for hidden in ('.ipynb_checkpoints', '__MACOSX', '.thumbnails', '@eaDir', '$RECYCLE.BIN'):
        put(tmp_path/'set', f'{hidden}/a.png', f'cat/{hidden}/a.png')
    put(tmp_path/'set', 'cat/1.png', 'dog/1.png')
    put(tmp_path/'elsewhere', '1.png')
    (tmp_path/'set/emu').symlink_to(tmp_path/'elsewhere', target_is_directory=True)
    (tmp_path/'set/dog/loop').symlink_to(tmp_path/'set', target_is_directory=True)
    (tmp_path/'elsewhere/back').symlink_to(tmp_path/'elsewhere', target_is_directory=True)
    ds = ImageFolder(tmp_path/'set', 8)
    assert ds.classes == ['cat', 'dog', 'emu'] and len(ds) == 3
    assert [it['label'] for it in ds] == [0, 1, 2]


@pytest.mark.parametrize('table, files', [
    ('{"file_name": "sub\\\\0.png", "text": "t0"}\n{"file_name": "./sub/1.png", "caption": "t1"}',
     ['sub/0.png', 'sub/1.png']),
    ('{"file_name": "0.png", "text": "t0"}\r\n{"file_name": "1.png", "text": "t1"}\r\n', ['0.PNG', '1.Png']),
    ('\ufeff{"file": "0.png", "prompt": "t0"}\n{"image": "1.png", "text": "t1"}', ['0.png', '1.png']),
    ('{"file_name": "/home/me/set/0.png", "text": "t0"}\n{"file_name": "/home/me/set/a/1.png", "text": "t1"}',
     ['0.png', 'a/1.png']),
    ('file_name,text\n0.png,t0\n1.png,t1\n', ['0.png', '1.png']),
    ('\ufeffFile_Name;Caption\r\n0.png;t0\r\n1.png;"t1"\r\n', ['x/0.png', 'y/1.png'])])
def test_captions_find_their_pictures(tmp_path, table, files):
    put(tmp_path, *files)
    (tmp_path/('metadata.jsonl' if '{' in table else 'metadata.csv')).write_text(table, encoding='utf-8', newline='')
    said, data = words_of(lambda: load_images(str(tmp_path), 8, 10))
    assert not said and dict(zip(data['file'], data['caption'])) == {f: f't{k}' for k, f in enumerate(files)}


def test_captions_beside_their_own_pictures(tmp_path):
    "As image folders for other libraries have it: a table in each sub-folder."
    put(tmp_path, 'train/0.png', 'val/0.png')
    for part in ('train', 'val'):
        (tmp_path/part/'metadata.jsonl').write_text(f'{{"file_name": "0.png", "text": "{part}"}}')
    assert [it['caption'] for it in ImageFolder(tmp_path, 8)] == ['train', 'val']


def test_captions_that_do_not_fit(tmp_path):
    put(tmp_path, '0.png', '1.png')
    table = tmp_path/'metadata.jsonl'
    table.write_text('{"file_name": "0.png", "text": "zero"}\n{"file_name": "7.png", "text": "seven"}')
    said, data = words_of(lambda: load_images(str(tmp_path), 8, 10))
    assert '1 of 2 rows name no picture that is there, e.g. 7.png' in said
    assert '1 of 2 pictures have no row, e.g. 1.png' in said and sorted(data['caption']) == ['', 'zero']
    for raw, why in ((b'{"file_name": "7.png", "text": "seven"}', 'none of them is in'),
                     (b'{"file_name": "0.png", "title": "zero"}', 'the keys there are file_name, title'),
                     ('{"file_name": "0.png", "text": "Käse"}'.encode('latin-1'), 'line 1: the byte 0xe4 is no UTF-8'),
                     (b'{"file_name": "0.png", "text": "zero"}\n[' + b'['*100_000, 'line 2 is not JSON')):
        table.write_bytes(raw)
        with pytest.raises(ValueError, match=why): ImageFolder(tmp_path, 8)
    put(tmp_path, 'a/2.png', 'b/2.png') # which of them is 2.png?
    table.write_text('{"file_name": "0.png", "text": "zero"}\n{"file_name": "2.png", "text": "two"}')
    assert 'e.g. 2.png' in words_of(lambda: ImageFolder(tmp_path, 8))[0]


def test_prepared_once(tmp_path, monkeypatch):
    "Decoded into the cache, mapped afterwards, made again where pictures or the file of the cache changed."
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(folders, 'SMALL', (1, 0))
    put(tmp_path/'set', *(f'{k}.png' for k in range(20)))
    decoded = []
    real = folders.decode_all
    monkeypatch.setattr(folders, 'decode_all', lambda *a: decoded.append(1) or real(*a))
    load = lambda n=100: load_images(str(tmp_path/'set'), 8, n, seed=1)
    first = load()
    assert sorted(first['image'][:, 0, 0, 0].tolist()) == list(range(20))
    assert torch.equal(load()['image'], first['image']) and len(decoded) == 1
    pixels, index = ((next((tmp_path/'cache').glob(f'*.{suffix}'))) for suffix in ('pixels', 'json'))
    for spoil in (lambda: pixels.unlink(), lambda: index.write_text('{'), lambda: index.write_bytes(b'\0'*99),
                  lambda: index.write_text('{"good": 3}'), lambda: shutil.copy(__file__, pixels)):
        spoil()
        assert torch.equal(load()['image'], first['image'])
    assert len(decoded) == 6
    with monkeypatch.context() as m: # as Windows has it with a file that is mapped
        def held(path, missing_ok=False):
            if path.suffix == '.pixels': raise PermissionError('mapped')
            unlink(path, missing_ok)
        put(tmp_path/'set', 'other.png')
        unlink = type(pixels).unlink
        m.setattr(type(pixels), 'unlink', held)
        assert len(load()['image']) == 21
    (tmp_path/'set/other.png').unlink()
    assert torch.equal(load(5)['image'], first['image'][:5]) # the first that were drawn
    put(tmp_path/'set', 'new.png')
    assert len(load()['image']) == 21


def blank(n, size, *_): return [dict(image=torch.zeros(3, size, size))]*n # in place of the photographs


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(folders, 'SMALL', (1, 0))
    put(tmp_path/'set', '0.png')
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(folders, 'decode_all', full)
        with pytest.raises(OSError, match='cannot write .*disk is full.*LDM_NB_CACHE'):
            load_images(str(tmp_path/'set'), 8, 10)
    monkeypatch.setattr(sources, 'save_file', full)
    monkeypatch.setattr(sources, 'Photographs', blank)
    with pytest.raises(OSError, match='cannot write .*disk is full.*LDM_NB_CACHE'): load_images('photos', 2, 1000)
    assert not list((tmp_path/'cache').glob('*.safetensors')) and not list((tmp_path/'cache').glob('*.pixels'))


def test_photos_or_the_folder_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'Photographs', blank)
    monkeypatch.chdir(put(tmp_path, 'photos/0.png', 'photos/1.png'))
    said, data = words_of(lambda: load_images('photos', 8, 4))
    assert len(data['image']) == 4 and 'for the folder beside you say ./photos' in said
    assert len(load_images('./photos', 8, 4)['image']) == 2


@pytest.fixture
def ae(): return torch.nn.Linear(1, 1) # no condition asks it here


def test_classes_by_name(tmp_path, ae):
    "A model of cats, dogs and emus is asked for dogs and emus, whatever their numbers are in another folder."
    put(tmp_path/'three', 'cat/0.png', 'dog/0.png', 'emu/0.png')
    put(tmp_path/'two', 'dog/0.png', 'emu/0.png')
    three, two = (load_images(str(tmp_path/k), 8, 10) for k in ('three', 'two'))
    e = make_embedder('class', three, ae, dim=4)
    assert ClassEmbedder(**json.loads(json.dumps(e.config))).config['names'] == ['cat', 'dog', 'emu']
    i = torch.arange(2)
    said = ['cat', 'dog', 'emu']
    assert [said[k] for k in prompts_like(e, two, i)['y']] == [f.split('/')[0] for f in two['file']]
    assert [said[k] for k in training_rows(e, two, ae)(i, None)] == two['class']
    assert e.prompts('dog') == [1] and e.prompts(['2', 'cat']) == [2, 0]
    with pytest.raises(ValueError, match='class fox: this model knows cat, dog, emu'): e.prompts('fox')
    asked = sample_arguments(SimpleNamespace(embedder=e), sample_parser().parse_args(['dog', '2'])) # `ldm-sample dog 2`
    assert e.prompts(asked['y']) == [1, 2]
    with pytest.raises(ValueError, match='class cat: this model knows'):
        prompts_like(make_embedder('class', two, ae, dim=4), three, torch.arange(3))
    then, now = (dict(model=model_config(torch.nn.ModuleDict(dict(embedder=make_embedder('class', d, ae, dim=4)))))
                 for d in (three, three | {'classes': ['dog', 'emu', 'zebra']}))
    with pytest.raises(ValueError, match="names.*cat.*then.*zebra.*now"): check_settings(then, now, tmp_path)
    old = ClassEmbedder(3, 4) # of a config without names
    assert 'asked by number' in words_of(lambda: prompts_like(old, three, i))[0] and 'names' not in old.config
    put(tmp_path/'two', 'beside.png')
    said, mixed = words_of(lambda: load_images(str(tmp_path/'two'), 8, 10))
    assert '1 picture(s) lie beside the class folders' in said and 'label' not in mixed


def test_classes_keep_the_numbers_of_their_source(tmp_path, ae):
    "Whichever pictures are drawn: the place in the whole list of the source, in its own order."
    put(tmp_path/'set', *(f'{c}/{k}.png' for c in 'abc' for k in range(3)))
    for n, seed in ((1, 0), (2, 0), (2, 1), (9, 0)):
        data = load_images(str(tmp_path/'set'), 8, n, seed)
        assert data['label'].tolist() == ['abc'.index(c) for c in data['class']] and data['classes'] == list('abc')
    assert make_embedder('class', load_images(str(tmp_path/'set'), 8, 1), ae, dim=4).config['names'] == list('abc')
    clothes = ['top', 'trouser', 'pullover'] # not sorted, as those of FashionMNIST
    class Clothes:
        size, classes = 8, clothes
        def __len__(self): return 6
        def __getitem__(self, i): return dict(image=torch.full((3, 8, 8), i/6), label=i%3)
    data = sources._from_torchvision(Clothes(), 6, 0)
    assert data['label'].tolist() == [round((x.float().mean().item()/255*2 - 1)*6)%3 for x in data['image']]
    assert data['class'] == [clothes[k] for k in data['label']] and data['classes'] == clothes
    put(tmp_path/'more', 'c/0.png', 'd/0.png')
    both = load_images(f"{tmp_path/'set'}+{tmp_path/'more'}", 8, 20)
    assert both['classes'] == list('abcd') and both['class'] == [f[0] for f in both['file']]
    assert both['label'].tolist() == ['abcd'.index(c) for c in both['class']]
    assert 'label' not in load_images(f"{tmp_path/'set'}+photos", 8, 2)


def test_a_folder_called_1_is_no_class_number_1(ae):
    data = {'class': ['1'], 'label': torch.tensor([0])}
    with pytest.raises(ValueError, match='class 1: this model knows 10, 20, 30'):
        prompts_like(ClassEmbedder(3, 8, names=['10', '20', '30']), data, torch.tensor([0]))


def test_weights_of_other_classes_and_words():
    "`--init` takes the row of a class, or of a word, to where that class or word stands now; the others stay new."
    for kind, key, words in ((ClassEmbedder, 'table.weight', 'names'), (TextEmbedder, 'token.weight', 'vocab')):
        classes = ['cat', 'dog', 'emu'], ['dog', 'emu', 'fox']
        if words == 'names': old, new = (kind(len(n), 4, names=n) for n in classes)
        else: old, new = (kind(train_tokenizer([c]), dim=4, depth=1, heads=1) for c in ('red house', 'a red tree'))
        have, want = ({f'embedder.{k}': v for k, v in e.state_dict().items()} for e in (old, new))
        rows = word_rows(new.config, old.config, have, want)[f'embedder.{key}']
        for k, w in enumerate(new.config[words]):
            place = old.config[words].index(w) if w in old.config[words] else None
            assert torch.equal(rows[k], want[f'embedder.{key}'][k] if place is None else have[f'embedder.{key}'][place])
        assert not word_rows(old.config, old.config, have, have) # the same words: as they lie
        if words == 'names': # "no class" means the same; a model without names gives its rows by number
            assert torch.equal(rows[-1], have[f'embedder.{key}'][-1])
            assert not word_rows(new.config, ClassEmbedder(3, 4).config, have, want)


def test_a_run_goes_on_with_its_own_vocabulary(tmp_path):
    "The tokens of an older version, for the same captions; with other captions, today's."
    images = dict(caption=['a red house', 'a tree'])
    today = train_tokenizer(images['caption'])
    older = [*today[:5], *reversed(today[5:])]
    assert own_vocabulary(images, 'mine', None, tmp_path) == today # nothing there yet
    (tmp_path/'checkpoints').mkdir()
    text = dict(vocab=older)
    for e, want in ((text, older), (dict(parts=dict(text=text)), older), (dict(n_classes=3), today), ('x', today)):
        torch.save(dict(format=FORMAT, settings=dict(model=dict(embedder=e))), tmp_path/'checkpoints/step-00000001.pt')
        assert own_vocabulary(images, 'mine', None, tmp_path) == want
        assert own_vocabulary(images, 'mine', None) == today and own_vocabulary(images, 'postcards', None) is None
    torch.save(dict(format=FORMAT, settings=dict(model=dict(embedder=text))), tmp_path/'checkpoints/step-00000001.pt')
    others = dict(caption=['a dog'])
    assert own_vocabulary(others, 'mine', 'captions', tmp_path) == train_tokenizer(others['caption'])


def test_captions_as_people_write_them(ae):
    long = 'a small house ' * 20
    data = dict(image=torch.zeros(4, 3, 8, 8), caption=['a red house', '  ', long, '儔兝'],
                file=[f'{k}.png' for k in range(4)])
    e = TextEmbedder(train_tokenizer(['a small red house']), dim=8, depth=1)
    with pytest.raises(ValueError, match='1 of 4 captions are longer than the 30 tokens .* of 2.png'):
        fit_captions(e, data)
    # messages stay short all the same
    endless = data | dict(caption=['a red house', 'b'*9000, 'house '*9000, '儔'*9000])
    with pytest.raises(ValueError) as caught: fit_captions(e, endless)
    assert len(str(caught.value)) < 500
    assert max(map(len, words_of(lambda: fit_captions(e, endless, 'cut'))[0].split(' | '))) < 500
    with pytest.raises(ValueError) as caught: e.prompts('house '*9000)
    assert len(str(caught.value)) < 500
    said, fitting = words_of(lambda: fit_captions(e, data, 'cut'))
    for words in ('1 of 4 captions were cut', '1 of 4 captions are blank, e.g. that of 1.png', '3.1% of the pieces'):
        assert words in said, said
    rows = training_rows(e, fitting, ae)(torch.arange(4), None)
    assert torch.equal(rows[1], e.nothing) and rows.shape == (4, 32)
    asked = prompts_like(e, fitting, torch.arange(4))['y']
    assert e.prompts(asked) and asked[1] == asked[2] != ''
    with pytest.raises(ValueError, match='all captions are blank'): fit_captions(e, dict(data, caption=[' ']*4))


def test_a_vocabulary_covers_all_characters():
    chinese = [''.join(chr(0x4e00 + 12*k + j) for j in range(12)) for k in range(100)]
    cyrillic = [f'{chr(a)}word' for a in range(0x400, 0x500)]
    for captions in (chinese, ['एक लाल घर', 'un château à 5 €', '집 🏠 & дом'], cyrillic):
        t = Tokenizer(train_tokenizer(captions, 400), 64)
        assert not any('[UNK]' in t.bert.encode(c).tokens for c in captions)


def test_captions_are_drawn_as_typed():
    fig = show_images(torch.zeros(2, 3, 8, 8), [r'a house $\foo$ at night', 'a $5 house and a $6 tree'], title='$x')
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    texts = fig.findobj(lambda o: hasattr(o, 'get_parse_math') and '$' in o.get_text())
    assert len(texts) == 3 and not any(t.get_parse_math() for t in texts)
    assert np.asarray(canvas.buffer_rgba()).min() == 0
