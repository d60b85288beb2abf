"""The site of the chapters, built once without the models, checked as files and looked at in Debian's chromium.
Where Sphinx, npm or chromium are missing, tests are skipped and say so."""
import functools
import gzip
import importlib
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import nbformat
import pytest
from conftest import NO_BROWSER, ROOT, run

SITE = ROOT/'site'
sys.path.insert(0, str(SITE))
build, chapters, check, reference, serve = map(
    importlib.import_module, ('build', 'chapters', 'check', 'reference', 'serve'))

SEEN = pytest.mark.skipif(bool(NO_BROWSER), reason=f'{NO_BROWSER}, so no page was seen in a browser')
HEAVY = 5    # pages with the most formulas
SECOND = 1000
STORY = next(iter(chapters.parts().values()))


def gone() -> str: # what is missing for a build
    missing = [n for n in ('sphinx', 'myst_nb', 'sphinx_copybutton', 'sphinx_book_theme')
               if importlib.util.find_spec(n) is None]
    if missing: return f"no {', '.join(missing)} here, so no site was built; pip install -e '.[dev]'"
    try: build.npm_packages()
    except build.Refused as e: return f'no site was built: {e}'
    return ''


@pytest.fixture(scope='module')
def out(tmp_path_factory): # the built site
    if why := gone(): pytest.skip(why)
    folder = tmp_path_factory.mktemp('site')/'_site'
    r = run(sys.executable, SITE/'build.py', '--out', folder, '--no-models', timeout=1800, PYTHONPATH=str(ROOT))
    assert r.returncode == 0, r.stdout + r.stderr
    assert [p.name for p in folder.parent.iterdir()] == ['_site'] # nothing beside it
    return folder


@pytest.fixture(scope='module')
def url(out): # where it is served
    s = serve.server(out, 0)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()
    s.server_close()


@pytest.fixture
def page(browser, url): # a page of the site; what it loads from elsewhere, and what it complains of, fails the test
    page = browser.new_page(viewport=dict(width=1100, height=900))
    outside, said = [], []
    page.on('request', lambda r: r.url.startswith((url, 'blob:', 'data:')) or outside.append(r.url))
    page.on('console', lambda m: said.append(f'{m.text} ({m.location.get("url", "")})')
            if m.type in ('error', 'warning') and '/play/' not in m.location.get('url', '') else None)
    page.on('pageerror', lambda e: said.append(str(e)))
    page.set_default_timeout(60*SECOND)
    yield page
    page.close()
    assert not outside and not said, (outside, said)


@functools.cache
def text(path) -> str: return path.read_text(encoding='utf-8')


# the files

def test_links_anchors_and_formulas_of_the_whole_site(out): assert check.problems(out) == []


def test_every_chapter_is_there_with_its_notebook_and_its_place(out):
    names = [n for listed in chapters.parts().values() for n in listed]
    assert len(names) > 90 and all((out/f'{n}.html').is_file() for n in names)
    for n in names: assert (out/'notebooks'/f'{n}.ipynb').read_bytes() == (ROOT/'nbs'/f'{n}.ipynb').read_bytes()
    middle = text(out/f'{STORY[5]}.html')
    for other in (STORY[4], STORY[6]): # previous and next
        assert re.search(rf'class="(left-prev|right-next)"\s+href="{other.removeprefix("story/")}.html"', middle), other
    for folder in chapters.parts().values(): assert f'{folder[0].partition("/")[0]}/' in text(out/'index.html')


def test_the_front_page_leads_to_the_explainer_and_to_the_first_chapter(out):
    links = re.findall(r'<a class="go[^"]*" href="([^"]+)"', text(out/'index.html'))
    assert links == ['play/index.html', 'story/00_start_here.html']


def test_the_reference_says_what_the_docments_say(out):
    page = text(out/'api/samplers.html')
    for word in ('id="ldm_nb.samplers.sampling_steps"', 'how many, 1 ... T', 'different t, descending', 'Raises'):
        assert word in page
    cell = re.search(r'href="\.\./story/05_samplers\.html#(cell-\w+)"', page)[1]
    assert f'id="{cell}"' in text(out/'story/05_samplers.html')
    pages = {m: text(out/'api'/f'{m.removeprefix("ldm_nb.")}.html') for m, _ in exported()}
    assert [f'{m}.{n}' for m, n in exported() if f'id="{m}.{n}"' not in pages[m]] == []


