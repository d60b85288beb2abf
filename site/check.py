"Does every link and anchor of the built site hold, does MathJax take every formula, does nothing load from elsewhere?"
import functools
import html
import json
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

TAG = re.compile(r'<([a-z]+)\b([^<>]*)>', re.I)
REFERS = re.compile(r'\s(href|src)="([^"]*)"')
ID = re.compile(r'\s(?:id|name)="([^"]+)"')
MATH = re.compile(r'<(span|div) class="math notranslate nohighlight(?: amsmath)?"[^>]*>(.*?)</\1>', re.S)
READY = re.compile(r'\s*(\\\(.*\\\)|(<span class="eqno">.*</span>)?\s*\\\[.*\\\])\s*', re.S)
RAW = re.compile(r'\\\(|\\\[|\$\$|\\begin\{|\$[^$\n]{0,80}\\[a-z]+[^$\n]{0,80}\$')
FORMULA = re.compile(r'(?<!\\)\$\$.+?\$\$|(?<![\\$])\$(?!\$).+?(?<!\\)\$', re.S)


@functools.lru_cache(maxsize=None)
def ids(path: Path) -> frozenset:
    return frozenset(html.unescape(i) for i in ID.findall(path.read_text(encoding='utf-8')))


def target(page: Path, link: str, out: Path) -> str | None: # what is wrong with a link of a page, if something is
    parts = urlsplit(html.unescape(link))
    path = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    if path.is_dir(): path /= 'index.html'
    if not path.is_relative_to(out) or not path.is_file(): return f'leads to {link}, which is not there'
    if parts.fragment and path.suffix == '.html' and unquote(parts.fragment) not in ids(path):
        return f"leads to {link}, and that page has no such anchor"
    return None


def wrong_links(page: Path, text: str, out: Path) -> list[str]:
    found = []
    for tag, inside in TAG.findall(text):
        for name, link in REFERS.findall(inside):
            if re.match(r'(mailto|data|blob|javascript):', link) or link == '#': continue
            if re.match(r'[a-z][a-z0-9+.-]*:|//', link, re.I):
                if tag.lower() != 'a': found.append(f'loads {link} from elsewhere')
            elif said := target(page, link, out): found.append(said)
    return found


def wrong_formulas(text: str) -> list[str]:
    body = re.sub(r'<(script|style|pre|code|title)\b.*?</\1>', '', text, flags=re.S)
    found = [f'has a formula in a form that MathJax does not take: {m[2][:60]}' for m in MATH.finditer(body)
             if not READY.fullmatch(m[2])]
    rest = re.sub(r'<[^>]*>', '', MATH.sub('', body))
    return found + [f'has a formula that is shown as written: {m[0][:60]}' for m in RAW.finditer(rest)]


def formulas(notebook: Path) -> int: # that a page is to show
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    texts += [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', [])
              if 'text/markdown' in o.get('data', {})]
    without_code = [re.sub(r'^```.*?^```|`[^`\n]*`', '', t, flags=re.M | re.S) for t in texts]
    return sum(len(FORMULA.findall(t)) for t in without_code)


def problems(out: Path) -> list[str]: # of the whole site, each with its page
    found = []
    for page in sorted(p for p in out.rglob('*.html') if '.cache' not in p.parts and '_static' not in p.parts):
        name, text = page.relative_to(out).as_posix(), page.read_text(encoding='utf-8')
        said = wrong_links(page, text, out)
        if not name.startswith('play/'): said += wrong_formulas(text)
        source = out/'.cache/src'/posixpath.splitext(name)[0]
        notebook, n = source.with_name(f'{source.name}.ipynb'), len(MATH.findall(text))
        if notebook.is_file() and formulas(notebook) != n:
            said.append(f'shows {n} formulas, and its notebook has {formulas(notebook)}')
        found += [f'{name} {s}' for s in dict.fromkeys(said)]
    return found


def report(out: Path) -> int: # an exit status
    if not (out/'index.html').is_file():
        print(f'site: there is no site in {out}: run make site')
        return 1
    found = problems(out)
    print('\n'.join(found) or f'site: every link and anchor in {out} holds, MathJax takes every formula, '
          'nothing comes from elsewhere')
    return bool(found)
