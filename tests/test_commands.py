"""ldm-train and ldm-sample as a person calls them: help, a tiny run of every stage, resume, kill -9, and one line for
each kind of bad input."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import command, refused, run
from ldm_nb.cli.recipes import train_autoencoder, train_diffusion
from ldm_nb.engine.checkpoints import checkpoints
from ldm_nb.engine.files import read_metadata
from PIL import Image
from safetensors.torch import load_file, save_file

TRAIN, SAMPLE = command('ldm-train'), command('ldm-sample')
CAPTION = 'a yellow house at dusk'
TINY = ['--data', 'postcards', '--preset', 'tiny', '--seed', 3]


@pytest.fixture(scope='session')
def work(tmp_path_factory): return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='session')
def ae(work): # a first stage of four steps
    r = run(*TRAIN, 'autoencoder', *TINY, '--f', 4, '--regulariser', 'kl', '--steps', 4, '--out', work/'ae')
    assert r.returncode == 0, r.stderr
    return work/'ae'


@pytest.fixture(scope='session')
def ldm(work, ae): # and a diffusion model of six on top of it
    r = run(*TRAIN, 'diffusion', *TINY, '--autoencoder', ae, '--condition', 'text', '--steps', 6, '--out', work/'ldm')
    assert r.returncode == 0, r.stderr
    return work/'ldm'


def finished(folder): # what a finished training leaves
    assert {'config.json', 'model.safetensors', 'checkpoints'} <= {p.name for p in folder.iterdir()}
    assert isinstance(json.loads((folder/'config.json').read_text()), dict)
    w = load_file(folder/'model.safetensors')
    assert w and all(torch.isfinite(v).all() for v in w.values() if v.is_floating_point())
    assert not [p.name for p in folder.iterdir() if p.name.endswith('.tmp')], 'a temporary file was left behind'
    return w


COMMON = '--data --preset --out --steps --batch-size --lr --seed --device --precision --dry-run --resume'


@pytest.mark.parametrize('words, options', [
    (TRAIN, 'autoencoder diffusion reader'), ([*TRAIN, 'autoencoder'], COMMON + ' --f --regulariser'),
    ([*TRAIN, 'diffusion'], COMMON + ' --autoencoder --condition'),
    (SAMPLE, '--model --n --steps --guidance --seed --out')], ids=range(4))
def test_help(words, options):
    r = run(*words, '--help')
    assert r.returncode == 0 and not [o for o in options.split() if o not in r.stdout], r.stdout + r.stderr


def test_autoencoder(ae): finished(ae)


def test_diffusion(ldm): finished(ldm)


def test_reader(work):
    r = run(*TRAIN, 'reader', '--preset', 'tiny', '--steps', 3, '--out', work/'reader')
    assert r.returncode == 0, r.stderr
    finished(work/'reader')


def test_dry_run_writes_nothing(work):
    r = run(*TRAIN, 'autoencoder', *TINY, '--dry-run', '--out', work/'dry')
    assert r.returncode == 0 and len(r.stdout + r.stderr) > 40 and not (work/'dry').exists(), r.stderr


def test_sample(ldm, work):
    out = work/'grid.png'
    r = run(*SAMPLE, '--model', ldm, CAPTION, '--n', 2, '--steps', 3, '--guidance', 2, '--seed', 0, '--out', out)
    assert r.returncode == 0, r.stderr
    im = Image.open(out)
    im.load()
    assert im.width >= 2*32 and im.height >= 32
    first = out.read_bytes()
    assert run(*SAMPLE, '--model', ldm, CAPTION, '--n', 2, '--steps', 3, '--guidance', 2, '--seed', 0, '--out',
               out).returncode == 0
    assert out.read_bytes() == first, 'the same seed gives the same file'


def test_sample_warns_of_unknown_words(ldm, work):
    r = run(*SAMPLE, '--model', ldm, 'a zqxjk house', '--n', 1, '--steps', 1, '--out', work/'odd.png')
    assert r.returncode == 0 and 'zqxjk' in r.stderr and (work/'odd.png').is_file(), r.stderr


def test_resume_of_a_finished_run(ldm, work):
    before = load_file(ldm/'model.safetensors')
    r = run(*TRAIN, 'diffusion', *TINY, '--autoencoder', work/'ae', '--condition', 'text', '--steps', 6, '--out',
            ldm, '--resume')
    assert r.returncode == 0 and 'resumed at step 6' in r.stdout + r.stderr, r.stdout + r.stderr
    after = finished(ldm)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_resume_with_nothing_there(work):
    r = run(*TRAIN, 'autoencoder', *TINY, '--steps', 2, '--out', work/'new', '--resume')
    assert r.returncode == 0 and not re.search(r'resumed at step [1-9]', r.stdout + r.stderr), r.stderr
    finished(work/'new')


def start(log, *words): # a training in the background; its output goes to the file `log`
    return subprocess.Popen([str(w) for w in words], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                            env=os.environ | {'PYTHONUNBUFFERED': '1'})


def wait_for(seen, p, log, seconds=150): # poll until seen() or the process ends
    end = time.time() + seconds
    while not seen():
        assert p.poll() is None and time.time() < end, open(log.name).read()[-2000:]
        time.sleep(.05)


def test_kill_and_resume(work):
    # kill -9 in the middle of training leaves a checkpoint that loads, and --resume goes on from it
    out, words = work/'killed', [*TRAIN, 'autoencoder', *TINY, '--f', 4, '--regulariser', 'kl', '--steps', 100_000]
    with open(work/'log', 'w') as log:
        for k in range(2):
            before = checkpoints(out)
            p = start(log, *words, '--out', out, *(['--resume'] if k else []))
            # it has written one of its own
            try: wait_for(lambda: checkpoints(out) and checkpoints(out) != before, p, log)
            finally:
                os.kill(p.pid, signal.SIGKILL)
                p.wait()
            for path in checkpoints(out): assert torch.load(path, map_location='cpu', weights_only=True)
    assert re.search(r'resumed at step [1-9]', (work/'log').read_text()), (work/'log').read_text()[-2000:]


def test_stop(work): # SIGTERM saves, says how to go on, and is told from a run that came to its end
    out = work/'stopped'
    with open(work/'stop.log', 'w') as log:
        p = start(log, *TRAIN, 'autoencoder', *TINY, '--steps', 100_000, '--out', out)
        try:
            wait_for(lambda: checkpoints(out), p, log)
            p.terminate()
            assert p.wait(60) == 128 + signal.SIGTERM
        finally: p.kill()
    said = re.search(r'stopped at step (\d+) .*--resume', (work/'stop.log').read_text())
    assert said and torch.load(checkpoints(out)[0], map_location='cpu', weights_only=True)['step'] == int(said[1])
    assert not (out/'model.safetensors').exists()


# ---- bad input: one line, an exit code, and nothing written ----

def flags(given: dict) -> list: return [o for k, v in given.items() for o in (f'--{k}', v)]


@pytest.fixture(scope='session')
def spoilt(ldm, work): # model folders, each with its own fault
    made = {}
    for name in ('noconfig', 'truncated', 'foreign', 'shape'): made[name] = shutil.copytree(ldm, work/name)
    for f in ('config.json', 'run.json'): (made['noconfig']/f).unlink()
    f = made['truncated']/'model.safetensors'
    f.write_bytes(f.read_bytes()[:-100])
    save_file({'some.weight': torch.zeros(2)}, made['foreign']/'model.safetensors')
    w = load_file(ldm/'model.safetensors')
    key = next(k for k, v in w.items() if v.dim() == 4)
    w[key] = torch.zeros(1, 2, 3, 3)
    path = made['shape']/'model.safetensors'
    save_file(w, path, metadata=read_metadata(path))
    made['file'] = work/'file'
    made['file'].write_text('a file, not a folder')
    made['empty'], made['rubbish'] = work/'empty', work/'rubbish'
    for d in ('empty', 'rubbish'): made[d].mkdir()
    (made['rubbish']/'notes.txt').write_text('no image')
    return made | dict(key=key)


@pytest.mark.parametrize('given, says', [
    (dict(model='no-such-model'), ['no-such-model']), (dict(model='noconfig'), ['config.json']),
    (dict(model='truncated'), ['model.safetensors']),
    (dict(model='foreign'), ['foreign']), (dict(model='shape'), ['{key}', '(1, 2, 3, 3)']),
    (dict(caption=''), ['caption']),
    (dict(n=0), ['n']), (dict(steps=0), ['steps']), (dict(size=50), ['50']), (dict(out='file'), ['file'])], ids=str)
def test_sample_refuses(ldm, spoilt, work, given, says):
    given = dict(given)
    model = given.pop('model', ldm)
    out = spoilt['file']/'x.png' if given.pop('out', None) else work/'refused.png'
    caption, model = given.pop('caption', CAPTION), spoilt.get(model, model)
    line = refused(run(*SAMPLE, '--model', model, caption, *flags(dict(n=1, steps=1) | given), '--out', out))
    for s in says: assert s.format(**spoilt) in line, line
    assert not (work/'refused.png').exists()


@pytest.mark.parametrize('given, says', [
    (dict(data='no-such-data'), 'no-such-data'), (dict(data='empty'), 'empty'), (dict(data='rubbish'), 'rubbish'),
    (dict(steps=0), 'steps'),
    (dict(preset='huge'), 'laptop'), (dict(out='file'), 'file'), (dict(accumulate=3), 'a batch size that 3 divides'),
    (dict(device='cuda:99'), 'cuda'),
    (dict(precision='fp16', device='cpu'), 'bf16'), (dict(tracker='no-such-tracker'), 'no-such-tracker')], ids=str)
def test_train_refuses(spoilt, work, given, says):
    given = dict(preset='tiny', data='postcards', steps=2) | given
    given['data'] = spoilt.get(given['data'], given['data'])
    out = spoilt['file']/'ae' if given.pop('out', None) else work/'refused'
    assert says in refused(run(*TRAIN, 'autoencoder', *flags(given), '--out', out))
    assert not (work/'refused').exists()


def test_resume_with_other_settings(ae): # the differences, all of them
    line = refused(run(*TRAIN, 'autoencoder', *TINY, '--steps', 6, '--lr', .01, '--out', ae, '--resume'))
    assert 'steps: 4 then, 6 now' in line and 'lr: 0.002 then, 0.01 now' in line
    assert 'add --resume' in refused(run(*TRAIN, 'autoencoder', *TINY, '--steps', 4, '--out', ae))


def test_a_folder_smaller_than_a_batch(work):
    # warns, and trains all the same; with a prepared batch ahead it is the same run
    (work/'two').mkdir()
    for k in range(2): Image.new('RGB', (64, 64), (k*200, 40, 90)).save(work/'two'/f'{k}.png')
    words = [*TRAIN, 'autoencoder', '--preset', 'tiny', '--data', work/'two', '--steps', 3, '--precision', 'fp32',
             '--tracker', 'none', '--quiet', '--out']
    r = run(*words, work/'few')
    assert r.returncode == 0 and 'warning: 2 picture(s) for batches of 4' in r.stderr, r.stderr
    assert run(*words, work/'ahead', '--workers', 2).returncode == 0
    a, b = (load_file(work/k/'model.safetensors') for k in ('few', 'ahead'))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('stage, option, value, who',
                         [('diffusion', '--f', 8, 'autoencoder'), ('autoencoder', '--condition', 'map', 'diffusion'),
                          ('reader', '--data', 'photos', 'autoencoder, diffusion, distil and decoder'),
                          ('diffusion', '--kl-weight', '1e-6', 'autoencoder')])
def test_options_of_another_stage(work, stage, option, value, who):
    said = refused(run(*TRAIN, stage, '--preset', 'tiny', option, value, '--dry-run', '--out', work/'other'))
    assert f'{option}: {who} alone' in said and stage in said


def test_dry_run_says_what_it_would_take(work):
    r = run(*TRAIN, 'diffusion', '--preset', 'tiny', '--dry-run', '--out', work/'dry')
    assert r.returncode == 0 and 'ten timed steps on cpu' in r.stdout and not (work/'dry').exists(), r.stdout + r.stderr
    r = run(*TRAIN, 'diffusion', '--preset', 'paper', '--dry-run', '--on', 'v100', '--out', work/'dry')
    assert r.returncode == 0 and '872.30M' in r.stdout and 'does not fit' in r.stdout, r.stdout + r.stderr
    assert 'h200' in refused(run(*TRAIN, 'diffusion', '--preset', 'tiny', '--dry-run', '--on', 'abacus',
                                 '--out', work/'dry'))


def test_train_names_what_it_skips(spoilt, work): # the count and the name of what is no image, before the refusal
    r = run(*TRAIN, 'autoencoder', '--preset', 'tiny', '--data', spoilt['rubbish'], '--out', work/'refused')
    assert r.returncode and 'notes.txt' in r.stderr, r.stderr


def test_diffusion_refuses_an_unknown_autoencoder(work):
    assert 'no-such-ae' in refused(run(*TRAIN, 'diffusion', *TINY, '--autoencoder', 'no-such-ae', '--condition', 'text',
                                       '--steps', 2, '--out', work/'refused'))
    assert not (work/'refused').exists()


def test_module_form(): # torchrun -m ldm_nb.cli.train ... is the same command
    r = run(sys.executable, '-m', 'ldm_nb.cli.train', 'autoencoder', '--help')
    assert r.returncode == 0 and '--preset' in r.stdout, r.stderr


# ---- checkpoints of the format before this one ----

OLD_NAMES = dict(lr_schedule='rate', prediction_type='kind', logit_normal_share='focus')


def old_form(path): # write a checkpoint in the names it had before there was a format
    state = torch.load(path, weights_only=True)
    assert state.pop('format') == 2
    guard, adversary = (state['callbacks'].get(k) for k in ('ExplosionGuard', 'AdversaryStep'))
    del state['callbacks']
    state['settings'] = {OLD_NAMES.get(k, k): v for k, v in state['settings'].items()}
    torch.save(state | dict(watched=[guard['first'], guard['lowest'], guard['last']], second=adversary), path)


@pytest.mark.parametrize('train, more', [(train_diffusion, {}),
                                         (train_autoencoder, dict(regulariser='vq', restarts=5, adversary_start=4))])
def test_an_old_checkpoint_resumes(tmp_path, train, more): # to the weights of the run that was never stopped
    how = dict(preset='tiny', n=40, steps=12, save_every=6, device='cpu', precision='fp32', quiet=True, **more)
    train(tmp_path/'x', **how)
    before = load_file(tmp_path/'x'/'model.safetensors')
    (tmp_path/'x'/'checkpoints'/'step-0000012.pt').unlink()
    old_form(checkpoints(tmp_path/'x')[0])
    train(tmp_path/'x', resume=True, **how)
    after = load_file(tmp_path/'x'/'model.safetensors')
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert torch.load(checkpoints(tmp_path/'x')[0], weights_only=True)['format'] == 2


def test_a_setting_that_no_version_knew_is_named(tmp_path):
    how = dict(preset='tiny', n=40, steps=2, device='cpu', precision='fp32', quiet=True)
    train_autoencoder(tmp_path, **how)
    path = checkpoints(tmp_path)[0]
    state = torch.load(path, weights_only=True)
    for settings, says in ((dict(lr_shedule='one_cycle'),
                            "'lr_shedule' that no version knew; did you mean 'lr_schedule'"),
                           (dict(raet='one_cycle'), "'raet' that no version knew; did you mean 'rate'")):
        torch.save(state |
                   dict(settings={k: v for k, v in state['settings'].items() if k != 'lr_schedule'} | settings), path)
        with pytest.raises(ValueError, match=re.escape(says)): train_autoencoder(tmp_path, resume=True, **how)
    torch.save(state | dict(format=3), path)
    with pytest.raises(ValueError, match='written by a newer one'): train_autoencoder(tmp_path, resume=True, **how)
