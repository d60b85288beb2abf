"Picture files as strangers write them: each is shown as a viewer shows it, or refused in one sentence that names it."
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_nb.datasets import pictures
from ldm_nb.datasets.images import open_picture, to_mask, to_rgb
from ldm_nb.datasets.pictures import Decoder, PictureError, decoder


def gradient(w=24, h=16): return Image.linear_gradient('L').resize((w, h)).convert('RGB')


def complaint(path):
    with pytest.raises(ValueError) as e: open_picture(path)
    words = str(e.value)
    assert words.startswith(f'{path} ') and words.endswith('.') and '\n' not in words, words
    return words


@pytest.mark.parametrize('orientation, back', [
    (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180), (4, Image.Transpose.FLIP_TOP_BOTTOM),
    (5, Image.Transpose.TRANSPOSE), (6, Image.Transpose.ROTATE_90), (7, Image.Transpose.TRANSVERSE),
    (8, Image.Transpose.ROTATE_270)])
def test_turned_as_viewers_show_it(tmp_path, orientation, back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ('png', 'tif', 'webp'):
        how = dict(lossless=True) if suffix == 'webp' else {}
        gradient().transpose(back).save(tmp_path/f'a.{suffix}', exif=exif, **how)
        assert np.array_equal(np.asarray(open_picture(tmp_path/f'a.{suffix}')), np.asarray(gradient())), suffix


def test_foreign_formats_start_nothing(tmp_path, monkeypatch):
    "A PostScript file whose Ghostscript would leave a trace, and others that Pillow could open."
    trace = tmp_path/'ran'
    (tmp_path/'gs').write_text(f'#!/bin/sh\ntouch {trace}\n')
    (tmp_path/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.setattr(pictures, '_decoder', None)
    (tmp_path/'a.eps').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n')
    for suffix in ('dds', 'ico', 'pcx', 'tga', 'sgi', 'jp2'): gradient().save(tmp_path/f'a.{suffix}')
    for suffix in ('eps', 'dds', 'ico', 'pcx', 'tga', 'sgi', 'jp2'):
        assert 'no picture' in complaint(tmp_path/f'a.{suffix}'), suffix
    assert not trace.exists()
    decoder().stop()


def test_sizes(tmp_path):
    "200 million pixels of a panorama are read, more than the bound are not, whatever the file says first."
    (tmp_path/'pano.pbm').write_bytes(b'P4 20000 10000\n' + bytes(20000*10000//8))
    assert open_picture(tmp_path/'pano.pbm').size == (20000, 10000)
    (tmp_path/'bomb.pgm').write_bytes(b'P5 60000 60000 255\n')
    assert 'million pixels' in complaint(tmp_path/'bomb.pgm')
    with pytest.raises(PictureError) as e: decoder()(tmp_path/'bomb.pgm', 8)
    assert e.value.reason == 'too large'


def test_damaged(tmp_path):
    for suffix in ('png', 'jpg', 'gif', 'webp', 'tif', 'bmp', 'ppm', 'avif'):
        gradient(200, 200).save(tmp_path/f'a.{suffix}')
        whole = (tmp_path/f'a.{suffix}').read_bytes()
        (tmp_path/f'a.{suffix}').write_bytes(whole[:len(whole)*2//3])
        complaint(tmp_path/f'a.{suffix}')
    (tmp_path/'empty.png').write_bytes(b'')
    assert 'is empty' in complaint(tmp_path/'empty.png')
    assert 'is no file' in complaint(tmp_path)
    assert 'is not there' in complaint(tmp_path/'nowhere.png')
    (tmp_path/'a.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    assert 'HEIC' in complaint(tmp_path/'a.heic')


BROKEN = """
import os, signal, sys, time
sys.path[:] = sys.argv[1:]
from PIL import Image
from ldm_nb.datasets import pictures
def decode(path, size):
    if 'crash' in path: os.kill(os.getpid(), signal.SIGSEGV)
    if 'hang' in path: time.sleep(100)
    if 'leave' in path: os._exit(1)
    return Image.new('L', (2, 2))
pictures._decode, pictures.MAX_SECONDS = decode, .3
pictures.serve()
"""


class Broken(Decoder): # a worker whose decoders crash and hang
    def start(self):
        self.process = subprocess.Popen([sys.executable, '-c', BROKEN, *sys.path], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_decoders_that_crash_or_hang(monkeypatch):
    monkeypatch.setattr(pictures, 'MAX_SECONDS', .3)
    ask = Broken()
    assert ask('good').size == (2, 2)
    for name, words in (('crash', 'crash'), ('hang', 'not decoded within'), ('leave', 'crash')):
        with pytest.raises(ValueError, match=words): ask(name)
        assert ask('good').size == (2, 2), f'no worker after a {name}'
    ask.stop()


def test_worker_ends_with_its_parent(tmp_path):
    gradient().save(tmp_path/'a.png')
    code = ('import sys, time; from ldm_nb.datasets.pictures import decoder, open_picture; open_picture(sys.argv[1]); '
            'print(decoder().process.pid, flush=True); time.sleep(60)')
    parent = subprocess.Popen([sys.executable, '-c', code, tmp_path/'a.png'], stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(50):
        try: os.kill(worker, 0)
        except ProcessLookupError: break
        try: # what nobody has waited for is no process any more
            if open(f'/proc/{worker}/stat').read().split(') ')[1][0] == 'Z': break
        except FileNotFoundError: break
        time.sleep(.1)
    else: pytest.fail('the worker lives on')


def test_after_a_fork(tmp_path):
    "A forked process has a worker of its own: two that read one pipe would get each other's pictures."
    if not hasattr(os, 'fork'): pytest.skip('there is no fork here')
    gradient().save(tmp_path/'a.png')
    open_picture(tmp_path/'a.png')
    mine = decoder().process.pid
    if not (child := os.fork()):
        try: os._exit(0 if open_picture(tmp_path/'a.png').size and decoder().process.pid != mine else 1)
        except BaseException: os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert open_picture(tmp_path/'a.png').size == (24, 16) and decoder().process.pid == mine


def test_modes(tmp_path):
    "What a file holds besides 8-bit RGB becomes the same picture."
    grey = Image.linear_gradient('L').resize((24, 16))
    want = np.asarray(grey.convert('RGB')).astype(int)
    kinds = dict(deep=Image.fromarray(np.asarray(grey).astype(np.uint16)*257), palette=grey.convert('P'),
                 alpha=grey.convert('RGBA'), both=grey.convert('LA'),
                 int32=Image.fromarray(np.asarray(grey)*np.int32(1)), cmyk=grey.convert('RGB').convert('CMYK'),
                 real=Image.fromarray(np.asarray(grey)/np.float32(255)))
    for name, im in kinds.items():
        path = tmp_path/f'{name}.{"tif" if name in ("cmyk", "real", "int32") else "png"}'
        im.save(path)
        assert abs(np.asarray(to_rgb(open_picture(path))).astype(int) - want).max() <= 1, name
    frames = [Image.new('P', (4, 4), k) for k in range(3)]
    frames[0].save(tmp_path/'film.gif', save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path/'film.gif').size == (4, 4)
    clear = Image.new('P', (4, 4))
    clear.save(tmp_path/'clear.png', transparency=0)
    assert to_rgb(open_picture(tmp_path/'clear.png')).getpixel((0, 0)) == (255, 255, 255)


def test_mask(tmp_path):
    "Strokes on transparency fill what was painted; black and white, of 1, 8 or 16 bits, what is bright."
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    strokes = Image.fromarray(np.dstack([np.full((8, 8, 3), 255, np.uint8), half]))
    black = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), half]))
    for k, im in enumerate((Image.fromarray(half), Image.fromarray(half).convert('1'), strokes, black,
                            Image.fromarray(half.astype(np.uint16)*257), Image.fromarray(half).convert('RGBA'))):
        im.save(tmp_path/'mask.png')
        assert torch.equal(to_mask(open_picture(tmp_path/'mask.png'))[0], torch.from_numpy(half/255).float()), k
