"""A run of 300 steps killed with -9 at twenty random moments, another stopped with SIGTERM at twenty, each resumed
until it is done: the log and the weights must be those of the run that nobody touched, bit for bit, and every
checkpoint must be readable after every kill. Writes data/results/kills.json.

    python tests/prove/kills.py              about 40 minutes on two cores
    python tests/prove/kills.py --kills 3    a short one"""
import argparse, json, os, random, signal, subprocess, sys, time
from pathlib import Path
import torch
from ldm_nb.engine.files import atomic_path
from ldm_nb.engine.checkpoints import checkpoints
from safetensors.torch import load_file

STEPS = 300
WORDS = [sys.executable, '-m', 'ldm_nb.cli.train', 'diffusion', '--data', 'postcards', '--preset', 'tiny',
         '--condition', 'text', '--steps', str(STEPS), '--seed', '3', '--device', 'cpu', '--precision', 'fp32',
         '--log-every', '1', '--save-every', '25', '--tracker', 'none', '--quiet', '--out']

def start(out: Path, *more):
    return subprocess.Popen([*WORDS, str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def steps_done(out: Path) -> int: # lines of the log; 0 before there is one
    return len((out/'log.jsonl').read_text().splitlines()) if (out/'log.jsonl').is_file() else 0

def curve(out: Path) -> list: # (step, loss, mean) of each step, as text: equal means equal in every digit
    return [[json.loads(o)[k] for k in ('step', 'loss', 'mean')] for o in (out/'log.jsonl').read_text().splitlines()]

def interrupted(out: Path, sig: int, kills: int, rng: random.Random
    ) -> tuple: # where it was hit; how often it said where it went on
    "Train, hit at a random step, resume, until it is done."
    hits, resumed = [], 0
    while True:
        p = start(out, *(['--resume'] if out.exists() else []))
        target = steps_done(out) + rng.randint(1, STEPS//kills) if len(hits) < kills else None
        while target and p.poll() is None and steps_done(out) < target: time.sleep(.003)
        if target and p.poll() is None:
            time.sleep(rng.random()*.03)  # anywhere in a step, or in the writing of a checkpoint
            p.send_signal(sig)
            hits.append(steps_done(out))
        said = p.communicate()[0]
        resumed += 'resumed at step' in said
        if sig == signal.SIGTERM: assert p.returncode in (0, 128 + sig), said  # 0: it came to its end
        for path in checkpoints(out): torch.load(path, weights_only=True)      # readable, whenever it was hit
        if steps_done(out) == STEPS and (out/'model.safetensors').is_file(): return hits, resumed

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=20, help='how often each of the two is hit (default 20)')
    p.add_argument('--seed', type=int, default=0, help='of the moments (default 0)')
    p.add_argument('--work', type=Path, default=Path('runs/kills'),
                   help='an empty folder for the runs (default runs/kills)')
    p.add_argument('--out', type=Path, default=Path('data/results/kills.json'))
    a, began = p.parse_args(), time.time()
    os.environ['OMP_NUM_THREADS'] = '1'
    said = start(a.work/'whole').communicate()[0]
    whole, rows = load_file(a.work/'whole'/'model.safetensors'), []
    for name, sig in (('kill -9', signal.SIGKILL), ('SIGTERM', signal.SIGTERM)):
        out = a.work/name.replace(' ', '')
        hits, resumed = interrupted(out, sig, a.kills, random.Random(a.seed))
        there = load_file(out/'model.safetensors')
        rows.append(dict(signal=name, hits=hits, resumed=resumed, same_losses=curve(out) == curve(a.work/'whole'),
                         tensors=len(whole),
                         tensors_that_differ=sum(not torch.equal(v, there[k]) for k, v in whole.items())))
        print(rows[-1], flush=True)
    about = dict(command=f'python tests/prove/kills.py --kills {a.kills} --seed {a.seed}', steps=STEPS, device='cpu',
                 threads=1, torch=torch.__version__, minutes=round((time.time() - began)/60, 1))
    with atomic_path(a.out) as path: path.write_text(json.dumps(about | dict(runs=rows), indent=1) + '\n')
    assert all(len(r['hits']) == a.kills and r['same_losses'] and not r['tensors_that_differ']
               for r in rows), 'an interrupted run is not the same'