def exported() -> list: # (module, name) of every function and class in the package's index
    from ldm_nb._modidx import d
    names = [n.rpartition('.') for symbols in d['syms'].values() for n in symbols]
    modules = {m for m in d['syms'] if d['syms'][m]}
    return [(m, n) for m, _, n in names if m in modules and not n.startswith('_')]


def test_nothing_is_built_twice(monkeypatch, tmp_path):
    made, sheet = [], tmp_path/'site/_static/course.css'
    shutil.copytree(SITE/'_static', sheet.parent)
    monkeypatch.setattr(build, 'ROOT', tmp_path)
    monkeypatch.setattr(build, 'HERE', tmp_path/'site')
    monkeypatch.setattr(build, 'chapters', made.append)
    (tmp_path/'out/.cache').mkdir(parents=True)
    for _ in range(3): build.chapters_if_changed(tmp_path/'out')
    assert len(made) == 1
    sheet.write_text('a { color: red }')
    assert build.chapters_if_changed(tmp_path/'out') and len(made) == 2


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    r = run(sys.executable, SITE/'build.py', '--out', tmp_path, '--no-models')
    assert r.returncode and 'is not empty' in r.stderr and 'Traceback' not in r.stderr
    assert (tmp_path/'mine.txt').is_file()


def test_where_there_is_no_npm_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(build, 'MODULES', tmp_path)
    monkeypatch.setattr(build.shutil, 'which', lambda name: None)
    with pytest.raises(build.Refused, match='install Node.js'): build.npm_packages()


# the pages as made from notebooks

def code(source: str, *outputs, **metadata):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def shown(monkeypatch, tmp_path, *cells) -> list: # the cells of a chapter of these, after its title
    monkeypatch.setattr(chapters, 'NBS', tmp_path)
    (tmp_path/'story').mkdir()
    title = nbformat.v4.new_markdown_cell('# A chapter\n\n> What it says')
    nbformat.write(nbformat.v4.new_notebook(cells=[title, *cells]), tmp_path/'story/00_x.ipynb')
    return chapters.shown(chapters.Page('story/00_x'), set()).cells[1:]


def test_what_is_hidden_stays_out_and_directives_too(monkeypatch, tmp_path):
    folded = dict(jupyter=dict(source_hidden=True))
    cells = shown(monkeypatch, tmp_path, code('#| default_exp x'), code('#| hide\nassert True'),
                  code('#| export\ndef f(): pass', **folded),
                  code('#| slow\nf()'), code('#|hide\n1'), code('### BEGIN SOLUTION\n2', **folded))
    assert [c.source for c in cells if c.cell_type == 'code'] == ['def f(): pass', 'f()', '### BEGIN SOLUTION\n2']
    f, slow, solution = (c for c in cells if c.cell_type == 'code')
    assert f.metadata.tags == ['hide-input'] and f.metadata.mystnb.code_prompt_show == 'Show the code: f'
    assert solution.metadata.mystnb.code_prompt_show == 'Show a solution' and 'tags' not in slow.metadata


def test_a_panel_of_the_lab_is_live(monkeypatch, tmp_path):
    panel = [nbformat.v4.new_output('display_data', {'text/plain': '(Here belongs a panel of controls: X.)'}),
             nbformat.v4.new_output('display_data', {'text/markdown': 'The controls need a running kernel. '
                                                                      'The strip says the same: nine images.'})]
    live, still = shown(monkeypatch, tmp_path, code('noise_slider(s, x)', *panel), code('interpolation(m)', *panel))
    frame = live.outputs[0].data['text/html']
    assert 'src="../play/index.html?panel=noise"' in frame and 'title="Live panel' in frame
    assert live.outputs[1].data['text/markdown'] == 'The same as images: nine images.'
    assert len(still.outputs) == 1
    assert 'running kernel; here it is as images: nine images.' in still.outputs[0].data['text/markdown']


