"`ldm-diagnose` as a program: its exit codes, and that a model which was broken on purpose is found out."
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, refused, run
from safetensors.torch import load_file, save_file

CODE = 'from ldm_nb.cli.diagnose import main as diagnose_command; diagnose_command()'


def diagnose(*words): return run(sys.executable, '-c', CODE, *words, cwd=ROOT)


def test_a_shipped_model_is_healthy():
    r = diagnose('postcards-map', '--n', '12')
    assert r.returncode == 0 and 'BUG' not in r.stdout, r.stdout + r.stderr


def test_weights_that_are_not_the_average_and_a_misread_answer_are_found(tmp_path):
    broken = shutil.copytree(ROOT/'data/pretrained/postcards-map', tmp_path/'broken')
    config = json.loads((broken/'config.json').read_text())
    (broken/'config.json').write_text(json.dumps(config | dict(prediction='eps')))
    r = diagnose(str(broken), '--n', '12')
    assert r.returncode == 1 and "answers in 'v' and is read as 'eps'" in r.stdout, r.stdout + r.stderr
    shaken = shutil.copytree(ROOT/'data/pretrained/postcards-map', tmp_path/'shaken')
    weights = load_file(shaken/'model.safetensors')
    torch.save(dict(ema=weights), tmp_path/'step.pt')
    assert diagnose(str(shaken), '--n', '12', '--checkpoint', str(tmp_path/'step.pt')).returncode == 0
    save_file({k: v*1.01 if k == 'net.conv_out.weight' else v for k, v in weights.items()}, shaken/'model.safetensors')
    r = diagnose(str(shaken), '--n', '12', '--checkpoint', str(tmp_path/'step.pt'))
    assert r.returncode == 1 and 'the average is not used' in r.stdout, r.stdout + r.stderr


@pytest.mark.parametrize('words,says', [(['no-such-model'], 'no-such-model'),
                                        (['postcards', '--n', '4'], '--n=4: expected a whole number, 8 to 10000'),
                                        (['postcards', '--sampler', 'x'], 'no sampler')])
def test_bad_input_is_one_line_and_code_2(words, says):
    r = diagnose(*words)
    assert says in refused(r) and r.returncode == 2, r.stderr


def test_cards_say_what_was_measured(): # and the same as the file of `ldm-evaluate`
    for p in sorted((ROOT/'data/results').glob('evaluate-*.json')):
        found = json.loads(p.read_text())
        whose = found.get('guide') or found['model'] # what a guide is good for stands in its own card
        card = json.loads((ROOT/'data/pretrained'/whose/'config.json').read_text())['card']['measured']
        assert card['command'] == found['command'], p.name
        for k, (value, low, high) in card['measures'].items():
            m = found['measures'][k]
            assert max(abs(value - m['value']), abs(low - m['low']), abs(high - m['high'])) < 1e-4, (p.name, k)
        assert {k for k in found['measures'] if not k.startswith('first stage')} == set(card['measures']), p.name
