"Every exercise: its solution passes, its stub does not, wrong answers fail with their own hints. The student edition holds no solution, and comes back whole."
import contextlib
import io
import json
import linecache
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import run

from ldm_nb import attention as conditioning, diffusion, layers, losses, samplers, training
from ldm_nb.course import checks, checks as diffusion_checks, checks as first_checks
from ldm_nb.datasets import postcards as data
from ldm_nb.metrics import evaluate
from ldm_nb.autoencoder import Codebook, Codes, Gaussian
from ldm_nb.engine.seeds import ItemNoise
from ldm_nb.samplers import cut_sigmas
from ldm_nb.course.grading import (
    BEGIN, END, STUB, chapters, exercises, holds_answers, main, read_notebook, source,
    student_notebook, without_solution, write_student)

MAIN = '01_data 02_reader 03_layers 04_autoencoder 05_losses 06_diffusion 07_unet 08_conditioning 09_samplers 10_training 11_core 12_evaluate'.split()
CHECKS = {'15_first_checks': first_checks, '15a_diffusion_checks': diffusion_checks, '15b_checks': checks}


@pytest.fixture(scope='module')
def asked(root): return [e for p in chapters(root/'nbs') for e in exercises(read_notebook(p), p.stem)]


@pytest.fixture(scope='module')
def known(root): # name of a check -> {name of a wrong answer: the first line of its hint}; runs the cells of the chapters of checks that are not exported
    found = {}
    for stem, module in CHECKS.items():
        space = dict(vars(module))
        first_checks.MET.clear()
        for k, c in enumerate(read_notebook(root/f'nbs/{stem}.ipynb')['cells']):
            code, name = source(c), f'<{stem}, cell {k}>'
            if c['cell_type'] != 'code' or code.startswith(('#| export', '#| default_exp')) or 'nbdev_export(' in code: continue
            linecache.cache[name] = len(code), None, code.splitlines(True), name
            with contextlib.redirect_stdout(io.StringIO()): exec(compile(code, name, 'exec'), space)
        found |= first_checks.MET
    return found


def says(e, code) -> str: return checks.try_answer(e.name, e.setup, code)


def test_three_to_five_in_each_chapter(asked):
    for stem in MAIN: assert 3 <= len([e for e in asked if e.chapter == stem]) <= 5, stem
    assert len({e.name for e in asked}) == len(asked)


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


class Levels: # a schedule with these abar
    def __init__(self, abar): self.abar = abar
    def __len__(self): return len(self.abar)


OWN = dict(
    to_float=data.to_float, block_mean=data.downsample, cross_entropy=F.cross_entropy, group_norm=lambda h, g, eps: layers.norm(h.shape[1], g, eps)(h),
    timestep_embedding=layers.timestep_embedding, gaussian_sample=lambda m, lv, eps: Gaussian(m, lv).sample(eps), kl=lambda m, lv: Gaussian(m, lv).kl(),
    quantize=quantized, hinge=losses.hinge_loss, adaptive_weight=losses.adaptive_weight, codebook_loss=codebook_loss,
    perceptual=losses.FeatureDistance(lambda x: [x]).forward, abar=lambda T, lo, hi: diffusion.Schedule('scaled_linear', lo, hi, T).abar,
    q_sample=lambda a, z0, t, eps: diffusion.q_sample(Levels(a), z0, t, eps), draw_t=diffusion.draw_t,
    from_v=lambda z, v, a: (diffusion.to_z0('v', v, z, a.flatten()), diffusion.to_eps('v', v, z, a.flatten())),
    diffusion_loss=lambda net, z0, t, eps, a: diffusion.DiffusionLoss(Levels(a))(lambda z, t, c: net(z, t), z0, None, t, eps),
    drop_some=conditioning.drop_some, euler=lambda *q: last(samplers.euler(*q)), heun_step=lambda d, z, s, to: last(samplers.heun(d, z, [s, to])),
    karras_sigmas=samplers.karras_sigmas, batch_indices=training.batch_indices, item_noise=lambda seed, items, shape: ItemNoise(seed, items)(
        torch.empty(len(items), *shape)), start_from=lambda z0, eps, s, p: (z0 + cut_sigmas(s, p)[0]*eps, cut_sigmas(s, p)),
    precision_recall=evaluate.precision_recall, interval=evaluate.wilson)