def test_chapters_with_panels_show_them(out):
    panels = {'story/03_diffusion': 'noise', 'story/15_text_to_image': 'caption', 'lab/00_widgets': 'firststage',
              'paper/12_layouts_and_maps': 'layout', 'paper/13_inpainting': 'inpaint', 'lab/02_explore': 'steps'}
    for chapter, panel in panels.items():
        assert f'src="../play/index.html?panel={panel}"' in text(out/f'{chapter}.html'), chapter


def test_letters_of_a_docstring_are_no_markup():
    assert reference.plain('a*b and `c*d` <i> $x$') == r'a\*b and `c*d` \<i\> \$x\$'


@pytest.mark.parametrize('body, says', [
    ('<a href="gone.html">x</a>', 'leads to gone.html'), ('<a href="#gone">x</a>', 'no such anchor'),
    ('<a href="../elsewhere.html">x</a>', 'leads to ../elsewhere.html'), ('<img src="gone.png">', 'leads to gone.png'),
    ('<script src="https://x.org/a.js"></script>', 'from elsewhere'), (r'<p>\(x\)</p>', 'shown as written'),
    ('<p>$$x$$</p>', 'shown as written'), (r'<p>$\alpha$</p>', 'shown as written'),
    ('<span class="math notranslate nohighlight">x</span>', 'does not take')])
def test_what_is_wrong_with_a_page_is_seen(tmp_path, body, says):
    (tmp_path/'index.html').write_text(f'<html><body><h1 id="a">A</h1>{body}</body></html>')
    assert says in ' '.join(check.problems(tmp_path))


def test_a_good_page_passes(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a/index.html').write_text('<p id="b c">B</p>')
    (tmp_path/'index.html').write_text('<a href="a/index.html#b%20c">x</a><a href="https://x.org">y</a><pre>$$</pre>'
                                       r'<span class="math notranslate nohighlight">\(x\)</span>')
    assert check.problems(tmp_path) == []


# what is served

@pytest.fixture
def served(tmp_path):
    root = tmp_path/'site'
    (root/'a').mkdir(parents=True)
    for name in ('index.html', 'a/index.html', 'x.mjs', 'x.wasm', 'x.onnx', 'x.json', '.hidden'):
        (root/name).write_text(f'it is {name} '*50)
    (tmp_path/'secret.txt').write_text('secret')
    (root/'link.txt').symlink_to(tmp_path/'secret.txt')
    s = serve.server(root, 0)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()
    s.server_close()


def get(address: str, **headers): # status, headers, body
    try: r = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10)
    except urllib.error.HTTPError as e: return e.code, e.headers, e.read()
    return r.status, r.headers, r.read()


@pytest.mark.parametrize('name, kind', [
    ('x.mjs', 'text/javascript'), ('x.wasm', 'application/wasm'), ('x.json', 'application/json'),
    ('x.onnx', 'application/octet-stream'), ('', 'text/html'), ('a/', 'text/html')])
def test_types(served, name, kind):
    status, headers, body = get(f'{served}/{name}')
    assert status == 200 and headers['Content-Type'].startswith(kind) and body.startswith(b'it is')
    packed = get(f'{served}/{name}', **{'Accept-Encoding': 'gzip'})
    assert packed[1]['Content-Encoding'] == (None if name == 'x.onnx' else 'gzip')
    assert (packed[2] if name == 'x.onnx' else gzip.decompress(packed[2])) == body
    assert get(f'{served}/{name}', **{'If-None-Match': headers['ETag']})[0] == 304


@pytest.mark.parametrize('path', ['.hidden', '../secret.txt', '%2e%2e/secret.txt', 'link.txt', 'gone.html',
                                  'a/../../secret.txt', 'a%00'])
def test_what_is_not_of_the_site_is_not_served(served, path):
    status, _, body = get(f'{served}/{path}')
    assert status == 404 and b'secret' not in body


def test_a_folder_without_its_slash(served): assert get(f'{served}/a')[2].startswith(b'it is a/index.html')


