"""The explainer in a real browser: Debian's chromium, driven by playwright, against the built page served on this
machine alone. Its pictures beside Python's of the same captions and noise; keys, screens, colours, bad input, no
network. Screenshots stay in runs/screens. Without chromium, playwright, onnx or onnxruntime-web these tests are
skipped, and say so."""
import base64
import contextlib
import functools
import gzip
import http.server
import importlib.util
import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import NO_BROWSER, ROOT, SCREENS
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.postcards import Postcards
from ldm_nb.engine.seeds import ItemNoise
from ldm_nb.metrics.reader import load_reader, read

PACKAGES = Path(os.environ.get('LDM_NODE_MODULES', ROOT/'site/node_modules'))
pytestmark = [
    pytest.mark.skipif(bool(NO_BROWSER), reason=f'{NO_BROWSER}, so the explainer was not seen in a browser'),
    pytest.mark.skipif(not (PACKAGES/'onnxruntime-web').is_dir(),
                       reason='no onnxruntime-web here, so the explainer was not run: make site gets it'),
    pytest.mark.skipif(importlib.util.find_spec('onnxscript') is None,
                       reason="no onnxscript here, so no model was exported: pip install -e '.[dev]'")]
SECOND = 1000 # playwright counts milliseconds
CAPTION = 'a red house on a snowy hill at night'
FAST, FULL = '#fast-picture', '#picture'


class Server: # the page on loopback; counts what it sends, and spoils files on demand
    def __init__(self, folder: Path):
        self.sent, self.spoiled = [], {} # paths; path -> function of its bytes, None: 404
        outer = self
        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
                '.js': 'text/javascript', '.mjs': 'text/javascript', '.wasm': 'application/wasm',
                '.json': 'application/json'}
            def log_message(self, *words): pass
            def do_GET(self):
                path = self.path.partition('?')[0]
                outer.sent.append(path)
                if path not in outer.spoiled: return super().do_GET()
                spoil, whole = outer.spoiled[path], (folder/path.lstrip('/')).read_bytes()
                if spoil is None: return self.send_error(404)
                self.send_response(200)
                self.send_header('Content-Type', self.guess_type(path))
                self.end_headers()
                self.wfile.write(spoil(whole))
        class Quiet(http.server.ThreadingHTTPServer): # a browser that closes a connection is no error
            def handle_error(self, *words): pass
        self.http = Quiet(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope='module')
def play(tmp_path_factory) -> Path: # the built page
    spec = importlib.util.spec_from_file_location('site_build', ROOT/'site/build.py')
    build = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT/'site'))
    try: spec.loader.exec_module(build)
    finally: sys.path.remove(str(ROOT/'site'))
    build.MODULES = PACKAGES
    out = tmp_path_factory.mktemp('site')
    build.explainer(out, with_models=False)
    for name in build.MODELS: shutil.copytree(export(build, name), out/'play/models'/name)
    return out/'play'

def export(build, name: str) -> Path: # made again only when weights or code have changed, or as LDM_EXPORTS says
    if 'LDM_EXPORTS' in os.environ: return Path(os.environ['LDM_EXPORTS'])/name
    cache = ROOT/'_site/.cache/models' # that of make site
    cache.mkdir(parents=True, exist_ok=True)
    return build.exported(name, cache)


@pytest.fixture(scope='module')
def server(play):
    s = Server(play)
    yield s
    s.stop()


@contextlib.contextmanager
def watched(browser, path): # ms that the page's thread worked on its longest task, whatever else the machine does
    found = []
    browser.start_tracing(path=path, categories=['toplevel'])
    try: yield found
    finally: browser.stop_tracing()
    events = json.loads(path.read_text(encoding='utf-8'))['traceEvents']
    pages = {(e['pid'], e['tid']) for e in events if e.get('args', {}).get('name') == 'CrRendererMain'}
    tasks = [e['tdur'] for e in events if 'RunTask' in e['name'] and 'tdur' in e and (e['pid'], e['tid']) in pages]
    found.append(max(tasks)/1000)


