"A short run of tests/prove/breaking.py: a few signals at random moments, a few hundred damaged files."
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'/'prove'))
import killed # noqa: E402, beside the proofs
import mutants # noqa: E402


def test_damaged_files_are_opened_or_refused_in_a_sentence(tmp_path):
    rows = mutants.try_inputs(range(300), 1, tmp_path)
    found = [r for r in rows if r['outcome'] != mutants.FINE and r['outcome'] != 'refused']
    assert len(rows) == 300 and not found, '\n'.join(str(r) for r in found[:5])
    assert min(sum(r['outcome'] == k for r in rows) for k in (mutants.FINE, 'refused')) > 50


def test_a_signal_at_any_moment_changes_nothing(tmp_path):
    jobs = ['with an adversary', 'with workers', 'postcards', 'folder of pictures', 'save over another']
    rows = killed.all_hits(5, 1, tmp_path.resolve(), names=jobs)
    wrong = [(r['job'], r['signal'], r['wrong']) for r in rows if r['wrong']]
    assert sum(r['hit'] for r in rows) >= 5 and not wrong, wrong