def test_serving_refuses_in_a_sentence(tmp_path, served):
    (tmp_path/'site/index.html').touch()
    port = served.rpartition(':')[2]
    taken = run(sys.executable, SITE/'serve.py', '--root', tmp_path/'site', '--port', port, timeout=60)
    empty = run(sys.executable, SITE/'serve.py', '--root', tmp_path/'no', timeout=60)
    assert taken.returncode and empty.returncode and 'Traceback' not in taken.stderr + empty.stderr
    assert 'cannot be had' in taken.stderr and 'run make site' in empty.stderr


def test_ctrl_c_ends_it(tmp_path):
    (tmp_path/'index.html').write_text('x')
    p = subprocess.Popen([sys.executable, SITE/'serve.py', '--root', tmp_path, '--port', '0'], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    assert 'http://127.0.0.1:' in p.stdout.readline()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 0 and err == ''


# what is seen

def typeset(page, address: str): # open a page, and wait for its formulas
    page.goto(address)
    page.wait_for_function('''() => document.querySelectorAll('.math').length ==
                                     document.querySelectorAll('.math mjx-container').length''')


@SEEN
def test_formulas_of_the_heaviest_pages(page, url, out):
    names = sorted((n for listed in chapters.parts().values() for n in listed),
                   key=lambda n: -text(out/f'{n}.html').count('"math '))
    for name in names[:HEAVY]:
        typeset(page, f'{url}/{name}.html')
        assert page.locator('.math mjx-container').count() > 50, name
        assert not page.locator('mjx-merror, [data-mjx-error]').count(), name
        raw = page.evaluate('''() => { const a = document.querySelector('article').cloneNode(true)
            a.querySelectorAll('pre, code, mjx-container, script').forEach(e => e.remove()); return a.textContent }''')
        assert not re.search(r'\\\(|\$\$|\\begin\{', raw), name


CUT = '''() => { document.querySelectorAll('details').forEach(d => d.open = true)
    return [...document.querySelectorAll('.cell_input pre')].filter(e => e.scrollWidth > e.clientWidth)
        .map(e => e.textContent.split('\\n').sort((a, b) => b.length - a.length)[0]) }'''
WRAPPED = '''() => [...document.querySelectorAll('.cell_input pre')].filter(e => {
    const lines = e.textContent.replace(/\\n$/, '').split('\\n').length, style = getComputedStyle(e)
    const inside = e.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom)
    return inside > (lines + .5)*parseFloat(style.lineHeight) }).length'''


@SEEN
def test_no_line_of_the_storys_code_is_cut_off(page, url):
    page.route('**/mathjax/**', lambda route: route.fulfill(body='', content_type='text/javascript'))
    blocks = wrapped = 0
    for name in STORY:
        page.goto(f'{url}/{name}.html', wait_until='domcontentloaded')
        assert page.evaluate(CUT) == [], name
        blocks += page.locator('.cell_input pre').count()
        wrapped += page.evaluate(WRAPPED)
    assert blocks > 500 and wrapped < blocks/50, (blocks, wrapped) # a line above 100 columns is continued below


@SEEN
def test_search_finds_guidance(page, url):
    page.goto(f'{url}/search.html?q=classifier-free+guidance')
    page.locator('#search-results ul.search li').first.wait_for()
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.textContent.includes('found')")
    found = page.locator('#search-results ul.search li a').evaluate_all('e => e.map(a => a.href)')
    assert any('story/12_guidance' in f for f in found), found


@SEEN
@pytest.mark.parametrize('name', ['index', 'story/05_samplers', 'story/14_one_object', 'api/core',
                                  'metrics/08_shipped_models', 'lab/01_canvas'])
def test_no_page_scrolls_sideways_on_a_phone(page, url, name):
    page.set_viewport_size(dict(width=360, height=740))
    typeset(page, f'{url}/{name}.html')
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    page.evaluate('window.scrollTo(100, 0)')
    assert page.evaluate('window.scrollX') == 0


@SEEN
def test_light_and_dark(browser, url):
    for mode in ('light', 'dark'):
        page = browser.new_page(color_scheme=mode)
        page.goto(f'{url}/story/05_samplers.html', wait_until='domcontentloaded')
        page.wait_for_function("document.documentElement.dataset.theme")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r'\d+', ground)[:3])) > 380) == (mode == 'light'), (mode, ground)
        page.close()