KEY = '''more => new Promise(done => { // ms from a key to the picture of the fast model
  const field = document.querySelector('#caption'), picture = document.querySelector('#fast-picture')
  const start = performance.now()
  new MutationObserver((_, observer) => {
    if (picture.dataset.drawn != field.value) return
    observer.disconnect()
    done(performance.now() - start)
  }).observe(picture, {attributeFilter: ['data-drawn']})
  field.value += more
  field.dispatchEvent(new Event('input')) })'''

class Visit: # a page, and what it said and asked for
    def __init__(self, browser, server, path='/index.html', wide=1100, context=None, **how):
        how = dict(viewport=dict(width=wide, height=900)) | how
        self.server, self.context, self.said, self.asked = server, context or browser.new_context(**how), [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(60*SECOND)
        self.page.on('console', lambda m: self.said.append(f'{m.type}: {m.text} {m.location.get("url", "")}'))
        self.page.on('pageerror', lambda e: self.said.append(f'error: {e}'))
        self.page.on('request', lambda r: self.asked.append(r.url))
        self.page.goto(server.url + path)

    def __enter__(self): return self
    def __exit__(self, *error): self.context.close()

    def drawn(self, canvas, caption): self.page.wait_for_selector(f'{canvas}[data-drawn="{caption}"]')
    def done(self, job): self.page.wait_for_selector(f'#{job}-job[data-state=done]')

    def draw(self, caption, **settings): # by the full model, with Enter
        for k, v in settings.items(): self.put(k, v)
        self.page.fill('#caption', caption)
        self.page.press('#caption', 'Enter')
        self.drawn(FULL, caption)

    def put(self, field, value):
        if field == 'sampler': self.page.select_option('#sampler', value)
        else: self.page.fill(f'#{field}', str(value))

    def picture(self, canvas) -> np.ndarray: # (64, 64, 3) uint8, as it stands on the page
        data = self.page.eval_on_selector(canvas, 'c => c.toDataURL()').partition(',')[2]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))

    def clean(self): # nothing said on the console, nothing asked of anybody else
        assert not self.said, self.said
        away = [u for u in self.asked if not u.startswith(self.server.url)]
        assert not away, away


# --- 1. the first load

def test_first_load(browser, server, play):
    server.sent.clear()
    start = time.time()
    with Visit(browser, server) as v:
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        first = time.time() - start
        assert v.page.evaluate('document.activeElement.id') == 'caption'
        files = set(server.sent)
        models = sum((play/f.lstrip('/')).stat().st_size for f in files if f.startswith('/models/'))
        rest = sum(len(gzip.compress((play/(f.lstrip('/') or 'index.html')).read_bytes(), 6))
                   for f in files if not f.startswith('/models/'))
        print(f'\nfirst load: {models/1e6:.2f} MB of models, {rest/1e6:.2f} MB of the rest (gzip), '
              f'first picture after {first:.1f} s')
        assert models <= 12e6 and rest <= 5e6
        early = [f for f in files if f.startswith('/models/') and '/postcards-text-fast/' not in f]
        assert not early, f'loaded before it was asked for: {early}'
        twice = [f for f in files if f.endswith('.onnx') and server.sent.count(f) > 1]
        assert not twice, f'loaded twice: {twice}'
        v.clean()


# --- 2. its pictures, beside Python's

