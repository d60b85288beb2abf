"""The site, from the notebooks as they are: `python site/build.py --out _site`. Nothing is run: outputs are those kept.
Needs Sphinx (pip install -e '.[dev]') and npm, which brings MathJax and onnxruntime-web."""
import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
MODULES = HERE/'node_modules'
MODELS = ('postcards-text', 'postcards-text-fast', 'postcards-layout', 'postcards-inpaint')
RUNTIME = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
PLAY = {'.html', '.css', '.js', '.mjs', '.svg', '.png', '.webmanifest'} # what belongs to the explainer, by its ending
CARDS, CARD_SIZE, CARD_SEED = 8, 64, 3


class Refused(Exception): pass # a sentence for the person who ran this


def digest(paths, *words: str) -> str: # of files, their names included
    h = hashlib.sha256(' '.join(words).encode())
    for p in sorted(p for p in paths if p.is_file()): h.update(p.relative_to(ROOT).as_posix().encode() + p.read_bytes())
    return h.hexdigest()[:16]


def npm_packages(): # into site/node_modules, in the versions of package.json
    wanted = json.loads((HERE/'package.json').read_text(encoding='utf-8'))['dependencies']
    def there(name):
        file = MODULES/name/'package.json'
        return file.is_file() and json.loads(file.read_text(encoding='utf-8'))['version'] == wanted[name]
    if all(map(there, wanted)): return
    npm = shutil.which('npm')
    if npm is None:
        raise Refused('the site needs npm, which brings MathJax and onnxruntime-web: install Node.js '
                      '(Debian, Ubuntu: apt install npm) and run this again')
    print('Getting MathJax and onnxruntime-web with npm ...', flush=True)
    words = [npm, 'install', '--no-package-lock', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error']
    if subprocess.run(words, cwd=HERE).returncode or not all(map(there, wanted)):
        raise Refused('npm could not install what site/package.json lists; see above, and try by hand: '
                      f'cd site && {" ".join(words)}')


def copy(source: Path, target: Path): # a file or a folder
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir(): shutil.copytree(source, target, dirs_exist_ok=True)
    else: shutil.copy(source, target)


def mathjax(out: Path): # with its font, and what reads formulas aloud in English
    for name in ('tex-chtml.js', 'LICENSE', 'a11y', 'input/tex/extensions', 'ui', 'sre/speech-worker.js',
                 *(f'sre/mathmaps/{n}.json' for n in ('base', 'en', 'nemeth'))):
        copy(MODULES/'mathjax'/name, out/'_static/mathjax'/name)
    for name in ('chtml', 'chtml.js'):
        copy(MODULES/'@mathjax/mathjax-newcm-font'/name, out/'_static/mathjax-fonts/mathjax-newcm-font'/name)


def chapters(out: Path): # every page, by Sphinx
    from sphinx.cmd.build import build_main
    import chapters
    import reference
    src = out/'.cache/src'
    shutil.rmtree(src, ignore_errors=True)
    for old in out.iterdir():
        if old.name in ('.cache', 'play'): continue
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    pages = chapters.write_all(src)
    reference.write_all(src, pages)
    copy(ROOT/'nbs/images', src/'images')
    made = out/'.cache/html' # not `out` itself: myst-nb puts the images of the outputs beside what it writes
    shutil.rmtree(made, ignore_errors=True)
    words = ['-b', 'html', '-c', str(HERE), '-d', str(out/'.cache/doctrees'), '-E', '-a', '-q', '-W', '--keep-going',
             str(src), str(made)]
    if build_main(words): raise Refused('Sphinx has something to say about the pages; see above')
    for p in made.iterdir(): p.rename(out/p.name)
    for page in pages: copy(page.path, out/'notebooks'/f'{page.name}.ipynb')
    mathjax(out)


def chapters_if_changed(out: Path) -> bool:
    sources = [*(ROOT/'nbs').rglob('*'), *(ROOT/'ldm_nb').rglob('*.py'), *HERE.glob('*.py'), HERE/'package.json',
               *(HERE/'_static').rglob('*'), ROOT/'CONTRIBUTING.md', ROOT/'CHANGELOG.md']
    sources = [p for p in sources if '.ipynb_checkpoints' not in p.parts]
    versions = (version(n) for n in ('sphinx', 'myst-nb', 'sphinx-book-theme'))
    stamp, now = out/'.cache/stamp', digest(sources, *versions)
    if stamp.is_file() and stamp.read_text() == now: return False
    stamp.unlink(missing_ok=True)
    chapters(out)
    stamp.write_text(now)
    return True


def exported(name: str, cache: Path) -> Path: # a model's export; made again when weights or code have changed
    parts = ('', 'paper', 'beyond') # where networks and embedders are
    code = [ROOT/'ldm_nb/interop/onnx.py', *(p for part in parts for p in (ROOT/'ldm_nb'/part).glob('*.py'))]
    folder = cache/f'{name}-{digest([*(ROOT/"data/pretrained"/name).rglob("*"), *code], version("torch"))}'
    if folder.is_dir(): return folder
    from ldm_nb.core import LatentDiffusion
    for old in cache.glob(f'{name}-????????????????'): shutil.rmtree(old)
    print(f'Exporting {name} ...', flush=True)
    half = cache/f'{name}.half'
    shutil.rmtree(half, ignore_errors=True)
    LatentDiffusion.from_pretrained(name).export_onnx(half)
    half.rename(folder)
    return folder


def models(out: Path):
    cache = out/'.cache/models'
    cache.mkdir(parents=True, exist_ok=True)
    for name in MODELS: copy(exported(name, cache), out/'play/models'/name)


def postcards(out: Path): # images for the panels to begin with
    code = (ROOT/'ldm_nb/datasets').glob('*.py')
    cache = out/'.cache'/f'postcards-{digest(code, str((CARDS, CARD_SIZE, CARD_SEED)))}'
    if not cache.is_dir():
        from PIL import Image
        from ldm_nb.data import Postcards
        from ldm_nb.datasets.images import to_uint8
        half = out/'.cache/postcards.half'
        half.mkdir(parents=True, exist_ok=True)
        cards = [Postcards(CARDS, CARD_SIZE, seed=CARD_SEED)[i] for i in range(CARDS)]
        for i, card in enumerate(cards): Image.fromarray(to_uint8(card['image'])).save(half/f'{i}.png', optimize=True)
        rows = [dict(file=f'{i}.png', caption=card['caption']) for i, card in enumerate(cards)]
        (half/'postcards.json').write_text(json.dumps(rows, indent=1))
        half.rename(cache)
    copy(cache, out/'play/postcards')


def explainer(out: Path, with_models: bool): # its own files, the runtime, the models, some postcards
    shutil.rmtree(out/'play', ignore_errors=True)
    for p in HERE.rglob('*'):
        inside = p.relative_to(HERE)
        if p.suffix in PLAY and not {'node_modules', '_static'} & set(inside.parts):
            copy(p, out/'play'/inside)
    for name in RUNTIME: copy(MODULES/'onnxruntime-web/dist'/name, out/'play/ort'/name)
    postcards(out)
    if with_models: models(out)


def build(out: Path, with_models: bool):
    if out.is_dir() and any(out.iterdir()) and not (out/'.cache').is_dir():
        raise Refused(f'{out} is not empty, and this command did not make it: name another folder with --out')
    (out/'.cache').mkdir(parents=True, exist_ok=True)
    start = time.time()
    npm_packages()
    explainer(out, with_models) # first: Sphinx makes the packages that export talk
    if not chapters_if_changed(out): print('No chapter has changed since the last time.')
    print(f'The site is in {out} (made in {time.time() - start:.0f} s); make serve shows it.')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT/'_site', help='the folder of the site (default _site)')
    parser.add_argument('--no-models', action='store_true',
                        help='leave out the exported models of the explainer')
    parser.add_argument('--check', action='store_true',
                        help='build nothing: check the links and formulas of the site in --out')
    parser.add_argument('--packages', action='store_true', help='build nothing: get what npm brings')
    args = parser.parse_args()
    try:
        if args.packages: return npm_packages()
        if args.check:
            import check
            sys.exit(check.report(args.out.resolve()))
        build(args.out.resolve(), not args.no_models)
    except Refused as e: sys.exit(f'site: {e}')
    except ModuleNotFoundError as e: sys.exit(f"site: no {e.name} here: pip install -e '.[dev]'")


if __name__ == '__main__': main()
