"Several processes on one machine, joined over gloo: the gradients of one, one set of files, a failure that is noticed."
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run
from ldm_nb.unet import UNet
from safetensors.torch import load_file
from under_torchrun import curve, gradient, sitting

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2]
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', 2, '--num_machines', 1,
          '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', 0, '--use_fsdp',
          '--fsdp_version', 2]
LAYER = type(UNet(ch=8, groups=4).mid[0]).__name__                             # the block that is gathered at a time
FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')                      # what that sets


def together(what, out, **env) -> list: # what each of two processes with half of the batch has computed
    r = run(*TORCHRUN, ROOT/'tests'/'under_torchrun.py', what, out, OMP_NUM_THREADS='1', **env)
    assert r.returncode == 0, r.stderr[-3000:]
    return [torch.load(out/f'result{k}.pt', weights_only=True) for k in range(2)]


@pytest.fixture(scope='module')
def ddp(tmp_path_factory): return together('compare', tmp_path_factory.mktemp('ddp'))


@pytest.fixture(scope='module')
def fsdp(tmp_path_factory):
    # besides, a run of 20 steps is cut after 10, and goes on in another form: one process then two, two then one
    out = tmp_path_factory.mktemp('fsdp')
    sitting(out/'one', 10)
    both = together('share', out, **FSDP)
    (out/'copy').mkdir()
    for p in (out/'cut'/'checkpoints').iterdir(): (out/'copy'/p.name).write_bytes(p.read_bytes())
    both[0] |= dict(out=out, back=sitting(out/'cut', 20), whole=sitting(out/'whole', 20))
    return both


@pytest.fixture(params=['ddp', 'fsdp'])
def two(request): return request.getfixturevalue(request.param)[0]


def apart(a: dict, b: dict) -> float: # largest difference of tensors by name
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def by_path(state, at='') -> dict: # path -> what stands there
    return ({k: v for name, x in state.items() for k, v in by_path(x, f'{at}/{name}').items()}
            if isinstance(state, dict) else {at: state})


@pytest.mark.parametrize('name, accumulate', [('gradient', 1), ('halves', 2)])
def test_two_processes_have_the_gradients_of_one(two, name, accumulate):
    there, here = two[name], gradient(1)
    assert (there['processes'], here['processes']) == (2, 1)  # accelerate can start one where two were asked for
    # and DDP where FSDP was
    assert there['kind'] == ('DistributedType.FSDP' if 'out' in two else 'DistributedType.MULTI_CPU')
    assert here['gradient'].abs().max() > 1e-3
    assert (there['gradient'] - here['gradient']).abs().max() < 1e-10
    assert abs(there['loss'] - here['loss']) < 1e-10
    assert (gradient(accumulate)['gradient'] - here['gradient']).abs().max() < 1e-10


def test_their_loss_curves_stay_together_in_float32(two):
    here, there = curve()['losses'], two['curve']['losses']
    worst = max(abs(a - b) for a, b in zip(here, there))
    print(f'60 steps in float32, two processes against one: losses differ by at most {worst:.1e}')
    assert len(here) == len(there) == 60 and here[-1] < here[0] and worst < 1e-4


def test_each_of_two_holds_half_of_what_is_shared_out(fsdp):
    whole = 8*fsdp[0]['cut']['count']                                          # bytes of the weights in float64
    for name, share in dict(weights=1, gradients=1, moments=2, average=1).items():
        held = [one['cut']['held'][name] for one in fsdp]
        print(f'{name}: {held} of {share*whole} bytes')
        assert sum(held) >= share*whole and max(held) < .51*share*whole


def test_what_is_shared_out_is_saved_whole_and_once(fsdp):
    out = fsdp[0]['out']
    assert [one['cut']['wrote'] for one in fsdp] == ['step-0000010.pt', None]
    assert [p.name for p in (out/'copy').iterdir()] == ['step-0000010.pt']
    there, here = (by_path(torch.load(p/'step-0000010.pt', weights_only=True))
                   for p in (out/'copy', out/'one'/'checkpoints'))
    assert list(there) == list(here) and len(here) > 100
    tensors = [k for k, v in here.items() if torch.is_tensor(v)]
    assert all(type(there[k]) is torch.Tensor and (there[k].shape, there[k].dtype) == (here[k].shape, here[k].dtype)
               for k in tensors)
    assert apart({k: there[k] for k in tensors}, {k: here[k] for k in tensors}) < 1e-10


@pytest.mark.parametrize('name', ['back', 'again'])
def test_a_run_goes_on_in_another_form(fsdp, name):
    there, whole = fsdp[0][name], fsdp[0]['whole']
    assert (there['began'], len(there['losses']), len(whole['losses'])) == (10, 10, 20)
    print(f'{name}: largest difference of an averaged weight after 20 steps in '
          f'float64 {apart(there["averaged"], whole["averaged"]):.1e}')
    assert apart(there['averaged'], whole['averaged']) < 1e-10
    assert max(abs(a - b) for a, b in zip(there['losses'], whole['losses'][10:])) < 1e-10


def test_autocast_is_the_same_where_weights_are_shared_out(ddp, fsdp):
    full, whole, parts = curve(10)['losses'], ddp[0]['bf16']['losses'], fsdp[0]['bf16']['losses']
    far = lambda a, b: max(abs(x - y) for x, y in zip(a, b))
    print(f'10 steps in bf16: FSDP against DDP {far(parts, whole):.1e}, both against float32 {far(whole, full):.1e}')
    assert far(parts, whole) < .1*far(whole, full)