def test_pictures_as_python(browser, server):
    "64 captions typed into the page: the pictures are Python's, and the attribute reader says the same of both."
    how = dict(steps=4, guidance=3, sampler='dpmpp_2m')
    ds = Postcards(200, seed=27)
    captions = list(dict.fromkeys(ds.caption(i) for i in range(len(ds))))[:64]
    with Visit(browser, server) as v:
        seen = []
        for seed, c in enumerate(captions):
            v.draw(c, seed=seed, **how)
            seen.append(v.picture(FULL))
        v.clean()
    page = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)/127.5 - 1
    ldm = LatentDiffusion.from_pretrained('postcards-text')
    noise = torch.cat([ItemNoise(seed, range(1))(torch.empty(1, *ldm.latent_shape())) for seed in range(64)])
    python = ldm.sample(captions, latents=noise, **how)
    off = (page - python).abs().mean((1, 2, 3))
    print(f'\nmean difference of pixels {off.mean():.4f} of 2, of the worst picture {off.max():.4f}')
    assert off.mean() < .02
    here, there = (read(load_reader(), x) for x in (page, python))
    differ = {k: sum(a[k] != b[k] for a, b in zip(here, there)) for k in here[0]}
    print('verdicts that differ:', differ)
    assert max(differ.values()) <= 1, differ


# --- 3. times, and a page that answers

def test_times(browser, server, tmp_path):
    with Visit(browser, server) as v:
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        v.draw(CAPTION, steps=1)
        with watched(browser, tmp_path/'held.json') as held: # the measure itself: it sees a page that is held up
            v.page.evaluate("""new Promise(done => setTimeout(() => {
              for (const end = performance.now() + 800; performance.now() < end;);
              setTimeout(done, 200) }))""")              # later: a task that runs when the trace ends is not in it
        assert held[0] > 100
        with watched(browser, tmp_path/'used.json') as longest:
            v.draw(f'{CAPTION}, with two trees', steps=20)
            full = v.page.get_attribute(FULL, 'data-seconds')
            v.page.press('#caption', 'End')
            v.page.locator('#caption').press_sequentially(' and a lake', delay=60)
            v.drawn(FAST, f'{CAPTION}, with two trees and a lake')
            v.done('fast')
            said = v.page.inner_text('#fast-job')
            waits = [v.page.evaluate(KEY, word) for word in (' and', ' clouds', ' and', ' mountains')]
            v.page.locator('#strip').scroll_into_view_if_needed()
            v.page.locator('#strip label').nth(9).click()
            v.page.wait_for_selector('#inside:not([hidden])')
            v.page.wait_for_selector('#z-19[data-painted]')
        print(f'\nfrom Enter to picture, 20 guided steps: {full} s; fast model: {said}, '
              f'from key to picture {", ".join(f"{w:.0f}" for w in waits)} ms; '
              f'longest task of the page {longest[0]:.0f} ms')
        assert longest[0] < 100
        v.clean()


# --- 4. every panel

def test_steps(browser, server):
    with Visit(browser, server) as v:
        v.draw(CAPTION, steps=6)
        assert v.page.locator('#strip label').count() == 6
        v.page.locator('#strip label').nth(2).click()
        v.page.wait_for_selector('#inside:not([hidden])')
        v.page.keyboard.press('ArrowRight')
        v.page.wait_for_selector('#inside-title:has-text("Step 4 of 6")')
        assert v.page.locator('#inside .channels canvas').count() == 8
        text = v.page.inner_text('#arrows-text')
        apart, far = (float(text.split(k)[1].split()[0].rstrip('.;')) for k in ('The two are ', 'as far: '))
        assert abs(far - 3*apart) < .05 and apart > 0
        words = v.page.locator('#word option').all_inner_texts()
        assert words == CAPTION.split(), words
        before = v.picture('#attention')
        v.page.select_option('#word', label='night')
        assert (v.picture('#attention') != before).any()
        v.clean()


