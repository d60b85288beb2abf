"""The story check: who imports whom (the table is in house.py), how long the story is, and a few rules for notebooks
that nothing else would notice."""
import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import house

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ('slow', 'cuda')
EXPORTS = ('export', 'exports', 'exporti')


@dataclass
class Arrow: # one import of a module by another
    other: str # 'engine.files'
    where: str # notebook and cell
    line: int # of the cell
    function: str | None # that it stands in; None: on top, so it runs when the module is imported


@dataclass
class Module: # what the notebooks export under one name
    homes: list[str] = field(default_factory=list) # notebooks whose `default_exp` it is
    arrows: list[Arrow] = field(default_factory=list)


# ---- cells ----

def code(source: str) -> str: # what Python would see: magics and shell lines taken out
    if source.lstrip().startswith('%%'): return ''
    return '\n'.join('' if o.lstrip()[:1] in ('%', '!') else o for o in source.splitlines())


def directives(source: str
    ) -> list[str]: # the words after `#|`, one string a line, from the lines above the code: where nbdev looks
    found = []
    for line in source.splitlines():
        if line.strip() and not re.match(r'\s*(#\s*\||%%\w)', line): break
        if re.match(r'\s*#\s*\|', line): found.append(re.sub(r'^\s*#\s*\|\s*', '', line).strip())
    return found


