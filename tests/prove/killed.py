"""Trainings, caches, saves and evaluations hit by a signal at random moments, and started again until they are done:
what comes out must be, bit for bit, what comes out untouched; everything that has its final name must be readable
after every hit; no temporary file and no process may stay. Called by tests/prove/breaking.py; by hand:

    python tests/prove/killed.py --kills 20           runs/breaking/kills.jsonl keeps what is done
    python tests/prove/killed.py --job postcards

A hit comes at a random moment, or at a random file operation: a process counts what it opens for writing, renames and
removes, and sends itself the signal at the chosen one. One process imports everything, once, and forks each run."""
import argparse, contextlib, json, multiprocessing, os, random, shutil, signal, sys, tempfile, time, warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import context # noqa: E402, beside this file

SIGNALS = ('SIGKILL', 'SIGTERM', 'SIGHUP', 'SIGINT')
MARK = 'LDM_NB_PROVE'                                        # in the environment of a run, and of all that it starts
PATIENCE = 300                                               # seconds that a run may take; a longer one hangs

# ---------------------------------------------------------------- what is done, in a process of its own

def pictures(folder: Path, n: int, side: int = 24):
    import numpy as np
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        rng = np.random.default_rng(k)
        small = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((side, side + k % 3), Image.Resampling.BILINEAR).save(folder/f'{k:02d}.png')

def prepare(work: Path):
    "What the runs begin from: pictures, a first stage, two models of one shape that predict other things."
    import torch
    from ldm_nb.autoencoder import Autoencoder, save_autoencoder
    from ldm_nb.core import LatentDiffusion
    from ldm_nb.unet import UNet
    pictures(work/'pictures', 48)
    ae = lambda seed: (torch.manual_seed(seed), Autoencoder(z_ch=2, ch=8, ch_mult=(1, 1), num_res_blocks=1, groups=4,
                                                            mid_attn=False))[1]
    save_autoencoder(ae(0), work/'first-stage')
    for k, (name, predicts) in enumerate((('a', 'eps'), ('b', 'v'))): # the weights of one fit the config of the other
        torch.manual_seed(k)
        net = UNet(in_ch=2, out_ch=2, ch=8, ch_mult=(1,), attn_factors=(), groups=4)
        for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
        LatentDiffusion(ae(1), net, prediction_type=predicts, size=16).eval().save_pretrained(work/name)

TINY = dict(preset='tiny', steps=40, save_every=6, batch_size=4, size=16, device='cpu', precision='fp32', quiet=True,
            seed=3, log_every=1)

def train_first_stage(work: Path, out: Path):
    from ldm_nb.cli.recipes import train_autoencoder
    train_autoencoder(out, data=str(work/'pictures'), f=2, crop=16, adversary_start=12, adversary_warmup=6,
                      resume=out.exists(), model=dict(ch=8, num_res_blocks=1, groups=4, mid_attn=False), **TINY)

def train_codes(work: Path, out: Path):
    from ldm_nb.cli.recipes import train_autoencoder
    train_autoencoder(out, data=str(work/'pictures'), f=2, crop=16, regulariser='vq', codes=64, restarts=5,
                      resume=out.exists(), model=dict(ch=8, num_res_blocks=1, groups=4, mid_attn=False), **TINY)

def train_second_stage(work: Path, out: Path):
    from ldm_nb.cli.recipes import train_diffusion
    train_diffusion(out, data='postcards', n=60, autoencoder=str(work/'first-stage'), condition='text',
                    resume=out.exists(), model=dict(ch=8, ch_mult=(1,), attn_factors=(1,), groups=4), **TINY)

def train_with_workers(work: Path, out: Path):
    from ldm_nb.cli.recipes import train_diffusion
    train_diffusion(out, data=str(work/'pictures'), autoencoder=str(work/'first-stage'), condition='none',
                    resume=out.exists(), model=dict(ch=8, ch_mult=(1,), attn_factors=(), groups=4), workers=1, **TINY)