def test_noise_and_first_stage(browser, server):
    with Visit(browser, server) as v:
        card = v.picture('#noise-picture') if v.page.wait_for_selector('#noise-chooser [aria-pressed=true]') else None
        off = {}
        for t in (5, 950):
            v.page.fill('#noise-t', str(t))
            v.page.wait_for_selector(f'#noise-job :text("At t = {t} ")')
            off[t] = np.abs(v.picture('#noise-guess').astype(int) - card).mean()
        assert off[5] < 8 < off[950], off # little noise: nearly the picture; much: another one
        v.page.fill('#amount', '0')
        v.page.fill('#amount', '0.1')
        v.done('firststage')
        small = np.abs(v.picture('#firststage-decoded').astype(int) - card).mean()
        v.page.select_option('#disturb', 'shuffle')
        v.page.fill('#amount', '100')
        v.page.wait_for_selector('#amount-value:has-text("100 %")')
        v.page.wait_for_timeout(200)
        v.done('firststage')
        assert small < 8 < np.abs(v.picture('#firststage-decoded').astype(int) - card).mean()
        assert v.picture('#firststage-difference').mean() > 5
        v.clean()


def test_layout_by_keys_pointer_and_numbers(browser, server):
    with Visit(browser, server, '/index.html?panel=layout') as v:
        page = v.page
        assert page.locator('section:visible').count() == 1 and page.locator('#whole').is_visible()
        boxes = page.locator('#boxes g')
        n = boxes.count()
        page.select_option('#box-class', 'moon')
        page.click('#add-box')
        assert boxes.count() == n + 1 and 'moon: left 38, top 44' in boxes.nth(n).get_attribute('aria-label')
        for key in ('ArrowUp', 'ArrowUp', 'Shift+ArrowRight'): page.keyboard.press(key)
        assert boxes.nth(n).get_attribute('aria-label') == 'moon: left 38, top 38, right 66, bottom 63'
        page.locator('#box-list tr').nth(n).get_by_label('left').fill('10')
        page.keyboard.press('Tab')
        assert 'left 10,' in boxes.nth(n).get_attribute('aria-label')
        boxes.nth(n).focus()
        page.keyboard.press('Delete')
        assert boxes.count() == n
        at = page.locator('#boxes').bounding_box()
        page.mouse.move(at['x'] + at['width']*.05, at['y'] + at['height']*.05)
        page.mouse.down()
        page.mouse.move(at['x'] + at['width']*.2, at['y'] + at['height']*.2, steps=4)
        page.mouse.up()
        assert boxes.count() == n + 1
        assert boxes.nth(n).get_attribute('aria-label') == 'moon: left 5, top 5, right 20, bottom 20'
        page.click('#draw-layout')
        v.done('layout')
        first = v.picture('#layout-picture')
        assert first.std() > 10
        page.mouse.move(at['x'] + at['width']*.9, at['y'] + at['height']*.9)
        page.mouse.down()
        page.wait_for_timeout(700) # a box without a size, while the hand rests: nothing to draw yet
        assert page.get_attribute('#layout-job', 'data-state') == 'done'
        page.mouse.up()
        page.click('#draw-layout')
        page.wait_for_selector('#layout-job[data-state=busy]')
        page.click('#clear-boxes')
        page.wait_for_timeout(700) # what was being drawn has been stopped, and its end says nothing
        assert 'no box yet' in page.inner_text('#layout-job')
        v.clean()


def test_inpaint_by_keys_and_pointer(browser, server):
    with Visit(browser, server, '/index.html?panel=inpaint') as v:
        page = v.page
        page.wait_for_selector('#inpaint-chooser [aria-pressed=true]')
        page.click('#clear-mask')
        card = v.picture('#mask')
        page.click('#fill')
        assert 'no hole yet' in page.inner_text('#inpaint-job')
        page.focus('#mask')
        for key in ['ArrowLeft']*3 + [' ']: page.keyboard.press(key)
        share = page.inner_text('#mask-text')
        assert share != '0 % is to be filled.'
        at = page.locator('#mask').bounding_box()
        page.mouse.move(at['x'] + 40, at['y'] + at['height'] - 40)
        page.mouse.down()
        page.mouse.move(at['x'] + at['width'] - 40, at['y'] + at['height'] - 40, steps=5)
        page.mouse.up()
        assert page.inner_text('#mask-text') != share
        page.evaluate('document.activeElement.blur()')
        hole = (v.picture('#mask') != card).any(-1)
        assert 40 < hole.sum() < 1500
        page.click('#fill')
        v.done('inpaint')
        filled = v.picture('#filled')
        assert (filled[~hole] == card[~hole]).all() and (filled[hole] != card[hole]).any()
        v.clean()