def test_a_run_on_two_writes_once(tmp_path):
    words = ['-m', 'ldm_nb.cli.train', 'autoencoder', '--preset', 'tiny', '--steps', 20, '--device', 'cpu',
             '--precision', 'fp32', '--log-every', 5, '--adversary-start', 8, '--adversary-warmup', 4,
             '--quiet', '--out']
    r = run(*TORCHRUN, *words, tmp_path/'two', cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('wrote ') == 1 and r.stdout.count('reconstruction, dB') == 1
    log = [json.loads(o) for o in (tmp_path/'two'/'log.jsonl').read_text().splitlines()]
    assert [o['step'] for o in log] == [5, 10, 15, 20]
    assert (sorted(p.name for p in (tmp_path/'two'/'checkpoints').iterdir()) ==
            ['best.pt', 'step-0000010.pt', 'step-0000020.pt'])
    assert json.loads((tmp_path/'two'/'config.json').read_text())['card']['processes'] == 2
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path/'two'/'model.safetensors').values())
    r = run(*TORCHRUN, *words, tmp_path/'two', '--resume', cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0 and r.stdout.count('resumed at step 20') == 1, r.stderr[-3000:]


def test_a_command_under_fsdp_writes_once_and_goes_on_alone(tmp_path):
    # gathered one by one
    blocks = ['--fsdp_auto_wrap_policy', 'TRANSFORMER_BASED_WRAP', '--fsdp_transformer_layer_cls_to_wrap', LAYER]
    words = ['-m', 'ldm_nb.cli.train', 'diffusion', '--preset', 'tiny', '--steps', 6, '--save-every', 3, '--device',
             'cpu', '--precision', 'fp32', '--checkpointing', '--channels-last', '--compile', '--quiet', '--out',
             tmp_path/'ldm']
    r = run(*LAUNCH, *blocks, *words, cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('wrote ') == 1 and r.stdout.count('FSDP cuts the network into blocks: running eager') == 1
    log = [json.loads(o) for o in (tmp_path/'ldm'/'log.jsonl').read_text().splitlines()]
    assert [o['step'] for o in log] == [3, 6] and all('score' in o for o in log)
    assert (sorted(p.name for p in (tmp_path/'ldm'/'checkpoints').iterdir()) ==
            ['best.pt', 'step-0000003.pt', 'step-0000006.pt'])
    assert json.loads((tmp_path/'ldm'/'config.json').read_text())['card']['processes'] == 2
    weights = load_file(tmp_path/'ldm'/'model.safetensors')
    (tmp_path/'ldm'/'model.safetensors').unlink()
    words.remove('--compile')
    r = run(sys.executable, *words, '--resume', cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0 and 'resumed at step 6' in r.stdout, r.stderr[-3000:]
    assert apart(load_file(tmp_path/'ldm'/'model.safetensors'), weights) == 0


@pytest.mark.parametrize('given, says', [(['--adversary-start', 2], 'without --use_fsdp.*no --adversary-start'),
                                         ([], '--fsdp_version 2')])
def test_what_fsdp_does_not_do_is_refused(tmp_path, given, says):
    words = ['-m', 'ldm_nb.cli.train', 'autoencoder', '--preset', 'tiny', '--steps', 4, '--device', 'cpu', '--out',
             tmp_path/'ae', *given]
    r = run(*LAUNCH[:len(LAUNCH) if given else -2], *words, cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode and re.search(f'error in process [01]: .*{says}', r.stderr), r.stderr[-2000:]
    assert not (tmp_path/'ae'/'checkpoints').exists()


def test_a_process_that_dies_ends_the_run(tmp_path):
    start = time.time()
    p = subprocess.run([str(w) for w in [*TORCHRUN, ROOT/'tests'/'under_torchrun.py', 'die', tmp_path]],
                       capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and time.time() - start < 60
    assert re.search(r'rank\s*:\s*1\b', p.stderr) and 'SIGKILL' in p.stderr, p.stderr[-2000:]


def test_codes_that_start_again_are_refused_on_two(tmp_path):
    words = ['-m', 'ldm_nb.cli.train', 'autoencoder', '--preset', 'tiny', '--regulariser', 'vq', '--steps', 4,
             '--device', 'cpu', '--out', tmp_path/'vq']
    r = run(*TORCHRUN, *words, cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode and re.search(r'error in process [01]: .*--restarts 0', r.stderr), r.stderr[-2000:]


LEFT = '''
import atexit, multiprocessing.util, sys
kept = []
if 'let go' in sys.argv: atexit.register(kept.clear)         # after torch's own end, before that of the processes
import torch
from ldm_nb.engine.feeding import feed
kept.append(feed(lambda step, part: torch.arange(4)[part] + step, [slice(0, 4)], 10**6, workers=1))
print(next(kept[0]).tolist(), flush=True)
if 'an error' in sys.argv: raise RuntimeError('an error')
'''

@pytest.mark.parametrize('how', ['as it is', 'an error', 'let go'])
def test_python_ends_while_batches_are_still_prepared(how):
    r = subprocess.run([sys.executable, '-c', LEFT, how], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (r.returncode, r.stdout) == (how == 'an error', '[0, 1, 2, 3]\n'), r.stderr
