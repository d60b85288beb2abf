"What differs between systems, simulated where this one is another."
import ctypes, os, signal, sys
import pytest, torch
from ldm_nb.engine import feeding, files
from ldm_nb.engine.devices import keep_memory

def without(monkeypatch, *names): # of the environment
    for k in names: monkeypatch.delenv(k, raising=False)

def test_a_cache_is_found_everywhere(monkeypatch, tmp_path):
    without(monkeypatch, 'LDM_NB_CACHE', 'XDG_CACHE_HOME', 'HOME', 'USERPROFILE')
    assert files.cache_folder().name.startswith('ldm_nb') # HOME is unset
    monkeypatch.setenv('HOME', str(tmp_path))
    assert files.cache_folder() == tmp_path/'.cache/ldm_nb'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert files.cache_folder() == tmp_path/'xdg/ldm_nb'
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path/'mine'))
    assert files.cache_folder() == tmp_path/'mine'

def test_a_home_that_cannot_be_written_costs_a_word(monkeypatch, tmp_path):
    without(monkeypatch, 'LDM_NB_CACHE')
    (tmp_path/'file').touch() # stands for a folder on a disk that is mounted read-only, which root could write
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'/'cache'))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    with pytest.warns(UserWarning, match='LDM_NB_CACHE names another place'): folder = files.cache_folder()
    assert folder.parent == tmp_path and files.writable_folder(folder) == folder
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path/'file')) # what was asked for by name is not replaced
    with pytest.raises(OSError, match=f'cannot write .*file.*{files.CACHE_ELSEWHERE}'):
        with files.atomic_path(files.cache_folder()/'a') as p: p.write_text('x', encoding='utf-8')

def test_windows_holds_an_open_file(monkeypatch, tmp_path):
    refusals, real = [1, 1], os.replace
    def replace(a, b):
        if refusals: raise PermissionError(13, 'in use', str(a), refusals.pop(), str(b))
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError, match='cannot write .*a'), files.atomic_path(tmp_path/'a') as p: p.touch() # at once
    refusals.append(1)
    monkeypatch.setattr(sys, 'platform', 'win32')
    with files.atomic_path(tmp_path/'a') as p: p.write_text('x', encoding='utf-8')
    assert [p.name for p in tmp_path.iterdir()] == ['a']

@pytest.mark.parametrize('error', [AttributeError('macOS and musl have no mallopt'), TypeError('Windows: no name')])
def test_no_mallopt(monkeypatch, error):
    def library(name): raise error
    monkeypatch.setattr(ctypes, 'CDLL', library)
    assert keep_memory() is False

@pytest.mark.parametrize('system', ['darwin', 'win32'])
def test_without_a_safe_fork_batches_are_prepared_here(monkeypatch, system):
    if system == 'win32': monkeypatch.setattr(feeding.mp, 'get_all_start_methods', lambda: ['spawn'])
    monkeypatch.setattr(sys, 'platform', system)
    batch = lambda step, rows: torch.tensor([step, os.getpid()])
    with pytest.warns(UserWarning, match='no safe fork'):
        rows = list(feeding.feed(batch, [slice(0, 2)], 3, workers=2))
    assert [r.tolist() for r in rows] == [[k, os.getpid()] for k in range(3)]

def test_signals_that_windows_lacks(monkeypatch):
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.delattr(signal, 'SIGHUP')
    try: feeding.ignore_signals(0)
    finally:
        for s, f in old.items(): signal.signal(s, f)

def test_the_longest_name_and_any_bytes(tmp_path):
    for name in ('n'*255, 'ä'*127, os.fsdecode(b'\xff')):
        with files.atomic_path(tmp_path/name) as p: p.touch()
        assert (tmp_path/name).is_file()
    with pytest.raises(OSError, match='cannot write'), files.atomic_path(tmp_path/('n'*256)) as p: p.touch()