@pytest.mark.parametrize('name', OWN)
def test_the_package_passes_its_own_checks(name): getattr(checks, name)(OWN[name])


def test_an_answer_that_returns_nothing_or_takes_nothing(asked):
    for e in asked:
        for answer in (f'def my_{e.name}(*args): pass', f'def my_{e.name}(): pass', f'def my_{e.name}(*args): return "words"'):
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
    shipped = {p.name: read_notebook(p) for p in chapters(edition)}
    assert {p.stem for p in chapters(root/'nbs')} - {p[:-6] for p in shipped} == {*CHECKS, '15c_grading'}
    assert all(f'{stem}.ipynb' in shipped for stem in MAIN)
    for name, nb in shipped.items(): assert BEGIN not in words(nb) and END not in words(nb) and 'nbdev_export(' not in words(nb), name
    for e in asked:
        nb = shipped[f'{e.chapter}.ipynb']
        lines = words(nb).splitlines() # of the whole chapter, which teaches what the exercise asks for in other words
        assert not any(o in lines for o in solution(e.code) if len(o) > 35), e.name
        mine = [c for c in nb['cells'] if f'def my_{e.name}(' in source(c) or source(c) == f'checks.{e.name}(my_{e.name})']
        assert len(mine) == 2 and STUB in source(mine[0]) and not any(c['outputs'] for c in mine), e.name
    assert (edition.parent/'data/pretrained').is_dir() and any((edition/'images').iterdir())


def test_answers_are_not_overwritten(edition, root):
    before = (edition/'03_layers.ipynb').read_bytes()
    (edition/'03_layers.ipynb').write_bytes(before + b' ')
    with pytest.raises(ValueError, match='perhaps with answers'): write_student(edition, root/'nbs')
    assert (edition/'03_layers.ipynb').read_bytes() == before + b' '
    (edition/'03_layers.ipynb').write_bytes(before)


def pasted(nb, original) -> dict: # the solutions put back, and the last cell
    codes = {e.name: e.code for e in exercises(original)}
    cells = [c | dict(source=codes[n].splitlines(True)) if (n := next((k for k in codes if f'def my_{k}(' in source(c)), None)) else c for c in nb['cells']]
    return nb | dict(cells=cells)


def test_with_solutions_pasted_back_it_is_this_course(edition, root): # which the tests of the notebooks run top to bottom
    for p in chapters(edition):
        original = read_notebook(root/'nbs'/p.name)
        back = [(c['cell_type'], source(c)) for c in pasted(read_notebook(p), original)['cells']]
        assert back == [(c['cell_type'], source(c)) for c in original['cells'] if 'nbdev_export(' not in source(c)], p.name


def test_a_student_runs_it_top_to_bottom(edition, root, tmp_path): # the lightest chapter, in a kernel, from the folder of the students
    nb = pasted(read_notebook(edition/'03_layers.ipynb'), read_notebook(root/'nbs/03_layers.ipynb'))
    (edition/'_back.ipynb').write_text(json.dumps(nb))
    r = run(sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output-dir', tmp_path, edition/'_back.ipynb', cwd=edition,
            PYTHONPATH=str(root), timeout=200)
    assert r.returncode == 0, r.stderr[-2000:]
    printed = [''.join(o.get('text', '')) for c in read_notebook(tmp_path/'_back.ipynb')['cells'] for o in c.get('outputs', [])]
    assert [f'{e.name}: right\n' in printed for e in exercises(nb)] == [True]*4


def change(path, name, code): # the cell of an exercise; None: delete it
    nb = read_notebook(path)
    nb['cells'] = [c if f'def my_{name}(' not in source(c) else c | dict(source=code.splitlines(True)) for c in nb['cells']
                   if code is not None or f'def my_{name}(' not in source(c)]
    path.write_text(json.dumps(nb))


