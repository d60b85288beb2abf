"""What our modules cost beside those of diffusers: the same weights, the same settings, in turn, in one process a row. `make bench` runs it.

    python tests/prove/bench.py            about 8 minutes on two cores, half of it compiling; writes data/results/bench-cpu.json
    python tests/prove/bench.py --quick    3 turns, nothing compiled: about 3 minutes
    python tests/prove/bench.py --device cuda                          writes bench-cuda.json

UNet: 6.3 M parameters, attention at both levels, batch 8 of 4x16x16, 77 tokens. First stage: f=8, 4 pictures of 128x128. A sample: four captions, 50 DDIM
steps, guidance 7.5, decoded, from text to pictures. A ratio is the median of the ratios of neighbours in time; memory is the peak of a process
of its own."""
import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from ldm_nb.conditioning import remember
from ldm_nb.cost import this_machine
from ldm_nb.files import atomic_path
from ldm_nb.pretrained import load_diffusers
from ldm_nb.unet import Cond

CAPTIONS, STEPS, GUIDANCE = ['a red house', 'a lake at dusk', 'snow', 'two trees'], 50, 7.5


def write(folder: Path): # a Stable Diffusion at toy size, all weights random
    torch.manual_seed(0)
    letters = ['<|startoftext|>', '<|endoftext|>', *'abcdefghijklmnopqrstuvwxyz', *(k + '</w>' for k in 'abcdefghijklmnopqrstuvwxyz')]
    (folder/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(letters)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    words = CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), model_max_length=77)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(letters), bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=128, intermediate_size=512,
                                        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77))
    unet = diffusers.UNet2DConditionModel(sample_size=16, block_out_channels=(64, 128), layers_per_block=2, attention_head_dim=4, cross_attention_dim=128,
                                          down_block_types=('CrossAttnDownBlock2D',)*2, up_block_types=('CrossAttnUpBlock2D',)*2)
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64, 64, 64), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                                  layers_per_block=1, latent_channels=4, sample_size=128)
    clock = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=clock, safety_checker=None, feature_extractor=None,
                                      requires_safety_checker=False).save_pretrained(folder/'sd')
    return folder/'sd'


def theirs_from(folder, device, dtype=None):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def ours_from(folder, device, dtype=None): return load_diffusers(folder).to(device, dtype or torch.float32)

def their_sample(pipe, start):
    return pipe(CAPTIONS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=start.to(pipe.unet.dtype), output_type='pt').images

def our_sample(ldm, start): return ldm.sample(CAPTIONS, steps=STEPS, guidance=GUIDANCE, latents=start)/2 + .5

