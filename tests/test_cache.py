"""The latent cache killed with SIGKILL, between two shards and in the middle of writing one: it goes on, and nothing
is done twice or differently."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.engine.cache import LatentCache, encode_dataset

N, SHARD = 96, 16

# encodes N pictures into argv[1]; argv[2] is a number of calls of the encoder after which it is slow, argv[3] of the
# shard that is cut in half by SIGKILL
ENCODE = textwrap.dedent('''
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from ldm_nb.engine import cache
    sys.path.insert(0, os.path.join(sys.argv[4], 'tests'))
    from test_cache import first_stage, pictures, SHARD
    ae, calls, saved = first_stage(), 0, 0
    once, save = ae.posterior, cache.save_file
    def posterior(x):
        global calls
        calls += 1
        if calls > int(sys.argv[2]): time.sleep(60)
        return once(x)
    def cut(tensors, path, metadata):
        global saved
        saved += 1
        save(tensors, path, metadata)
        if saved == int(sys.argv[3]):
            os.truncate(path, os.path.getsize(path)//2)
            os.kill(os.getpid(), signal.SIGKILL)
    ae.posterior, cache.save_file = posterior, cut
    cache.encode_dataset(ae, 'v1', pictures(), sys.argv[1], batch_size=8, shard=SHARD,
                         variants=('plain', 'mirror', 'crops:1x16'), quiet=True)
''')


def pictures() -> torch.Tensor:
    return torch.randint(256, (N, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def first_stage() -> Autoencoder: # small, with weights that are the same in every process
    torch.manual_seed(0)
    return Autoencoder(ch=8, num_res_blocks=1, groups=4).eval()


def encode(folder) -> tuple[LatentCache, int]: # and how many batches were encoded
    ae, calls = first_stage(), []
    once = ae.posterior
    ae.posterior = lambda x: (calls.append(len(x)), once(x))[1]
    cache = encode_dataset(ae, 'v1', pictures(), folder, batch_size=8, shard=SHARD,
                           variants=('plain', 'mirror', 'crops:1x16'), quiet=True)
    return cache, len(calls)


def start(folder, root, calls=10**6, cut=0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', ENCODE, folder, str(calls), str(cut), root],
                            env=os.environ | dict(OMP_NUM_THREADS='1'))


def shards(folder) -> dict: return {p.name: p.read_bytes() for p in folder.glob('[0-9]*.safetensors')}


@pytest.fixture(scope='module')
def whole(tmp_path_factory): # a cache that nobody disturbed
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('whole')
    assert encode(folder)[1] == N//8
    return folder


def go_on(folder, whole, left): # `left` shards are missing; the others must stay as they are
    before, times = shards(folder), {p.name: p.stat().st_mtime_ns for p in folder.glob('[0-9]*.safetensors')}
    assert len(before) == N//SHARD - left and not (folder/'index.json').exists()
    with pytest.raises(ValueError, match='is unfinished'): LatentCache(folder)
    cache, calls = encode(folder)
    assert calls == left*SHARD//8
    assert {k: (folder/k).stat().st_mtime_ns for k in times} == times
    assert shards(folder) == shards(whole) and (folder/'index.json').read_bytes() == (whole/'index.json').read_bytes()
    i = torch.randperm(N)
    for v in range(3):
        assert torch.equal(cache.moments(i, torch.full((N,), v))[1],
                           LatentCache(whole).moments(i, torch.full((N,), v))[1])


def test_killed_between_shards(root, tmp_path, whole):
    p = start(tmp_path, root, calls=5)  # two batches a shard: it hangs in the second batch of the third
    try:
        for _ in range(600):
            if len(shards(tmp_path)) == 2: break
            assert p.poll() is None, 'ended early'
            time.sleep(.1)
    finally: p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    go_on(tmp_path, whole, left=4)


def test_killed_while_writing(root, tmp_path, whole):
    assert start(tmp_path, root, cut=4).wait(timeout=120) == -signal.SIGKILL
    assert len(list(tmp_path.glob('.*.tmp'))) == 1  # the half that was written is under another name
    go_on(tmp_path, whole, left=3)


def test_killed_anywhere(root, tmp_path, whole): # wherever that is, the same cache comes of it
    for delay in (.5, 1, 2, 3, 4, 6):
        p = start(tmp_path, root)
        try: p.wait(timeout=delay)
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL)
        if p.wait() == 0: break
    encode(tmp_path)
    assert shards(tmp_path) == shards(whole)
