"""A run and its folder: what a checkpoint may hold, who may write, what a stopped run leaves, caches that are damaged,
disks that are full, workers whose parent is killed."""
import contextlib
import copy
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import psutil
import pytest
import torch
from conftest import command
from ldm_nb.autoencoder import Autoencoder, save_autoencoder
from ldm_nb.cli import recipes
from ldm_nb.cli.common import save_grid
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets import postcards, sources
from ldm_nb.engine import runs
from ldm_nb.engine.cache import LatentCache, encode_dataset, vary
from ldm_nb.engine.callbacks import AdversaryStep, ExplosionGuard, Log, Preview, SaveCheckpoints
from ldm_nb.engine.checkpoints import checked, checkpoints, latest
from ldm_nb.engine.distributed import averaged_model
from ldm_nb.engine.runs import StopRequest, hold_folder
from ldm_nb.losses import Adversary, DeadCodes, FirstStageLoss, PatchDiscriminator
from ldm_nb.training import Callback, Trainer, cpu_accelerator
from torch import nn

QUIET = dict(device='cpu', precision='fp32', quiet=True)


def toy(*callbacks, steps=30, layout=torch.contiguous_format, **more) -> Trainer:
    torch.manual_seed(0)
    images = torch.randn(8, 4, 8, 8)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).to(memory_format=layout)
    loss = lambda net, x, rng: (net(x) - rng((len(x), 4, 4, 4))).square().mean()
    return Trainer(net, loss, lambda step, rows: images[rows], steps, batch_size=8, lr=.02, callbacks=callbacks, **more)


def first_stage_run(folder, steps=3) -> Trainer: # with everything that learns beside: an adversary, codes that restart
    torch.manual_seed(0)
    ae = Autoencoder(ch=8, ch_mult=(1, 2), num_res_blocks=1, groups=4, codes=16)
    objective = FirstStageLoss(adversary=Adversary(PatchDiscriminator(8, 1), 0), dead_codes=DeadCodes(100))
    images = torch.rand(4, 3, 16, 16)*2 - 1
    around = [ExplosionGuard(), AdversaryStep(objective, cpu_accelerator()), SaveCheckpoints(folder, every=3)]
    return Trainer(ae, objective, lambda step, rows: images[rows], steps, batch_size=4, callbacks=around)


# ---- what a checkpoint may hold ----

@pytest.fixture(scope='module')
def saved(tmp_path_factory): # the folder of a finished run, and its latest checkpoint
    run = first_stage_run(tmp_path_factory.mktemp('saved'))
    for _ in run: pass
    path = checkpoints(run.callbacks[-1].out)[0]
    return path, torch.load(path, weights_only=True)


def put(state, keys, value):
    *way, last = keys
    for k in way: state = state[k]
    state[last] = value


GUARD, BESIDE = ('callbacks', 'ExplosionGuard'), ('callbacks', 'AdversaryStep')
WRONG = [(('opt', 'state', 0, 'exp_avg'), torch.zeros(1)), (('opt', 'state', 0, 'exp_avg_sq'), -1), (('step',), 6.),
         (('step',), '6'), (('step',), 4), (('step',), None), (('seconds',), math.nan), (('mean',), 'low'),
         (('opt', 'state', 99), {}), (('opt', 'state', 0), {}), (('opt', 'state'), []), (('ema_updates',), -1),
         (('model', 'quant.bias'), math.inf), (('model', 'quant.bias'), torch.zeros(4).double()),
         (('model', 'more'), 1),
         (('ema', 'quant.bias'), torch.zeros(3)), (('ema',), None), (('scaler',), dict(scale=1.)), (('callbacks',), 1),
         ((*GUARD, 'last'), [1.]*11), ((*GUARD, 'last'), 'ten'), ((*GUARD, 'lowest'), '1'), (GUARD, [1]),
         ((*BESIDE, 'adversary', 'opt', 'state', 0, 'exp_avg'), torch.zeros(1)),
         ((*BESIDE, 'adversary', 'net', '0.weight'), None), ((*BESIDE, 'adversary', 'step'), .5),
         ((*BESIDE, 'dead_codes', 'used'), torch.ones(3, dtype=torch.bool)), ((*BESIDE, 'dead_codes'), None)]