def draw_postcards(work: Path, out: Path):
    from ldm_nb.datasets.postcards import Postcards, render_all
    render_all(Postcards(1500, 8), 2)

def encode(work: Path, out: Path):
    from ldm_nb.autoencoder import load_autoencoder
    from ldm_nb.engine.cache import encode_dataset
    from ldm_nb.engine.files import weights_hash
    import torch
    images = (torch.arange(240*3*16*16) % 251).reshape(240, 3, 16, 16).to(torch.uint8)
    ae, name = load_autoencoder(work/'first-stage'), weights_hash(work/'first-stage')
    encode_dataset(ae, name, images, out, shard=16, quiet=True)

def crop_photographs(work: Path, out: Path):
    from ldm_nb.datasets.sources import load_images
    load_images('photos', 8, 1000, 0)

def load_folder(work: Path, out: Path):
    from ldm_nb.datasets.sources import load_images
    load_images(str(work/'pictures'), 16, 48, 0)

def save_over(work: Path, out: Path):
    "One model over the other, ten times."
    from ldm_nb.core import LatentDiffusion
    two = [LatentDiffusion.from_pretrained(work/k) for k in 'ab']
    for k in range(10): two[k % 2].save_pretrained(out)

def evaluate(work: Path, out: Path):
    from ldm_nb.cli.evaluate import main
    main(['--model', str(work/'a'), '--data', str(work/'pictures'), '--n', '24', '--steps', '3', '--out',
          str(out/'table.json'), '--device', 'cpu'])

def sample(work: Path, out: Path):
    from ldm_nb.cli.sample import main
    main(['--model', str(work/'a'), '--n', '4', '--steps', '20', '--out', str(out/'grid.png'), '--device', 'cpu'])

# ---------------------------------------------------------------- what must have come of it

def weights(folder: Path) -> dict:
    from safetensors.torch import load_file
    return load_file(folder/'model.safetensors')

def trained(out: Path, cache: Path) -> dict: # losses as text: equal means equal in every digit
    rows = [json.loads(o) for o in (out/'log.jsonl').read_text().splitlines()]
    return dict(losses=[{k: repr(v) for k, v in r.items() if k != 'seconds'} for r in rows], weights=weights(out))

def arrays_of(out: Path, cache: Path) -> dict:
    import numpy as np
    return {p.name: dict(np.load(p)) for p in sorted(cache.rglob('*.npz'))}

def tensors_of(out: Path, cache: Path) -> dict:
    from safetensors.torch import load_file
    files = sorted([*out.rglob('*.safetensors'), *cache.rglob('*.safetensors')])
    return {p.name: load_file(p) for p in files}

def files_of(out: Path, cache: Path) -> dict: # whatever is kept of a folder: any names
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob('*')) if p.is_file()}

def measured(out: Path, cache: Path) -> dict: return json.loads((out/'table.json').read_text())['measures']

def drawn(out: Path, cache: Path) -> dict:
    import numpy as np
    from PIL import Image
    return dict(grid=np.asarray(Image.open(out/'grid.png')))

def same(a, b) -> bool:
    import numpy as np, torch
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return a == b

class Job:
    def __init__(self, name, run, result, share, cold=False): # share: of the hits
        self.name, self.run, self.result, self.share, self.cold = name, run, result, share, cold

JOBS = [Job('first stage with an adversary', train_first_stage, trained, 40),
        Job('first stage with codes', train_codes, trained, 20),
        Job('second stage, warm cache', train_second_stage, trained, 30),
        Job('second stage, cold cache', train_second_stage, trained, 30, cold=True),
        Job('second stage with workers', train_with_workers, trained, 10),
        Job('postcards', draw_postcards, arrays_of, 16, cold=True),
        Job('latents', encode, tensors_of, 14, cold=True),
        Job('photographs', crop_photographs, tensors_of, 6, cold=True),
        Job('folder of pictures', load_folder, files_of, 6, cold=True),
        Job('save over another', save_over, tensors_of, 16),
        Job('evaluation', evaluate, measured, 8),
        Job('samples', sample, drawn, 4)]                    # 200 in all

