"""The unit tests that say most in little time: those of what git shows as changed first, then a few of all parts.
Test files are started one after another, `WORKERS` at a time, until `START` seconds have passed, and end after `STOP`;
what was left out is named, and `make test` runs it."""
import ast
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import house
import story

ROOT = Path(__file__).resolve().parent.parent
START, STOP, WORKERS = 45, 90, 2
ALWAYS = ('api', 'formats', 'links', 'samplers', 'unet') # each at most 20 seconds
NEVER = ('browser',) # minutes, and a browser


def git(*words) -> list[str]: # lines of what it says; none where there is no repository
    r = subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    return r.stdout.splitlines() if r.returncode == 0 else []


def changed() -> set[str]: # files that differ from the last commit; where none does, those of the last commit
    now = git('diff', '--name-only', 'HEAD') + git('ls-files', '--others', '--exclude-standard')
    return set(now or git('show', '--name-only', '--format=', 'HEAD'))


def modules(files: set[str], known: dict) -> set[str]: # of the package, that these files hold or export
    found = {f.removeprefix(house.PACKAGE + '/').removesuffix('.py').replace('/', '.')
             for f in files if f.startswith(house.PACKAGE + '/')}
    found |= {m for m, v in known.items() if any(f'nbs/{home}.ipynb' in files for home in v.homes)}
    return found & set(known)


def imported(test: Path, known: dict) -> set[str]: # modules of the package that a test imports
    nodes = ast.walk(ast.parse(test.read_text(encoding='utf-8')))
    return {story.known(name, known) for node in nodes for name in story.imported(node, '')}


def order(tests: list[Path], files: set[str], known: dict
    ) -> list[Path]: # what changed itself, then what imports most of what changed, then the rest of ALWAYS
    new = modules(files, known)
    def weight(test): return (f'tests/{test.name}' in files)*1000 + len(imported(test, known) & new)
    chosen = [t for t in tests
              if t.stem.removeprefix('test_') not in NEVER and (weight(t) or t.stem.removeprefix('test_') in ALWAYS)]
    return sorted(chosen, key=lambda t: (-weight(t), t.name))


def run(test: Path, began: float) -> str | None: # 'passed' or what pytest said; None: there was no time for it
    if time.time() > began + START: return None
    words = [sys.executable, '-m', 'pytest', '-q', str(test)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    p = subprocess.Popen(words, cwd=ROOT, env=env, text=True, start_new_session=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    try: said, _ = p.communicate(timeout=began + STOP - time.time())
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL) # with what it started
        p.communicate()
        return None
    return 'passed' if p.returncode in (0, 5) else said


def main() -> int:
    known, _ = story.read_modules(house.notebooks(ROOT/'nbs'), ROOT/'nbs')
    chosen, began = order(sorted((ROOT/'tests').glob('test_*.py')), changed(), known), time.time()
    with ThreadPoolExecutor(WORKERS) as pool: said = dict(zip(chosen, pool.map(lambda t: run(t, began), chosen)))
    for text in said.values():
        if text not in ('passed', None): print(text)
    names = lambda *kinds: ' '.join(t.stem.removeprefix('test_') for t, text in said.items() if text in kinds) or 'none'
    failed = [t.name for t, text in said.items() if text not in ('passed', None)]
    print(f'quick: passed: {names("passed")}; failed: {" ".join(failed) or "none"}; left out: {names(None)}')
    return len(failed) > 0


if __name__ == '__main__': sys.exit(main())
