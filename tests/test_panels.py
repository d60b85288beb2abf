"Panels that are closed take with them all that they made."
import gc

import pytest
import torch
from ipywidgets.widgets.widget import _instances
from ldm_nb.diffusion import Schedule
from ldm_nb.lab.canvas import layout_editor, mask_painter
from ldm_nb.lab.explore import caption_builder, guidance_slider, interpolation, sampler_stepper
from ldm_nb.lab.watch import preference_study, training_monitor
from ldm_nb.lab.widgets import compression_explorer, noise_slider, shelf
from prove.arguments import models


@pytest.fixture(scope='module')
def makers(tmp_path_factory):
    toys, x = models(), torch.zeros(2, 3, 32, 32)
    text, ae = toys['text'][0], toys['none'][0].autoencoder
    answers = tmp_path_factory.mktemp('study')/'answers.jsonl'
    return dict(noise=lambda: noise_slider(Schedule(), x[0]), compression=lambda: compression_explorer({'ae': ae}, x),
                steps=lambda: sampler_stepper(text, 'dusk', steps=2),
                guidance=lambda: guidance_slider(text, 'dusk', steps=1),
                caption=lambda: caption_builder(text, steps=1), between=lambda: interpolation(text, 'dusk', steps=1),
                layout=lambda: layout_editor(toys['layout'][0], steps=1),
                mask=lambda: mask_painter(toys['inpaint'][0], x[0], steps=1),
                training=lambda: training_monitor(iter([(1, 2.)])), study=lambda: preference_study(x, x + .1, answers))


def test_closed_panels_leave_no_widget(makers):
    for name, make in makers.items():
        make().close() # what is made once, for all
        before = len(_instances)
        for _ in range(2): make().close()
        assert len(_instances) == before, name
    some = shelf(makers)
    for k in range(len(makers)): some.selected_index = k
    assert len(_instances) > before + 100
    some.close()
    gc.collect()
    assert len(_instances) == before
