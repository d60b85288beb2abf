"`import ldm_nb.core` does nothing: no file read or written, no folder made, no socket opened, nothing heavy imported."
import re
import sys
import textwrap
from pathlib import Path

import ldm_nb
from conftest import run

# runs in a process of its own: notes what Python's audit hook says while a statement runs, then prints
# whatever is not the loading of code
WATCH = textwrap.dedent('''
    import os, site, sys, sysconfig
    code = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *site.getsitepackages()}
    allowed = [os.path.realpath(p) for p in code] + ['/proc', '/sys', '/etc', '/dev', '/usr', '/opt']
    package, bad = os.path.realpath(sys.argv[1]), []
    data = os.path.join(os.path.dirname(package), 'data')
    changes = ('os.mkdir', 'os.rename', 'os.remove', 'os.link', 'os.symlink', 'shutil.copyfile', 'tempfile.mkstemp',
               'tempfile.mkdtemp', 'urllib.Request')
    inside = lambda path, folder: path == folder or path.startswith(folder + os.sep)
    def opened(path, mode, flags):
        if not isinstance(path, (str, bytes)): return # a file already open
        path = os.path.realpath(os.fsdecode(path))
        flagged = mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        writes = isinstance(mode, str) and set(mode) & set('wax+') or flagged
        if path == '/dev/null': return
        if writes: bad.append(f'writes {path}')
        elif inside(path, package):
            if not path.endswith(('.py', '.pyc')): bad.append(f'reads {path}')
        elif path.endswith(os.path.join('ldm_nb.egg-info', 'entry_points.txt')):
            return # of an editable install: torch looks for its plugins in all of these
        elif inside(path, data) or path.endswith(('.safetensors', '.pt')) or not any(inside(path, a) for a in allowed):
            bad.append(f'reads {path}')
    def hook(event, args):
        if event == 'open': opened(*args)
        elif event.startswith('socket.') and event != 'socket.gethostname': bad.append(f'{event} {args[1:]}')
        elif event in changes: bad.append(f'{event} {args}')
    sys.path.insert(0, os.path.dirname(package))
    sys.addaudithook(hook)
    exec(sys.argv[2])
    heavy = ('accelerate', 'transformers', 'diffusers', 'ipywidgets', 'anywidget', 'matplotlib.pyplot', 'fastcore',
             'nbdev', 'sklearn', 'skimage')
    pulled = [m for m in heavy if m in sys.modules]
    pulled += sorted(m for m in sys.modules if m.startswith(('ldm_nb.fast', 'ldm_nb.lab', 'ldm_nb.cli')))
    print('\\n'.join(sorted(set(bad)) + [f'imports {m}' for m in pulled]))
''')


def watched(root, folder, statement) -> list[str]: # what went wrong while it ran in an empty folder, also its home
    r = run(sys.executable, '-B', '-c', WATCH, root/'ldm_nb', statement, cwd=folder, HOME=str(folder),
            XDG_CACHE_HOME=str(folder/'cache'))
    assert r.returncode == 0, r.stderr
    assert not list(folder.iterdir()), f'left behind: {list(folder.iterdir())}'
    return r.stdout.split('\n')[:-1] if r.stdout.strip() else []


def test_import_of_core_is_pure(root, tmp_path):
    assert watched(root, tmp_path, 'import ldm_nb.core') == []


def test_the_watch_notices(root, tmp_path): # the test above can fail
    def seen(statement): return ' '.join(watched(root, tmp_path, statement))
    assert 'settings.ini' in seen(f'open({str(root/"settings.ini")!r}).close()')
    assert 'writes' in seen('p = "x"; open(p, "w").close(); os.unlink(p)')
    assert 'os.mkdir' in seen('os.mkdir("y"); os.rmdir("y")')
    assert 'socket' in seen('import socket; socket.socket().close()')
    assert 'imports matplotlib.pyplot' in seen('import types; sys.modules["matplotlib.pyplot"] = types.ModuleType("x")')
    assert 'imports ldm_nb.fast' in seen('import ldm_nb.fast')


def test_every_module_imports(root, tmp_path): # recipes too, and none needs the tools that make the notebooks
    files = [p.relative_to(root).with_suffix('') for p in sorted((root/'ldm_nb').rglob('*.py')) if p.stem[0] != '_']
    names = ['.'.join(p.parts) for p in files]
    assert {'ldm_nb.core', 'ldm_nb.engine.cache', 'ldm_nb.cli.train', 'ldm_nb.data'} <= set(names)
    bad = watched(root, tmp_path, 'import ' + ', '.join(names))
    assert not [b for b in bad
                if b.split()[1] in ('fastcore', 'nbdev', 'diffusers', 'ipywidgets') or b.split()[0] != 'imports'], bad

def test_modules_import_each_other_by_relative_names(): # a copy of the package under another name is then whole
    for p in Path(ldm_nb.__file__).parent.rglob('*.py'):
        assert not re.search(r'^from ldm_nb\b', p.read_text(), re.M), f'{p}: an import that the export left absolute'
