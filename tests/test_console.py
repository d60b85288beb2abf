"""What ends a command: mistakes, bad bytes, signals, a reader that is gone, files that cannot be written; and that what
draws leaves the rest as it was."""
import copy
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import command
from ldm_nb.cli.common import guarded, writable_file
from ldm_nb.cli.evaluate import main as evaluate_command
from ldm_nb.cli.sample import main as sample_command
from ldm_nb.course.grading import main as grading_command
from PIL import Image
from prove.arguments import COMMANDS, globals_now, models, prove, workplace


@pytest.fixture(scope='module')
def toys(): return models()


def ended(capsys, main, *words): # exit code, and the lines of stderr
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    return e.value.code, capsys.readouterr().err.splitlines()


# ---- the mechanism ----

@pytest.mark.parametrize('error, code, says', [
    (ValueError('no\n such'), 2, 'error: no such'),
    (OSError(28, 'No space left on device', 'x.png'), 2, 'x.png: No space'),
    (MemoryError(), 2, 'not enough memory'), (RuntimeError("can't allocate memory: 9 bytes"), 2, 'not enough memory'),
    (KeyboardInterrupt(), 130, 'interrupted; the words'), (ValueError('x'*9000), 2, ' ... ')], ids=str)
def test_what_ends_a_command(capsys, error, code, says):
    def main(argv): raise error
    found, lines = ended(capsys, lambda argv: guarded(main, argv, 'the words'))
    assert found == code and len(lines) == 1 and says in lines[0] and len(lines[0]) < 2100


