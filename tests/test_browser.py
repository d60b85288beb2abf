"""The panels in a real browser: Debian's chromium, driven by playwright, against a JupyterLab and a Voila that are started here, on this machine alone.
Screenshots stay in runs/screens. Without chromium or playwright these tests are skipped, and say so."""
import io
import json
import os
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
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
try: from playwright.sync_api import sync_playwright
except ImportError: sync_playwright = None
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason='no chromium here, so no panel was seen in a browser; on Debian: apt install chromium'),
    pytest.mark.skipif(sync_playwright is None, reason="no playwright here, so no panel was seen in a browser; pip install -e '.[dev]'")]
SCREENS = ROOT/'runs/screens'
SECOND = 1000 # playwright counts milliseconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Server: # a Jupyter server of our own; only what it started is ended
    def __init__(self, words: list, folder, health: str, **env):
        self.port, self.log = free_port(), open(folder/'server.log', 'w+')
        env = os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), JUPYTER_CONFIG_DIR=str(folder/'config'),
                                IPYTHONDIR=str(folder/'ipython'), JUPYTER_RUNTIME_DIR=str(folder/'runtime')) | env
        self.process = subprocess.Popen([sys.executable, '-m', *words, f'--port={self.port}'], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=subprocess.STDOUT, start_new_session=True)
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
    return ['jupyterlab', '--no-browser', '--ip=127.0.0.1', '--allow-root', '--IdentityProvider.token=', '--ServerApp.password=', '--ServerApp.port_retries=0',
            f'--ServerApp.root_dir={folder/"nbs"}', f'--LabApp.user_settings_dir={folder/"settings"}', f'--LabApp.workspaces_dir={folder/"workspaces"}']


def write(path, *cells): # a notebook of code cells
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)


@pytest.fixture(scope='module')
def browser():
    SCREENS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                                                              '--disable-component-update', '--disable-sync'])
        yield b
        b.close()


@pytest.fixture(scope='module')
def lab(tmp_path_factory): # every cell stays in the page: this version takes those that are out of sight out of it
    folder = tmp_path_factory.mktemp('lab')
    (folder/'nbs').mkdir()
    settings(folder, notebook__tracker=dict(windowingMode='none'), apputils__notification=dict(fetchNews='false', checkForUpdates=False))
    server = Server(lab_words(folder), folder, '/api/status')
    server.folder = folder/'nbs'
    yield server
    server.stop()


@pytest.fixture
def page(browser): # a page whose errors fail the test
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.errors = []
    page.on('console', lambda m: page.errors.append(f'{m.text} ({m.location.get("url", "")})') if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.set_default_timeout(30*SECOND)
    yield page
    page.close()


def open_notebook(page, lab, name: str): # and wait for its kernel
    page.goto(f'{lab.url}/lab/tree/{name}?reset')
    page.locator('.jp-Notebook').wait_for(timeout=60*SECOND)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=60*SECOND)


def menu(page, *items: str):
    page.locator('#jp-MainMenu').get_by_text(items[0], exact=True).click()
    for item in items[1:]: page.locator('.lm-Menu').get_by_text(item, exact=True).click()


def run_all(page, seconds: float): # through the menu, to the last cell; fails on a cell that failed
    menu(page, 'Run', 'Run All Cells')
    prompts = page.locator('.jp-Notebook .jp-CodeCell .jp-InputPrompt')
    page.wait_for_function('''() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].filter(c => c.querySelector('.cm-content').textContent.trim()).every(
        c => /\\[\\d+\\]/.test(c.querySelector('.jp-InputPrompt').textContent))''', timeout=seconds*SECOND)
    failed = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"], .jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')
    assert prompts.count() and not failed.count(), failed.first.inner_text()


def shot(page, name: str): page.screenshot(path=SCREENS/f'{name}.png')


def pixels(image) -> np.ndarray: # of an <img> of the page, (h, w, 3)
    data = image.evaluate('''async e => { const b = await (await fetch(e.src)).blob();
        return await new Promise(r => { const f = new FileReader(); f.onload = () => r(f.result.split(',')[1]); f.readAsDataURL(b) }) }''')
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


def test_noise_slider_of_chapter_06(page, lab):
    shutil.copy(ROOT/'nbs/06_diffusion.ipynb', lab.folder)
    open_notebook(page, lab, '06_diffusion.ipynb')
    run_all(page, 150)
    slider, image = page.get_by_role('slider').first, page.locator('img[alt^="the picture at t"]')
    image.scroll_into_view_if_needed()
    clean = pixels(image)
    shot(page, '06-noise-before')
    slider.focus()
    assert '999' in changes(page, image, lambda: page.keyboard.press('End'))
    drowned = pixels(image)
    shot(page, '06-noise-after')
    assert abs(drowned - clean).mean() > 30 and np.corrcoef(clean.ravel(), drowned.ravel())[0, 1] < .2
    assert 't = 998' in changes(page, image, lambda: page.keyboard.press('ArrowLeft'))
    box = slider.locator('xpath=ancestor::*[contains(@class, "noUi-target")]').bounding_box()
    changes(page, image, lambda: page.mouse.click(box['x'] + box['width']*.25, box['y'] + box['height']/2))      # with the mouse
    assert not page.errors, page.errors