# --- 5. for everyone: keys, screen readers, colours, narrow screens, no network

LABELS = '''() => [...document.querySelectorAll('input, select, button, canvas, svg, textarea, progress')].filter(e =>
  !e.closest('[aria-hidden=true]') && !e.hidden && !(e.labels && e.labels.length && e.labels[0].textContent.trim())
  && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')
  && !(e.tagName == 'BUTTON' && e.textContent.trim())
  && !(e.tagName == 'BUTTON' && e.querySelector('img[alt]:not([alt=""])'))).map(e => e.outerHTML.slice(0, 120))'''

CONTRAST = '''() => { // [ratio, colour, background, text] of visible text that is below what WCAG AA asks for
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1] }
  const over = (a, b) => [0, 1, 2].map(k => a[k]*a[3] + b[k]*(1 - a[3])).concat(1)
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4)
                       return .2126*r + .7152*g + .0722*b }
  const ground = e => { const stack = []
    for (; e; e = e.parentElement) {
      stack.push(parse(getComputedStyle(e).backgroundColor))
      if (stack.at(-1)[3] == 1) break }
    return stack.reduceRight((below, c) => over(c, below), [255, 255, 255, 1]) }
  const bad = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim()
    if (!text || ['SCRIPT', 'STYLE', 'OPTION', 'NOSCRIPT'].includes(e.tagName) || !e.checkVisibility()) continue
    const s = getComputedStyle(e), back = ground(e)
    const ink = over(parse(e.namespaceURI.includes('svg') ? s.fill : s.color), back)
    const [a, b] = [light(ink.slice(0, 3)), light(back.slice(0, 3))].sort((x, y) => y - x)
    const ratio = (a + .05)/(b + .05), size = parseFloat(s.fontSize)
    const large = size >= 24 || size >= 18.66 && s.fontWeight >= 700
    if (ratio < (large ? 3 : 4.5)) bad.push([ratio.toFixed(2), s.color, back.join(), text.slice(0, 40)])
  }
  return bad }'''

WALK = '''() => { const e = document.activeElement, s = getComputedStyle(e), all = [...document.querySelectorAll('*')]
  return {id: e.id, tag: e.tagName, at: all.indexOf(e), panel: e.closest('section')?.dataset.panel ?? '',
          outline: s.outlineStyle != 'none' && parseFloat(s.outlineWidth) >= 2 || e.matches('.strip input, g.box')} }'''

def test_labels_contrast_and_width(browser, server):
    with Visit(browser, server, wide=360, color_scheme='light', reduced_motion='reduce') as v:
        v.draw('a castle at night', steps=2)
        v.page.locator('#strip label').nth(1).click()
        v.page.wait_for_selector('#inside:not([hidden])')
        v.put('steps', 0)
        assert v.page.evaluate(LABELS) == []
        for scheme in ('light', 'dark'):
            v.page.emulate_media(color_scheme=scheme)
            assert v.page.evaluate(CONTRAST) == []
            for wide in (360, 800, 1400):
                v.page.set_viewport_size(dict(width=wide, height=900))
                assert v.page.evaluate('document.documentElement.scrollWidth') <= wide
                v.page.screenshot(path=SCREENS/f'explainer-{wide}-{scheme}.png', full_page=True)
        headings = v.page.eval_on_selector_all('h1, h2, h3, h4', 'all => all.map(h => Number(h.tagName[1]))')
        assert headings[0] == 1 and headings.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(headings, headings[1:])), headings
        v.page.click('#theme') # against what the system says, and kept
        assert v.page.get_attribute('html', 'data-theme') == 'light' and v.page.evaluate(CONTRAST) == []
        v.page.reload()
        assert v.page.get_attribute('html', 'data-theme') == 'light'
        v.clean()


