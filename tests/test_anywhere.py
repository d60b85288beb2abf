"A notebook works from any working directory: it finds data and scripts by where the package is."
import ast
import json
import os

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def code_cells(path) -> list[str]:
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_no_cell_looks_beside_itself(path):
    # '../data' is another folder as soon as a notebook moves, or is opened from elsewhere
    wrong = [line for cell in code_cells(path)
             for line in cell.splitlines() if "'../" in line or '"../' in line or "'data/results" in line]
    assert wrong == [], 'ask ldm_nb.engine.files.data_path, or begin at ldm_nb.__file__'


@pytest.mark.parametrize('name', ['index', 'course/02_glossary'])
def test_a_notebook_runs_from_an_empty_folder(name, tmp_path, monkeypatch):
    # both read what is shipped: data, tables, other notebooks
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    nb = nbformat.read(ROOT/f'nbs/{name}.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if 'nbdev_export(' not in c.source]
    NotebookClient(nb, timeout=120, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert os.listdir(tmp_path) == []
    assert any(c.get('outputs') for c in nb.cells)


def test_data_named_by_the_environment(tmp_path, monkeypatch): # $LDM_NB_DATA comes first, the clone's own data after it
    from ldm_nb.engine.files import data_path
    (tmp_path/'results').mkdir()
    (tmp_path/'results/mine.json').write_text('{}')
    monkeypatch.setenv('LDM_NB_DATA', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert data_path('results', 'mine.json') == tmp_path/'results/mine.json'
    assert data_path('results', 'kills.json') == ROOT/'data/results/kills.json'
    with pytest.raises(FileNotFoundError, match='no results/none.json in .*'): data_path('results', 'none.json')


def without_encoding(path): # lines where a text file is opened in whatever encoding the system has
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(n, ast.Call) or {'encoding', None} & (keys := {k.arg for k in n.keywords}): continue
        name = n.func.attr if isinstance(n.func, ast.Attribute) else None
        bare = isinstance(n.func, ast.Name) and n.func.id == 'open'
        mode = n.args[1] if len(n.args) > 1 else next((k.value for k in n.keywords if k.arg == 'mode'), None)
        text = mode is None or isinstance(mode, ast.Constant) and 'b' not in str(mode.value)
        process = 'text' in keys and name in ('run', 'Popen')
        if name in ('read_text', 'write_text') or bare and text or process: yield n.lineno


def test_text_is_utf8_on_every_system():
    # on Windows it would be cp1252 otherwise
    files = [*(ROOT/'ldm_nb').rglob('*.py'), *(ROOT/'.ci').glob('*.py'), ROOT/'setup.py']
    assert len(files) > 50 and [f'{p.name}:{k}' for p in files for k in without_encoding(p)] == []