def training(answer, net, z, noise): # one step as in diffusers' training examples
    opt = torch.optim.AdamW(net.parameters(), lr=1e-5)
    def step():
        loss = F.mse_loss(answer(z).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        return loss
    return step


ROWS = ('UNet forward', 'training step', 'sample, 50 steps', 'encode', 'decode')

def ways_of(row, folder, device, compiled): # way -> a call, theirs, plain, in float32 first; nothing is built that this row does not need
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(device)
    z, noise, context, t, start = draw(8, 4, 16, 16), draw(8, 4, 16, 16), draw(8, 77, 128), torch.full((8,), 500., device=device), draw(4, 4, 16, 16)
    pictures, latents, ways, forward = draw(4, 3, 128, 128).clamp(-1, 1), draw(4, 4, 16, 16), {}, torch.no_grad()
    kinds = [('', None, False), (' bf16', torch.bfloat16, False)] + [(' compiled', None, True), (' bf16 compiled', torch.bfloat16, True)]*compiled
    for name, dtype, fast in kinds:
        if row == 'training step' and dtype or row == 'encode' and fast: continue
        a, b = theirs_from(folder, device, dtype), ours_from(folder, device, dtype)
        c, x, zz, zn = (v.to(dtype or torch.float32) for v in (context, pictures, latents, z))
        if fast:
            a.unet.compile(), a.vae.decoder.compile()
            b.compile()
        if row == 'training step':
            a, b = a.unet.train(), b.net.train()
            pair = (training(lambda z, a=a: a(z, t, context, return_dict=False)[0], a, z, noise),
                    training(lambda z, b=b: b(z, t, Cond(context=context)), b, z, noise))
        if row == 'UNet forward':
            kept = remember_now(Cond(context=c))
            pair = forward(lambda a=a, c=c, z=zn: a.unet(z, t, c, return_dict=False)[0]), forward(lambda b=b, k=kept, z=zn: b.net(z, t, k))
        if row == 'sample, 50 steps': pair = lambda a=a: their_sample(a, start), lambda b=b: our_sample(b, start)
        if row == 'encode':
            pair = (forward(lambda a=a, x=x: a.vae.encode(x).latent_dist.mean*a.vae.config.scaling_factor), forward(lambda b=b, x=x: b.autoencoder.encode(x)))
        if row == 'decode':
            pair = (forward(lambda a=a, z=zz: a.vae.decode(z/a.vae.config.scaling_factor, return_dict=False)[0]),
                    forward(lambda b=b, z=zz: b.autoencoder.decode(z)))
        ways |= {f'theirs{name}': pair[0], f'ours{name}': pair[1]}
    return ways

@torch.no_grad()
def remember_now(c): return remember(c)


def timed(ways, turns, device): # way -> seconds, a turn each
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    seconds = {k: [] for k in ways}
    for _ in range(turns):
        for k, call in ways.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds[k].append(time.perf_counter() - start)
    return seconds

def row(name, ways, turns, device): # seconds and ratios of one job
    first = {k: call().float().cpu() for k, call in ways.items()}           # warm, compiled, and all the same numbers
    off = {k: (v - first['theirs']).abs().max().item() for k, v in first.items()}
    seconds, out = timed(ways, turns, device), {}
    for k, s in seconds.items():
        ratio = statistics.median(x/y for x, y in zip(s, seconds['theirs']))
        out[k] = dict(seconds=statistics.median(s), ratio=ratio, difference=off[k])
        print(f'{name:18} {k:22} {1e3*out[k]["seconds"]:9.1f} ms {ratio:7.3f} of theirs   off by {off[k]:.0e}', flush=True)
    return out


MEMORY = '''
import sys
sys.path.insert(0, sys.argv[1])
import bench, torch
device, who, what = torch.device(sys.argv[4]), sys.argv[2], sys.argv[3]
m = (bench.theirs_from if who == 'theirs' else bench.ours_from)(sys.argv[5], device)
start = torch.randn(4, 4, 16, 16, device=device)
z, noise, c, t = (torch.randn(8, *s, device=device) for s in ((4, 16, 16), (4, 16, 16), (77, 128), ()))
if what == 'sample':
    call = lambda: (bench.their_sample if who == 'theirs' else bench.our_sample)(m, start)
else:
    net = (m.unet if who == 'theirs' else m.net).train().requires_grad_()
    answer = (lambda z: net(z, t, c, return_dict=False)[0]) if who == 'theirs' else (lambda z: net(z, t, bench.Cond(context=c)))
    call = bench.training(answer, net, z, noise)
print(bench.peak(call, device))
'''

def peak(call, device) -> int: # bytes a second call takes at most, above what is there before the first
    memory = lambda what: int(re.search(what + r':\s+(\d+)', Path('/proc/self/status').read_text())[1])*1024
    if device.type == 'cuda':
        there = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')
        there = memory('VmRSS')
    call()
    call()
    return torch.cuda.max_memory_allocated() - there if device.type == 'cuda' else memory('VmHWM') - there

def memory(folder, device, turns): # job -> MB of each
    rows = {}
    for what in ('sample', 'training'):
        got = dict(theirs=[], ours=[])
        for _ in range(turns):
            for who in got:
                call = [sys.executable, '-c', MEMORY, str(Path(__file__).parent), who, what, str(device), str(folder)]
                env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
                out = subprocess.run(call, capture_output=True, text=True, check=True, env=env).stdout
                got[who].append(int(out.split()[-1])/1e6)
        rows[f'memory, {what}'] = {k: dict(megabytes=statistics.median(v), ratio=statistics.median(v)/statistics.median(got['theirs'])) for k, v in got.items()}
        for k, v in rows[f'memory, {what}'].items(): print(f'memory, {what:10} {k:22} {v["megabytes"]:9.1f} MB {v["ratio"]:7.3f} of theirs', flush=True)
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda (default: the best there is)')
    p.add_argument('--threads', type=int, default=min(2, os.cpu_count()), help='on a CPU (default 2)')
    p.add_argument('--turns', type=int, default=15, help='of each way of a row, in turn (default 15; a sample has a third of them)')
    p.add_argument('--only', nargs='*', help='these rows; the others stay as the file has them')
    p.add_argument('--quick', action='store_true', help='3 turns, nothing compiled, nothing written')
    p.add_argument('--out', type=Path)
    a, start = p.parse_args(), time.time()
    torch.set_num_threads(a.threads)
    torch._dynamo.config.recompile_limit = 64                                   # one class, many networks of it: none falls back to eager
    device, out = torch.device(a.device), a.out or Path(f'data/results/bench-{a.device}.json')
    diffusers.utils.logging.set_verbosity_error()
    if a.only is None: # each row in a process of its own: what others left in memory is no part of it
        for name in (*ROWS, 'memory'):
            subprocess.run([sys.executable, __file__, '--only', name, *sys.argv[1:]], check=True, env=os.environ | dict(OMP_NUM_THREADS=str(a.threads)))
        raise SystemExit
    rows = json.loads(out.read_text())['rows'] if out.is_file() and not a.quick else {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = write(Path(tmp))
        for name in a.only:
            if name == 'memory': rows |= memory(folder, device, 1 if a.quick else 3)
            else:
                turns = 3 if a.quick else max(3, a.turns//3) if 'sample' in name else a.turns
                rows[name] = row(name, ways_of(name, folder, device, not a.quick), turns, device)
    if not a.quick:
        table = dict(command='python tests/prove/bench.py', threads=a.threads, machine=this_machine(device)['name'],
                     versions=dict(torch=torch.__version__, diffusers=diffusers.__version__, python=platform.python_version()), rows=rows)
        with atomic_path(out) as path: path.write_text(json.dumps(table, indent=1) + '\n')
        print(f'wrote {", ".join(a.only)} to {out} after {(time.time() - start)/60:.1f} minutes')