def test_tab_order(browser, server):
    "Tab visits the controls from top to bottom, each with a visible focus, and is caught nowhere."
    with Visit(browser, server) as v:
        v.draw(CAPTION, steps=2)
        v.page.wait_for_selector('#inpaint-chooser [aria-pressed=true]')
        v.page.evaluate('document.activeElement.blur(); window.getSelection().removeAllRanges()')
        v.page.focus('.skip')
        seen = [v.page.evaluate(WALK)]
        while len(seen) < 150:
            v.page.keyboard.press('Tab')
            seen.append(v.page.evaluate(WALK))
            if seen[-1]['tag'] in ('BODY', 'HTML') or seen[-1]['at'] < seen[-2]['at']: break
        order = [s['at'] for s in seen[:-1]]
        assert order == sorted(order) and len(seen) < 150
        assert all(s['outline'] for s in seen[:-1]), [s for s in seen[:-1] if not s['outline']]
        ids = [s['id'] for s in seen if s['id']]
        wanted = ['theme', 'caption', 'draw', 'steps', 'guidance', 'sampler', 'seed', 'new-seed', 'steps-draw',
                  'noise-t', 'noise-caption', 'channel', 'disturb', 'amount', 'box-class', 'add-box', 'draw-layout',
                  'brush', 'erase', 'fill', 'mask']
        assert [i for i in ids if i in wanted] == wanted
        assert list(dict.fromkeys(s['panel'] for s in seen if s['panel'])) == \
            ['caption', 'steps', 'noise', 'firststage', 'layout', 'inpaint']
        v.clean()


def test_without_a_network(browser, play):
    own = Server(play) # of this test: it is stopped
    with Visit(browser, own) as v:
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        v.draw(CAPTION, steps=2)
        before = v.picture(FULL)
        count = 'async () => (await (await caches.open("explainer")).keys()).length'
        end, kept = time.time() + 20, 0
        while time.time() < end and (now := v.page.evaluate(count)) != kept:
            kept = now
            v.page.wait_for_timeout(700)
        v.clean()
        own.stop()
        v.context.set_offline(True)
        v.page.reload()
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        v.draw(CAPTION, steps=2, seed=0)
        assert (v.picture(FULL) == before).all()
        assert v.page.locator('#noise-chooser img').count() == 8
        v.page.goto(f'{own.url}/index.html?panel=caption')
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        assert not [m for m in v.said if m.startswith('error') and 'ERR_INTERNET_DISCONNECTED' not in m], v.said


# --- 6. bad input

ODD = {'': 'empty', '   ': 'empty', '🏠🌙': 'Unknown', '山の上の赤い家': 'Unknown',
       '<img src=x onerror=alert(1)>': 'Unknown', 'house '*1700: 'too many', 'x'*10_000: 'Unknown'}

def test_odd_captions(browser, server, tmp_path):
    with watched(browser, tmp_path/'trace.json') as longest, Visit(browser, server) as v:
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        for caption, said in ODD.items():
            v.page.fill('#caption', caption)
            v.page.wait_for_selector(f'#caption-note:has-text("{said}")')
            v.page.wait_for_timeout(150)
            assert v.page.locator('#fast-job[data-state=error]').count() == 0, v.page.inner_text('#fast-job')
        assert v.page.locator('img[src=x]').count() == 0
        v.page.fill('#caption', '')
        v.page.press('#caption', 'Enter')
        assert v.page.get_attribute('#caption-job', 'data-state') != 'busy'
        v.page.fill('#caption', 'house '*1700)
        v.put('steps', 1)
        v.page.press('#caption', 'Enter')
        v.done('caption')
        assert v.page.evaluate('document.documentElement.scrollWidth') <= 1100
        v.clean()
    assert longest[0] < 100


