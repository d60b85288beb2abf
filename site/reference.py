"The reference: a page for each module, from its docments (signatures, the note of each argument, docstrings)."
import ast
import io
import re
import textwrap
import tokenize
from pathlib import Path

from chapters import ROOT, Page, parts, toctree, write

CELL = re.compile(r'^# %% (?:\.\./)+nbs/(\S+)\.ipynb #(\w+)', re.M)
INSIDE = ('__call__',) # methods whose names begin with an underscore and that are shown all the same
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LONG = 200             # letters of a value that is still shown


def plain(text: str) -> str: # no letter of it is markup, but for `code`
    return ''.join(p if i % 2 else re.sub(r'([\\*_<>$\[\]{}|#~])', r'\\\1', p)
                   for i, p in enumerate(re.split(r'(`[^`\n]*`)', text)))


class Module: # what a module exports, in its order, and the cell of the chapter that each part comes from
    def __init__(self, name: str, page: Page):
        self.name, self.page = name, page
        self.path = ROOT/(name.replace('.', '/') + '.py')
        if not self.path.is_file(): self.path = ROOT/name.replace('.', '/')/'__init__.py'
        text = self.path.read_text(encoding='utf-8')
        tree = ast.parse(text)
        self.says = ast.get_docstring(tree) or page.says
        self.notes = notes_of_lines(text, tree)
        self.cells = {text.count('\n', 0, m.start()) + 1: m.groups() for m in CELL.finditer(text)}
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                       and getattr(n.targets[0], 'id', '') == '__all__'), [])
        self.parts = [n for n in tree.body if names_of(n) & set(public)]

    def cell(self, node) -> tuple[str, str]: # the chapter and the cell that a part comes from
        return next(self.cells[line] for line in sorted(self.cells, reverse=True) if line < node.lineno)


def notes_of_lines(text: str, tree) -> dict[int, str]: # line -> its comment; in a signature it may go on below
    heads = {i for n in ast.walk(tree) if isinstance(n, FUNCTION) for i in range(n.lineno, n.body[0].lineno)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    found, at = {}, 0
    for line, t in comments.items():
        alone = not t.line.split('#')[0].strip()
        if alone and line not in heads: continue
        if not alone or line - 1 not in comments: at = line - alone # a comment alone is of the line above it
        found[at] = f'{found.get(at, "")} {t.string.lstrip("# ").strip()}'.strip()
    return found


def names_of(node) -> set[str]:
    if isinstance(node, (*FUNCTION, ast.ClassDef)): return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


def arguments(node, method: bool) -> list: # of a function; without self
    a = node.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return found[1:] if method and 'staticmethod' not in decorators(node) else found


def decorators(node) -> set[str]: return {ast.unparse(d).partition('(')[0] for d in node.decorator_list}


def signature(node, method: bool) -> str:
    text = ast.unparse(node.args)
    if method and 'staticmethod' not in decorators(node): text = re.sub(r'^\w+(, /)?(, |$)', '', text, count=1)
    return f'({text})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')


def notes(node, module: Module, method: bool) -> list[str]: # a note stands at the end of the line of its arguments
    lines = {}
    for a in arguments(node, method): lines.setdefault(a.lineno, []).append(a.arg)
    rows = [f':param {names[0]}: {plain(module.notes[line])}' for line, names in lines.items()
            if line in module.notes and len(names) == 1]
    back = node.returns.lineno if node.returns else None
    if back in module.notes and back not in lines: rows.append(f':returns: {plain(module.notes[back])}')
    shared = [f'{", ".join(f"`{n}`" for n in names)}: {plain(module.notes[line])}\n' for line, names in lines.items()
              if line in module.notes and len(names) > 1]
    return [*shared, *rows]


def directive(kind: str, head: str, body: list[str], ticks: int = 3) -> list[str]:
    return [f'{"`"*ticks}{{py:{kind}}} {head}', *body, '`'*ticks, '']


def says(node) -> list[str]:
    text = ast.get_docstring(node)
    return ['', plain(text), ''] if text else ['']


