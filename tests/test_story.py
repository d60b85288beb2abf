"`make check` passes on a good tree and fails on each kind of bad one: small copies, broken on purpose."
import base64
import importlib
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import run
from PIL import Image, ImageDraw

CHAPTERS = ('engine/00_files', 'engine/02_build', 'datasets/00_images', 'datasets/00a_pictures')
FILES, IMAGES = 'nbs/engine/00_files.ipynb', 'nbs/datasets/00_images.ipynb'


def script(tree, name, *words): return run(sys.executable, tree/'.ci'/f'{name}.py', *words, cwd=tree)


def source(cell) -> str: return ''.join(cell['source'])


def edit(path, f): # `f` changes the cells of a notebook; written as nbdev_clean writes
    nb = json.loads(path.read_text(encoding='utf-8'))
    f(nb['cells'])
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def exported(cells, holding='') -> dict: # the first exported cell that holds a text
    return next(c for c in cells
                if c['cell_type'] == 'code' and source(c).startswith('#| export\n') and holding in source(c))


def new_cell(text, id='made-to-fail', outputs=()) -> dict:
    return dict(cell_type='code', id=id, metadata={}, execution_count=None, outputs=list(outputs),
                source=text.splitlines(True))


def add_code(cells, text): cells.insert(-1, new_cell(text)) # before the last one


