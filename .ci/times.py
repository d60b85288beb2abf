"""How long each chapter of the story takes, honestly: 150 words of prose and 40 lines of code a minute, exercises as
their headings say, the machine as it was measured. `write` puts the numbers into the chapters, `check` compares."""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from house import address, notebooks

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
WORDS, LINES = 150, 40 # a minute
HOURS, READING_HOURS = 14, 9 # the whole story at most: with exercises, and without
SLACK = 2 # minutes that a stated time may be off before `check` says so: a sentence more needs no new number
# of README's table
ROW = re.compile(r'\| \[\d\d [^]]*\]\(nbs/(story/\w+)\.ipynb\) \|[^|]*\| (\d*) \| (\d*) \| (\d*) \|')
LINE = re.compile(r'\*\*Time\*\*: reading (\d+) min, exercises (\d+) min, machine (\d+) min\.')


@dataclass
class Times: # of one chapter
    address: str
    title: str
    words: int # of prose, exercises left out
    code: int # lines that are shown, exercises left out
    exercises: int # minutes, as their headings say
    unstated: int # exercises whose headings do not say
    machine: int | None # minutes by the processor, for one run of the whole chapter; None: never measured
    stated: tuple[int, int, int] | None # what the chapter says

    @property
    def reading(self) -> int: return max(round(self.words/WORDS + self.code/LINES), 1)

    @property
    def true(self) -> tuple[int, int, int]: return self.reading, self.exercises, self.machine or 0


def words(text: str) -> int: # of prose: formulas, code and addresses of links are not counted
    return len(re.findall(r"[A-Za-z][A-Za-z'-]*", re.sub(r'\$[^$]*\$|`[^`]*`|\]\([^)]*\)', ' ', text)))


def lines(code: str) -> int: # that hold something, directives left out
    return len([o for o in code.splitlines() if o.strip() and not o.startswith('#|')])


def measure(path: Path, machine: dict) -> Times: # `machine` is data/results/chapter-times.json
    cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    inside, prose, code, exercises, unstated = False, 0, 0, 0, 0
    for kind, text in cells:
        head = re.match(r'(#+) ', text) if kind == 'markdown' else None
        if head: inside = bool(re.match(r'#+ Exercises?\b', text)) or inside and len(head[1]) > 2
        if inside and kind == 'markdown':
            minutes = re.findall(r'^Difficulty .*?(\d+) minutes', text, re.M)
            exercises += sum(map(int, minutes))
            unstated += len(re.findall(r'^### Exercise \d', text, re.M)) - len(minutes)
        elif kind == 'markdown': prose += words(text)
        elif kind == 'code' and not inside and not re.match(r'#\|\s*(hide|default_exp)', text): code += lines(text)
    book = '\n'.join(text for kind, text in cells if kind == 'markdown')
    name, said = address(path, NBS), LINE.search(book)
    spent = machine.get(name)
    title = re.search(r'^# (.+)$', book, re.M)
    return Times(name, title[1] if title else path.stem, prose, code, exercises, unstated,
                 spent and max(round(spent['processor_seconds']/60), 1), said and tuple(map(int, said.groups())))


def story(nbs: Path = NBS) -> list[Times]: # every chapter, in order
    kept = ROOT/'data/results/chapter-times.json'
    machine = json.loads(kept.read_text(encoding='utf-8')) if kept.is_file() else {}
    return [measure(p, machine) for p in notebooks(nbs) if p.parent.name == 'story']


def totals(found: list[Times]) -> str: # in hours
    reading = sum(t.words/WORDS + t.code/LINES for t in found)/60
    exercises = sum(t.exercises for t in found)/60
    return (f'{reading:.1f} h to read, {exercises:.1f} h of exercises, {reading + exercises:.1f} h in all; '
            f'{sum(t.machine or 0 for t in found)/60:.1f} h of one processor')


def off(stated: tuple | None, true: tuple) -> bool: # too far to be left
    return stated is None or any(abs(a - b) > SLACK for a, b in zip(stated, true))


def wrong(found: list[Times], readme: str) -> list[str]: # of the chapters, of the table in README, of the totals
    bad = []
    shown = {k: tuple(int(m or 0) for m in minutes) for k, *minutes in ROW.findall(readme)}
    for t in found:
        if t.unstated: bad.append(f'{t.address} has {t.unstated} exercises without "Difficulty ... N minutes"')
        if off(shown.get(t.address), t.true):
            bad.append(f'README says {shown.get(t.address)} minutes of {t.address}, which takes {t.true}: '
                       'make notebooks NB=index')
        if t.machine is None: bad.append(f'{t.address} was never timed: make notebooks NB={t.address}')
        if t.stated is None:
            bad.append(f'{t.address} has no line "**Time**: reading 0 min, exercises 0 min, machine 0 min."')
        elif off(t.stated, t.true):
            bad.append(f'{t.address} says {t.stated} minutes and takes {t.true}: run .ci/times.py write')
    reading = sum(t.words/WORDS + t.code/LINES for t in found)/60
    exercises = sum(t.exercises for t in found)/60
    if reading > READING_HOURS: bad.append(f'{reading:.1f} hours to read the story, at most {READING_HOURS}')
    if reading + exercises > HOURS: bad.append(f'{reading + exercises:.1f} hours with exercises, at most {HOURS}')
    return bad


def write(found: list[Times]): # the true numbers into each chapter that has the line
    for t in found:
        if t.stated in (None, t.true): continue
        path = NBS/f'{t.address}.ipynb'
        text = path.read_text(encoding='utf-8')
        new = '**Time**: reading {} min, exercises {} min, machine {} min.'.format(*t.true)
        path.write_text(LINE.sub(new, text, count=1), encoding='utf-8')
        t.stated = t.true


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else 'check'
    if what not in ('write', 'check', 'table'): sys.exit('usage: times.py write | check | table')
    found = story()
    if what == 'write': write(found)
    if what == 'table':
        for t in found:
            print(f'{t.address:26} {t.words:5} words {t.code:4} lines  reading {t.reading:3}  '
                  f'exercises {t.exercises:3}  machine {t.machine}  stated {t.stated}')
    readme = ROOT/'README.md'
    bad = wrong(found, readme.read_text(encoding='utf-8') if readme.is_file() else '')
    for w in bad: print('times:', w, file=sys.stderr)
    print('times:', totals(found))
    sys.exit(bool(bad))
