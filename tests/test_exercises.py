"""Every exercise: its solution passes, its stub does not, wrong answers fail with their own hints. The student edition
holds no solution, and comes back whole."""
import contextlib
import io
import json
import linecache
import shutil
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import run

from ldm_nb import diffusion, embedders, layers, losses, samplers
from ldm_nb.autoencoder import Codebook, Codes, Gaussian
from ldm_nb.course import checks
from ldm_nb.course.grading import (BEGIN, END, STUB, address, chapters, exercises, holds_answers, main, read_notebook,
                                   source, student_notebook, without_solution, write_student)
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.masks import downsample
from ldm_nb.engine import seeds
from ldm_nb.metrics import distances, intervals
from ldm_nb.samplers import cut_sigmas

# the chapters that ask for something, and for how much
ASKED = {
    'story/02_data': 3,
    'story/03_diffusion': 5,
    'story/04_why_it_works': 3,
    'story/05_samplers': 4,
    'story/06_unet': 4,
    'story/07_autoencoder': 4,
    'story/08_losses': 4,
    'story/09_latent_diffusion': 3,
    'story/10_attention': 3,
    'story/11_text': 3,
    'story/12_guidance': 3,
    'story/13_training': 3,
    'story/14_one_object': 3,
    'story/15_text_to_image': 3,
    'story/16_compression': 3,
    'engine/01_seeds': 2,
    'metrics/00_reader': 3,
    'metrics/02_intervals': 1,
    'metrics/03_distances': 3,
}
HOME = 'course/00_checks'


@pytest.fixture(scope='module')
def asked(root): return [e for p in chapters(root/'nbs') for e in exercises(read_notebook(p), address(p, root/'nbs'))]


@pytest.fixture(scope='module')
def known(root):
    # name of a check -> {name of a wrong answer: the first line of its hint}; runs the cells of the chapter of
    # checks that are not exported
    space = dict(vars(checks))
    checks.MET.clear()
    for k, c in enumerate(read_notebook(root/f'nbs/{HOME}.ipynb')['cells']):
        code, name = source(c), f'<{HOME}, cell {k}>'
        if c['cell_type'] != 'code' or code.startswith(('#| export', '#| default_exp')) or 'nbdev_export(' in code:
            continue
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        with contextlib.redirect_stdout(io.StringIO()): exec(compile(code, name, 'exec'), space)
    return dict(checks.MET)


def says(e, code) -> str: return checks.try_answer(e.name, e.setup, code)


def test_what_each_chapter_asks_for(asked):
    assert dict(Counter(e.chapter for e in asked)) == ASKED
    assert len({e.name for e in asked}) == len(asked) == sum(ASKED.values())


def test_numbers_follow_the_chapter(asked):
    # 'Exercise 5.1' in story/05_samplers, 'Exercise 1' elsewhere; and the check says where it belongs
    count = Counter()
    for e in asked:
        count[e.chapter] += 1
        folder, _, stem = e.chapter.partition('/')
        number = stem.split('_')[0]
        expected = f'{number.lstrip("0")}.{count[e.chapter]}: ' if folder == 'story' else f'{count[e.chapter]}: '
        assert e.title.startswith(expected), (e.chapter, e.title, expected)
        assert getattr(checks,
                       e.name).__doc__.startswith(f'Chapter {number if folder == "story" else e.chapter}: '), e.name


def test_solutions_pass(asked):
    assert {e.name: says(e, e.code) for e in asked} == {e.name: 'passed' for e in asked}


def test_stubs_are_not_written_yet(asked):
    assert {e.name: says(e, without_solution(e.code)) for e in asked} == {e.name: 'not written yet' for e in asked}


def test_wrong_answers_fail_with_hints_of_their_own(asked, known):
    assert set(known) == {e.name for e in asked}
    for name, hints in known.items():
        assert len(hints) >= 2 and len(set(hints.values())) == len(hints), name
        assert not any(h == 'not written yet' or h.startswith('your code stopped') for h in hints.values()), name


