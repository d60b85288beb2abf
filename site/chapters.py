"The pages of the site from the notebooks: what a reader sees of each, with its kept outputs. Nothing is run."
import posixpath
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
LINK = re.compile(r'(\]\(|<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=["\'])([^)"\'\s]+)')
OUTSIDE = re.compile(r'[a-z][a-z0-9+.-]*:|#|/', re.I)
DIRECTIVE = re.compile(r'^#\s*\|(.*)\n?', re.M)
PAGES = ('CONTRIBUTING.md', 'CHANGELOG.md') # of the root, that chapters link to
PANELS = { # the function that shows a panel of the lab -> the same panel of the explainer, and its title
    'caption_builder': ('caption', 'type a caption and watch the model draw it'),
    'sampler_stepper': ('steps', 'every step of a sample'),
    'noise_slider': ('noise', 'noise an image and see what the model thinks is there'),
    'compression_explorer': ('firststage', 'encode an image, change its latent, decode it'),
    'layout_editor': ('layout', 'draw boxes and get an image'),
    'mask_painter': ('inpaint', 'paint a mask and have it filled')}


class Page: # a chapter: its name ('story/05_samplers'), its module ('ldm_nb.samplers', or None)
    def __init__(self, name: str):
        self.name, self.path = name, NBS/f'{name}.ipynb'
        self.nb = nbformat.read(self.path, as_version=4)
        self.up = '../'*name.count('/')                        # from the page to the root of the site
        self.at = f'nbs/{name}'.rpartition('/')[0]             # its folder in the repository
        code = '\n'.join(c.source for c in self.nb.cells if c.cell_type == 'code')
        exports = re.search(r'^#\s*\|\s*default_exp\s+(\S+)', code, re.M)
        self.module = f'ldm_nb.{exports[1]}' if exports else None

    @property
    def text(self) -> str: return '\n\n'.join(c.source for c in self.nb.cells if c.cell_type == 'markdown')

    @property
    def title(self) -> str: return re.search(r'^# (.+)$', self.text, re.M)[1]

    @property
    def says(self) -> str: # the sentence below its title
        said = re.search(r'^> (.+)$', self.text, re.M)
        return said[1] if said else ''


def parts() -> dict[str, list[str]]: # title of a folder -> its chapters, in the order of nbs/sidebar.yml
    found, title = {}, None
    for line in (NBS/'sidebar.yml').read_text(encoding='utf-8').splitlines():
        if section := re.match(r'\s*- section: "?(.+?)"?$', line): title = section[1]
        elif (chapter := re.match(r'\s*- (\S+)\.ipynb$', line)) and title:
            found.setdefault(title, []).append(chapter[1])
    return found


def linked(link: str, at: str, needed: set) -> str: # a link of a page in the repository's folder `at`, for the site
    if OUTSIDE.match(link): return link
    path, mark, anchor = link.partition('#')
    target = posixpath.normpath(posixpath.join(at, path))
    if target == 'README.md': target = 'nbs/index.ipynb'
    if not target.startswith('nbs/') and target not in PAGES: needed.add(target)
    return posixpath.relpath(target.removeprefix('nbs/'), at.removeprefix('nbs').strip('/') or '.') + mark + anchor


def with_links(text: str, at: str, needed: set) -> str: return LINK.sub(lambda m: m[1] + linked(m[2], at, needed), text)


def prompt(source: str) -> str: # what the fold of a cell says
    if 'BEGIN SOLUTION' in source: return 'Show a solution'
    names = re.findall(r'^(?:async )?(?:def|class) (\w+)', source, re.M)
    return f'Show the code: {", ".join(names)}' if names else 'Show the code'


def panel_of(cell) -> tuple | None: # of the explainer, for a cell that shows one of the lab's; () where it has none
    if not any('(Here belong' in str(o.get('data', {}).get('text/plain')) for o in cell.outputs): return None
    called = [(cell.source.find(f'{f}('), f) for f in PANELS if f'{f}(' in cell.source]
    return PANELS[min(called)[1]] if called else ()


def live(page: Page, panel: tuple) -> str:
    name, title = panel
    return (f'<iframe class="panel" src="{page.up}play/index.html?panel={name}" loading="lazy" '
            f'title="Live panel: {title}"></iframe>')


def panel_outputs(page: Page, cell) -> list: # the live panel where there is one, above its pictures
    panel = panel_of(cell)
    if panel is None: return cell.outputs
    shown = []
    for o in cell.outputs:
        data = o.get('data', {})
        if '(Here belong' in str(data.get('text/plain')):
            if panel: shown.append(nbformat.v4.new_output('display_data', {'text/html': live(page, panel)}))
        elif 'need a running kernel' in data.get('text/markdown', ''):
            says = data['text/markdown'].rpartition('The strip says the same: ')[2]
            before = ('The same as images' if panel else
                      'Its controls need a running kernel; here it is as images')
            shown.append(nbformat.v4.new_output('display_data', {'text/markdown': f'{before}: {says}'}))
        else: shown.append(o)
    return shown