def test_grading(edition, root, tmp_path):
    for stem in ('03_layers', '06_diffusion', '08_conditioning', '04_autoencoder'): shutil.copy(edition/f'{stem}.ipynb', tmp_path)
    p, q = tmp_path/'06_diffusion.ipynb', tmp_path/'08_conditioning.ipynb'
    right = {e.name: e.code for e in exercises(read_notebook(root/'nbs/06_diffusion.ipynb')) + exercises(read_notebook(root/'nbs/08_conditioning.ipynb'))}
    change(p, 'abar', right['abar'])
    change(p, 'q_sample', right['q_sample'].replace('a.sqrt()*z0', 'a*z0').replace('(1 - a).sqrt()*eps', '(1 - a)*eps'))
    change(p, 'from_v', 'def my_from_v(z_t, v, abar) return z_t')
    change(p, 'diffusion_loss', 'def my_diffusion_loss(*args):\n    while True: pass')
    change(p, 'draw_t', None)
    change(q, 'guidance', 'import os\ndef my_guidance(uncond, cond, w): os._exit(0)')
    change(q, 'one_call', '%matplotlib inline\nimport math\n' + right['one_call'])
    nb = read_notebook(q) # somebody edits the check: it is the package's that counts
    for c in nb['cells']:
        if source(c) == 'checks.drop_some(my_drop_some)': c['source'] = ['print("drop_some: right")']
    q.write_text(json.dumps(nb))
    change(q, 'drop_some', 'def my_drop_some(y, null, p): return y')
    nb = read_notebook(q) # tried twice: the later cell counts, as in a kernel
    nb['cells'] = [dict(cell_type='code', id='first', metadata={}, execution_count=None, outputs=[], source=['def my_one_call(*args): return 1']), *nb['cells']]
    q.write_text(json.dumps(nb))
    (tmp_path/'04_autoencoder.ipynb').write_text('{"cells": 3')
    words = 'grade', tmp_path, '--seconds', '4', '--json', tmp_path/'grades.json', '--nbs', root/'nbs'
    r = run(sys.executable, '-m', 'ldm_nb.course.grading', *words, PYTHONPATH=str(root))
    assert r.returncode == 0, r.stderr
    got = {g['exercise']: (g['result'], g['hint']) for g in json.loads((tmp_path/'grades.json').read_text())}
    assert got['abar'] == got['one_call'] == ('passed', '') and got['group_norm'] == ('not written yet', '')
    for name, result, hint in (('q_sample', 'wrong', 'you multiplied by abar'), ('from_v', 'wrong', 'line 1 is not Python'),
                               ('diffusion_loss', 'wrong', 'does a loop never end'), ('draw_t', 'missing', 'no cell defines my_draw_t'),
                               ('guidance', 'wrong', 'ended before it had an answer'), ('drop_some', 'wrong', ''), ('kl', 'missing', 'no notebook')):
        assert got[name][0] == result and hint in got[name][1], (name, got[name])
    assert '2 of 17 passed' in r.stdout and '06_diffusion' in r.stdout, r.stdout


@pytest.mark.parametrize('args, contains', [
    (('grade', 'no/such/folder'), 'no folder no/such/folder'), (('grade', 'ldm_nb'), 'no notebook with exercises in ldm_nb'),
    (('grade',), 'required: dir'), (('grade', 'nbs', '--nbs', 'tests'), 'no exercise in tests'), (('student', '--nbs', 'tests'), 'no notebook in tests')])
def test_refused(root, monkeypatch, capsys, args, contains):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as e: main(list(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and contains in err and err.count('\n') == 1 and err.startswith('error: '), err


def test_solutions_stay_out(root): # half a marker, or a solution outside an exercise, is refused
    nb = read_notebook(root/'nbs/03_layers.ipynb')
    for old, new in ((END, ''), ('checks.halve(my_halve)', 'print(1)')):
        bad = nb | dict(cells=[c | dict(source=[source(c).replace(old, new)]) for c in nb['cells']])
        with pytest.raises(ValueError): student_notebook(bad)
    assert not holds_answers(nb) and holds_answers(read_notebook(root/'nbs/15b_checks.ipynb'))