def last(walk): # what a sampler ends with
    for z, _ in walk: pass
    return z


def quantized(raw, codes): # by a codebook with these codes, which the package detaches elsewhere
    book = Codebook(*codes.shape)
    book.embedding.weight.data = codes.detach()
    return book(raw).quantized


def codebook_loss(raw, nearest, beta):
    q = Codes(raw, nearest, None)
    return (q.codebook() + beta*q.commitment()).mean()


class Levels(diffusion.Schedule): # with these abar
    def __init__(self, abar): self.abar = abar


OWN = dict(to_float=to_float, block_mean=downsample, cross_entropy=F.cross_entropy,
           group_norm=lambda h, g, eps: layers.norm(h.shape[1], g, eps)(h),
           timestep_embedding=layers.timestep_embedding, gaussian_sample=lambda m, lv, eps: Gaussian(m, lv).sample(eps),
           kl=lambda m, lv: Gaussian(m, lv).kl(), quantize=quantized, hinge=losses.hinge_loss,
           adaptive_weight=losses.adaptive_weight, codebook_loss=codebook_loss,
           perceptual=losses.FeatureDistance(lambda x: [x]).forward,
           abar=lambda T, lo, hi: diffusion.Schedule('scaled_linear', lo, hi, T).abar,
           q_sample=lambda a, z0, t, eps: diffusion.q_sample(Levels(a), z0, t, eps), draw_t=diffusion.draw_t,
           from_v=lambda z, v, a: (diffusion.to_z0('v', v, z, a.flatten()), diffusion.to_eps('v', v, z, a.flatten())),
           diffusion_loss=lambda net, z0, t, eps, a: diffusion.DiffusionLoss(Levels(a))(
               lambda z, t, c: net(z, t), z0, None, t, eps), drop_some=embedders.drop_some,
           euler=lambda *q: last(samplers.euler(*q)), heun_step=lambda d, z, s, to: last(samplers.heun(d, z, [s, to])),
           karras_sigmas=samplers.karras_sigmas, batch_indices=seeds.batch_indices,
           item_noise=lambda seed, items, shape: seeds.ItemNoise(seed, items)(torch.empty(len(items), *shape)),
           start_from=lambda z0, eps, s, p: (z0 + cut_sigmas(s, p)[0]*eps, cut_sigmas(s, p)),
           precision_recall=distances.precision_recall, interval=intervals.wilson)


@pytest.mark.parametrize('name', OWN)
def test_the_package_passes_its_own_checks(name): getattr(checks, name)(OWN[name])


def test_an_answer_that_returns_nothing_or_takes_nothing(asked):
    for e in asked:
        for answer in (f'def my_{e.name}(*args): pass', f'def my_{e.name}(): pass',
                       f'def my_{e.name}(*args): return "words"'):
            hint = says(e, answer)
            assert len(hint) > 20 and not hint.startswith(('the cell stopped', 'not written')), (e.name, hint)


def words(nb) -> str: return '\n'.join(o.strip() for c in nb['cells'] for o in source(c).splitlines())


def solution(code) -> list: # its lines
    lines = [o.strip() for o in code.splitlines()]
    return lines[lines.index(BEGIN) + 1:lines.index(END)]


@pytest.fixture(scope='module')
def edition(root, tmp_path_factory):
    out = tmp_path_factory.mktemp('student')/'nbs'
    write_student(out, root/'nbs')
    return out


def test_student_edition_holds_no_solution(asked, edition, root):
    shipped = {address(p, edition): read_notebook(p) for p in chapters(edition)}
    there = {address(p, root/'nbs') for p in chapters(root/'nbs')}
    assert there - {*shipped} == {HOME, 'course/01_grading'}, 'the folders stay what they are'
    assert all(chapter in shipped for chapter in ASKED)
    for name, nb in shipped.items():
        assert BEGIN not in words(nb) and END not in words(nb) and 'nbdev_export(' not in words(nb), name
    for e in asked:
        nb = shipped[e.chapter]
        lines = words(nb).splitlines() # of the whole chapter, which teaches what the exercise asks for in other words
        assert not any(o in lines for o in solution(e.code) if len(o) > 35), e.name
        mine = [c for c in nb['cells']
                if f'def my_{e.name}(' in source(c) or source(c) == f'checks.{e.name}(my_{e.name})']
        assert len(mine) == 2 and STUB in source(mine[0]) and not any(c['outputs'] for c in mine), e.name
    assert any((edition/'images').iterdir())


