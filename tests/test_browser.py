"""The panels in a real browser: Debian's chromium, driven by playwright, against a JupyterLab and a Voila that are
started here, on this machine alone. Screenshots stay in runs/screens. Without chromium or playwright these tests are
skipped, and say so."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest
from PIL import Image
from conftest import NO_BROWSER, ROOT, SCREENS
from ldm_nb.datasets.images import to_uint8
from ldm_nb.datasets.postcards import Postcards

try: from playwright.sync_api import TimeoutError as PlaywrightTimeout
except ImportError: pass
pytestmark = pytest.mark.skipif(bool(NO_BROWSER), reason=f'{NO_BROWSER}, so no panel was seen in a browser')
SECOND = 1000 # playwright counts milliseconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Server: # a Jupyter server of our own; only what it started is ended
    def __init__(self, words: list, folder, health: str): # a command; {port} in it is where to listen
        self.port, self.log = free_port(), open(folder/'server.log', 'w+')
        env = os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT),
                                JUPYTER_CONFIG_DIR=str(folder/'config'),
                                IPYTHONDIR=str(folder/'ipython'), JUPYTER_RUNTIME_DIR=str(folder/'runtime'))
        self.process = subprocess.Popen([w.replace('{port}', str(self.port)) for w in words], cwd=folder, env=env,
                                        stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
                                        start_new_session=True)
        self.url = f'http://127.0.0.1:{self.port}'
        try: self.await_answer(health)
        except BaseException:
            self.stop()
            raise

    def await_answer(self, health: str, seconds: float = 60):
        end = time.time() + seconds
        while time.time() < end:
            assert self.process.poll() is None, f'the server ended:\n{self.said()}'
            try:
                with urllib.request.urlopen(self.url + health, timeout=2) as r:
                    if r.status == 200: return
            except OSError: time.sleep(.3)
        raise AssertionError(f'no answer within {seconds} s:\n{self.said()}')

    def said(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()[-4000:]

    def stop(self): # a Jupyter server that is asked ends its kernels first
        for s, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            if self.process.poll() is None: os.killpg(self.process.pid, s)
            try: self.process.wait(seconds)
            except subprocess.TimeoutExpired: continue
        self.log.close()


def settings(folder, **of): # plugin -> dict, as JupyterLab keeps them
    for plugin, values in of.items():
        path = folder/'settings/@jupyterlab'/f'{plugin.replace("__", "-extension/")}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def lab_words(folder) -> list: # no token, no password: it listens on this machine alone
    return [sys.executable, '-m', 'jupyterlab', '--port={port}', '--no-browser', '--ip=127.0.0.1', '--allow-root',
            '--IdentityProvider.token=', '--ServerApp.password=', '--ServerApp.port_retries=0',
            f'--ServerApp.root_dir={folder/"nbs"}',
            f'--LabApp.user_settings_dir={folder/"settings"}', f'--LabApp.workspaces_dir={folder/"workspaces"}']


def write(path, *cells): # a notebook of code cells
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)


@pytest.fixture(scope='module')
def lab(tmp_path_factory): # every cell stays in the page: this version takes those that are out of sight out of it
    folder = tmp_path_factory.mktemp('lab')
    (folder/'nbs').mkdir()
    settings(folder, notebook__tracker=dict(windowingMode='none'),
             apputils__notification=dict(fetchNews='false', checkForUpdates=False))
    server = Server(lab_words(folder), folder, '/api/status')
    server.folder = folder/'nbs'
    yield server
    server.stop()


@pytest.fixture
def page(browser, request): # a page whose errors fail the test; its last state is kept as a picture
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.errors = []
    page.on('console',
            lambda m: page.errors.append(f'{m.text} ({m.location.get("url", "")})') if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.set_default_timeout(30*SECOND)
    yield page
    page.screenshot(path=SCREENS/f'last-of-{request.node.name}.png')
    page.close()


def open_notebook(page, lab, name: str): # and wait for its kernel
    page.goto(f'{lab.url}/lab/tree/{name}?reset')
    page.locator('.jp-Notebook').wait_for(timeout=60*SECOND)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=60*SECOND)


def menu(page, *items: str):
    page.locator('#jp-MainMenu').get_by_text(items[0], exact=True).click()
    for item in items[1:]: page.locator('.lm-Menu').get_by_text(item, exact=True).click()


# folded cells have no text that could be seen; they run in their turn all the same
CELLS = ("[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]"
         ".filter(c => c.querySelector('.cm-content')?.textContent.trim())")
PROMPT = "c.querySelector('.jp-InputPrompt').textContent"


def run_all(page, seconds: float): # through the menu, to the last cell; fails on a cell that failed
    # a kernel that has just said that it is ready may still miss the first request
    for last_try in (False, False, True):
        menu(page, 'Run', 'Run All Cells')
        try:
            page.wait_for_function(f"() => {CELLS}.some(c => /\\[[*\\d]/.test({PROMPT}))", timeout=10*SECOND)
            break
        except PlaywrightTimeout:
            if last_try: raise
    page.wait_for_function(f"() => {CELLS}.every(c => /\\[\\d+\\]/.test({PROMPT}))", timeout=seconds*SECOND)
    failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    assert not failed.count(), failed.first.inner_text()


def shot(page, name: str): page.screenshot(path=SCREENS/f'{name}.png')


def pixels(image) -> np.ndarray: # of an <img> of the page, (h, w, 3)
    data = image.evaluate('''async e => { const b = await (await fetch(e.src)).blob();
        return await new Promise(r => {
            const f = new FileReader(); f.onload = () => r(f.result.split(',')[1]); f.readAsDataURL(b) }) }''')
    import base64
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB')).astype(int)


def changes(page, image, what, seconds=10): # the alternative text of an image, once `what` was done
    before = image.get_attribute('alt')
    what()
    end = time.time() + seconds
    while image.get_attribute('alt') == before:
        assert time.time() < end, f'the picture stays {before!r}'
        page.wait_for_timeout(50)
    return image.get_attribute('alt')


def changes_within(page, image, what) -> float: # seconds
    start = time.time()
    changes(page, image, what, seconds=30)
    return time.time() - start


def patience() -> float: # how much longer than on an idle machine things may take now
    return max(1.5, 2*os.getloadavg()[0]/os.cpu_count())


def opening(path, holding: str, folder):
    # a chapter up to the end of the section that holds a text; what follows takes minutes, and nbdev_test runs it
    nb = json.loads(path.read_text(encoding='utf-8'))
    at = next(k for k, c in enumerate(nb['cells']) if holding in ''.join(c['source']) and c['cell_type'] == 'code')
    heads = [k for k, c in enumerate(nb['cells'])
             if c['cell_type'] == 'markdown' and re.search(r'^## ', ''.join(c['source']), re.M) and k > at]
    if not os.environ.get('WHOLE_CHAPTER'): nb['cells'] = nb['cells'][:heads[0]]
    (folder/path.name).write_text(json.dumps(nb), encoding='utf-8')
    # what `../images` means for a page at the top
    shutil.copytree(ROOT/'nbs/images', folder/'images', dirs_exist_ok=True)


def test_noise_slider_of_chapter_03(page, lab): # WHOLE_CHAPTER=1 pytest ... runs all of it
    opening(ROOT/'nbs/story/03_diffusion.ipynb', 'noise_slider(', lab.folder)
    open_notebook(page, lab, '03_diffusion.ipynb')
    run_all(page, 300 if os.environ.get('WHOLE_CHAPTER') else 100)
    slider, image = page.get_by_role('slider').first, page.locator('img[alt^="the picture at t"]')
    image.scroll_into_view_if_needed()
    clean = pixels(image)
    shot(page, '03-noise-before')
    slider.focus()
    assert '999' in changes(page, image, lambda: page.keyboard.press('End'))
    drowned = pixels(image)
    shot(page, '03-noise-after')
    assert abs(drowned - clean).mean() > 30 and np.corrcoef(clean.ravel(), drowned.ravel())[0, 1] < .2
    assert 't = 998' in changes(page, image, lambda: page.keyboard.press('ArrowLeft'))
    box = slider.locator('xpath=ancestor::*[contains(@class, "noUi-target")]').bounding_box()
    # with the mouse
    changes(page, image, lambda: page.mouse.click(box['x'] + box['width']*.25, box['y'] + box['height']/2))
    assert not page.errors, page.errors


LAYOUT = ("from ldm_nb.lab.canvas import layout_editor\nfrom ldm_nb.core import LatentDiffusion\n"
          "from ldm_nb.metrics.reader import load_reader",
          "editor = layout_editor(LatentDiffusion.from_pretrained('postcards-layout'), reader=load_reader())\neditor")
MASK = ("from ldm_nb.lab.canvas import mask_painter\nfrom ldm_nb.core import LatentDiffusion\n"
        "from ldm_nb.datasets.postcards import Postcards",
        "painter = mask_painter(LatentDiffusion.from_pretrained('postcards-inpaint'), "
        "Postcards(64, 64, seed=3)[40]['image'])\npainter")


def point(canvas, x: float, y: float) -> tuple: # fractions of a canvas -> the page
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box['x'] + x*box['width'], box['y'] + y*box['height']


def drag(page, canvas, *points: tuple): # fractions of the canvas
    page.mouse.move(*point(canvas, *points[0]))
    page.mouse.down()
    for p in points[1:]: page.mouse.move(*point(canvas, *p), steps=4)
    page.mouse.up()


def finished(page, name: str, seconds: float = 40): # the line of a panel says so
    page.get_by_text(name, exact=False).first.wait_for(timeout=seconds*SECOND)


def test_draw_a_box(page, lab):
    write(lab.folder/'layout.ipynb', *LAYOUT)
    open_notebook(page, lab, 'layout.ipynb')
    run_all(page, 60)
    canvas = page.locator('canvas.ldm-boxes')
    words = page.get_by_placeholder('house .2')
    image = page.locator('img[alt^="a picture of"]')
    assert not image.count() and page.get_by_text('No boxes yet').count()
    page.mouse.click(*point(canvas, .5, .5))                                  # an empty drawing: a click
    page.wait_for_timeout(300)
    assert words.input_value() == ''
    drag(page, canvas, (.3, .45), (.5, .6), (.58, .74))
    image.wait_for()
    finished(page, 'finished')
    shot(page, 'layout-house')
    said = page.locator('figcaption', has_text='the reader').inner_text()
    print(f'{words.input_value()}; {said}')
    assert 'house found' in said, said
    # dragged outside: it stays in the picture
    seconds = changes_within(page, image, lambda: drag(page, canvas, (.45, .6), (.9, .6), (1.4, .6)))
    print(f'preview after {seconds:.2f} s')
    page.wait_for_function('([e]) => / 1\\.00 /.test(e.value)', arg=[words.element_handle()])
    assert words.input_value().count('house') == 1 and seconds < 2*patience(), seconds
    page.keyboard.press('Delete')
    page.get_by_text('No boxes yet').wait_for()
    page.keyboard.press('Enter')                                              # from the keys alone
    for _ in range(3): page.keyboard.press('ArrowDown')
    page.keyboard.press('Shift+ArrowRight')
    finished(page, 'house 0.35 0.45 0.62 0.75', 10)
    image.wait_for()
    shot(page, 'layout-keys')
    assert not page.errors, page.errors


def test_paint_a_mask(page, lab):
    write(lab.folder/'mask.ipynb', *MASK)
    open_notebook(page, lab, 'mask.ipynb')
    run_all(page, 60)
    canvas, image = page.locator('canvas.ldm-mask'), page.locator('img[alt^="filled"]')
    assert page.get_by_text('Nothing is masked').count()
    shot(page, 'mask-before')
    drag(page, canvas, (.7, .5), (.95, .65), (.7, .7), (.9, .55))
    image.wait_for()
    page.get_by_text('finished', exact=False).first.wait_for()
    shot(page, 'mask-after')
    inside, outside = (int(w) for w in image.get_attribute('alt').split() if w.isdigit())
    before, after = Postcards(64, 64, seed=3)[40]['image'], pixels(image)
    differs = (to_uint8(before).astype(int) != after).any(-1)
    # of some hundred redrawn pixels one may, in 8 bits, come out just as it was
    assert (outside == 0 and inside > 50 and inside - 2 <= differs.sum() <= inside and
            not differs[:, :32].any()), (inside, outside, differs.sum())
    page.get_by_role('button', name='Mask all').click()                       # a mask over everything
    page.get_by_text('all of it is invented').wait_for()
    page.get_by_role('button', name='Clear').click()
    page.get_by_text('Nothing is masked').wait_for()
    canvas.focus()
    page.keyboard.press('ArrowRight'); page.keyboard.press('Space')
    image.wait_for()
    assert not page.errors, page.errors


NOISE = ("from ldm_nb.datasets.postcards import Postcards\nfrom ldm_nb.diffusion import Schedule\n"
         "from ldm_nb.lab.widgets import noise_slider",
         "noise_slider(Schedule(), Postcards(64, 64, seed=3)[40]['image'])")


def test_restart_with_a_panel_on_the_page(page, lab):
    write(lab.folder/'noise.ipynb', *NOISE)
    open_notebook(page, lab, 'noise.ipynb')
    run_all(page, 60)
    slider, image = page.get_by_role('slider').first, page.locator('img[alt^="the picture at t"]')
    menu(page, 'Kernel', 'Restart Kernel…')
    page.get_by_role('button',
                     name='Confirm Kernel Restart').or_(page.locator('.jp-Dialog .jp-mod-accept')).first.click()
    page.wait_for_timeout(1500)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=60*SECOND)
    if slider.count(): # the controls may stay; nobody answers them, and the line beneath says what to do
        slider.focus()
        page.keyboard.press('End')
        page.wait_for_timeout(500)
    assert (page.get_by_text('after a restart, run this cell again').count() and
            page.locator('.jp-OutputArea img[src^="data:image/jpeg"]').count())
    run_all(page, 60)
    slider.focus()
    assert '999' in changes(page, image, lambda: page.keyboard.press('End'))
    assert not page.errors, page.errors


def test_front_end_without_widgets(page, lab):
    # the extension does not load: the strip is there, and a line that says why
    page.route('**/jupyterlab-manager/**', lambda route: route.abort())
    write(lab.folder/'without.ipynb', *NOISE)
    open_notebook(page, lab, 'without.ipynb')
    run_all(page, 60)
    page.get_by_text('a front end with Jupyter widgets').first.wait_for() # a cell is done before its output is drawn
    assert not page.get_by_role('slider').count()
    assert page.locator('.jp-OutputArea img[src^="data:image/jpeg"]').is_visible()
    shot(page, 'without-widgets')


@pytest.fixture(scope='module')
def app(tmp_path_factory): # what `make app` serves
    folder = tmp_path_factory.mktemp('app')
    server = Server(['make', '-C', str(ROOT), 'app', 'PORT={port}', f'VENV={sys.prefix}', 'READY=1'],
                    folder, '/voila/static/voila.js')
    yield server
    server.stop()


def test_the_app(page, app):
    # Voila's page asks the web for icons; no panel has any
    page.route('https://cdn.jsdelivr.net/**', lambda route: route.fulfill(body=''))
    page.goto(app.url, timeout=90*SECOND)
    image = page.locator('img[alt^="the picture at t"]')
    image.wait_for(timeout=60*SECOND)
    page.get_by_role('slider').first.focus()
    assert '999' in changes(page, image, lambda: page.keyboard.press('End'))
    shot(page, 'app-noise')

    def tab(name): page.get_by_role('tab', name=name, exact=True).click()
    tab('Guidance')
    drawn = page.locator('img[alt^="w ="]')
    drawn.wait_for()
    page.get_by_role('slider').locator('visible=true').first.focus()
    for _ in range(10): page.keyboard.press('ArrowRight')  # ten moves during a run: the last one counts
    page.locator('img[alt^="w = 8,"]').wait_for()
    page.get_by_text('finished', exact=False).locator('visible=true').first.wait_for()
    assert drawn.get_attribute('alt').startswith('w = 8, ')
    seconds = changes_within(page, drawn, lambda: page.keyboard.press('ArrowRight'))
    print(f'app: preview after {seconds:.2f} s')
    assert seconds < 2*patience()
    tab('Layout')
    canvas, picture = page.locator('canvas.ldm-boxes'), page.locator('img[alt^="a picture of"]')
    picture.wait_for()
    changes(page, picture, lambda: drag(page, canvas, (.7, .5), (.9, .85)), 20)
    assert picture.get_attribute('alt').startswith('a picture of 2 boxes')
    tab('Inpainting')
    canvas, filled = page.locator('canvas.ldm-mask'), page.locator('img[alt^="filled"]')
    canvas.wait_for()
    drag(page, canvas, (.7, .4), (.95, .6))
    filled.wait_for()
    assert ', 0 outside' in filled.get_attribute('alt')
    shot(page, 'app-inpainting')
    assert not page.errors, page.errors
