"A first stage trained with everything on it, killed and resumed; the distance of the published LPIPS package."
import json
import os
import random

import lpips
import pytest
import torch
import torchvision
from ldm_nb.losses import load_lpips
from ldm_nb.cli.recipes import train_autoencoder
from ldm_nb.cli.train import main as train_command
from ldm_nb.training import Trainer

# 2,048 codes and 1,600 latents between restarts: some are always dead
EVERYTHING = dict(data='postcards', preset='tiny', regulariser='vq', codes=2048, restarts=25, perceptual='reader',
                  adversary_start=60, adversary_warmup=30, steps=200, save_every=50, crop=16, precision='fp32',
                  device='cpu', quiet=True)


class Killed(BaseException): pass


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, monkeypatch):
    "Weights, discriminator, both optimisers, dead codes and the log, killed at random. KILL_AT=n repeats a failure."
    step = int(os.environ.get('KILL_AT', 0)) or random.randint(1, 199)
    whole = train_autoencoder(tmp_path/'whole', **EVERYTHING)
    once = Trainer.step
    def die(self):
        if self.steps_done == step: raise Killed
        return once(self)
    monkeypatch.setattr(Trainer, 'step', die)
    with pytest.raises(Killed): train_autoencoder(tmp_path/'cut', **EVERYTHING)
    monkeypatch.setattr(Trainer, 'step', once)
    again = train_autoencoder(tmp_path/'cut', resume=True, **EVERYTHING)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), (step, k)
    a, b = (torch.load(tmp_path/f/'checkpoints'/'step-0000200.pt', weights_only=True) for f in ('whole', 'cut'))
    assert (a['callbacks']['AdversaryStep']['adversary']['step'] == 200 and
            a['callbacks']['AdversaryStep']['dead_codes']['restarted'] > 0)
    same(a | dict(seconds=0), b | dict(seconds=0), f'killed at {step}')
    assert [json.loads(o)['step'] for o in (tmp_path/'cut'/'log.jsonl').read_text().splitlines()] == [50, 100, 150, 200]


def same(a, b, where): # two checkpoints, to the last bit
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: same(a[k], b[k], f'{where}: {k}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (u, v) in enumerate(zip(a, b)): same(u, v, f'{where}: {k}')
    elif isinstance(a, torch.Tensor): assert torch.equal(a, b), where
    else: assert a == b, where


def test_lpips_is_that_of_its_package():
    torch.manual_seed(0)
    # published linear weights, a random backbone
    theirs = lpips.LPIPS(net='vgg', pretrained=True, pnet_rand=True, verbose=False).eval()
    slices = [m for k in range(1, 6) for m in getattr(theirs.net, f'slice{k}')]
    ours = torchvision.models.vgg16(weights=None).features
    for a, b in zip(ours, slices): a.load_state_dict(b.state_dict())
    linear = {f'lin{k}.model.1.weight': theirs.state_dict()[f'lin{k}.model.1.weight'] for k in range(5)}
    x, y = torch.rand(2, 4, 3, 64, 64)*2 - 1
    with torch.no_grad():
        difference = (load_lpips(ours.state_dict(), linear)(x, y) - theirs(x, y).flatten()).abs().max()
    assert difference <= 1e-5 and theirs(x, y).min() > 1e-3, difference


def test_without_a_network_lpips_says_what_to_use(monkeypatch):
    def offline(*_, **__): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    with pytest.raises(FileNotFoundError, match='use the reader'):
        load_lpips(torchvision.models.vgg16(weights=None).features.state_dict())


def errs(capsys, *words) -> str: # the one line that `ldm-train autoencoder` says before it exits with 2
    with pytest.raises(SystemExit) as e: train_command(['autoencoder', '--preset', 'tiny', '--quiet', *map(str, words)])
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(err) == 1, err
    return err[0]


@pytest.mark.parametrize('words, says', [
    (['--f', 3], 'f=3: expected 1, 2, 4, 8, 16 or 32'),
    (['--regulariser', 'gan'], "regulariser='gan': expected kl or vq"),
    (['--f', 16, '--crop', 24], 'f=16 does not divide the training crops of 24 pixels'),
    (['--regulariser', 'vq', '--codes', 1], 'at least 2 codes'),
    (['--perceptual', 'eyes'], "perceptual='eyes'"),
    (['--adversary-start', -1], 'expected steps, 0 or more'),
    (['--data', 'postcards+no/such/folder'], 'no folder no/such/folder'),
    (['--init', 'reader'], 'none of its weights fits'),
    (['--init', 'no-such-model'], "no model 'no-such-model'")])
def test_bad_first_stages_are_refused_in_one_line(tmp_path, capsys, words, says):
    assert says in errs(capsys, '--out', tmp_path/'x', *words)


def test_an_adversary_after_the_end_is_warned_of(tmp_path, capsys):
    train_command(['autoencoder', '--preset', 'tiny', '--steps', '2', '--adversary-start', '2', '--quiet', '--out',
                   str(tmp_path/'x')])
    assert 'warning: the adversary would start at step 2 of 2' in capsys.readouterr().err


def test_init_takes_what_fits_and_names_the_rest(tmp_path, capsys):
    words = '--steps 1 --n 20 --regulariser vq --codes 8 --init ae-kl-f4 --quiet --out'.split()
    train_command(['autoencoder', *words, str(tmp_path/'x')])
    said = capsys.readouterr().out
    assert ('started from ae-kl-f4: 144 tensors; new: encoder.conv_out.weight, encoder.conv_out.bias, quant.weight, '
            'quant.bias, codebook' in said)
    card = json.loads((tmp_path/'x'/'config.json').read_text())['card']
    assert '--init ae-kl-f4' in card['command'] and '--codes 8' in card['command'] and 'fresh postcards' in card['psnr']