def test_sigterm_ends_a_command(capsys):
    def main(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    before = signal.getsignal(signal.SIGTERM)
    code, lines = ended(capsys, lambda argv: guarded(main, argv, 'the words'))
    assert (code == 143 and lines == ['error: stopped by SIGTERM; the words'] and
            signal.getsignal(signal.SIGTERM) == before)


def test_a_bug_is_not_hidden():
    def main(argv): raise RuntimeError('shapes differ')
    with pytest.raises(RuntimeError, match='shapes differ'): guarded(main, [])


def test_bytes_of_another_encoding(capsys, tmp_path):
    for main, words in ((sample_command, ['caf\udce9']), (evaluate_command, ['--out', tmp_path/'\udce9.json']),
                        (grading_command, ['grade', '\udcff'])):
        code, lines = ended(capsys, main, *words)
        assert code == 2 and len(lines) == 1 and 'not UTF-8' in lines[0]


@pytest.mark.parametrize('name, says', [
    ('', 'empty word'), ('nowhere/x.png', 'no folder'), ('null.png', 'a device'), ('lost.png', 'is not there'),
    ('folder.png', 'is a folder'), ('n'*300 + '.png', 'too long'), ('x.txt', 'e.g. x.png')])
def test_out_is_tried_before_work(capsys, tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'folder.png').mkdir()
    for link, to in (('null.png', '/dev/null'), ('lost.png', 'gone/x.png')): (tmp_path/link).symlink_to(to)
    before = sorted(os.listdir())
    code, lines = ended(capsys, sample_command, 'dusk', '--model', 'no-such-model', '--out', name) # before the model
    assert code == 2 and len(lines) == 1 and says in lines[0]
    assert sorted(os.listdir()) == before and not os.path.isfile('/dev/null')


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert COMMANDS and writable_file(tmp_path/('n'*246 + '.png')) # the longest name, tried and removed
    from ldm_nb.cli.common import a_name, a_path
    assert (a_path('~/x'), a_name('photos+~/y')) == (tmp_path/'x', f'photos+{tmp_path}/y')


def test_a_reader_that_is_gone(tmp_path): # `| head -1`, and Ctrl-C, of real processes
    words = [*command('ldm-sample'), '--help']
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
    p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    p.stdout.close() # nobody reads a line
    assert p.stderr.read() == b'' and p.wait(60) == 141
    p = subprocess.Popen([*command('ldm-sample'), 'dusk', '--n', '500', '--out', str(tmp_path/'x.png')],
                         stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    while p.poll() is None:
        p.send_signal(signal.SIGINT)
        try: p.wait(3)
        except subprocess.TimeoutExpired: pass
    said = p.stderr.read()
    assert p.returncode in (130, -signal.SIGINT) and 'checkpoint' not in said and not (tmp_path/'x.png').exists()
    if p.returncode == 130: assert 'no image was written' in said


# ---- pictures of the command line ----

def test_a_photograph_is_fitted(capsys, toys, tmp_path):
    toys['text'][0].save_pretrained(tmp_path/'toy')
    Image.linear_gradient('L').resize((1920, 1080)).convert('RGB').save(tmp_path/'photo.jpg')
    words = ['a house', '--model', tmp_path/'toy', '--init', tmp_path/'photo.jpg', '--strength', '.5', '--n', 1,
             '--steps', 2, '--device', 'cpu']
    for size, says in (([], '24x40'), (['--size', '32x48'], '32x48'), (['--size', '64'], '64x64')):
        sample_command([str(w) for w in (*words, *size, '--out', tmp_path/'x.png')])
        assert f'1080x1920, scaled and cut to {says}' in capsys.readouterr().out
    (tmp_path/'half.jpg').write_bytes((tmp_path/'photo.jpg').read_bytes()[:9000])
    code, lines = ended(capsys, sample_command, *words, '--init', tmp_path/'half.jpg', '--out', tmp_path/'y.png')
    assert code == 2 and '--init: ' in lines[0] and 'damaged' in lines[0] and not (tmp_path/'y.png').exists()


# ---- what draws leaves the rest alone ----

@pytest.mark.parametrize('name', ['text', 'inpaint', 'classes'])
def test_sample_leaves_everything_as_it_was(toys, name):
    ldm, asked, _ = toys[name]
    ldm = copy.deepcopy(ldm).train()
    ldm.autoencoder.eval() # a mixture of modes, as in a training
    before = globals_now(ldm)
    for how in (dict(), dict(sampler='ddpm'), dict(init=torch.zeros(3, 32, 32), strength=.5, sampler='euler_a')):
        ldm.sample(**asked, steps=3, **how)
        assert globals_now(ldm) == before
    steps = ldm.stream(**asked, steps=3)
    next(steps)
    assert globals_now(ldm) == before # also between two steps
    del steps
    was, ldm.net.forward = ldm.net.forward, lambda z, *_: torch.full_like(z, float('nan'))
    with pytest.raises(ValueError, match='not finite'): ldm.sample(**asked, steps=2)
    ldm.net.forward = was
    assert globals_now(ldm) == before
    x = ldm.sample(**asked, steps=3, seed=1)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try: assert torch.equal(ldm.sample(**asked, steps=3, seed=1), x), dtype
        finally: torch.set_default_dtype(torch.float32)


# ---- arguments that nobody should give; the long run is tests/prove/arguments.py ----

def test_sample_takes_or_refuses(toys, tmp_path):
    assert prove('sample', range(60), toys, tmp_path)['wrong'] == {}


def test_items_of_a_stream(toys):
    ldm = toys['none'][0]
    assert next(ldm.stream(n=4, steps=1, items=range(1, 3)))[0].shape[0] == 2
    for bad in (range(3, 5), range(-1, 2), range(0), range(0, 4, 2), 2, [1], 'x'):
        with pytest.raises(ValueError, match='items='): ldm.stream(n=4, steps=1, items=bad)


FIRST = {'ldm-sample': 2, 'ldm-train': 18, 'ldm-evaluate': 17, 'ldm-diagnose': 0} # sets that cost little

def test_commands_take_or_refuse(toys):
    with workplace(toys) as folder:
        for name, first in FIRST.items():
            assert prove(name, range(first, first + 15), toys, folder)['wrong'] == {}, name