def test_a_checkpoint_is_checked_whole_before_any_of_it_is_loaded(saved):
    path, good = saved
    run = first_stage_run(path.parent.parent)
    before = copy.deepcopy(run.state_dict())
    for keys, value in WRONG:
        state = copy.deepcopy(good)
        at = state
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for k in keys: at = at[k]
        if type(value) in (int, float) and torch.is_tensor(at): value = torch.full_like(at, value)
        put(state, keys, value)
        with pytest.raises(ValueError, match=f'^{keys[0]}'): checked(state, run)
    torch.save(state, path)
    with pytest.raises(ValueError, match=f'{path.name} is damaged or of another model: {keys[0]}'):
        run.callbacks[-1].resume(run)
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(before), leaves(run.state_dict()), strict=True): # nothing was loaded
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    torch.save(good, path)
    assert run.callbacks[-1].resume(run) == 3


@pytest.mark.parametrize('name', ['pickle_KeyError.ckpt', 'pickle_TypeError.ckpt'])
def test_a_damaged_pickle_is_passed_over(tmp_path, name, saved):
    path = tmp_path/'checkpoints'/'step-0000009.pt'
    path.parent.mkdir()
    torch.save(saved[1], path.with_name('step-0000003.pt'))
    # the least of what such files hold: a function that is called with what it does not take
    path.write_bytes(b'\x80\x02ccollections\nOrderedDict\n' + (b'K\x01\x85R.' if 'Type' in name else b'q\x00h\x01.'))
    with pytest.warns(UserWarning, match='step-0000009.pt'): assert latest(tmp_path)[1].name == 'step-0000003.pt'


@pytest.mark.parametrize('state, says', [
    ([1], 'no checkpoint of a training'), (dict(format=2), 'no settings'), (dict(settings={}, watched=[1.]), 'watched'),
    (dict(settings={}), 'watched'), (dict(format=9, settings={}), 'newer'),
    (dict(format=2, settings=1), 'no settings')])
def test_what_is_no_checkpoint_is_named(tmp_path, state, says):
    (tmp_path/'checkpoints').mkdir()
    torch.save(state, tmp_path/'checkpoints'/'step-0000001.pt')
    with pytest.raises(ValueError, match=f'step-0000001.pt.*{says}'): latest(tmp_path)


# ---- a resume that changes nothing ----

@pytest.mark.parametrize('before, after', [(torch.contiguous_format, torch.channels_last),
                                           (torch.channels_last, torch.contiguous_format)])
def test_resumed_in_another_memory_layout(tmp_path, before, after):
    whole = [loss for _, loss in toy()]
    cut, again = (toy(SaveCheckpoints(tmp_path, every=10), layout=o) for o in (before, after))
    for step, _ in cut:
        if step == 10: break
    again.callbacks[0].resume(again)
    assert all(m.stride() == w.stride() for w, kept in again.opt.state.items()
               for m in (kept['exp_avg'], kept['exp_avg_sq']))
    worst = max(abs(a - b) for a, b in zip(whole[10:], (loss for _, loss in again), strict=True))
    assert worst < 1e-5, worst


def test_the_running_mean_and_the_settings_go_on(tmp_path):
    whole, cut, again = (toy(SaveCheckpoints(tmp_path/k, every=10)) for k in 'abb')
    for _ in whole: pass
    for step, _ in cut:
        if step == 15: break
    path = checkpoints(tmp_path/'b')[0]
    state = torch.load(path, weights_only=True)
    state['opt']['param_groups'][0] |= dict(eps=1., betas=(0., 0.), amsgrad=True)     # an edited file
    torch.save(state, path)
    again.callbacks[0].resume(again)
    assert again.seconds > 0
    for _ in again: pass
    assert again.mean == whole.mean
    assert all(torch.equal(a, b) for a, b in zip(whole.params, again.params))