def test_odd_settings(browser, server):
    with Visit(browser, server) as v:
        odd = dict(steps=['0', '1000000000', '2.5', ''], guidance=['1e9', ''], seed=['-1', '1.5'])
        for field, values in odd.items():
            good = v.page.input_value(f'#{field}')
            for value in values:
                v.put(field, value)
                assert v.page.get_attribute(f'#{field}', 'aria-invalid') == 'true'
                note = v.page.locator(f'#{v.page.get_attribute(f"#{field}", "aria-describedby")}')
                assert 'is needed here' in note.inner_text()
                v.page.press('#caption', 'Enter')
                assert v.page.get_attribute('#caption-job', 'data-state') is None, 'it was sent'
                assert v.page.evaluate('document.activeElement.id') == field
            v.put(field, good)
            assert v.page.get_attribute(f'#{field}', 'aria-invalid') is None
        v.clean()


def png(size, mode='RGB', colour=0) -> bytes:
    f = io.BytesIO()
    Image.new(mode, size, colour).save(f, 'png')
    return f.getvalue()

DROP = '''([type, value]) => { // was it stopped from doing what the browser does with it?
  const data = new DataTransfer()
  type == 'Files' ? data.items.add(new File(['x'], 'x.txt')) : data.setData(type, value)
  const drop = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
  return !document.querySelector('#noise-caption').dispatchEvent(drop) }'''

def test_odd_pictures(browser, play, tmp_path):
    own = Server(play)
    own.spoiled['/postcards/3.png'] = None
    with watched(browser, tmp_path/'trace.json') as longest, Visit(browser, own, '/index.html?panel=noise') as v:
        v.page.wait_for_selector('#noise-chooser [aria-pressed=true]')
        note = lambda text: v.page.wait_for_selector(f'#noise-chooser .note:has-text("{text}")')
        give = lambda name, kind, data: v.page.set_input_files(
            '#noise-chooser-file', dict(name=name, mimeType=kind, buffer=data))
        v.page.locator('#noise-chooser .postcards button').nth(3).click()
        note('did not arrive')
        assert v.page.locator('#noise-chooser button').first.get_attribute('aria-pressed') == 'true'
        v.said.clear() # the browser itself says that it is not there
        assert not v.page.evaluate(DROP, ['text/plain', 'a lake']) and v.page.evaluate(DROP, ['Files', ''])
        give('a.txt', 'text/plain', b'no picture at all, whatever its name')
        note('no picture')
        give('b.png', 'image/png', png((10_000, 10_000), '1'))
        note('100 megapixels')
        give('c.png', 'image/png', png((300, 200))[:100])
        note('damaged')
        give('d.png', 'image/png', png((400, 200), 'RGBA', (255, 0, 0, 255)))
        note('cut to a square')
        assert (v.picture('#noise-picture') == (255, 0, 0)).all()
        assert v.page.input_value('#noise-chooser-file') == '' # the same file can be chosen again
        v.done('noise') # a picture that was chosen is looked at without another word
        v.page.evaluate('''() => {
          const data = new DataTransfer()
          data.items.add(new File(['words'], 'words.html', {type: 'text/html'}))
          const drop = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
          document.querySelector('#noise-chooser').dispatchEvent(drop)
        }''')
        note('no picture')
        v.clean()
    own.stop()
    assert longest[0] < 100


