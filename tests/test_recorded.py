"""Trainings and samples whose work is recorded give what the plain ones give, for every condition. On a GPU by a CUDA
graph; elsewhere a stand-in calls the recorded function again, which tries everything but the graph."""
import json
import pytest
import torch
from ldm_nb.cli import recipes
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.callbacks import Recording, find
from ldm_nb.fast.compile import graph_model
from ldm_nb.fast.graphs import CUDAGraphed, call_again, cuda_graph

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HOW = cuda_graph if DEVICE == 'cuda' else call_again


def losses(out, condition, monkeypatch, recorded):
    found, make = [], recipes.make_trainer
    def make_trainer(*args, **settings):
        trainer = make(*args, **settings)
        recording = find(trainer, Recording)
        assert recording.possible(trainer) == (DEVICE == 'cuda')
        if recorded: recording.wrap, recording.devices = (lambda f: CUDAGraphed(f, HOW)), (DEVICE,)
        else: trainer.callbacks.remove(recording)
        found.append(recording)
        return trainer
    with monkeypatch.context() as m:
        m.setattr(recipes, 'make_trainer', make_trainer)
        recipes.train_diffusion(out, preset='tiny', condition=condition, n=40, batch_size=8, steps=4, save_every=4,
                                log_every=1, device=DEVICE, quiet=True, watch=lambda ldm, step: {})
    assert not recorded or len(found[0].recorded.kept) == 1
    return [json.loads(line)['loss'] for line in (out/'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('condition', ['none', 'text', 'class', 'layout', 'map', 'x4', 'inpaint', 'text+inpaint'])
def test_training(tmp_path, monkeypatch, condition):
    plain, recorded = (losses(tmp_path/str(r), condition, monkeypatch, r) for r in (False, True))
    assert plain == recorded and len(set(plain)) == 4


@pytest.mark.parametrize('name, asks',
                         [('postcards-text', ['a red house at noon', ['a lake at dusk', 'two trees'], 'four trees']),
                          ('postcards-class', [3, [0, 7], 12])])
def test_sample(name, asks):
    plain, fast = (LatentDiffusion.from_pretrained(name).to(DEVICE) for _ in range(2))
    graph_model(fast, HOW)
    for y in asks:
        for sampler in ('ddim', 'plms'):
            assert torch.equal(plain.sample(y, steps=4, sampler=sampler),
                               fast.sample(y, steps=4, sampler=sampler)), (y, sampler)
    assert len(fast.wrapper.graphed.kept) == 2  # batches of 2 and of 4: each asked with and without the words
    for ldm in (plain, fast): ldm.to(torch.bfloat16)                            # moved: recorded anew
    assert (torch.equal(plain.sample(asks[0], steps=2), fast.sample(asks[0], steps=2)) and
            len(fast.wrapper.graphed.kept) == 3)