def test_an_averaged_model_has_the_averaged_weights():
    run = toy()
    for _ in run: pass
    for twin in (run.averaged_model(), averaged_model(run)):
        state = twin.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in run.ema.state.items()) and not twin.training
        assert any(not torch.equal(v, state[k]) for k, v in run.model.state_dict().items())


def test_other_settings_name_the_way_on(tmp_path):
    for _ in toy(SaveCheckpoints(tmp_path, every=10, init=None)): pass
    run = toy(SaveCheckpoints(tmp_path, every=10, init=None), steps=60)
    with pytest.raises(ValueError, match=f'steps: 30 then, 60 now.*--init {tmp_path} --out'):
        run.callbacks[0].resume(run)


def test_a_guard_promises_no_checkpoint_that_is_not_there(tmp_path):
    for every, says in ((100, False), (2, True)):
        run = toy(ExplosionGuard(), SaveCheckpoints(tmp_path/str(every), every=every))
        for step, _ in run:
            if step == 3: break
        run.objective.loss = (lambda *_: torch.tensor(math.nan, requires_grad=True),)
        with pytest.raises(FloatingPointError) as e: list(run)
        assert ('The last checkpoint is kept' in str(e.value)) == says


# ---- one folder, one run; signals; what a run has learnt so far ----

