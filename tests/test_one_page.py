"Chapter 01 is short, needs no more of this package than data and a judge, and may be interrupted and run again."
import ast
import contextlib
import importlib.util
import io
import json
import re

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope='module')
def cells():
    spec = importlib.util.spec_from_file_location('one_page', ROOT/'tests/prove/one_page.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.code_cells(3)


def test_length_and_imports(cells):
    lines = [line for c in cells for line in c.splitlines() if line.strip() and not line.startswith('#')]
    assert len(lines) <= 140 and max(map(len, lines)) <= 100
    froms = [n for c in cells for n in ast.walk(ast.parse(c)) if isinstance(n, ast.ImportFrom)]
    assert {n.module for n in froms if n.module.startswith('ldm_nb')} == {'ldm_nb.data', 'ldm_nb.metrics.reader'}


def test_interrupted_and_run_again(cells, monkeypatch):
    # each cell twice; the first time training is interrupted at its third step
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setattr(plt, 'show', lambda *a, **k: None)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for c in cells:
            if c.startswith('train('):
                step, count = torch.optim.Adam.step, []
                def interrupted(*a, **k):
                    count.append(1)
                    if len(count) == 3: raise KeyboardInterrupt
                    return step(*a, **k)
                with monkeypatch.context() as m:
                    m.setattr(torch.optim.Adam, 'step', interrupted)
                    with pytest.raises(KeyboardInterrupt): exec(c, names)
            else: exec(c, names)
            exec(c, names)
            plt.close('all')
    assert names['seed'] == 3 and said.getvalue().count('season right') == 2
    assert names['x'].shape == (200, 3, 64, 64) and torch.isfinite(names['z']).all()


def test_lines_that_later_chapters_replace(cells): # those that they quote are there; `...` stands for anything
    page, quoted = '\n'.join(cells).replace('seed = 3', 'seed = 0'), []
    for p in sorted((ROOT/'nbs/story').glob('*.ipynb')):
        prose = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells']
                 if c['cell_type'] == 'markdown']
        said = [line for t in prose for line in t.splitlines() if line.startswith('**Chapter 01**')]
        assert len(said) <= 1, p.name
        for line in said:
            first = re.findall(r'`([^`]+)`', line)[:1]
            quoted += first
            assert all(part in page for q in first for part in q.split('...')), f'{p.name}: {first}'
    assert len(quoted) >= 13
