"What the tests share: where the tree is, how to run the commands, and a browser."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try: from playwright.sync_api import sync_playwright
except ImportError: sync_playwright = None

ROOT = Path(__file__).resolve().parent.parent
SCREENS = ROOT/'runs/screens' # pictures of pages that the tests leave
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
NO_BROWSER = ('no chromium here (Debian: apt install chromium)' if CHROMIUM is None else # '' where there is one
              "no playwright here (pip install -e '.[dev]')" if sync_playwright is None else '')


@pytest.fixture(scope='session')
def root() -> Path: return ROOT


@pytest.fixture(scope='module')
def browser(): # asks nothing of the network
    SCREENS.mkdir(parents=True, exist_ok=True)
    quiet = ('background-networking', 'component-update', 'sync', 'gpu')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM,
                              args=['--no-sandbox', '--no-first-run', *(f'--disable-{k}' for k in quiet)])
        yield b
        b.close()


def run(*words, cwd=None, timeout=300, **env
    ) -> subprocess.CompletedProcess: # a program and its arguments; stdout and stderr as text
    return subprocess.run([str(w) for w in words], cwd=cwd, env=os.environ | {'PYTHONUNBUFFERED': '1'} | env, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)


def command(name: str) -> list[str]: # `ldm-train` as installed beside this Python, or else what it calls
    installed = Path(sys.executable).with_name(name)
    if installed.is_file(): return [str(installed)]
    return [sys.executable, '-m', f'ldm_nb.cli.{name.removeprefix("ldm-")}']


def refused(r: subprocess.CompletedProcess
    ) -> str: # the one line that a command which refuses its input must leave on stderr
    assert r.returncode > 0, f'exit {r.returncode} for bad input\n{r.stdout}\n{r.stderr}'
    assert 'Traceback' not in r.stderr, r.stderr
    lines = [o for o in r.stderr.splitlines() if re.match(r'(\S+: )?error: ', o)]
    assert len(lines) == 1 and len(lines[0]) > 30, f'expected one line that begins with "error: ":\n{r.stderr}'
    return lines[0]


# few tests that take long: begun last they would run alone, while the other worker is done
LONG = [f'test_{o}.py' for o in '''processes explainer commands site onnx explainer_core browser first_stage story runs
    breaking compvis evaluate exercises pretrained api cache strangers damage'''.split()]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