@pytest.fixture(scope='module')
def stopped(tmp_path_factory): # a run on a first stage of one's own, looked at while it goes on, then hung up on
    work = tmp_path_factory.mktemp('stopped')
    torch.manual_seed(0)
    save_autoencoder(Autoencoder(ch=8, ch_mult=(1, 2, 4), num_res_blocks=1, groups=4), work/'ae')
    out, log = work/'run', open(work/'log', 'w')
    words = [*command('ldm-train'), 'diffusion', '--preset', 'tiny', '--n', 40, '--autoencoder', work/'ae', '--steps',
             100_000, '--save-every', 5, '--device', 'cpu', '--tracker', 'none', '--quiet', '--workers', 1,
             '--out', out]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    listen = None # nohup makes its children deaf to a hangup
    if hasattr(signal, 'SIGHUP'): listen = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    p = subprocess.Popen([str(w) for w in words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env,
                         preexec_fn=listen)
    try:
        for _ in range(1200):
            if checkpoints(out) or p.poll() is not None: break
            time.sleep(.1)
        workers = psutil.Process(p.pid).children(recursive=True)
        seen = {}
        try: recipes.train_reader(out, 'tiny', **QUIET)
        except ValueError as e: seen['refused'] = str(e)
        with warnings.catch_warnings(record=True) as said: LatentDiffusion.from_pretrained(out)
        seen['alive'] = [str(w.message) for w in said]
        p.send_signal(getattr(signal, 'SIGHUP', signal.SIGTERM))
        code = p.wait(60)
    finally:
        p.kill()
        log.close()
    return dict(seen, out=out, code=code, pid=p.pid, said=(work/'log').read_text(), workers=workers)


def test_a_second_run_is_refused_while_the_first_lives(stopped):
    assert f'another run (process {stopped["pid"]} on ' in stopped['refused']
    assert not (stopped['out']/'run.lock').exists()
    with hold_folder(stopped['out']): pass


def test_of_two_threads_one_holds_a_folder(tmp_path, monkeypatch):
    taken = runs.take_lock
    def slowly(path):
        time.sleep(.2)
        return taken(path)
    monkeypatch.setattr(runs, 'take_lock', slowly)
    said = []
    def hold():
        try:
            with hold_folder(tmp_path): said.append('held')
        except ValueError as e: said.append(str(e))
    threads = [threading.Thread(target=hold) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(s == 'held' for s in said) == [False, True] and not runs.HELD


def test_nobody_ends_before_the_checkpoint_is_written(tmp_path): # a launcher would end who writes it
    order = []
    class Saver(SaveCheckpoints):
        def save(self, *args):
            order.append('saved')
            return super().save(*args)
    run = toy(Saver(tmp_path, every=100))
    wait = run.accelerator.wait_for_everyone
    run.accelerator.wait_for_everyone = lambda: (order.append('waited'), wait())
    class Ask(Callback):
        def after_step(self, trainer, loss): signal.raise_signal(signal.SIGTERM)
    run.callbacks.append(Ask())
    assert not runs.run(run, quiet=True) and order == ['waited', 'saved', 'waited']


def test_a_hangup_saves_and_says_so_by_its_code(stopped):
    assert stopped['code'] == 128 + getattr(signal, 'SIGHUP', signal.SIGTERM)
    step = int(re.search(r'stopped at step (\d+) and saved.*--resume', stopped['said'])[1])
    assert torch.load(checkpoints(stopped['out'])[0], weights_only=True)['step'] == step
    assert psutil.wait_procs(stopped['workers'], timeout=5)[1] == []


def test_an_unfinished_run_is_a_model(stopped, tmp_path):
    out, newest = stopped['out'], checkpoints(stopped['out'])[0]
    assert any('is not finished, taking the averaged weights of step' in w for w in stopped['alive'])
    state = torch.load(newest, weights_only=True)
    with pytest.warns(UserWarning, match=f'is not finished.*step {state["step"]}'):
        ldm = LatentDiffusion.from_pretrained(out)
    own = ldm.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in state['ema'].items() if v.is_floating_point())
    x = ldm.sample('a red house', steps=2, seed=0)
    ldm.save_pretrained(tmp_path/'exported')                                   # with its first stage: it may be moved
    assert torch.equal(LatentDiffusion.from_pretrained(tmp_path/'exported').sample('a red house', steps=2, seed=0), x)
    with pytest.warns(UserWarning, match='a checkpoint, taking the averaged weights of step'):
        best = LatentDiffusion.from_pretrained(out/'checkpoints'/'best.pt')
    kept = torch.load(out/'checkpoints'/'best.pt', weights_only=True)['ema']
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in kept.items() if v.is_floating_point())
    (out.parent/'ae').rename(out.parent/'moved')
    with pytest.raises(FileNotFoundError, match='ae is gone, the first stage'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        LatentDiffusion.from_pretrained(out)
    (out.parent/'moved').rename(out.parent/'ae')


@pytest.mark.parametrize('name, says', [('model_index.json', 'load_diffusers'), ('sd.ckpt', 'load_compvis')])
def test_foreign_folders_are_told_their_door(tmp_path, name, says):
    (tmp_path/name).write_text('{}')
    for path in (tmp_path, tmp_path/name) if name == 'sd.ckpt' else (tmp_path,):
        with pytest.raises((FileNotFoundError, ValueError), match=says): LatentDiffusion.from_pretrained(path)


def test_who_ignores_hangups_is_obeyed():
    if not hasattr(signal, 'SIGHUP'): pytest.skip('this system knows no hangup')
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, old)


# ---- previews, full disks, folders that are gone ----

def test_a_preview_never_costs_a_checkpoint(tmp_path):
    def watch(model, trainer): raise ValueError('an empty\ncaption')
    saver = SaveCheckpoints(tmp_path, every=10)
    run = toy(Preview(watch, saver, log := Log(saver)), log, saver)
    with warnings.catch_warnings(record=True) as said:
        for _ in run: pass
    assert [f'no preview at step {k} (ValueError: an empty caption); the run goes on' for k in (10, 20, 30)] == [
        str(w.message) for w in said]
    assert len(checkpoints(tmp_path)) == 2 and [row['step'] for row in log.rows] == [10, 20, 30]


