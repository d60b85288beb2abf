"ldm-evaluate as a person calls it: help, a table and a file, the same numbers again, one line for each bad input."
import copy
import json
import sys
import types

import pytest
import torch
from conftest import refused, run
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.paper.conditions import make_unet
from ldm_nb.core import LatentDiffusion
from ldm_nb.cli.evaluate import main as evaluate_command
from ldm_nb.metrics.distances import embed, inception_features
from PIL import Image

EVALUATE = [sys.executable, '-m', 'ldm_nb.cli.evaluate']
TINY = ['--model', 'postcards-text', '--n', 24, '--steps', 2, '--device', 'cpu']


def quiet(capsys, *words):
    # the command in this process: what it leaves on stdout; raises SystemExit as the command line would
    evaluate_command([str(w) for w in words])
    return capsys.readouterr().out


def error(capsys, *words) -> str: # the one line of a call that fails
    with pytest.raises(SystemExit) as e: evaluate_command([str(w) for w in words])
    err = capsys.readouterr().err
    lines = [o for o in err.splitlines() if not o.startswith('warning: ')]
    assert e.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), err
    return lines[0]


@pytest.fixture(scope='module')
def unconditional(): # with random weights
    ae = load_autoencoder('ae-kl-f4')
    return LatentDiffusion(ae, make_unet(None, ae.z_ch, ch=32, groups=8, ch_mult=(1, 2), attn_factors=(2,),
                                         num_res_blocks=1), first_stage=None).eval()


def test_help():
    r = run(*EVALUATE, '--help')
    assert r.returncode == 0, r.stderr
    options = '--model --data --out --n --steps --guidance --eta --seed --batch-size --sampler --features --device'
    assert not [o for o in options.split() if o not in r.stdout]


def test_table_and_file(tmp_path, capsys):
    r = run(*EVALUATE, *TINY, '--out', tmp_path/'new'/'table.json')
    assert r.returncode == 0, r.stderr
    assert 'warning: 24 images and 384 features' in r.stderr
    head, *rows = r.stdout.splitlines()
    assert head.split() == ['measure', 'value', '95', '%', 'interval', 'real', 'n']
    written = json.loads((tmp_path/'new'/'table.json').read_text())
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['table.json'] # no temporary file
    assert (written['command'].startswith('ldm-evaluate --model postcards-text --n 24') and written['seconds'] > 0 and
            written['device'] == 'cpu')
    measures = written['measures']
    assert {'FID', 'KID', 'precision', 'recall', 'IS', 'caption: all', 'first stage: PSNR',
            'first stage: rFID'} <= set(measures)
    for k, m in measures.items():
        assert m['low'] <= m['value'] <= m['high'] and 0 < m['n'] <= 24, (k, m)
        assert any(row.startswith(k + ' ') for row in rows), k
    quiet(capsys, *TINY, '--batch-size', 5, '--out', tmp_path/'again.json') # other batches, the same numbers
    again = json.loads((tmp_path/'again.json').read_text())['measures']
    for k, m in measures.items(): assert again[k]['value'] == pytest.approx(m['value'], rel=2e-3, abs=2e-3), k


def test_another_seed_is_another_set(tmp_path, capsys):
    a, b = (quiet(capsys, *TINY, '--seed', s).splitlines() for s in (1, 2))
    assert a[1].startswith('FID') and b[1].startswith('FID') and a[1] != b[1]


def test_folder_of_pictures(tmp_path, unconditional, capsys):
    # not postcards, fewer than twice n: says so, and goes on with what there is
    folder = tmp_path/'pictures'
    folder.mkdir()
    for k in range(44): Image.effect_noise((70, 64), 10 + k).convert('RGB').save(folder/f'{k}.png')
    unconditional.save_pretrained(tmp_path/'model')
    words = ['--model', tmp_path/'model', '--data', folder, '--steps', 1, '--n', 30, '--device', 'cpu']
    evaluate_command([str(w) for w in (*words, '--out', tmp_path/'t.json')])
    assert 'has 44 images: n=22' in capsys.readouterr().err
    assert {m['n'] for m in json.loads((tmp_path/'t.json').read_text())['measures'].values()} == {22}
    assert "conditioned on text, and" in error(capsys, *TINY, '--data', folder)
    for k in range(39): (folder/f'{k}.png').unlink()
    assert 'has 5 image(s): expected at least 40' in error(capsys, *words)


def test_nan(tmp_path, unconditional, capsys):
    broken = copy.deepcopy(unconditional)
    broken.autoencoder.decoder.conv_out.bias.data[:] = float('nan')
    broken.save_pretrained(tmp_path/'broken')
    out = tmp_path/'t.json'
    said = error(capsys, '--model', tmp_path/'broken', *TINY[2:], '--out', out)
    assert "'autoencoder.decoder.conv_out.bias' holds NaN" in said
    assert not out.exists()


def test_first_stage(capsys):
    out = quiet(capsys, '--model', 'ae-kl-f8', '--n', 24, '--device', 'cpu')
    assert 'first stage: PSNR' in out and 'caption' not in out and '\nFID' not in out


@pytest.mark.parametrize('words, says', [
    (['--model', 'no-such-model'], 'postcards-text'), (['--model', 'reader'], 'not a latent diffusion model'),
    (['--n', 19], 'at least 20'),
    (['--n', 'many'], 'invalid int'), (['--steps', 0], 'steps=0'), (['--steps', 5000], 'steps=5000'),
    (['--sampler', 'best'], 'no sampler'),
    (['--eta', 2], 'eta=2'), (['--guidance', 'nan'], 'guidance=nan'), (['--batch-size', 0], '--batch-size 0'),
    (['--seed', -1], '--seed -1'),
    (['--data', 'no/such'], 'no folder'), (['--data', 'photos'], 'conditioned on text'),
    (['--features', 'clip'], 'invalid choice'), (['--frobnicate'], 'unrecognized')], ids=str)
def test_refuses(capsys, words, says):
    assert says in error(capsys, *TINY, *words)


def test_refuses_folders(capsys, tmp_path):
    assert 'no config.json' in error(capsys, *TINY, '--model', tmp_path)
    assert 'is a folder' in error(capsys, *TINY, '--out', tmp_path)
    (tmp_path/'file').write_text('')
    assert 'cannot write' in error(capsys, *TINY, '--out', tmp_path/'file'/'t.json')
    r = run(*EVALUATE, *TINY, '--model', tmp_path)
    assert 'no config.json' in refused(r) and not r.stdout


def test_inception_seam(monkeypatch, capsys):
    # what torch-fidelity is given and gives, with a stand-in; without it, one line
    seen = []
    class Stand(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            seen.append((name, features))
        def forward(self, x):
            seen.append((x.dtype, x.min().item(), x.max().item()))
            return x.float().flatten(1)[:, :8], x.float().flatten(1)[:, :3]
    module = types.ModuleType('torch_fidelity.feature_extractor_inceptionv3')
    module.FeatureExtractorInceptionV3 = Stand
    monkeypatch.setitem(sys.modules, 'torch_fidelity', types.ModuleType('torch_fidelity'))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    s = embed(inception_features(), torch.linspace(-1, 1, 3*64*64).view(1, 3, 64, 64))
    assert seen == [('inception-v3-compat', ['2048', 'logits_unbiased']), (torch.uint8, 0, 255)]
    assert s.features.shape == (1, 8) and s.logits.shape == (1, 3) and s.features.dtype == torch.float64
    monkeypatch.setitem(sys.modules, module.__name__, None)
    assert 'pip install torch-fidelity' in error(capsys, *TINY, '--features', 'inception')