def function(node, module: Module, link: str = '') -> list[str]:
    body = [*says(node), *notes(node, module, False), '', link]
    return directive('function', node.name + signature(node, False), body)


def method(node, module: Module) -> list[str]:
    if 'property' in decorators(node): return directive('property', node.name, says(node))
    option = [f':{d}:' for d in ('classmethod', 'staticmethod') if d in decorators(node)]
    return directive('method', node.name + signature(node, True), [*option, *says(node), *notes(node, module, True)])


def field(node, module: Module) -> list[str]: # of a class, declared in its body
    default = [f':value: {ast.unparse(node.value)}'] if node.value else []
    note = plain(module.notes.get(node.end_lineno, ''))
    return directive('attribute', node.target.id, [f':type: {ast.unparse(node.annotation)}', *default, '', note])


def class_(node, module: Module, link: str) -> list[str]:
    inside = [n for n in node.body if isinstance(n, FUNCTION)]
    init = next((n for n in inside if n.name == '__init__'), None)
    body = [*says(node), *(says(init) + notes(init, module, True) if init else []), '', link, '']
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_'): body += field(n, module)
    for n in inside:
        if not n.name.startswith('_') or n.name in INSIDE: body += method(n, module)
    return directive('class', node.name + (signature(init, True) if init else ''), body, ticks=4)


def value(node, module: Module, link: str) -> list[str]:
    text = ' '.join(ast.unparse(node.value).split()) if node.value else ''
    option = [f':value: {text}'] if 0 < len(text) <= LONG else []
    note = plain(module.notes.get(node.end_lineno, ''))
    return [line for name in sorted(names_of(node)) for line in directive('data', name, [*option, '', note, '', link])]


def module_page(module: Module, titles: dict[str, str]) -> str:
    lines = [f'# {module.name}', '', plain(module.says), '',
             f'Chapter: [{module.page.title}](../{module.page.name}.ipynb)', '',
             f'```{{py:currentmodule}} {module.name}\n```', '']
    for node in module.parts:
        chapter, cell = module.cell(node)
        link = (f'<p class="made-in"><a href="../{chapter}.html#cell-{cell}">'
                f'Made in the chapter {titles[chapter]}</a></p>')
        if isinstance(node, FUNCTION): lines += function(node, module, link)
        elif isinstance(node, ast.ClassDef): lines += class_(node, module, link)
        else: lines += value(node, module, link)
    return '\n'.join(lines)


def names(module: Module) -> str: # as links, for the front page of the reference
    return ', '.join(f'{{py:obj}}`~{module.name}.{n}`' for node in module.parts for n in sorted(names_of(node)))


def index(groups: dict[str, list[Module]]) -> str:
    lines = ['# Reference', '', 'Every module, with what it exports. The pages are made from the code: '
             'signatures, the note of each argument, docstrings.', '']
    for title, modules in groups.items():
        lines += [f'## {plain(title)}', '']
        for m in modules:
            says = plain(textwrap.shorten(m.says, 200))
            lines.append(f'- [{m.name}]({m.name.removeprefix("ldm_nb.")}.md): {says}  \n  {names(m)}')
        lines.append('')
    return '\n'.join([*lines, toctree([m.name.removeprefix('ldm_nb.') for ms in groups.values() for m in ms])])


def write_all(src: Path, pages: list[Page]) -> list[Module]: # a page for each module that a chapter exports
    chapter = {p.name: p for p in pages if p.module}
    groups = {title: [Module(chapter[n].module, chapter[n]) for n in listed if n in chapter]
              for title, listed in parts().items()}
    groups = {title: [m for m in modules if m.parts] for title, modules in groups.items()}
    titles = {p.name: p.title for p in pages}
    for m in (m for modules in groups.values() for m in modules):
        write(module_page(m, titles), src/'api'/f'{m.name.removeprefix("ldm_nb.")}.md')
    write(index({t: ms for t, ms in groups.items() if ms}), src/'api/index.md')
    return [m for modules in groups.values() for m in modules]