def test_a_folder_that_is_taken_away_is_not_made_again(tmp_path):
    saver = SaveCheckpoints(tmp_path/'run', every=10)
    run = toy(Preview(lambda *_: {}, saver, log := Log(saver, 1)), log, saver)
    with pytest.raises(FileNotFoundError, match='run is gone: the folder was removed or renamed'):
        for step, _ in run:
            if step == 9: (tmp_path/'run').rename(tmp_path/'elsewhere')
    assert not (tmp_path/'run').exists()


@contextlib.contextmanager
def limit(what: str, most: int): # of this process, for a while
    resource = pytest.importorskip('resource')
    kind = getattr(resource, what)
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, old[1]))
    try: yield
    finally: resource.setrlimit(kind, old)


class Crops: # in the place of `Photographs`, which takes seconds
    def __init__(self, n, size, seed, held_out): self.size = size
    def __getitem__(self, i): return dict(image=torch.full((3, self.size, self.size), i/1000 - .5))


def first_stage():
    torch.manual_seed(0)
    return Autoencoder(ch=8, num_res_blocks=1, groups=4).eval()


PICTURES = torch.randint(256, (100, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(sources, 'Photographs', Crops)
    monkeypatch.setattr(postcards, 'BLOCK', 20)
    run = toy(log := Log(saver := SaveCheckpoints(tmp_path/'run', every=10)), saver)
    for step, _ in run:
        if step == 15: break
    (tmp_path/'run'/'log.jsonl').open('a').write(' '*3000)
    run.steps_done, kept = 20, checkpoints(tmp_path/'run')[0].read_bytes()
    latents = tmp_path/'latents'
    writers = {'000000.npz': lambda: postcards.render_all(postcards.Postcards(10, 32), workers=1),
               'photos-16': lambda: sources.photo_crops(1000, 16, 0, False),
               '00000.safetensors': lambda: encode_dataset(first_stage(), 'v1', PICTURES, latents, quiet=True),
               'step-0000020.pt': lambda: saver.save(run), 'log.jsonl': lambda: log.after_step(run, 0.),
               'reconstructions.png': lambda: save_grid(torch.rand(2, 3, 16, 16), tmp_path/'reconstructions.png')}
    for name, write in writers.items():
        with limit('RLIMIT_FSIZE', 2000), pytest.raises(OSError) as e: write()
        said = str(e.value)
        assert name in said and ('cannot write' in said) and 'Errno' not in said and '\n' not in said, said
        assert ('LDM_NB_CACHE' in said) == (str(tmp_path/'cache') in said)
    assert checkpoints(tmp_path/'run')[0].read_bytes() == kept
    assert not list(tmp_path.rglob('*.tmp'))


def test_more_blocks_and_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(postcards, 'BLOCK', 1)
    ds = postcards.Postcards(40, 8)
    whole = postcards.render_all(ds, workers=1, cache=tmp_path)
    latents = encode_dataset(first_stage(), 'v1', PICTURES[:40], tmp_path/'latents', shard=1, quiet=True)
    mean = latents.moments(torch.arange(40))[0]
    with limit('RLIMIT_NOFILE', max(map(int, os.listdir('/proc/self/fd'))) + 20 if os.path.isdir('/proc') else 100):
        assert torch.equal(postcards.render_all(ds, workers=1, cache=tmp_path)['image'], whole['image'])
        assert torch.equal(LatentCache(tmp_path/'latents').moments(torch.arange(40))[0], mean)


# ---- caches ----

def test_damaged_photographs_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setenv('LDM_NB_CACHE', str(tmp_path))
    monkeypatch.setattr(sources, 'Photographs', Crops)
    whole = sources.photo_crops(1000, 8, 0, False)
    path, = tmp_path.glob('photos-*.safetensors')
    kept = path.read_bytes()
    for damaged in (b'', kept[:9000], b'{}'*500, bytes(len(kept))):
        path.write_bytes(damaged)
        assert torch.equal(sources.photo_crops(1000, 8, 0, False), whole) and path.read_bytes() == kept


def test_every_picture_is_varied_by_its_own_number(tmp_path): # not by its place in a batch
    ae = first_stage()
    cache = encode_dataset(ae, 'v1', PICTURES, tmp_path, batch_size=7, shard=30, variants=('crops:2x8',),
                           quiet=True)
    for v, name in enumerate(cache.variants):
        want = torch.cat([vary(PICTURES[i:i+1], name, i) for i in range(100)])
        with torch.no_grad(): mean = ae.posterior(want/127.5 - 1).mean
        found = cache.moments(torch.arange(100), torch.full((100,), v))[0]
        assert (found - mean).abs().max() < 2e-3*mean.abs().max()


def test_fresh_pictures_are_not_those_of_the_training(tmp_path, monkeypatch):
    s = dict(size=16, n=50, seed=3)
    images, fresh = recipes.keep_back(sources.load_images('postcards', 16, 50, 3)['image'], 'postcards', s)
    own = {im.numpy().tobytes() for im in images}
    assert len(images) == 50 and not own & {im.numpy().tobytes() for im in fresh['fresh postcards']}
    asked = []
    monkeypatch.setattr(recipes, 'load_images', lambda name, size, n, seed: asked.append(seed))
    for name in ('make_trainer', 'averaged_model', 'reader_accuracy', 'card'):
        monkeypatch.setattr(recipes, name, lambda *_, **__: {})
    for name in ('run', 'save_reader'): monkeypatch.setattr(recipes, name, lambda *_, **__: True)
    recipes.train_reader(tmp_path, 'tiny', seed=3, **QUIET)
    assert asked == [3, 4]                                                     # what it learns from, what it is held to


# ---- workers whose parent is killed ----

RENDER = '''
import sys
from ldm_nb.cli.common import guarded
from ldm_nb.datasets.postcards import Postcards, render_all
if __name__ == '__main__': guarded(lambda argv: render_all(Postcards(10**4, 512), workers=2, cache=argv[0]), None)
'''
FEED = '''
import sys, torch
from ldm_nb.engine.feeding import feed
batches = feed(lambda step, part: torch.zeros(10**6), [slice(0, 4)], 10**6, workers=2)
for _ in batches: pass
'''


def test_workers_end_with_their_parent(tmp_path): # one is told to end, the other is killed
    started = []
    for name, program in dict(render=RENDER, feed=FEED).items():
        (tmp_path/f'{name}.py').write_text(program)
        started.append(subprocess.Popen([sys.executable, tmp_path/f'{name}.py', tmp_path], stderr=subprocess.DEVNULL,
                                        env=os.environ | dict(OMP_NUM_THREADS='1')))
    try:
        for p, sig in zip(started, (signal.SIGTERM, getattr(signal, 'SIGKILL', signal.SIGTERM))):
            me, end = psutil.Process(p.pid), time.time() + 60
            while len(me.children(recursive=True)) < 2:
                assert p.poll() is None and time.time() < end
                time.sleep(.05)
            time.sleep(.2)
            workers = me.children(recursive=True)
            p.send_signal(sig)
            assert p.wait(10) == (143 if sig == signal.SIGTERM else -sig)
            assert psutil.wait_procs(workers, timeout=5)[1] == []
    finally:
        for p in started: p.kill()


def test_a_network_with_more_input_channels_starts_as_the_narrower_one(tmp_path):
    from ldm_nb.cli.recipes import start_from
    from ldm_nb.core import LatentDiffusion
    from ldm_nb.unet import Cond
    wide = LatentDiffusion.from_pretrained('postcards-inpaint')
    narrow = LatentDiffusion.from_pretrained('postcards-aligned')
    start_from(wide, 'postcards-aligned')
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([3., 700.])
    beside = torch.randn(2, wide.net.in_ch - 4, 16, 16)
    with torch.no_grad(): assert torch.equal(wide.net(z, t, Cond(concat=beside)), narrow.net(z, t))
