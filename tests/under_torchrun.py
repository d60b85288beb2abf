"""What test_processes.py starts under torchrun: one float64 step, a run in float32 or in two sittings, of a text model
in small, or a process that dies."""
import os
import signal
import sys

import torch
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.paper.conditions import make_embedder, make_unet
from ldm_nb.core import LatentDiffusion
from ldm_nb.cli.recipes import diffusion_loss, trained_parts
from ldm_nb.engine.callbacks import SaveCheckpoints
from ldm_nb.engine.distributed import Sharing, averaged_weights, gathered, make_accelerator
from ldm_nb.engine.seeds import SampleRNG, batch_indices, generator
from ldm_nb.training import Trainer

BATCH = 8


def small(dtype) -> tuple: # (trained parts, loss, batch) of a model whose every part has random weights
    torch.manual_seed(0)
    ae = Autoencoder(ch=8, ch_mult=(1, 2), num_res_blocks=1, groups=4)
    embedder = make_embedder('text', dict(caption=[]), ae, dim=16, depth=1, pooled=True)
    net = make_unet(embedder, ae.z_ch, ch=16, groups=4, heads=2)
    torch.nn.init.normal_(net.conv_out.weight, 0, .05)  # it starts at 0, and would let no gradient through
    ldm = LatentDiffusion(ae, net, embedder, prediction_type='v').to(dtype).train()
    if int(os.environ.get('RANK', 0)):  # another start must not matter: the first process's counts
        with torch.no_grad(): torch._foreach_add_(list(ldm.parameters()), 1.)
    captions = embedder.prepare(['a red house at night', 'a summer hill', 'sunset, snowy, blue house, clouds',
                                 'a spring landscape at dawn']*8)
    latents = torch.randn(32, 4, 8, 8, generator=generator(5), dtype=dtype)
    def batch(step, rows):
        i, rng = batch_indices(32, BATCH, 0, step)[rows], SampleRNG(generator(0, 8, step), BATCH, rows)
        t = rng.each(lambda n, g: torch.randint(1000, (n,), generator=g))
        return latents[i], t, rng((len(i), 4, 8, 8)).to(dtype), captions[i]
    return trained_parts(ldm), diffusion_loss(ldm), batch


def trainer(parts, loss, batch, steps: int, *callbacks, precision: str = 'fp32', **more
    ) -> Trainer: # as a run of several processes has it
    acc = make_accelerator('cpu', precision)
    return Trainer(parts, loss, batch, steps, BATCH, accelerator=acc,
                   callbacks=[Sharing(parts, acc), *callbacks], **more)


def gradient(accumulate: int) -> dict: # of one step, before it is clipped
    parts, loss, batch = small(torch.float64)
    run = trainer(parts, loss, batch, 1, accumulate=accumulate, clip=float('inf'))
    value = run.step()
    gradient = torch.cat([gathered(p.grad).flatten() for p in run.params])
    return dict(loss=value, processes=run.accelerator.num_processes, gradient=gradient,
                kind=str(run.accelerator.distributed_type))


def sitting(out, until: int, steps: int = 20
    ) -> dict: # train in float64 to `until`, where a checkpoint is written, from the one there is; bytes held here
    parts, loss, batch = small(torch.float64)
    run = trainer(parts, loss, batch, steps, saver := SaveCheckpoints(out, every=10))
    began, losses = saver.resume(run), []
    for step, value in run:
        losses.append(value)
        if step == until: break
    wrote = saver.save(run) if until < steps else None  # once more; the loop itself writes the last one
    here = lambda tensors: sum(v.to_local().nbytes if hasattr(v, 'to_local') else v.nbytes for v in tensors)
    kept = [v for s in run.opt.state_dict()['state'].values() for k, v in s.items() if k != 'step']
    held = dict(weights=here(run.params), gradients=here(p.grad for p in run.params), moments=here(kept),
                average=here(run.ema.state.values()))
    return dict(began=began, losses=losses, wrote=wrote and wrote.name, held=held,
                count=sum(p.numel() for p in run.params), averaged=averaged_weights(run))


def curve(steps: int = 60, die_at: tuple | None = None, precision: str = 'fp32') -> dict: # die_at: (process, step)
    parts, loss, batch = small(torch.float32)
    run = trainer(parts, loss, batch, steps, precision=precision)
    losses = []
    for step, value in run:
        losses.append(value)
        if die_at == (run.accelerator.process_index, step): os.kill(os.getpid(), signal.SIGKILL)
    return dict(processes=run.accelerator.num_processes, losses=losses)


if __name__ == '__main__':
    what, out = sys.argv[1:3]
    torch.set_num_threads(1)
    if what == 'die': curve(100_000, die_at=(1, 5))
    result = dict(gradient=gradient(1), halves=gradient(2), curve=curve(), bf16=curve(10, precision='bf16'))
    if what == 'share': result |= dict(cut=sitting(out + '/cut', 10), again=sitting(out + '/one', 20))
    torch.save(result, f'{out}/result{os.environ["RANK"]}.pt')