def read_cells(path: Path) -> list[dict]: # with the source of each as one string
    return [c | dict(source=''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


def module_of(cells: list) -> str | None: # what `#| default_exp` says
    for c in cells:
        for d in directives(c['source']):
            if d.split()[:1] == ['default_exp']: return d.split()[1]


def target(cell: dict, default: str | None) -> str | None: # the module that a cell is exported to; None: it is not
    if cell['cell_type'] != 'code': return None
    for d in directives(cell['source']):
        if d.split()[:1] and d.split()[0] in EXPORTS: return d.split()[1] if len(d.split()) > 1 else default


def check_cell(c: dict) -> list[str]: # what is wrong with one code cell, its imports of modules apart
    src, wrong = c['source'], []
    if any(o.get('output_type') == 'error' for o in c.get('outputs', [])):
        wrong.append('keeps the output of an error; run it again')
    for d in directives(src):
        if re.match(r'eval\b', d):
            wrong.append(f'`#| {d}`: every cell is evaluated; '
                         f'use `#| slow` or `#| cuda` for what cannot run everywhere')
        if set(FLAGS) & set(re.findall(r'\w+', d)) and d not in FLAGS:
            wrong.append(f'`#| {d}`: slow and cuda stand alone on their lines')
    late = [o for o in src.splitlines() if re.match(r'\s*#\s*\|', o)][len(directives(src)):]
    if late: wrong.append(f'`{late[0].strip()}` stands below code, where nbdev does not look')
    try: body = ast.parse(code(src)).body
    except SyntaxError as e: return wrong + [f'is not Python: {e}']
    imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
    if any(imports) and not all(imports) and 'nbdev_export(' not in src:
        wrong.append('mixes imports with other code; give them a cell of their own')
    return wrong


def check_notebook(path: Path, nbs: Path) -> list[str]:
    name, cells = house.address(path, nbs), read_cells(path)
    wrong, outputs = [], [c for c in cells if c['cell_type'] == 'code' and c.get('outputs')]
    if path.stat().st_size > house.MAX_BYTES:
        wrong.append(f'{name}: {path.stat().st_size:,} bytes, more than {house.MAX_BYTES:,}; '
                     f'make its pictures fewer or smaller')
    if path.name[0].isdigit() and not outputs:
        wrong.append(f'{name}: no output is kept; run it (make notebooks NB={name})')
    for k, c in enumerate(cells):
        say = []
        if re.search(r'^\s*skip_exec\s*:', c['source'], re.M): say.append('`skip_exec` hides a notebook from its tests')
        if c['cell_type'] == 'code': say += check_cell(c)
        wrong += [f'{name}, cell {k}: {s}' for s in say]
    code_cells = [c['source'] for c in cells if c['cell_type'] == 'code']
    switches = re.findall(r'set_grad_enabled\((False|True)\)', '\n'.join(code_cells))
    if switches and switches[-1] == 'False':
        wrong.append(f'{name} leaves gradients off for the next notebook of the same process; end with a hidden cell '
                     '`_ = torch.set_grad_enabled(True)`')
    folder, module = name.rpartition('/')[0], module_of(cells)
    if not folder and path.stem != 'index':
        wrong.append(f'{name} lies in nbs/ itself; put it into the folder of its part')
    if folder and folder not in house.FOLDERS:
        wrong.append(f'{name}: no part of the house is called {folder}; there are {", ".join(house.FOLDERS)}')
    if module and module not in house.DOORS and module.rpartition('.')[0] != ('' if folder == 'story' else folder):
        wrong.append(f'{name} exports {module}, which is not in its folder: '
                     f'{folder}.{module.rpartition(".")[2]} would be')
    return wrong


# ---- imports ----

def walk(node: ast.AST, function: str | None = None): # every node below, and the innermost function that it stands in
    for child in ast.iter_child_nodes(node):
        yield child, function
        yield from walk(child, child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function)


def imported(node: ast.AST, me: str) -> list[str]: # what an import statement of module `me` names inside the package
    # 'engine.files.data_path' may be a module or a thing in one: `known` says which
    if isinstance(node, ast.Import): names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ''
        if node.level: # relative
            here = [house.PACKAGE, *me.split('.')]
            base = '.'.join([*here[:len(here) - node.level], *([base] if base else [])])
        names = [f'{base}.{a.name}' for a in node.names]
    else: return []
    return [n.removeprefix(house.PACKAGE + '.') for n in names if n.startswith(house.PACKAGE + '.')]


def called_by_name(node: ast.AST) -> bool: # import_module(...) of anything but a module of others that is spelled out
    if not isinstance(node, ast.Call): return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
    if called not in ('import_module', '__import__'): return False
    name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    return not isinstance(name, str) or name.startswith((house.PACKAGE, '.'))


def is_layer(node: ast.AST) -> bool: # class X(nn.Module)
    return isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith('Module') for b in node.bases)


def read_modules(files: list[Path], nbs: Path
    ) -> tuple[dict[str, Module], list[str]]: # name -> Module, and what is wrong already
    modules, wrong = {}, []
    for p in files:
        if me := module_of(read_cells(p)): modules.setdefault(me, Module()).homes.append(house.address(p, nbs))
    for p in files:
        cells = read_cells(p)
        default = module_of(cells)
        for k, c in enumerate(cells):
            if not (me := target(c, default)): continue
            try: tree = ast.parse(code(c['source']))
            except SyntaxError: continue # check_cell says so
            where, mine = f'{house.address(p, nbs)}, cell {k}', modules.setdefault(me, Module())
            for node, function in walk(tree):
                if called_by_name(node) and me not in house.BY_NAME:
                    wrong.append(f'{where}: {me} imports a module by its name; {", ".join(house.BY_NAME)} alone may')
                if me in house.GROUND and is_layer(node):
                    wrong.append(f'{where}: {me} defines {node.name}; the ground holds no layer')
                for other in imported(node, me):
                    arrow = Arrow(known(other, modules), where, node.lineno, function)
                    if arrow not in mine.arrows: mine.arrows.append(arrow)
    return modules, wrong


def known(name: str, modules: dict) -> str: # 'engine.files.data_path' -> 'engine.files': the longest known beginning
    parts = name.split('.')
    return next((o for k in range(len(parts), 0, -1) if (o := '.'.join(parts[:k])) in modules), name)


def is_excepted(me: str, a: Arrow) -> bool: # one of the lines that may import a higher part
    allowed = house.EXCEPTIONS.get((me, house.part_of(a.other)), ())
    return a.function is not None and (allowed is None or a.function in allowed)


def check_arrow(me: str, a: Arrow, modules: dict) -> str | None: # why module `me` may not import that
    if a.other in ('__version__', '_modidx') or is_excepted(me, a): return None
    if a.other == me: return f'an exported cell of {me} imports its own module'
    if a.other not in modules: return f'an exported cell of {me} imports {a.other}, which no notebook exports'
    if house.forbidden(me, a.other): return f'{me} must never import {a.other}'
    if a.other in house.DOORS and me not in house.DOORS and house.floor_of(me) < house.floor_of(house.DOORS_FROM + '.'):
        return f'{me} imports {a.other}, a door for users; import what stands behind it'
    if me not in house.DOORS and a.other not in house.DOORS and house.floor_of(a.other) > house.floor_of(me):
        return f'{me} imports {a.other}: {house.part_of(me)} may not import {house.part_of(a.other)}'


def circles(modules: dict[str, Module]
    ) -> list[str]: # ways that come back to where they began; imports inside functions count, the exceptions do not
    graph = {m: sorted({a.other for a in v.arrows if a.other in modules and not is_excepted(m, a)} - {m})
             for m, v in modules.items() if m not in house.DOORS}
    found, done = [], set()
    def visit(m: str, way: list):
        if m in way:
            ring = way[way.index(m):]
            first = ring.index(min(ring)) # one circle, one sentence, wherever it was entered
            return found.append('a circle of imports: ' + ' -> '.join([*ring[first:], *ring[:first], ring[first]]))
        if m in done: return
        for other in graph.get(m, ()): visit(other, [*way, m])
        done.add(m)
    for m in sorted(graph): visit(m, [])
    return found


def check_imports(modules: dict[str, Module]) -> list[str]:
    wrong = [f'two notebooks export {m}: {" and ".join(v.homes)}' for m, v in sorted(modules.items())
             if len(v.homes) > 1]
    for me, module in sorted(modules.items()):
        wrong += [f'{a.where}: {says}' for a in module.arrows if (says := check_arrow(me, a, modules))]
        for part in {house.part_of(a.other) for a in module.arrows}:
            used = [a for a in module.arrows if house.part_of(a.other) == part and is_excepted(me, a)]
            for f in {a.function for a in used}:
                lines = {(a.where, a.line) for a in used if a.function == f}
                if len(lines) > 1: wrong.append(f'{me} imports {part} in {len(lines)} lines of {f}; one is allowed')
    return wrong + circles(modules)


# ---- sizes ----

def check_sizes(package: Path) -> list[str]: # of the story's modules, as they are exported
    files = [p for p in sorted(package.glob('*.py')) if p.stem not in house.DOORS | {'__init__', '_modidx'}]
    lines = {p: p.read_text(encoding='utf-8').splitlines() for p in files}
    total = sum(map(len, lines.values()))
    wrong = [f'{p.name} has {len(o)} lines; a module of the story has at most {house.MODULE_LINES}'
             for p, o in lines.items() if len(o) > house.MODULE_LINES]
    if total > house.STORY_LINES:
        wrong.append(f'the story has {total:,} lines, '
                     f'more than {house.STORY_LINES:,}: {", ".join(f"{p.stem} {len(o)}" for p, o in lines.items())}')
    wide = [f'{p.name}:{k}' for p, o in lines.items() for k, line in enumerate(o, 1) if len(line) > house.COLUMNS]
    if len(wide) > house.WIDE_SHARE*total:
        wrong.append(f'{len(wide)} of the {total:,} lines of the story are over {house.COLUMNS} columns, '
                     f'more than {house.WIDE_SHARE:.0%}: {", ".join(wide[:5])} ...')
    for stem, (name, most) in house.CLASS_LINES.items():
        for node in ast.parse('\n'.join(lines.get(package/f'{stem}.py', []))).body:
            if not (isinstance(node, ast.ClassDef) and node.name == name): continue
            long = node.end_lineno - node.lineno + 1
            if long > most: wrong.append(f'{name} has {long} lines, more than {most}')
    return wrong


def check(root: Path = ROOT) -> list[str]: # all that is wrong; empty when nothing is
    nbs = root/'nbs'
    if not (files := house.notebooks(nbs)): return [f'no notebook in {nbs}']
    modules, wrong = read_modules(files, nbs)
    sidebar = nbs/'sidebar.yml'
    text = sidebar.read_text(encoding='utf-8') if sidebar.is_file() else ''
    listed = re.findall(r'^\s*-\s*(\S+\.ipynb)\s*$', text, re.M)
    there = [p.relative_to(nbs).as_posix() for p in files]
    wrong += [f'{p} is not in nbs/sidebar.yml' for p in there if p not in listed]
    wrong += [f'nbs/sidebar.yml lists {p}, which is not there' for p in listed if p not in there]
    return (wrong + check_imports(modules) + check_sizes(root/house.PACKAGE) +
            [w for p in files for w in check_notebook(p, nbs)])


if __name__ == '__main__':
    wrong = check()
    for w in wrong: print('story:', w, file=sys.stderr)
    if not wrong: print(f'story: {len(house.notebooks(ROOT/"nbs"))} notebooks in order')
    sys.exit(bool(wrong))