# ---------------------------------------------------------------- one run, in a fork

def count_files(state: dict, roots: tuple[str, ...], at: int | None, sig: int):
    "An audit hook: counts what is done to files below these roots, and hits at the chosen one."
    def hook(event, args):
        if event == 'open':
            path, mode, flags = args
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)): return
        elif event in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate'): path = args[0]
        else: return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(roots): return
        if state['pid'] != os.getpid(): return               # a process that was forked off
        state['n'] += 1
        if state['n'] == at: os.kill(os.getpid(), sig)
    return hook

def child(name: str, work: str, out: str, cache: str, log: str, mark: str, at: int | None, sig: int):
    os.setsid()
    multiprocessing.set_start_method(None, force=True)         # of its own processes: as usual here
    os.chdir(work)
    os.environ |= {'LDM_NB_CACHE': cache, 'OMP_NUM_THREADS': '1', MARK: mark, 'HF_HUB_OFFLINE': '1'}
    where = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(where, 1)
    os.dup2(where, 2)
    import torch
    torch.set_num_threads(1)
    from ldm_nb.cli.common import guarded
    from ldm_nb.engine.runs import StopRequest
    state = dict(n=0, pid=os.getpid())
    sys.addaudithook(count_files(state, (out, cache), at, sig))
    job = next(j for j in JOBS if j.name == name)
    Path(f'{log}.go').write_text('')
    code = 0
    try:
        guarded(lambda argv: job.run(Path(work), Path(out)), [])
        code = 128 + StopRequest.last if StopRequest.last else 0                           # as ldm-train ends
    except SystemExit as e: code = e.code or 0
    except KeyboardInterrupt: code = 130
    Path(f'{log}.n').write_text(str(state['n']))
    sys.exit(code)                                           # as a command ends: what is registered for its end is done

def marked(mark: str) -> list[int]: # processes that carry this mark in their environment
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            ended = (p/'stat').read_text().split(') ')[-1][0] == 'Z'
            if not ended and f'{MARK}={mark}\0'.encode() in (p/'environ').read_bytes(): found.append(int(p.name))
    return found

