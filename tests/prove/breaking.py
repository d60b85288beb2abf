"""What strangers' machines do to the package: 200 signals at random moments, 5,000 damaged files, 1,000 calls with
arguments that make no sense. Writes data/results/breaking.json.

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
    began = time.time()
    if a.anew: shutil.rmtree(a.rows, ignore_errors=True)
    spent_before = json.loads((a.rows/'seconds.json').read_text()) if (a.rows/'seconds.json').is_file() else {}
    spent = {k: spent_before.get(k, 0.) for k in ('kills', 'inputs', 'arguments')}
    out = dict(command=' '.join(['python tests/prove/breaking.py', *sys.argv[1:]]), seed=a.seed, device='cpu',
               threads=1, torch=torch.__version__, python=platform.python_version())
    def timed(what, do):
        start = time.time()
        got = do()
        spent[what] = round(spent[what] + time.time() - start, 1)
        a.rows.mkdir(parents=True, exist_ok=True)
        (a.rows/'seconds.json').write_text(json.dumps(spent))
        return got
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        inputs = timed('inputs', lambda: mutants.try_inputs(range(a.inputs), a.seed, tmp/'inputs',
                                                            a.rows/'inputs.jsonl'))
        kills = timed('kills', lambda: killed.all_hits(a.kills, a.seed, tmp/'kills', a.rows/'kills.jsonl'))
    calls = timed('arguments', lambda: arguments(a.calls, a.seed))
    found = [r for r in inputs if r['outcome'].startswith('FINDING')]
    wrong = [dict(r, wrong=r['wrong']) for r in kills if r['wrong']]
    outcomes = {k: sum(r['outcome'] == k for r in inputs) for k in sorted({r['outcome'] for r in inputs})}
    out |= dict(seconds=spent, kills=dict(hits=sum(r['hit'] for r in kills), jobs=killed.counted(kills), wrong=wrong),
                inputs=dict(number=len(inputs), outcomes=outcomes, doors=mutants.counted(inputs), findings=found),
                arguments=calls)
    with atomic_path(a.out) as p: p.write_text(json.dumps(out, indent=1) + '\n')
    print(f'{out["kills"]["hits"]} hits, {len(wrong)} with something wrong; {len(inputs)} damaged files, '
          f'{len(found)} findings; {calls.get("number", 0)} argument sets, {len(calls.get("findings", []))} findings; '
          f'{(time.time() - began)/60:.1f} minutes; wrote {a.out}')
    return int(bool(wrong or found or calls.get('findings')))

def arguments(n: int, seed: int) -> dict: # number, outcomes, findings
    "The argument sets of arguments.py."
    import arguments as sets
    return sets.try_all(n, seed)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, d, h in (('kills', 200, 'signals'), ('inputs', 5000, 'damaged files'), ('calls', 1000, 'argument sets'),
                    ('seed', 0, 'of everything random')):
        p.add_argument(f'--{k}', type=int, default=d, help=f'{h} (default {d})')
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
