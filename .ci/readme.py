"README.md from nbs/index.ipynb, by nbconvert: hidden cells left out, links work from the root. `--check` compares."
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=["\'])([^)"\'\s]+)')
NOTE = '<!-- made from nbs/index.ipynb by .ci/readme.py: edit the notebook, then run `make readme` -->\n\n'


def from_root(link: str) -> str: # a link as written in nbs/, as it must read in the folder above
    if re.match(r'[a-z][a-z0-9+.-]*:|#|/', link, re.I): return link
    path, mark, anchor = link.partition('#')
    return posixpath.normpath(posixpath.join('nbs', path)) + mark + anchor


def rewritten(text: str) -> str: return LINK.sub(lambda m: m[1] + from_root(m[2]), text)


def directives(source: str) -> list[str]:
    return [re.sub(r'\s+', ' ', d).strip() for d in re.findall(r'^#\s*\|(.*)$', source, re.M)]


def visible(cells: list) -> list: # as a reader of the documentation would see them
    shown = []
    for c in cells:
        if c.cell_type == 'raw': continue
        if c.cell_type == 'markdown': c.source = rewritten(c.source)
        else:
            d = directives(c.source)
            if {'hide', 'hide:', 'default_exp'} & {o.split()[0] for o in d if o}: continue
            if any('image/png' in o.get('data', {}) for o in c.outputs):
                sys.exit('index.ipynb draws a picture: commit it under nbs/images/ and link to it instead')
            if 'echo: false' in d: # only what it says is shown
                said = [o.data.get('text/markdown', '') for o in c.outputs if 'data' in o]
                shown += [nbformat.v4.new_markdown_cell(rewritten(text)) for text in said if text]
                continue
            c.source = re.sub(r'^#\s*\|.*\n?', '', c.source, flags=re.M)
        shown.append(c)
    return shown


def readme(index: Path) -> str:
    nb = nbformat.read(index, as_version=4)
    nb.cells = visible(nb.cells)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def missing(text: str) -> list[str]: # files that the text links to and that are not there
    links = {m[2].partition('#')[0] for m in LINK.finditer(text)}
    return sorted(o for o in links if o and not re.match(r'[a-z][a-z0-9+.-]*:|/', o, re.I) and not (ROOT/o).exists())


if __name__ == '__main__':
    index, out = ROOT/'nbs/index.ipynb', ROOT/'README.md'
    if not index.is_file(): sys.exit('readme: there is no nbs/index.ipynb, from which README.md is made')
    text = readme(index)
    if gone := missing(text): sys.exit(f'readme: index.ipynb links to what is not there: {", ".join(gone)}')
    if '--check' not in sys.argv[1:]: out.write_text(text, encoding='utf-8')
    elif not out.is_file() or out.read_text(encoding='utf-8') != text:
        sys.exit('readme: README.md is not what nbs/index.ipynb says: run make readme')
    print('readme: README.md is what nbs/index.ipynb says')