def code_cells(page: Page, cell, needed: set) -> list: # as shown: none, one, or with an anchor before it
    words = [d.split() for d in DIRECTIVE.findall(cell.source)]
    first = {w[0].rstrip(':') for w in words if w}
    if {'hide', 'default_exp'} & first: return []
    source = DIRECTIVE.sub('', cell.source).strip('\n')
    for o in cell.outputs:
        if 'text/markdown' in o.get('data', {}):
            o.data['text/markdown'] = with_links(o.data['text/markdown'], page.at, needed)
    if 'echo' in first and not cell.outputs: return []
    new = nbformat.v4.new_code_cell(source, outputs=panel_outputs(page, cell), id=cell.id)
    new.metadata['mystnb'] = dict(image=dict(alt='Image made by the code above'))
    if 'echo' in first: new.metadata['tags'] = ['remove-input']
    elif cell.metadata.get('jupyter', {}).get('source_hidden'):
        show = prompt(source)
        new.metadata['tags'] = ['hide-input']
        new.metadata['mystnb'].update(code_prompt_show=show, code_prompt_hide=show.replace('Show', 'Hide', 1))
    anchor = nbformat.v4.new_markdown_cell(f'<span class="anchor" id="cell-{cell.id}"></span>')
    return [anchor, new] if 'export' in first else [new]


DOORS = ('ldm_nb.data', 'ldm_nb.pretrained') # they hand names on, and have no page of reference


def tools(page: Page) -> str: # the line below the title
    links = [f'<a href="{page.up}notebooks/{page.name}.ipynb" download>Download this notebook</a>']
    if page.module and page.module not in DOORS:
        links.append(f'<a href="{page.up}api/{page.module.removeprefix("ldm_nb.")}.html">'
                     f'Reference of <code>{page.module}</code></a>')
    return f'<p class="chapter-tools">{" ".join(links)}</p>'


def shown(page: Page, needed: set): # the notebook that Sphinx reads
    cells = []
    for cell in page.nb.cells:
        if cell.cell_type == 'markdown':
            cells.append(nbformat.v4.new_markdown_cell(with_links(cell.source, page.at, needed)))
        elif cell.cell_type == 'code': cells += code_cells(page, cell, needed)
    head = next(c for c in cells if re.search(r'^# ', c.source, re.M))
    head.source = re.sub(r'^(# .+)$', lambda m: f'{m[1]}\n\n{tools(page)}', head.source, count=1, flags=re.M)
    language = dict(name='python', pygments_lexer='ipython3')
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(language_info=language, kernelspec=dict(
        name='python3', display_name='Python 3', language='python')))


def toctree(names: list[str], caption: str = '') -> str:
    head = f':caption: {caption}\n' if caption else ''
    return '\n'.join(['```{toctree}', f':hidden:\n{head}', *names, '```'])


# at the top of the front page
FIRST = """<p>Type a caption, and a model of this course draws it in your browser: nothing to install, and nothing you
type leaves your computer. Or begin to read.</p>
<p class="first"><a class="go" href="play/index.html">Type a caption</a>
<a class="go second" href="story/00_start_here.html">Start the course</a></p>"""


def front(needed: set): # the front page: README's source, the first links, and the tree of all pages
    nb = shown(Page('index'), needed)
    nb.cells[0].source = re.sub(r'\n*<p class="chapter-tools">.*?</p>', '', nb.cells[0].source)
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(FIRST))
    (story, chapters), *others = parts().items()
    folders = [f'{names[0].partition("/")[0]}/index' for _, names in others]
    trees = [toctree(chapters, story), toctree(folders, 'Around the story'),
             toctree(['api/index', *(p.removesuffix('.md') for p in PAGES)], 'Reference')]
    nb.cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(trees)))
    return nb


def folder_page(title: str, pages: list[Page]) -> str: # the chapters of a folder, each with its sentence
    rows = [f'- [{p.title}]({posixpath.basename(p.name)}.ipynb): {p.says}' for p in pages]
    return '\n'.join([f'# {title}\n', *rows, '', toctree([posixpath.basename(p.name) for p in pages])])


def write(text: str, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_all(src: Path) -> list[Page]: # every page but the reference
    needed, made = set(), []
    for i, (title, names) in enumerate(parts().items()):
        pages = [Page(n) for n in names]
        for page in pages: write(nbformat.writes(shown(page, needed)), src/f'{page.name}.ipynb')
        if i: write(folder_page(title, pages), src/names[0].partition('/')[0]/'index.md')
        made += pages
    write(nbformat.writes(front(needed)), src/'index.ipynb')
    for name in PAGES: write(with_links((ROOT/name).read_text(encoding='utf-8'), '.', needed), src/name)
    for name in needed: # a licence, a table of results: offered as they are
        if (ROOT/name).is_file(): write((ROOT/name).read_text(encoding='utf-8'), src/name)
    return made