def test_enter_ten_times_and_two_tabs(browser, server):
    with Visit(browser, server) as v:
        v.draw('a lake', steps=12)
        v.page.evaluate('''() => { window.drawings = []
          new MutationObserver(() => drawings.push(document.querySelector('#picture').dataset.drawn))
            .observe(document.querySelector('#picture'), {attributeFilter: ['data-drawn']}) }''')
        for k in range(10):
            v.page.fill('#caption', f'a blue house, {"two "*k}trees')
            v.page.press('#caption', 'Enter')
        last = v.page.input_value('#caption')
        v.drawn(FULL, last)
        drawings = v.page.evaluate('drawings')
        assert len(drawings) <= 2 and drawings[-1] == last, drawings
        other = Visit(browser, server, context=v.context)
        for p in (v.page, other.page):
            for k, x in (('seed', 5), ('steps', 8), ('caption', CAPTION)): p.fill(f'#{k}', str(x))
            p.press('#caption', 'Enter')
        for tab in (v, other): tab.drawn(FULL, CAPTION)
        assert (v.picture(FULL) == other.picture(FULL)).all()
        v.clean()
        other.clean()


def test_a_long_drawing(browser, server):
    "The fast model does not wait for it; it can be stopped; going back to the page finds what the page says."
    with Visit(browser, server) as v:
        v.draw(CAPTION, steps=1)
        v.put('steps', 1000)
        v.page.press('#caption', 'Enter')
        v.page.wait_for_selector('#caption-job progress:not([hidden])')
        v.page.fill('#caption', 'a yellow house')
        v.drawn(FAST, 'a yellow house')
        assert v.page.get_attribute('#caption-job', 'data-state') == 'busy'
        v.page.get_by_role('button', name='Stop').click()
        v.page.wait_for_selector('#caption-job[data-state=idle]:has-text("Stopped.")')
        v.page.fill('#noise-t', '900')
        v.page.select_option('#disturb', 'blank')
        v.page.fill('#amount', '70')
        v.page.goto(f'{server.url}/index.html?panel=layout')
        v.page.go_back()
        v.page.wait_for_selector('#noise-chooser [aria-pressed=true]')
        said = v.page.inner_text('#noise-level'), v.page.inner_text('#amount-value').rstrip(' %')
        assert said == (f't = {v.page.input_value("#noise-t")}', v.page.input_value('#amount'))
        v.clean()


def test_without_a_service_worker(browser, server):
    context = browser.new_context()
    context.add_init_script('''Object.defineProperty(navigator, 'serviceWorker', {
      get() { throw new DOMException('not here', 'SecurityError') }})''')
    with Visit(browser, server, context=context) as v:
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        v.clean()


NETWORK = '/models/postcards-text-fast/network.onnx'

DAMAGES = [(None, '404'), (lambda data: data[:len(data)//2], 'damaged'),
           (lambda data: data[:-1] + bytes([data[-1] ^ 1]), 'damaged')] # missing, short, another

def test_a_model_that_does_not_arrive(browser, play):
    own = Server(play)
    own.spoiled[NETWORK] = DAMAGES[0][0]
    with Visit(browser, own) as v:
        for k, (_, said) in enumerate(DAMAGES):
            v.page.wait_for_selector(f'#fast-job[data-state=error] .status:has-text("{said}")')
            text = v.page.inner_text('#fast-job .status')
            assert 'network.onnx' in text and 'Try again' in text
            if k + 1 < len(DAMAGES): own.spoiled[NETWORK] = DAMAGES[k + 1][0]
            else: own.spoiled.clear()
            asked = own.sent.count(NETWORK)
            v.page.click('#fast-job .retry')
            while own.sent.count(NETWORK) == asked: v.page.wait_for_timeout(50)
        v.page.wait_for_selector(f'{FAST}[data-drawn]')
        assert not v.page.is_visible('#fast-job .retry')
    own.stop()


def test_without_simd(browser, play):
    own = Server(play)
    own.spoiled['/js/worker.js'] = lambda code: b'WebAssembly.validate = () => false;' + code
    with Visit(browser, own) as v:
        v.page.wait_for_selector('#fast-job[data-state=error]')
        assert 'WebAssembly SIMD' in v.page.inner_text('#fast-job .status')
        assert not v.page.is_visible('#fast-job .retry')
    own.stop()
