"The story check: chapters build on earlier chapters only, and notebooks keep to a few rules that nothing else would notice."
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, MAX_BYTES, FLAGS = 'ldm_nb', 1_500_000, ('slow', 'cuda')
# arrows that the order of chapters would allow, or that deserve their own sentence
FORBIDDEN = dict(samplers={'diffusion', 'unet', 'core'}, unet={'diffusion', 'samplers'}, autoencoder={'losses', 'training'},
                 training={'reader', 'autoencoder', 'unet', 'conditioning', 'core'}, core={'recipes', 'pretrained', 'widgets', 'evaluate'})
NOWHERE = {'widgets', 'canvas', 'explore', 'watch'} # the panels: no exported cell imports these, except one panel another


def code(source: str) -> str: # what Python would see: magics and shell lines taken out
    return '' if source.lstrip().startswith('%%') else '\n'.join('' if o.lstrip()[:1] in ('%', '!') else o for o in source.splitlines())


def directives(source: str) -> list[str]: # the words after `#|`, one string a line, from the lines above the code: where nbdev looks
    found = []
    for line in source.splitlines():
        if line.strip() and not re.match(r'\s*(#\s*\||%%\w)', line): break
        if re.match(r'\s*#\s*\|', line): found.append(re.sub(r'^\s*#\s*\|\s*', '', line).strip())
    return found


def module_of(cells: list) -> str | None: # what `#| default_exp` says
    for c in cells:
        for d in directives(c['source']):
            if d.split()[:1] == ['default_exp']: return d.split()[1]


def imported(tree: ast.AST) -> set: # modules of the package that are imported anywhere, in functions too
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, [PACKAGE if node.level else '', node.module]))
            names |= {base} if base != PACKAGE else {f'{base}.{a.name}' for a in node.names}
    return {n.split('.')[1] for n in names if n.startswith(PACKAGE + '.')}


def check_arrow(me: str, other: str, order: list) -> str | None: # why an exported cell of `me` may not import `other`
    if other in ('__version__', '_modidx'): return None
    if other in NOWHERE and me not in NOWHERE: return f'an exported cell imports {other}, which no exported cell may'
    if other in FORBIDDEN.get(me, ()): return f'{me} must never import {other}'
    if other == me: return f'an exported cell of {me} imports its own module'
    if other not in order: return f'an exported cell imports {other}, which no notebook exports'
    if me in order and order.index(other) > order.index(me): return f'an exported cell of {me} imports {other}, a later chapter'


def check_cell(c: dict) -> list[str]: # what is wrong with one code cell, its imports of chapters apart
    src, wrong = c['source'], []
    if any(o.get('output_type') == 'error' for o in c.get('outputs', [])): wrong.append('keeps the output of an error; run it again')
    for d in directives(src):
        if re.match(r'eval\b', d): wrong.append(f'`#| {d}`: every cell is evaluated; use `#| slow` or `#| cuda` for what cannot run everywhere')
        if set(FLAGS) & set(re.findall(r'\w+', d)) and d not in FLAGS: wrong.append(f'`#| {d}`: slow and cuda stand alone on their lines')
    late = [o for o in src.splitlines() if re.match(r'\s*#\s*\|', o)][len(directives(src)):]
    if late: wrong.append(f'`{late[0].strip()}` stands below code, where nbdev does not look')
    try: body = ast.parse(code(src)).body
    except SyntaxError as e: return wrong + [f'is not Python: {e}']
    imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
    if any(imports) and not all(imports) and 'nbdev_export(' not in src: wrong.append('mixes imports with other code; give them a cell of their own')
    return wrong


def check_notebook(path: Path, order: list) -> list[str]:
    wrong, cells = [], json.loads(path.read_text(encoding='utf-8'))['cells']
    for c in cells: c['source'] = ''.join(c['source'])
    if path.stat().st_size > MAX_BYTES: wrong.append(f'{path.name}: {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; make its pictures fewer or smaller')
    me, kept = module_of(cells), [c for c in cells if c['cell_type'] == 'code']
    if path.name[0].isdigit() and not any(c.get('outputs') for c in kept): wrong.append(f'{path.name}: no output is kept; run it (make notebooks)')
    for k, c in enumerate(cells):
        say = ['`skip_exec` hides a notebook from its tests'] if re.search(r'^\s*skip_exec\s*:', c['source'], re.M) else []
        if c['cell_type'] == 'code':
            say += check_cell(c)
            if any(d.split()[0] in ('export', 'exports', 'exporti') for d in directives(c['source']) if d):
                try: found = imported(ast.parse(code(c['source'])))
                except SyntaxError: found = set()
                say += filter(None, (check_arrow(me, other, order) for other in sorted(found)))
        wrong += [f'{path.name}, cell {k}: {s}' for s in say]
    return wrong


def chapters(nbs: Path) -> list[Path]: # every notebook that nbdev sees, in the order of the story
    return sorted(p for p in nbs.glob('*.ipynb') if p.name[0] not in '_.')


def check(root: Path = ROOT) -> list[str]: # all that is wrong; empty when nothing is
    files = chapters(root/'nbs')
    if not files: return [f'no notebook in {root/"nbs"}']
    order = []
    for p in files:
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        for c in cells: c['source'] = ''.join(c['source'])
        if m := module_of(cells): order.append(m)
    wrong = [f'two notebooks export {m}' for m in sorted(set(order)) if order.count(m) > 1]
    sidebar = root/'nbs/sidebar.yml'
    listed = sidebar.read_text(encoding='utf-8') if sidebar.is_file() else ''
    wrong += [f'{p.name} is not in nbs/sidebar.yml' for p in files if not re.search(rf'\b{re.escape(p.name)}\b', listed)]
    return wrong + [w for p in files for w in check_notebook(p, order)]


if __name__ == '__main__':
    wrong = check()
    for w in wrong: print('story:', w, file=sys.stderr)
    if not wrong: print(f'story: {len(chapters(ROOT/"nbs"))} notebooks in order')
    sys.exit(bool(wrong))
