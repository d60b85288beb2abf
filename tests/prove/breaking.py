"""What strangers and their machines do to the package: 200 signals at random moments, 5,000 damaged files, 2,000 calls
with arguments that make no sense. Writes data/results/breaking.json.

    python tests/prove/breaking.py                            all of it: about half an hour on two cores
    python tests/prove/breaking.py --kills 20 --inputs 500    a short one
    python tests/prove/breaking.py --only 1234                one damaged file, by its number, in all its words

What is done is kept in runs/breaking/, a line each, so that it can be stopped and gone on with; --anew forgets it."""
import argparse, json, os, platform, shutil, sys, tempfile, time
from pathlib import Path
import torch
from ldm_nb.engine.files import atomic_path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import killed, mutants # noqa: E402, beside this file

def main(a) -> int: # exit code
    if a.anew: shutil.rmtree(a.rows, ignore_errors=True)
    a.rows.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        parts = dict(
            inputs=lambda: mutants.try_inputs(range(a.inputs), a.seed, tmp/'inputs', a.rows/'inputs.jsonl'),
            kills=lambda: killed.all_hits(a.kills, a.seed, tmp/'kills', a.rows/'kills.jsonl'),
            arguments=lambda: arguments(a.calls, a.rows/'arguments.json'))
        got = {k: timed(parts[k], a.rows/f'{k}.seconds') for k in ([a.part] if a.part else parts)}
    return 0 if a.part else report(a, **got)

def timed(do, path: Path): # what it gives; its seconds are added to those of earlier sittings
    start = time.time()
    got = do()
    spent = float(path.read_text()) if path.is_file() else 0.
    path.write_text(f'{spent + time.time() - start:.0f}')
    return got

def report(a, inputs: list, kills: list, arguments: dict) -> int: # exit code
    found = [r for r in inputs if r['outcome'].startswith('FINDING')]
    wrong = [r for r in kills if r['wrong']]
    odd = {k: c['wrong'] for k, c in arguments.items() if c['wrong']}
    outcomes = {k: sum(r['outcome'] == k for r in inputs) for k in sorted({r['outcome'] for r in inputs})}
    out = dict(
        command=f'python tests/prove/breaking.py --kills {a.kills} --inputs {a.inputs} --calls {a.calls} '
                f'--seed {a.seed}',
        seed=a.seed, device='cpu', threads=1, torch=torch.__version__, python=platform.python_version(),
        seconds={k: int((a.rows/f'{k}.seconds').read_text()) for k in ('inputs', 'kills', 'arguments')},
        kills=dict(hits=sum(r['hit'] for r in kills), jobs=killed.counted(kills), wrong=wrong),
        inputs=dict(number=len(inputs), outcomes=outcomes, doors=mutants.counted(inputs), findings=found),
        arguments=arguments)
    with atomic_path(a.out) as p: p.write_text(json.dumps(out, indent=1) + '\n')
    print(f'{out["kills"]["hits"]} hits, {len(wrong)} with something wrong; {len(inputs)} damaged files, '
          f'{len(found)} findings; {sum(c["number"] for c in arguments.values())} argument sets, '
          f'{sum(map(len, odd.values()))} findings; wrote {a.out}')
    return int(bool(wrong or found or odd))

def arguments(n: int, kept: Path) -> dict: # sample or a command -> number, counts, wrong
    "The argument sets of arguments.py: n of `sample`, and as many of the commands, all together."
    import arguments as sets
    if kept.is_file(): return json.loads(kept.read_text())
    torch.set_num_threads(1)
    toys, out = sets.models(), {}
    with sets.workplace(toys) as folder:
        for what in ('sample', *sets.COMMANDS):
            many = n if what == 'sample' else -(-n//len(sets.COMMANDS))
            out[what] = dict(number=many) | sets.prove(what, range(many), toys, folder)
    kept.write_text(json.dumps(out))
    return out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, d, h in (('kills', 200, 'signals'), ('inputs', 5000, 'damaged files'), ('seed', 0, 'of everything random'),
                    ('calls', 1000, 'argument sets of sample, and of the commands')):
        p.add_argument(f'--{k}', type=int, default=d, help=f'{h} (default {d})')
    p.add_argument('--part', choices=('inputs', 'kills', 'arguments'),
                   help='do this alone, and write no table: that is of all')
    p.add_argument('--only', type=int, nargs='+', help='numbers of damaged files')
    p.add_argument('--anew', action='store_true', help='forget what runs/breaking/ keeps')
    p.add_argument('--rows', type=Path, default=Path('runs/breaking'))
    p.add_argument('--out', type=Path, default=Path('data/results/breaking.json'))
    a = p.parse_args()
    if a.only:
        with tempfile.TemporaryDirectory() as tmp:
            for r in mutants.try_inputs(a.only, a.seed, Path(tmp)): print('\n'.join(f'{k}: {v}' for k, v in r.items()))
        sys.exit()
    os.environ['OMP_NUM_THREADS'] = '1'
    sys.exit(main(a))
