"Several processes on one machine, joined over gloo: the same gradients as one, one set of files, and a failure that is noticed."
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file
from under_torchrun import curve, gradient

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2]


@pytest.fixture(scope='module')
def two(tmp_path_factory): # what two processes with half of the batch each have computed
    out = tmp_path_factory.mktemp('two')/'result.pt'
    r = run(*TORCHRUN, ROOT/'tests'/'under_torchrun.py', 'compare', out, OMP_NUM_THREADS='1')
    assert r.returncode == 0, r.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize('name, accumulate', [('gradient', 1), ('halves', 2)])
def test_two_processes_have_the_gradients_of_one(two, name, accumulate):
    there, here = two[name], gradient(1)
    assert (there['processes'], here['processes']) == (2, 1)                   # accelerate can start one where two were asked for
    assert here['gradient'].abs().max() > 1e-3
    assert (there['gradient'] - here['gradient']).abs().max() < 1e-10
    assert abs(there['loss'] - here['loss']) < 1e-10
    assert (gradient(accumulate)['gradient'] - here['gradient']).abs().max() < 1e-10


def test_their_loss_curves_stay_together_in_float32(two):
    here, there = curve()['losses'], two['curve']['losses']
    worst = max(abs(a - b) for a, b in zip(here, there))
    print(f'60 steps in float32, two processes against one: losses differ by at most {worst:.1e}')
    assert len(here) == len(there) == 60 and here[-1] < here[0] and worst < 1e-4


def test_a_run_on_two_writes_once(tmp_path):
    words = ['-m', 'ldm_nb.recipes', 'train', 'autoencoder', '--preset', 'tiny', '--steps', 20, '--device', 'cpu', '--precision', 'fp32', '--log-every', 5,
             '--adversary-start', 8, '--adversary-warmup', 4, '--quiet', '--out']
    r = run(*TORCHRUN, *words, tmp_path/'two', cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('wrote ') == 1 and r.stdout.count('reconstruction, dB') == 1
    log = [json.loads(o) for o in (tmp_path/'two'/'log.jsonl').read_text().splitlines()]
    assert [o['step'] for o in log] == [5, 10, 15, 20]
    assert sorted(p.name for p in (tmp_path/'two'/'checkpoints').iterdir()) == ['best.pt', 'step-0000010.pt', 'step-0000020.pt']
    assert json.loads((tmp_path/'two'/'config.json').read_text())['card']['processes'] == 2
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path/'two'/'model.safetensors').values())
    r = run(*TORCHRUN, *words, tmp_path/'two', '--resume', cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode == 0 and r.stdout.count('resumed at step 20') == 1, r.stderr[-3000:]


def test_a_process_that_dies_ends_the_run(tmp_path):
    start = time.time()
    p = subprocess.run([str(w) for w in [*TORCHRUN, ROOT/'tests'/'under_torchrun.py', 'die', tmp_path/'x']], capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and time.time() - start < 60
    assert re.search(r'rank\s*:\s*1\b', p.stderr) and 'SIGKILL' in p.stderr, p.stderr[-2000:]


def test_codes_that_start_again_are_refused_on_two(tmp_path):
    words = ['-m', 'ldm_nb.recipes', 'train', 'autoencoder', '--preset', 'tiny', '--regulariser', 'vq', '--steps', 4, '--device', 'cpu', '--out', tmp_path/'vq']
    r = run(*TORCHRUN, *words, cwd=ROOT, OMP_NUM_THREADS='1')
    assert r.returncode and re.search(r'error in process [01]: .*--restarts 0', r.stderr), r.stderr[-2000:]
