"""Smaller pictures in notebooks, by rules that find nothing more when applied again: PNG with a palette where
256 colours are enough, JPEG for what looks like a photograph. `shrink` does one notebook. JPEG stays as it is."""
import base64
import io

import numpy as np
from PIL import Image

GAIN = .95 # a picture is replaced by one of at most this share of its size: a second pass then finds nothing
VISIBLE = 20 # of 255: a palette that is further off anywhere is not taken
PHOTO = .6 # JPEG is taken where it has at most this share of the best lossless size
QUALITY = 85


def coded(im: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, optimize=True, **options)
    return out.getvalue()


def opaque(im: Image.Image) -> Image.Image: # as RGB, unless something of it is transparent
    if im.mode == 'RGBA' and im.getchannel('A').getextrema() == (255, 255): return im.convert('RGB')
    return im.convert('RGB') if im.mode in ('L', '1', 'CMYK', 'YCbCr') else im


def smaller_png(data: bytes) -> tuple[str, bytes]: # (type, bytes): the same where nothing is gained
    im = Image.open(io.BytesIO(data))
    if im.mode == 'P': return 'image/png', data # has been here
    im = opaque(im)
    best = coded(im, 'PNG')
    if im.mode != 'RGB': return 'image/png', min(data, best, key=len)
    few = im.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    if off(im, few.convert('RGB')) <= VISIBLE: best = min(best, coded(few, 'PNG'), key=len)
    photo = coded(im, 'JPEG', quality=QUALITY, subsampling=0, progressive=True)
    if len(photo) <= PHOTO*len(best): return 'image/jpeg', photo
    return ('image/png', best) if len(best) <= GAIN*len(data) else ('image/png', data)


def off(a: Image.Image, b: Image.Image) -> int: # the largest difference of a channel anywhere
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def shrink(nb: dict) -> int: # bytes won; the pictures of the outputs are replaced in place
    won = 0
    for c in nb['cells']:
        for o in c.get('outputs', []):
            data, meta = o.get('data', {}), o.get('metadata', {})
            if 'image/png' not in data or 'image/jpeg' in data: continue
            text = ''.join(data['image/png'])
            old = base64.b64decode(text)
            kind, new = smaller_png(old)
            if new == old: continue
            del data['image/png']
            data[kind] = base64.b64encode(new).decode() + '\n'*text.endswith('\n')
            if 'image/png' in meta: meta[kind] = meta.pop('image/png')
            won += len(text) - len(data[kind])
    return won
