"Configs written before the names changed still open, with the same meaning; names that no version knew are named."
import json

import pytest
import torch
from ldm_nb.core import LatentDiffusion, model_config
from ldm_nb.diffusion import Schedule
from ldm_nb.engine.build import FORMAT, build_network, upgrade
from ldm_nb.engine.files import data_path, load_model, save_model

SHIPPED = sorted(p.parent.name for p in data_path('pretrained').glob('*/config.json'))
DIFFUSION = [n for n in SHIPPED
             if json.loads(data_path('pretrained', n, 'config.json').read_text())['kind'] == 'latent-diffusion']


@pytest.fixture
def saved(tmp_path): # a shipped model in a folder of its own: (folder, config as it lies there, tensors)
    config, tensors = load_model(data_path('pretrained', 'postcards'))
    save_model(tmp_path, config, tensors)
    return tmp_path, json.loads((tmp_path/'config.json').read_text()), tensors


def rewrite(folder, config): (folder/'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('name', DIFFUSION)
def test_every_shipped_model_opens(name): # all of them were saved before there was a format
    raw = json.loads(data_path('pretrained', name, 'config.json').read_text())
    ldm = LatentDiffusion.from_pretrained(name)
    assert ldm.prediction_type == raw.get('prediction_type', raw.get('prediction'))
    assert ldm.schedule.config['kind'] == 'scaled_linear' and torch.equal(ldm.schedule.abar, Schedule().abar)
    assert upgrade(model_config(ldm) | dict(format=FORMAT)) == model_config(ldm) | dict(format=FORMAT)


def test_a_round_trip_writes_the_new_format(saved):
    folder, config, _ = saved
    assert config['format'] == FORMAT and config['prediction_type'] == 'v' and config['net']['kind'] == 'unet'
    a, b = LatentDiffusion.from_pretrained('postcards'), LatentDiffusion.from_pretrained(folder)
    assert torch.equal(a.sample(n=1, steps=3), b.sample(n=1, steps=3))


def test_an_old_linear_and_a_new_one_differ(saved):
    folder, config, _ = saved
    at = lambda: LatentDiffusion.from_pretrained(folder).schedule.abar
    rewrite(folder, config | dict(schedule=config['schedule'] | dict(kind='linear')))
    new = at()
    old = {k: v for k, v in config.items() if k != 'format'} | dict(schedule=config['schedule'] | dict(kind='linear'))
    rewrite(folder, old)
    assert (torch.equal(at(), Schedule('scaled_linear').abar) and torch.equal(new, Schedule('linear').abar) and
            not torch.equal(at(), new))


def test_old_words_for_where_sampling_ends():
    new = upgrade(dict(prediction='eps', stops=dict(spacing='trailing', offset=0, last=.03),
                       schedule=dict(kind='plain')))
    assert (new['sampling'] == dict(spacing='trailing', offset=0, final_sigma=.03) and
            new['schedule'] == dict(kind='linear'))
    assert new['prediction_type'] == 'eps' and 'stops' not in new and 'prediction' not in new


@pytest.mark.parametrize('change, says', [
    (dict(format=FORMAT + 1), 'newer'), (dict(format='two'), 'format'),
    (dict(net=dict(kind='unnet')), "did you mean 'unet'"),
    (dict(embedder=dict(kind='txt')), "did you mean 'text'"), (dict(embedder=dict(kind='zzz')), 'expected text')])
def test_what_no_version_knew_is_named(saved, change, says):
    folder, config, _ = saved
    rewrite(folder, config | change)
    with pytest.raises(ValueError, match=says): LatentDiffusion.from_pretrained(folder)


def test_a_misspelt_entry_is_named(saved):
    folder, config, _ = saved
    config['predction_type'] = config.pop('prediction_type')
    rewrite(folder, config)
    with pytest.raises(ValueError, match="no 'prediction_type'; did you mean 'predction_type'"):
        LatentDiffusion.from_pretrained(folder)
    rewrite(folder, {k: v for k, v in config.items() if k != 'format'} | dict(schedule=dict(kind='lineer')))
    with pytest.raises(ValueError, match="'lineer'.*did you mean 'linear'"): LatentDiffusion.from_pretrained(folder)


def test_networks_by_kind():
    for name in DIFFUSION:
        net = LatentDiffusion.from_pretrained(name).net
        twin = build_network(dict(kind=net.kind, **net.config))
        assert type(twin) is type(net) and twin.state_dict().keys() == net.state_dict().keys()