class Runner:
    "Starts runs of one job in a folder, hits them, looks at what they leave."
    def __init__(self, ctx, job: Job, work: Path, rng: random.Random):
        self.ctx, self.job, self.work, self.rng = ctx, job, work, rng
        self.place = work/job.name.replace(' ', '-').replace(',', '')
        self.count = 0

    def go(self, out: Path, cache: Path, at=None, sig=0, after=None) -> dict:
        "One run; hit at file operation `at`, or `after` seconds."
        self.count += 1
        mark = f'{os.getpid()}-{self.job.name}-{self.count}-{time.time_ns()}'
        log = self.place/f'said-{self.count}.txt'
        self.place.mkdir(parents=True, exist_ok=True)
        began = time.time()
        words = map(str, (self.job.name, self.work, out, cache, log, mark))
        p = self.ctx.Process(target=child, args=(*words, at, sig))
        p.start()
        if after is not None:
            go = Path(f'{log}.go')
            while p.is_alive() and not go.exists(): time.sleep(.002)
            p.join(after)
            if p.is_alive(): os.kill(p.pid, sig)
        p.join(PATIENCE)
        hung = p.is_alive()
        if hung: os.killpg(p.pid, signal.SIGKILL); p.join()
        until = time.time() + 10
        while (left := marked(mark)) and time.time() < until: time.sleep(.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        said, n = log.read_text(errors='replace'), Path(f'{log}.n')
        return dict(code=p.exitcode, seconds=round(time.time() - began, 2), hung=hung, left=len(left), said=said,
                    n=int(n.read_text()) if n.is_file() else None)

def fresh(out: Path, cache: Path, warm: Path | None = None):
    for p in (out, cache): shutil.rmtree(p, ignore_errors=True)
    if warm and warm.exists(): shutil.copytree(warm, cache)
    cache.mkdir(parents=True, exist_ok=True)

MADE_BEFORE = ('evaluation', 'samples')                      # jobs whose --out is a file in a folder that must be there

def wrong(job: Job, out: Path, cache: Path, r: dict, sig: str, hit: bool) -> list[str]:
    "What a hit, or an end, left that must not be."
    bad = []
    if r['hung']: bad.append('hangs')
    if r['left']: bad.append(f'{r["left"]} process(es) stayed')
    if 'Traceback' in r['said']: bad.append('traceback: ' + r['said'][-400:])
    if hit and sig != 'SIGKILL' and r['code'] not in (128 + getattr(signal, sig), -getattr(signal, sig)):
        bad.append(f'exit code {r["code"]} after {sig}: {r["said"][-300:]}')
    return bad + unreadable(out, cache)

def unreadable(out: Path, cache: Path) -> list[str]: # files with their final names that cannot be read
    import numpy as np, torch
    from safetensors import safe_open
    bad = []
    for p in [*out.rglob('*'), *cache.rglob('*')]:
        if p.name.startswith('.') or not p.is_file(): continue
        try:
            if p.suffix == '.pt': torch.load(p, weights_only=True)
            if p.suffix == '.safetensors':
                with safe_open(p, 'pt') as f: [f.get_tensor(k) for k in f.keys()]
            if p.suffix == '.npz':
                with np.load(p) as f: [f[k] for k in f]
            if p.suffix == '.json': json.loads(p.read_text())
            if p.suffix == '.jsonl': [json.loads(o) for o in p.read_text().splitlines()[:-1]]
        except Exception as e: bad.append(f'{p.name} cannot be read: {type(e).__name__}: {e}'[:300])
    return bad

def opens(out: Path, work: Path) -> str: # of a model folder: whole, or that it says what is wrong
    from ldm_nb.core import LatentDiffusion, own_tensors
    def read(folder):
        ldm = LatentDiffusion.from_pretrained(folder)
        return dict(own_tensors(ldm), predicts=ldm.prediction_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            here = read(out)
    except FileNotFoundError as e: return f'wrong: {e}'      # there was one before
    except ValueError as e: return 'refused' if str(out) in str(e) and '\n' not in str(e) else f'wrong: {e}'
    return 'a whole model' if any(same(here, read(work/k)) for k in 'ab') else 'wrong: a mixture of two models'

def temporary(*folders: Path) -> list[str]:
    return [p.name for f in folders for p in f.rglob('.*') if p.name.endswith('.tmp') or 'probe' in p.name]

def hits(ctx, job: Job, work: Path, n: int, seed: int, say=print, keep=lambda row: None, until: float = float('inf'),
         done: int = 0): # rows: one a hit, one for each time that it came to its end
    "Hit one job n times."
    rng = random.Random(f'{seed} {job.name} {done}')
    runner = Runner(ctx, job, work, rng)
    out, cache = runner.place/'out', runner.place/'cache'
    ready = lambda: (fresh(out, cache, None if job.cold else runner.place/'warm'),
                     out.mkdir() if job.name in MADE_BEFORE else None)
    if job.name in MADE_BEFORE: (runner.place/'whole').mkdir(parents=True, exist_ok=True)
    whole = whole_of(runner)
    ready()
    model_before = job.name == 'save over another'
    if model_before: shutil.copytree(work/'a', out)
    k = done
    since = 0
    while k < n and time.time() < until:
        sig = SIGNALS[k % 4]
        by_file = rng.random() < .5
        at = rng.randint(1, max(2, whole['n']//3)) if by_file else None
        after = None if by_file else rng.random()*max(.05, whole['seconds']/3)
        r = runner.go(out, cache, at, getattr(signal, sig), after)
        ended = r['code'] == 0
        row = dict(job=job.name, seed=seed, signal=sig, at=at, after=after and round(after, 3), code=r['code'],
                   seconds=r['seconds'], ended=ended, wrong=wrong(job, out, cache, r, sig, not ended))
        if model_before:
            row['model'] = opens(out, work)
            if row['model'].startswith('wrong'): row['wrong'].append(row['model'])
        if not ended: since += 1
        if ended or model_before and rng.random() < .2 or k == n - 1:
            if not ended: r = finish(runner, out, cache)
            row['since'], since = since, 0
            row['wrong'] += end(job, out, cache, r, whole)
            ready()
            if model_before: shutil.copytree(work/'a', out)
        if not ended: k += 1
        keep(row | dict(hit=not ended))
        moment = f'file operation {at}' if at else f'{after:.2f} s'
        if row['wrong']: say(f'{job.name}, {sig}, {moment}: {row["wrong"]}')

def whole_of(runner: Runner) -> dict:
    out, cache = runner.place/'whole', runner.place/'whole-cache'
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    if runner.job.name not in MADE_BEFORE: shutil.rmtree(out, ignore_errors=True)
    r = runner.go(out, cache)
    assert r['code'] == 0, f'{runner.job.name} does not run:\n{r["said"][-3000:]}'
    if not runner.job.cold:
        shutil.rmtree(runner.place/'warm', ignore_errors=True)
        shutil.copytree(cache, runner.place/'warm')
    return dict(result=runner.job.result(out, cache), n=r['n'], seconds=r['seconds'])

def finish(runner: Runner, out: Path, cache: Path) -> dict:
    for _ in range(3):
        r = runner.go(out, cache)
        if r['code'] == 0: return r
    return r

def end(job: Job, out: Path, cache: Path, r: dict, whole: dict) -> list[str]:
    "What is wrong with a run that has come to its end."
    if r['code'] != 0: return [f'does not come to its end: exit code {r["code"]}: {r["said"][-600:]}']
    bad = [f'temporary files stayed: {t}' for t in [temporary(out, cache)] if t]
    if not same(job.result(out, cache), whole['result']): bad.append('another result than the untouched run')
    return bad + unreadable(out, cache)

def all_hits(kills: int, seed: int, work: Path, rows: Path | None = None, names=None, say=print,
             until: float = float('inf')) -> list[dict]:
    "All jobs, each with its share of the hits; those whose rows are there already are not done again."
    old = [json.loads(o) for o in rows.read_text().splitlines()] if rows and rows.is_file() else []
    got = [r for r in old if r['seed'] == seed]
    ctx = context()
    made = ctx.Process(target=prepare, args=(work,))
    work.mkdir(parents=True, exist_ok=True)
    made.start()
    made.join()
    assert made.exitcode == 0
    def keep(row):
        got.append(row)
        if rows:
            rows.parent.mkdir(parents=True, exist_ok=True)
            with open(rows, 'a') as f: f.write(json.dumps(row) + '\n')
    jobs = [j for j in JOBS if not names or any(n in j.name for n in names)]
    for job in jobs:
        n = max(1, round(kills*job.share/sum(j.share for j in jobs)))
        done = sum(r['hit'] for r in got if r['job'] == job.name)
        if done >= n or time.time() > until: continue
        start = time.time()
        hits(ctx, job, work, n, seed, say, keep, until, done)
        say(f'{job.name}: {n - done} hits in {time.time() - start:.0f} s')
    return got

def counted(rows: list[dict]) -> dict: # job -> hits by signal, ends, what was wrong
    out = {}
    for job in JOBS:
        mine = [r for r in rows if r['job'] == job.name]
        if mine:
            out[job.name] = dict(hits=sum(r['hit'] for r in mine), ends=sum('since' in r for r in mine),
                                 signals={s: sum(r['hit'] and r['signal'] == s for r in mine) for s in SIGNALS},
                                 codes=sorted({str(r['code']) for r in mine if r['hit']}),
                                 wrong=[w for r in mine for w in r['wrong']])
    return out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=200)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--job', nargs='+', help='only jobs with this in their name')
    p.add_argument('--rows', type=Path, default=Path('runs/breaking/kills.jsonl'))
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        got = all_hits(a.kills, a.seed, Path(tmp).resolve(), None if a.job else a.rows, a.job)
    print(json.dumps(counted(got), indent=1))
    sys.exit(any(r['wrong'] for r in got))