def test_answers_are_not_overwritten(edition, root):
    mine = edition/'story/06_unet.ipynb'
    before = mine.read_bytes()
    mine.write_bytes(before + b' ')
    with pytest.raises(ValueError, match='perhaps with answers'): write_student(edition, root/'nbs')
    assert mine.read_bytes() == before + b' '
    mine.write_bytes(before)


def pasted(nb, original) -> dict: # the solutions put back, and the last cell
    codes = {e.name: e.code for e in exercises(original)}
    cells = [c | dict(source=codes[n].splitlines(True))
             if (n := next((k for k in codes if f'def my_{k}(' in source(c)), None)) else c for c in nb['cells']]
    return nb | dict(cells=cells)


def test_with_solutions_pasted_back_it_is_this_course(edition, root):
    # which the tests of the notebooks run top to bottom
    for p in chapters(edition):
        original = read_notebook(root/'nbs'/p.relative_to(edition))
        back = [(c['cell_type'], source(c)) for c in pasted(read_notebook(p), original)['cells']]
        assert back == [(c['cell_type'], source(c))
                        for c in original['cells'] if 'nbdev_export(' not in source(c)], address(p, edition)


def test_a_student_runs_it_top_to_bottom(edition, root, tmp_path):
    # a chapter with short trainings, in a kernel, from the folder of the students, who have no data beside it
    nb = pasted(read_notebook(edition/'story/02_data.ipynb'), read_notebook(root/'nbs/story/02_data.ipynb'))
    look = dict(cell_type='code', id='data', metadata={}, execution_count=None, outputs=[],
                source=['from ldm_nb.engine.files import data_path\n', 'data_path("pretrained")'])
    (edition/'story/_back.ipynb').write_text(json.dumps(nb | dict(cells=[*nb['cells'], look])))
    r = run(sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output-dir', tmp_path,
            edition/'story/_back.ipynb', cwd=edition, PYTHONPATH=str(root), IN_TEST='1', timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    cells = read_notebook(tmp_path/'_back.ipynb')['cells']
    printed = [''.join(o.get('text', '')) for c in cells for o in c.get('outputs', [])]
    assert [f'{e.name}: right\n' in printed for e in exercises(nb)] == [True]*ASKED['story/02_data']
    assert str(root/'data/pretrained') in ''.join(cells[-1]['outputs'][0]['data']['text/plain'])
    assert not (edition.parent/'data').exists()


def change(path, name, code): # the cell of an exercise; None: delete it
    nb = read_notebook(path)
    nb['cells'] = [c if f'def my_{name}(' not in source(c) else c | dict(source=code.splitlines(True))
                   for c in nb['cells'] if code is not None or f'def my_{name}(' not in source(c)]
    path.write_text(json.dumps(nb))


def test_grading(edition, root, tmp_path):
    layers, p, q, broken = (f'story/{stem}.ipynb'
                            for stem in ('06_unet', '03_diffusion', '12_guidance', '07_autoencoder'))
    right = {e.name: e.code for chapter in (p, q) for e in exercises(read_notebook(root/'nbs'/chapter))}
    work = tmp_path/'work'
    for name in (layers, p, q, broken):
        (work/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(edition/name, work/name)
    shutil.move(work/layers, work/'06_unet.ipynb') # handed in without its folder: known by its name
    p, q, broken = work/p, work/q, work/broken
    shutil.copy(edition/'story/11_text.ipynb', q.with_name('11_text.ipynb'))
    change(p, 'abar', right['abar'])
    change(p, 'q_sample', right['q_sample'].replace('a.sqrt()*z0', 'a*z0').replace('(1 - a).sqrt()*eps', '(1 - a)*eps'))
    change(p, 'from_v', 'def my_from_v(z_t, v, abar) return z_t')
    change(p, 'diffusion_loss', 'def my_diffusion_loss(*args):\n    while True: pass')
    change(p, 'draw_t', None)
    change(q, 'guidance', 'import os\ndef my_guidance(uncond, cond, w): os._exit(0)')
    change(q, 'one_call', '%matplotlib inline\nimport math\n' + right['one_call'])
    edited = q.with_name('11_text.ipynb')
    nb = read_notebook(edited) # somebody edits the check: it is the package's that counts
    for c in nb['cells']:
        if source(c) == 'checks.drop_some(my_drop_some)': c['source'] = ['print("drop_some: right")']
    edited.write_text(json.dumps(nb))
    change(edited, 'drop_some', 'def my_drop_some(y, null, p): return y')
    nb = read_notebook(q) # tried twice: the later cell counts, as in a kernel
    nb['cells'] = [dict(cell_type='code', id='first', metadata={}, execution_count=None, outputs=[],
                        source=['def my_one_call(*args): return 1']), *nb['cells']]
    q.write_text(json.dumps(nb))
    broken.write_text('{"cells": 3')
    args = 'grade', work, '--seconds', '4', '--json', tmp_path/'grades.json', '--nbs', root/'nbs'
    r = run(sys.executable, '-m', 'ldm_nb.course.grading', *args, PYTHONPATH=str(root))
    assert r.returncode == 0, r.stderr
    got = {g['exercise']: (g['result'], g['hint']) for g in json.loads((tmp_path/'grades.json').read_text())}
    assert got['abar'] == got['one_call'] == ('passed', '') and got['group_norm'] == ('not written yet', '')
    for name, result, hint in (('q_sample', 'wrong', 'you multiplied by abar'),
                               ('from_v', 'wrong', 'line 1 is not Python'),
                               ('diffusion_loss', 'wrong', 'does a loop never end'),
                               ('draw_t', 'missing', 'no cell defines my_draw_t'),
                               ('guidance', 'wrong', 'ended before it had an answer'), ('drop_some', 'wrong', ''),
                               ('kl', 'missing', 'no notebook')):
        assert got[name][0] == result and hint in got[name][1], (name, got[name])
    handed_in = ('06_unet', '03_diffusion', '12_guidance', '11_text', '07_autoencoder')
    assert f'2 of {sum(ASKED[f"story/{c}"] for c in handed_in)} passed' in r.stdout, r.stdout
    assert 'story/03_diffusion' in r.stdout and 'story/06_unet' in r.stdout, r.stdout


@pytest.mark.parametrize('args, contains', [
    (('grade', 'no/such/folder'), 'no folder no/such/folder'),
    (('grade', 'ldm_nb'), 'no notebook with exercises in ldm_nb'),
    (('grade',), 'required: dir'), (('grade', 'nbs', '--nbs', 'tests'), 'no exercise in tests'),
    (('student', '--nbs', 'tests'), 'no notebook in tests')])
def test_refused(root, monkeypatch, capsys, args, contains):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as e: main(list(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and contains in err and err.count('\n') == 1 and err.startswith('error: '), err


def test_solutions_stay_out(root): # half a marker, or a solution outside an exercise, is refused
    nb = read_notebook(root/'nbs/story/06_unet.ipynb')
    for old, new in ((END, ''), ('checks.group_norm(my_group_norm)', 'print(1)')):
        bad = nb | dict(cells=[c | dict(source=[source(c).replace(old, new)]) for c in nb['cells']])
        with pytest.raises(ValueError): student_notebook(bad)
    assert not holds_answers(nb) and holds_answers(read_notebook(root/f'nbs/{HOME}.ipynb'))
