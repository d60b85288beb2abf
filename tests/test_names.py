"What a name means, whatever lies in the working directory: a user names folders, the package its shipped models."
import os, shutil
import pytest, torch
from ldm_nb.autoencoder import load_autoencoder
from ldm_nb.core import LatentDiffusion, shared_first_stage
from ldm_nb.engine.files import data_path, find_pretrained, find_shipped, save_model
from ldm_nb.metrics.reader import Reader, load_reader, save_reader

def weights(model): return torch.cat([p.flatten() for p in model.state_dict().values()])

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.filterwarnings('error')
def test_empty_folders_are_no_models(elsewhere):
    for name in ('reader', 'ae-kl-f4', 'postcards'): os.mkdir(name)
    for name in ('reader', 'ae-kl-f4', 'postcards'): assert find_pretrained(name) == data_path('pretrained', name)
    load_reader(), load_autoencoder('ae-kl-f4'), LatentDiffusion.from_pretrained('postcards')

def test_the_package_means_its_own(elsewhere):
    right, sample = weights(load_reader()), LatentDiffusion.from_pretrained('postcards').sample(steps=2)
    save_reader(Reader(), 'reader')
    shutil.copytree(data_path('pretrained', 'ae-kl-f8'), 'ae-kl-f4') # a stranger with a shipped name
    assert torch.equal(weights(load_reader()), right) and find_shipped('reader').is_absolute()
    assert torch.equal(LatentDiffusion.from_pretrained('postcards').sample(steps=2), sample)
    said = 'the folder .*reader is taken; the shipped model of that name is .*give that path'
    with pytest.warns(UserWarning, match=said):
        assert not torch.equal(weights(load_reader('reader')), right)
    with pytest.warns(UserWarning, match='ae-kl-f4 is taken'): assert load_autoencoder('ae-kl-f4').f == 8
    assert torch.equal(weights(load_reader(find_shipped('reader'))), right) # how to ask for the other

def test_a_first_stage_is_named_only_where_it_is_the_shipped_one(elsewhere):
    assert shared_first_stage('ae-kl-f4')['name'] == 'ae-kl-f4'
    assert shared_first_stage(data_path('pretrained', 'ae-kl-f4')) == shared_first_stage('ae-kl-f4') # by its path
    shutil.copytree(data_path('pretrained', 'ae-kl-f4'), 'ae-kl-f4')
    with pytest.warns(UserWarning, match='is taken'): assert shared_first_stage('ae-kl-f4') is None

@pytest.mark.parametrize('name', ['', ' ', 'no-such', './reader', 'a\0b', '..', '/', 'x'*300, '~nobody/x'])
def test_what_is_no_model_lists_those_that_are(elsewhere, name):
    with pytest.raises(FileNotFoundError, match='postcards-text|no config.json') as e: find_pretrained(name)
    assert '\n' not in str(e.value)

def test_a_config_may_name_shipped_models_only(elsewhere):
    save_model('mine', dict(kind='autoencoder'), {})
    for name in ('mine', './mine', str(data_path('pretrained')/'..'/'mine'), 'pretrained/ae-kl-f4'):
        with pytest.raises(FileNotFoundError, match='no shipped model'): find_shipped(name)