def add_notebook(tree, name, *texts): # of these cells, with an output, listed in the sidebar
    path = tree/f'nbs/{name}.ipynb'
    path.parent.mkdir(exist_ok=True)
    shown = dict(output_type='stream', name='stdout', text=['shown\n'])
    cells = [new_cell(text, f'c{k}', [shown]*(k == 0)) for k, text in enumerate(texts)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    with open(tree/'nbs/sidebar.yml', 'a') as f: f.write(f'          - {name}.ipynb\n')


def without_pictures(cells):
    for c in cells:
        if c['cell_type'] == 'code': c['outputs'] = [o for o in c['outputs'] if 'image/png' not in o.get('data', {})]


LINKS = '![](images/a.png) [first](engine/00_files.ipynb#saving) [out](https://x.org/y) [up](../LICENSE)'
INDEX = [
    dict(cell_type='markdown', id='a', metadata={}, source='# A title\n\n' + LINKS),
    dict(cell_type='code', id='b', metadata=dict(jupyter=dict(source_hidden=True)), execution_count=None,
         source='#| hide\nsecret = 1', outputs=[]),
    dict(cell_type='code', id='c', metadata={}, execution_count=None, source='1 + 1',
         outputs=[dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': '2'})])]


@pytest.fixture(scope='session')
def good(root, tmp_path_factory): # three notebooks of two parts, an index, all in order
    tree = tmp_path_factory.mktemp('tree')
    for d in ('nbs/images', 'nbs/engine', 'nbs/datasets', 'ldm_nb'): (tree/d).mkdir(parents=True)
    shutil.copytree(root/'.ci', tree/'.ci', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('settings.ini', 'LICENSE', 'ldm_nb/__init__.py', *(f'nbs/{c}.ipynb' for c in CHAPTERS)):
        shutil.copy(root/f, tree/f)
    (tree/'nbs/sidebar.yml').write_text(''.join(f'- {c}.ipynb\n' for c in ('index', *CHAPTERS)))
    (tree/'nbs/images/a.png').write_bytes(b'')
    for c in CHAPTERS:
        edit(tree/f'nbs/{c}.ipynb', without_pictures) # small, whatever the chapters grow to
        edit(tree/f'nbs/{c}.ipynb', lambda cells: cells.insert(
            -1, new_cell('print(1)', 'shows', [dict(output_type='stream', name='stdout', text=['1\n'])])))
    (tree/'nbs/index.ipynb').write_text(json.dumps(dict(cells=INDEX, metadata={}, nbformat=4, nbformat_minor=5)))
    for f in ('clean import nbdev_clean', 'doclinks import nbdev_export'):
        subprocess.run([sys.executable, '-c', f'from nbdev.{f} as f; f()'], cwd=tree, check=True)
    assert script(tree, 'readme').returncode == 0
    return tree


@pytest.fixture
def tree(good, tmp_path): return shutil.copytree(good, tmp_path/'tree')


@pytest.fixture(scope='session')
def story(root): # the check as a module, to be asked about one thing at a time
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(root/'.ci'))
        yield importlib.import_module('story')


def refuses(tree, *says): # the story check says all of this, and fails
    r = script(tree, 'story')
    assert r.returncode == 1, 'the story check lets it pass'
    for text in says: assert text in r.stderr, f'{text!r} is not said:\n{r.stderr}'


def passes(tree):
    r = script(tree, 'story')
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('words', ['story', 'notebooks check', 'readme --check', 'diagrams check'])
def test_this_tree(root, words):
    r = script(root, *words.split())
    assert r.returncode == 0, r.stderr


def test_good_tree_passes(tree):
    for words in (('story',), ('notebooks', 'check'), ('readme', '--check')):
        r = script(tree, *words)
        assert r.returncode == 0, r.stderr


def test_hidden_cells_are_folded(tree): # JupyterLab would show them open
    edit(tree/'nbs/index.ipynb', lambda cells: cells[1].update(metadata={}))
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'nbs/index.ipynb is not clean: run .ci/notebooks.py tidy' in r.stderr


# ---- what is exported ----

def test_not_exported(tree):
    edit(tree/FILES, lambda cells: exported(cells, 'def weights_hash')['source'].append('\n# one more line'))
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and 'ldm_nb/engine/files.py is not what its notebook exports: run nbdev_export' in r.stderr
    assert 'not clean' not in r.stderr


@pytest.mark.parametrize('name', ['datasets/images.py', 'engine/__init__.py'])
def test_edited_module(tree, name):
    with open(tree/'ldm_nb'/name, 'a') as f: f.write('# by hand\n')
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and f'ldm_nb/{name} is not what' in r.stderr


@pytest.mark.parametrize('name', ['stray.py', 'engine/stray.py', 'attic/__init__.py', 'engine/notes.txt'])
def test_file_without_notebook(tree, name):
    (tree/'ldm_nb'/name).parent.mkdir(exist_ok=True)
    (tree/'ldm_nb'/name).write_text('')
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and f'ldm_nb/{name} comes from no notebook' in r.stderr


@pytest.mark.parametrize('name', ['engine/build.py', 'datasets/__init__.py'])
def test_missing_module(tree, name):
    (tree/'ldm_nb'/name).unlink()
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and f'ldm_nb/{name} is missing' in r.stderr


def test_not_clean(tree):
    edit(tree/IMAGES, lambda cells: next(c for c in cells if c['cell_type'] == 'code').update(execution_count=7))
    r = script(tree, 'notebooks', 'check')
    assert r.returncode and f'{IMAGES} is not clean: run .ci/notebooks.py tidy' in r.stderr
    assert FILES not in r.stderr and 'exports' not in r.stderr


# ---- who imports whom ----

UP = 'engine.files imports datasets.images: ground may not import datasets'


@pytest.mark.parametrize('line, says', [
    ('from ldm_nb.datasets.images import to_float', UP), ('import ldm_nb.datasets.images', UP),
    ('from ldm_nb.datasets import images', UP),
    ('from ..datasets.images import to_float', UP), ('from ..datasets import images', UP),
    ('def f():\n    from ldm_nb.datasets.images import to_float', UP),
    ('import ldm_nb.engine.files', 'imports its own module'),
    ('from . import files', 'imports its own module'), ('import ldm_nb.nothing', 'which no notebook exports'),
    ('class Own(nn.Module): pass', 'holds no layer'),
    ('def f(name): return import_module(name)', 'imports a module by its name'),
    ('importlib.import_module("ldm_nb.core")', 'imports a module by its name')])
def test_imports_of_the_ground(tree, line, says):
    edit(tree/FILES, lambda cells: add_code(cells, f'#| export\n{line}'))
    refuses(tree, says, 'engine/00_files, cell')


def test_demo_cell_may_import_anything(tree):
    edit(tree/FILES, lambda cells: add_code(cells, 'from ldm_nb.datasets.images import to_float'))
    passes(tree)


def test_modules_of_others_may_be_imported_by_name(tree):
    edit(tree/FILES, lambda cells: add_code(cells, '#| export\ndef f(): return import_module("torchvision.datasets")'))
    passes(tree)


def test_circles(tree): # through a function, too, and with another module between
    edit(tree/'nbs/engine/02_build.ipynb',
         lambda cells: add_code(cells, '#| export\ndef f():\n    from ldm_nb.engine.files import atomic_path'))
    refuses(tree, 'a circle of imports: engine.build -> engine.files -> engine.build')
    edit(tree/'nbs/engine/02_build.ipynb', lambda cells: cells.pop(-2))
    add_notebook(tree, 'datasets/05_a', '#| default_exp datasets.a', '#| export\nimport ldm_nb.datasets.b')
    add_notebook(tree, 'datasets/06_b', '#| default_exp datasets.b', '#| export\nimport ldm_nb.datasets.c')
    add_notebook(tree, 'datasets/07_c', '#| default_exp datasets.c', '#| export\ndef f(): import ldm_nb.datasets.a')
    refuses(tree, 'a circle of imports: datasets.a -> datasets.b -> datasets.c -> datasets.a')


def arrows(story, **imports):
    # what is said where modules import others: name='a b', `name__function` for imports inside one
    modules = {}
    for key, others in imports.items():
        me, _, function = key.replace('_dot_', '.').partition('__')
        for k, other in enumerate(others.split()):
            modules.setdefault(other, story.Module(['somewhere']))
            modules.setdefault(me, story.Module(['somewhere'])).arrows.append(
                story.Arrow(other, 'somewhere', k, function or None))
    return '\n'.join(story.check_imports(modules))


@pytest.mark.parametrize('me, other', [
    ('core', 'paper.maps'), ('core', 'fast.compile'), ('training', 'engine.runs'), ('diffusion', 'datasets.images'),
    ('datasets.images', 'engine.cache'),
    ('engine.runs', 'paper.conditions'), ('paper.maps', 'metrics.reader'), ('metrics.judges', 'interop.unets'),
    ('interop.unets', 'fast.tiles'),
    ('fast.tiles', 'cli.train'), ('core', 'lab.canvas'), ('engine.seeds', 'layers'), ('beyond.flow', 'cli.recipes')])
def test_floors(story, me, other):
    assert 'may not import' in arrows(story, **{me.replace('.', '_dot_'): other})
    assert arrows(story, **{other.replace('.', '_dot_'): me}) == '', 'downwards is allowed'


@pytest.mark.parametrize('me, other',
                         [('samplers', 'diffusion'), ('samplers', 'unet'), ('samplers', 'core'), ('unet', 'diffusion'),
                          ('unet', 'samplers'), ('autoencoder', 'losses'), ('autoencoder', 'training'),
                          ('training', 'unet'), ('training', 'autoencoder'), ('training', 'core'),
                          ('training', 'attention'), ('training', 'embedders'), ('engine.runs', 'core'),
                          ('course.checks', 'fast.tiles'), ('cli.train', 'lab.watch'), ('lab.watch', 'course.checks')])
def test_arrows_that_must_not_be(story, me, other):
    for key in (me, f'{me}__f'):
        assert f'{me} must never import {other}' in arrows(story, **{key.replace('.', '_dot_'): other})


def test_doors(story): # addresses for users: from `metrics` upwards
    for me in ('core', 'engine_dot_runs', 'paper_dot_maps'):
        assert 'a door for users' in arrows(story, **{me: 'data'}), me
    assert arrows(story, cli_dot_train='data pretrained', metrics_dot_judges='data', data='datasets.folders',
                  pretrained='interop.pipelines') == ''


def test_exceptions(story): # lazily, in the functions named, one line each
    assert arrows(story, core__compile='fast.compile', core__export_onnx='interop.onnx',
                  request__check_memory='engine.cost') == ''
    for key, other in (('core__sample', 'fast.compile'), ('core__compile', 'interop.onnx'), ('request', 'engine.cost'),
                       ('core', 'fast.compile')):
        assert 'may not import' in arrows(story, **{key: other}), (key, other)
    assert 'core imports fast in 2 lines of compile; one is allowed' in arrows(story,
                                                                               core__compile='fast.compile fast.graphs')
    assert arrows(story, core__compile='fast.compile', fast_dot_compile='core') == '', 'an exception closes no circle'


# ---- how long the story is ----

def write_module(tree, name, lines): (tree/f'ldm_nb/{name}.py').write_text('\n'.join(lines) + '\n')


def test_sizes(tree):
    write_module(tree, 'short', ['x = 1']*260)
    write_module(tree, 'data', ['x = 1']*999) # a door
    write_module(tree, 'core', ['class LatentDiffusion:', *['    x = 1']*149])
    write_module(tree, 'training', ['class Trainer:', *['    x = 1']*149, *['# ' + 'w'*99]*4])
    passes(tree)
    write_module(tree, 'short', ['x = 1']*261)
    refuses(tree, 'short.py has 261 lines; a module of the story has at most 260')
    write_module(tree, 'short', ['x = 1'])
    write_module(tree, 'core', ['class LatentDiffusion:', *['    x = 1']*150])
    refuses(tree, 'LatentDiffusion has 151 lines, more than 150')
    write_module(tree, 'core', [])
    write_module(tree, 'training', ['class Trainer:', *['    x = 1']*150])
    refuses(tree, 'Trainer has 151 lines, more than 150')
    write_module(tree, 'training', [])
    for k in range(12): write_module(tree, f'm{k}', ['x = 1']*250)
    refuses(tree, 'the story has 3,0')
    for k in range(12): write_module(tree, f'm{k}', ['# ' + 'w'*99]*(k == 0) + ['x = 1']*50)
    passes(tree)
    write_module(tree, 'm0', ['# ' + 'w'*99]*9 + ['x = 1']*50)
    refuses(tree, 'lines of the story are over 100 columns, more than 1%: m0.py:1')


# ---- notebooks ----

@pytest.mark.parametrize('text, says', [
    ('#| eval: false\nx = 1', 'every cell is evaluated'), ('#| eval false\nx = 1', 'every cell is evaluated'),
    ('#| slow cuda\nx = 1', 'stand alone'),
    ('x = 1\n#| slow\n', 'below code'), ('import os\nx = 1', 'mixes imports'), ('x = (', 'is not Python')])
def test_cell_rules(tree, text, says):
    edit(tree/IMAGES, lambda cells: add_code(cells, text))
    refuses(tree, says)


def test_cells_that_are_fine(tree):
    for text in ('#| slow\nx = 1', '#| slow\n#| cuda\nx = 1', '%matplotlib inline\nimport os',
                 '#| hide\nimport os, re'):
        edit(tree/IMAGES, lambda cells: add_code(cells, text))
    passes(tree)


def test_notebook_rules(tree):
    nb = tree/IMAGES
    edit(nb, lambda cells: cells.insert(0, dict(cell_type='raw', id='r', metadata={},
                                                source=['---\n', 'skip_exec: true\n', '---'])))
    shutil.copy(nb, nb.with_name('02_twice.ipynb'))
    edit(nb, lambda cells: cells[-1].update(outputs=[dict(output_type='error', ename='E', evalue='',
                                                          traceback=['x'*1_300_000])]))
    refuses(tree, 'skip_exec', 'two notebooks export datasets.images: datasets/00_images and datasets/02_twice',
            'datasets/02_twice.ipynb is not in nbs/sidebar.yml', 'more than 1,200,000', 'output of an error')


def test_gradients_left_off_are_noticed(tree): # the next notebook of the same process would train nothing
    edit(tree/IMAGES, lambda cells: add_code(cells, '_ = torch.set_grad_enabled(False)'))
    refuses(tree, 'datasets/00_images leaves gradients off')
    edit(tree/IMAGES, lambda cells: add_code(cells, '_ = torch.set_grad_enabled(True)'))
    assert script(tree, 'story').returncode == 0


def test_a_notebook_lies_in_the_folder_of_its_module(tree):
    add_notebook(tree, 'engine/30_lost', '#| default_exp datasets.lost')
    add_notebook(tree, 'story/30_deep', '#| default_exp story.deep')
    add_notebook(tree, 'attic/00_old', 'x = 1')
    add_notebook(tree, '31_flat', 'x = 1')
    add_notebook(tree, 'story/32_fine', '#| default_exp fine')
    refuses(tree, 'engine/30_lost exports datasets.lost', 'story/30_deep exports story.deep',
            'no part of the house is called attic', '31_flat lies in nbs/ itself')
    assert '32_fine' not in script(tree, 'story').stderr


def test_one_notebook_may_export_into_two_modules(tree): # an import counts for the module that its cell goes to
    add_notebook(tree, 'datasets/08_two', '#| default_exp datasets.two', '#| export\nimport ldm_nb.engine.files',
                 '#| export engine.build\nimport ldm_nb.datasets.two')
    refuses(tree, 'datasets/08_two, cell 2: engine.build imports datasets.two: ground may not import datasets')


def test_sidebar(tree):
    with open(tree/'nbs/sidebar.yml', 'a') as f: f.write('- engine/99_gone.ipynb\n')
    refuses(tree, 'nbs/sidebar.yml lists engine/99_gone.ipynb, which is not there')


def test_order_of_reading(root, story): # the story first, numbers as numbers, the index last
    names = [story.house.address(p, root/'nbs') for p in story.house.notebooks(root/'nbs')]
    assert names[0] == 'story/00_start_here' and names[-1] == 'index'
    parts = list(dict.fromkeys(n.partition('/')[0] for n in names))[:-1]
    assert parts == [p for p in story.house.FOLDERS if p in parts]
    assert names.index('story/05_samplers') < names.index('story/06_unet') < names.index('story/10_attention')


def test_readme(tree):
    text = (tree/'README.md').read_text()
    assert ('(nbs/images/a.png)' in text and '(nbs/engine/00_files.ipynb#saving)' in text and
            '(https://x.org/y)' in text and '(LICENSE)' in text)
    assert 'secret' not in text and '1 + 1' in text
    (tree/'README.md').write_text(text + '\nby hand\n')
    r = script(tree, 'readme', '--check')
    assert r.returncode and 'run make readme' in r.stderr
    (tree/'nbs/images/a.png').unlink()
    r = script(tree, 'readme')
    assert r.returncode and 'nbs/images/a.png' in r.stderr
    (tree/'nbs/index.ipynb').unlink()
    r = script(tree, 'readme', '--check')
    assert r.returncode and 'no nbs/index.ipynb' in r.stderr


# ---- diagrams ----

@pytest.fixture(scope='session')
def diagrams(root):
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(root/'.ci'))
        yield importlib.import_module('diagrams')


def test_diagrams_are_what_the_script_draws(tree, diagrams):
    r = script(tree, 'diagrams')
    assert r.returncode == 1 and all(f'nbs/images/{name}.svg is not what' in r.stderr for name in diagrams.ALL)
    assert script(tree, 'diagrams', 'write').returncode == 0 and script(tree, 'diagrams', 'check').returncode == 0
    with open(tree/'nbs/images/unet.svg', 'a') as f: f.write(' ')
    r = script(tree, 'diagrams')
    assert r.returncode == 1 and 'unet.svg' in r.stderr and 'whole.svg' not in r.stderr


def test_every_diagram_has_a_background_and_is_shown(root, diagrams):
    assert len(diagrams.ALL) - len(diagrams.HERE) == 10 and set(diagrams.ALL) == set(diagrams.EMBEDDED)
    for name, chapter in diagrams.EMBEDDED.items():
        text = (root/f'nbs/images/{name}.svg').read_text(encoding='utf-8')
        assert '<rect id="background" width="100%" height="100%"/>' in text and '(prefers-color-scheme: dark)' in text
        sizes = [float(v) for v in re.findall(r'font-size[:="]+([\d.]+)', text)]
        assert min(sizes) >= 11.5, 'indices alone are smaller than 12 px'
        cells = json.loads((root/f'nbs/{chapter}.ipynb').read_text(encoding='utf-8'))['cells']
        shown = [c for c in cells if c['cell_type'] == 'markdown' and f'](../images/{name}.svg)' in source(c)]
        assert shown, f'{chapter} does not show {name}.svg'
    assert 'nbs/images/whole.svg' in (root/'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('draw, says', [
    (lambda d: d.box(50, 50, 40, 30, 'a long name'), 'in its box'),
    (lambda d: (d.box(50, 50, 60, 30, 'one'), d.box(80, 60, 60, 30, 'two')), 'lies on another'),
    (lambda d: d.text(180, 50, 'a label at the edge'), 'leaves the picture'),
    (lambda d: (d.box(50, 50, 60, 30, 'one'), d.text(60, 50, 'on it')), 'lies on something'),
    (lambda d: (d.box(50, 50, 60, 30, 'one'), d.arrow((5, 50), (150, 50))), 'crosses a box'),
    (lambda d: (d.text(80, 54, 'a label'), d.arrow((5, 50), (150, 50))), 'goes through')])
def test_a_bad_diagram_is_refused(diagrams, draw, says):
    d = diagrams.Diagram('made', 200, 100, 'a test')
    with pytest.raises(ValueError, match=says):
        draw(d)
        d.svg()


def test_run_keeps_outputs(tree):
    # `make notebooks` on a tiny chapter: executed in its own folder, cleaned, exported; a failing one is left alone
    nb = tree/IMAGES
    edit(nb, lambda cells: cells.__setitem__(slice(None), [c for c in cells if source(c).startswith('#| default_exp')]))
    for text in ('#| export\ndef here(): return __name__', 'import os', 'os.path.basename(os.getcwd())'):
        edit(nb, lambda cells: add_code(cells, text))
    edit(nb, lambda cells: [c.update(id=f'c{i}') for i, c in enumerate(cells)])
    r = script(tree, 'notebooks', 'run', '00_images') # a bare stem, where one folder alone has it
    assert r.returncode == 0, r.stderr
    assert "'datasets'" in nb.read_text() and 'def here' in (tree/'ldm_nb/datasets/images.py').read_text()
    assert list(json.loads((tree/'data/results/chapter-times.json').read_text())) == ['datasets/00_images']
    assert script(tree, 'notebooks', 'check').returncode == 0
    edit(nb, lambda cells: add_code(cells, '1/0'))
    before = nb.read_bytes()
    r = script(tree, 'notebooks', 'run', 'datasets/00_images')
    assert r.returncode and 'ZeroDivisionError' in r.stderr and nb.read_bytes() == before
    shutil.copy(nb, tree/'nbs/engine/00_images.ipynb')
    for name, says in (('nothing', 'no notebook nothing in nbs/; there are engine/00_files'),
                       ('00_images', 'may be any of engine/00_images, datasets/00_images')):
        r = script(tree, 'notebooks', 'run', name)
        assert r.returncode and says in r.stderr, r.stderr


# ---- times ----

CHAPTER = ('# A title\n\n**Time**: reading 0 min, exercises 0 min, machine 0 min. **Paper**: §1.', 'word '*290,
           '## Exercises\n\n' + 'not counted '*500,
           '### Exercise 3.1: One\n\nDifficulty ●○○○○ · importance ●○○○○ · 8 minutes',
           '## Recap\n\n' + 'word '*4 + '`code` $formula$ [a link](to/a/long_address.ipynb)')


def timed(tree, *texts, code='x = 1\n'*80, seconds=130): # a chapter of the story, and how long it ran
    markdown = [dict(cell_type='markdown', id=f'm{k}', metadata={}, source=[t]) for k, t in enumerate(texts)]
    (tree/'nbs/story').mkdir(exist_ok=True)
    (tree/'nbs/story/03_made.ipynb').write_text(json.dumps(dict(
        cells=[markdown[0], new_cell(code), new_cell('#| hide\n' + code, 'h'), *markdown[1:]], metadata={}, nbformat=4,
        nbformat_minor=5), indent=1, ensure_ascii=False))
    (tree/'data/results').mkdir(parents=True, exist_ok=True)
    (tree/'data/results/chapter-times.json').write_text(json.dumps({'story/03_made': dict(processor_seconds=seconds)}))
    row = '| [03 A title](nbs/story/03_made.ipynb) | it | 4 | 8 | 2 |'
    (tree/'README.md').write_text(row)


def test_times_are_counted_and_written(tree):
    timed(tree, *CHAPTER)
    nb = tree/'nbs/story/03_made.ipynb'
    r = script(tree, 'times')
    assert r.returncode == 1 and 'says (0, 0, 0) minutes and takes (4, 8, 2)' in r.stderr, r.stderr
    r = script(tree, 'times', 'write')
    assert r.returncode == 0 and '**Time**: reading 4 min, exercises 8 min, machine 2 min. **Paper**' in nb.read_text()
    assert '0.1 h to read, 0.1 h of exercises, 0.2 h in all' in r.stdout
    nb.write_text(nb.read_text().replace('reading 4 min', 'reading 6 min'))
    assert script(tree, 'times').returncode == 0, 'two minutes off are let pass'
    nb.write_text(nb.read_text().replace('reading 6 min', 'reading 7 min'))
    assert script(tree, 'times').returncode == 1


@pytest.mark.parametrize('edit_it, says', [
    (lambda tree, t: timed(tree, t[0].replace('**Time**', 'Time'), *t[1:]), 'has no line "**Time**'),
    (lambda tree, t: timed(tree, *t, '## Exercises', '### Exercise 3.2: Two'), '1 exercises without'),
    (lambda tree, t: timed(tree, *t, 'word '*90_000), '10.1 hours to read the story, at most 9'),
    (lambda tree, t: timed(tree, *t, *[t[2], t[3].replace('8 min', '99 min')]*9), '15.1 hours with exercises'),
    (lambda tree, t: (timed(tree, *t), (tree/'README.md').write_text('')), 'README says None minutes of story/03_made'),
    (lambda tree, t: (timed(tree, *t), (tree/'data/results/chapter-times.json').unlink()), 'was never timed')])
def test_dishonest_times_are_refused(tree, edit_it, says):
    edit_it(tree, CHAPTER)
    r = script(tree, 'times', 'write')
    assert r.returncode == 1 and says in r.stderr, r.stderr


# ---- pictures of outputs ----

def picture(im) -> dict: # an output that shows it
    file = io.BytesIO()
    im.save(file, 'PNG')
    return dict(output_type='display_data', metadata={},
                data={'image/png': base64.b64encode(file.getvalue()).decode() + '\n', 'text/plain': 'a figure'})


def test_pictures_get_smaller_once(tree):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((200, 200))
    curve = Image.new('RGBA', (300, 200), 'white')
    ImageDraw.Draw(curve).line([(k, 100 + 80*np.sin(k/20)) for k in range(300)], (31, 119, 180, 255), 3)
    glass = Image.fromarray(rng.integers(0, 256, (20, 20, 4), dtype=np.uint8), 'RGBA')
    edit(tree/IMAGES, lambda cells: cells.insert(-1, new_cell('x', 'pictures', map(picture, (photo, curve, glass)))))
    cells = lambda: json.loads((tree/IMAGES).read_text())['cells']
    outputs = lambda: next(c['outputs'] for c in cells() if c['id'] == 'pictures')
    assert script(tree, 'notebooks', 'tidy').returncode == 0
    before = outputs()
    assert all('image/png' in o['data'] for o in before), 'those that are named alone'
    r = script(tree, 'notebooks', 'tidy', '00_images')
    assert r.returncode == 0 and 'bytes smaller' in r.stdout, r.stderr
    after = outputs()
    assert [set(o['data']) - {'text/plain'} for o in after] == [{'image/jpeg'}, {'image/png'}, {'image/png'}]
    shown = [Image.open(io.BytesIO(base64.b64decode(v))) for o in after for k, v in o['data'].items() if 'image' in k]
    assert [im.mode for im in shown] == ['RGB', 'P', 'RGBA']
    for old, new, most in zip((photo, curve, glass), shown, (8, 1, 0)):
        assert np.abs(np.asarray(old.convert('RGBA')).astype(int) - np.asarray(new.convert('RGBA'))).mean() <= most
    assert after[2] == before[2]
    r = script(tree, 'notebooks', 'tidy', 'all')
    assert r.returncode == 0 and 'smaller' not in r.stdout and outputs() == after
    assert script(tree, 'notebooks', 'check').returncode == 0


def test_another_nbdev_that_exports_something_else_is_noticed(root, tmp_path):
    sys.path.insert(0, str(root/'.ci'))
    try: from nbdev3 import compare
    finally: sys.path.pop(0)
    new, old = (shutil.copytree(root/'ldm_nb/fast', tmp_path/k) for k in ('new', 'old'))
    for p in (new, old): shutil.copy(root/'ldm_nb/_modidx.py', p)
    assert compare(new, old) == []
    with open(new/'tiles.py', 'a', encoding='utf-8') as f: f.write('# another line')
    (new/'graphs.py').unlink()
    index = (new/'_modidx.py').read_text(encoding='utf-8')
    (new/'_modidx.py').write_text(index.replace("'ldm_nb.fast.tiles.", "'ldm_nb.fast.tile.", 1), encoding='utf-8')
    wrong = ['graphs.py: only here', 'tiles.py: other code', '_modidx.py: other names in ldm_nb.fast.tiles']
    assert compare(new, old) == wrong
