"""What our modules cost beside those of diffusers: the same weights, the same settings, in turn, each way in a
process of its own. `make bench` runs it.

    python tests/prove/bench.py  long, most of it compiling; on quiet cores; writes data/results/bench-cpu.json
    python tests/prove/bench.py --quick  3 turns, nothing compiled, nothing written
    python tests/prove/bench.py --device cuda
        some minutes, most of it compiling; writes data/results/bench-cuda.json

UNet: 6.3 M parameters, attention at both levels, batch 8 of 4x16x16, 77 tokens. First stage: f=8, 4 pictures of
128x128. A sample: four captions, 50 DDIM steps, guidance 7.5, decoded, from text to pictures. "Kept" is a process
that keeps the memory it frees (`keep_memory`), which `ldm.compile()` and the commands ask for by themselves;
bfloat16 is there where the machine multiplies it in hardware (of a training step: autocast, on a GPU alone).
"Graphs" is compiled and recorded as CUDA graphs: theirs by PyTorch (mode reduce-overhead), ours as `ldm.compile()`
and `ldm-train --compile` do it on a GPU (`CUDAGraphed`; of encoder and decoder PyTorch). Compiled or recorded, a
training step has the fused AdamW, on both sides. A ratio is the median of the ratios of neighbours in time; memory
is the peak of a process of its own."""
import argparse, contextlib, json, os, platform, re, shlex, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from ldm_nb.attention import cache_context
from ldm_nb.engine.cost import this_machine
from ldm_nb.engine.files import atomic_path
from ldm_nb.interop.pipelines import load_diffusers
from ldm_nb.engine.devices import has_fast_bf16, keep_memory
from ldm_nb.fast.graphs import CUDAGraphed
from ldm_nb.unet import Cond
from ldm_nb.fast.compile import compile_network

CAPTIONS, STEPS, GUIDANCE = ['a red house', 'a lake at dusk', 'snow', 'two trees'], 50, 7.5


def write(folder: Path): # a Stable Diffusion at toy size, all weights random
    torch.manual_seed(0)
    letters = ['<|startoftext|>', '<|endoftext|>', *'abcdefghijklmnopqrstuvwxyz',
               *(k + '</w>' for k in 'abcdefghijklmnopqrstuvwxyz')]
    (folder/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(letters)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    words = CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), model_max_length=77)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(letters), bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                        hidden_size=128, intermediate_size=512,
                                        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77))
    unet = diffusers.UNet2DConditionModel(sample_size=16, block_out_channels=(64, 128), layers_per_block=2,
                                          attention_head_dim=4, cross_attention_dim=128,
                                          down_block_types=('CrossAttnDownBlock2D',)*2,
                                          up_block_types=('CrossAttnUpBlock2D',)*2)
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64, 64, 64), down_block_types=('DownEncoderBlock2D',)*4,
                                  up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=1, latent_channels=4,
                                  sample_size=128)
    clock = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False,
                                    set_alpha_to_one=False, steps_offset=1)
    diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=clock,
                                      safety_checker=None, feature_extractor=None,
                                      requires_safety_checker=False).save_pretrained(folder/'sd')
    return folder/'sd'


def theirs_from(folder, device, dtype=None):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def ours_from(folder, device, dtype=None): return load_diffusers(folder).to(device, dtype or torch.float32)

def their_sample(pipe, start):
    return pipe(CAPTIONS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=start.to(pipe.unet.dtype),
                output_type='pt').images

def our_sample(ldm, start): return ldm.sample(CAPTIONS, steps=STEPS, guidance=GUIDANCE, latents=start)/2 + .5

def training(answer, net, z, noise, half=False, fused=None, record=False):
    # as in diffusers' training examples; half: in bfloat16, by autocast
    params = list(net.parameters())
    opt = torch.optim.AdamW(params, lr=1e-5, fused=fused)
    def gradient(z, noise): # record: as `Trainer` does it
        opt.zero_grad()
        with torch.autocast(z.device.type, torch.bfloat16, enabled=half): loss = F.mse_loss(answer(z).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.)
        return loss.detach(), [p.grad for p in params]
    how = CUDAGraphed(gradient) if record else gradient
    def step():
        loss, grads = how(z, noise)
        for p, g in zip(params, grads): p.grad = g
        opt.step()
        return loss
    return step


ROWS = ('UNet forward', 'training step', 'sample, 50 steps', 'encode', 'decode')

def ways_of(row, device, quick): # names of ways, theirs, plain, in float32 first
    cuda = device.type == 'cuda'
    kinds = ['', ' bf16'] if cuda else ['', ' kept'] + [' bf16']*has_fast_bf16(device)*(row != 'training step')
    out = [who + k for k in kinds for who in ('theirs', 'ours')]
    if quick or row == 'encode' and not cuda: return out
    if cuda: return out + ['theirs bf16 graphs', 'ours bf16 graphs']       # merely compiled takes three times as long
    out += ['theirs compiled', 'theirs compiled kept', 'ours compiled']     # ours keeps its memory by itself
    return out + ['theirs bf16 compiled', 'ours bf16 compiled']*(' bf16' in kinds)

def compiled(m, row, way): # what a row needs of it
    ours, how = way.startswith('ours'), dict(mode='reduce-overhead' if 'graphs' in way else 'default')
    if row == 'encode': (m.autoencoder.encoder if ours else m.vae.encoder).compile(**how)
    elif row == 'training step' and ours:
        keep_memory()                                                           # as ldm-train does
        compile_network(m.net)
    elif row == 'training step': m.unet.compile(**how)
    elif ours: m.compile()
    else: m.unet.compile(**how), m.vae.decoder.compile(**how)

def call_of(row, way, folder, device): # a function without arguments
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(device)
    z = draw(8, 4, 16, 16)
    noise = draw(8, 4, 16, 16)
    context = draw(8, 77, 128)
    t = torch.full((8,), 500., device=device)
    start = draw(4, 4, 16, 16)
    x, latents, forward = draw(4, 3, 128, 128).clamp(-1, 1), draw(4, 4, 16, 16), torch.no_grad()
    ours, half = way.startswith('ours'), 'bf16' in way
    dtype = torch.bfloat16 if half and row != 'training step' else torch.float32
    if 'kept' in way: keep_memory()
    m = (ours_from if ours else theirs_from)(folder, device, dtype)
    c, x, zz, zn = (v.to(dtype) for v in (context, x, latents, z))
    best = 'compiled' in way or 'graphs' in way
    if best: compiled(m, row, way)
    net, ae = (m.net, m.autoencoder) if ours else (m.unet, m.vae)
    answer = ((lambda z: net(z, t, Cond(context=context))) if ours
              else (lambda z: net(z, t, context, return_dict=False)[0]))
    if row == 'training step':
        return training(answer, net.train(), z, noise, half, best or None, ours and 'graphs' in way)
    if row == 'sample, 50 steps': return (lambda: our_sample(m, start)) if ours else (lambda: their_sample(m, start))
    if row == 'encode':
        return forward((lambda: ae.encode(x)) if ours
                       else (lambda: ae.encode(x).latent_dist.mean*ae.config.scaling_factor))
    if row == 'decode':
        return forward((lambda: ae.decode(zz)) if ours
                       else (lambda: ae.decode(zz/ae.config.scaling_factor, return_dict=False)[0]))
    return forward(remembering(m, zn, t, c) if ours else (lambda: net(zn, t, c, return_dict=False)[0]))

@torch.no_grad()
def remembering(ldm, z, t, context): # as a sample does it: keys and values before the first step
    kept = cache_context(Cond(context=context))
    kept.context.fill(ldm.net)
    return lambda: ldm.predict(z, t, kept)


def work(row, way, folder, device, answer):
    # in a process of its own: warm, keep what came out, then one call for each line that comes in, timed
    wait, call = torch.cuda.synchronize if device.type == 'cuda' else lambda: None, call_of(row, way, folder, device)
    torch.save(call().float().cpu(), answer)
    print('ready', flush=True)
    for _ in sys.stdin:
        wait()
        start = time.perf_counter()
        call()
        wait()
        print(time.perf_counter() - start, flush=True)

def begin(stack, name, folder, device, quick):
    # way -> its process; on a GPU, where each has cores enough, they compile beside each other
    here = [sys.executable, '-W', 'ignore', __file__, '--threads', str(torch.get_num_threads()),
            '--device', str(device)]
    workers = {}
    for way in ways_of(name, device, quick):
        job = ['--worker', name, way, str(folder), str(folder/f'{name}, {way}.pt')]
        with open(folder/f'{name}, {way}.err', 'w') as err:
            p = subprocess.Popen(here + job, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)
        workers[way] = stack.enter_context(p)
        stack.callback(p.stdin.close)
        if device.type == 'cpu': p.first = p.stdout.readline()
    return workers

def ready(name, workers, folder): # those of a row that are; what a process that ended said last is printed
    for p in workers.values(): p.first = getattr(p, 'first', None) or p.stdout.readline()
    lost = [k for k, p in workers.items() if p.first != 'ready\n']
    for k in lost: print(f'{name}, {k}: ended: {(folder/f"{name}, {k}.err").read_text()[-800:]}', flush=True)
    if 'theirs' in lost: raise SystemExit(f'{name}: there is nothing to compare with')
    return {k: p for k, p in workers.items() if k not in lost}

def take_turns(name, workers, folder, turns): # seconds and ratios of one job
    seconds, out = {k: [] for k in workers}, {}
    for _ in range(turns + 1):
        for k, p in workers.items():
            print('go', file=p.stdin, flush=True)
            seconds[k].append(float(p.stdout.readline()))
    first = {k: torch.load(folder/f'{name}, {k}.pt') for k in workers}
    for k, s in seconds.items():                                            # the first turn wakes the processes
        ratio = statistics.median(x/y for x, y in zip(s[1:], seconds['theirs'][1:]))
        off = (first[k] - first['theirs']).abs().max().item()
        out[k] = dict(seconds=statistics.median(s[1:]), ratio=ratio, difference=off)
        print(f'{name:18} {k:22} {1e3*out[k]["seconds"]:9.1f} ms {ratio:7.3f} of theirs   off by {off:.0e}', flush=True)
    return out

def rows_of(names, folder, device, turns, quick): # yields (name, what was measured), row by row
    number = lambda name: 3 if quick else max(3, turns//3) if 'sample' in name else turns
    if device.type == 'cpu':
        for name in names:
            with contextlib.ExitStack() as stack:
                yield name, take_turns(name, ready(name, begin(stack, name, folder, device, quick), folder),
                                       folder, number(name))
        return
    with contextlib.ExitStack() as stack:
        jobs = {name: begin(stack, name, folder, device, quick) for name in names}
        jobs = {name: ready(name, workers, folder) for name, workers in jobs.items()}
        for name, workers in jobs.items(): yield name, take_turns(name, workers, folder, number(name))


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
    answer = ((lambda z: net(z, t, c, return_dict=False)[0]) if who == 'theirs'
              else (lambda z: net(z, t, bench.Cond(context=c))))
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
    rows, env = {}, os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
    def peak_of(who, what):
        call = [sys.executable, '-c', MEMORY, str(Path(__file__).parent), who, what, str(device), str(folder)]
        return int(subprocess.run(call, capture_output=True, text=True, check=True, env=env).stdout.split()[-1])/1e6
    for what in ('sample', 'training'):
        got = {who: [peak_of(who, what) for _ in range(turns)] for who in ('theirs', 'ours')}
        rows[f'memory, {what}'] = {
            k: dict(megabytes=statistics.median(v), ratio=statistics.median(v)/statistics.median(got['theirs']))
            for k, v in got.items()}
        for k, v in rows[f'memory, {what}'].items():
            print(f'memory, {what:10} {k:22} {v["megabytes"]:9.1f} MB {v["ratio"]:7.3f} of theirs', flush=True)
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                   help='cpu or cuda (default: the best there is)')
    p.add_argument('--threads', type=int, default=min(2, os.cpu_count()), help='on a CPU (default 2)')
    p.add_argument('--turns', type=int, default=15,
                   help='of each way of a row, in turn (default 15; a sample has a third of them)')
    p.add_argument('--only', nargs='*', help='these rows; the others stay as the file has them')
    p.add_argument('--quick', action='store_true', help='3 turns, nothing compiled, nothing written')
    p.add_argument('--out', type=Path)
    p.add_argument('--worker', nargs=4, help=argparse.SUPPRESS)
    a, start = p.parse_args(), time.time()
    torch.set_num_threads(a.threads)
    torch._dynamo.config.recompile_limit = 64  # one class, many networks of it: none falls back to eager
    device, out = torch.device(a.device), a.out or Path(f'data/results/bench-{a.device}.json')
    diffusers.utils.logging.set_verbosity_error()
    if a.worker:
        name, way, folder, answer = a.worker
        raise SystemExit(work(name, way, Path(folder), device, answer))
    before = json.loads(out.read_text()) if a.only and out.is_file() and not a.quick else dict(rows={}, command='')
    rows, command = before['rows'], shlex.join(['python', 'tests/prove/bench.py', *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as tmp:
        folder, names = write(Path(tmp)), a.only or (*ROWS, 'memory')
        for name, measured in rows_of([n for n in names if n != 'memory'], folder, device, a.turns, a.quick):
            rows[name] = measured
        if 'memory' in names: rows |= memory(folder, device, 1 if a.quick or device.type == 'cuda' else 3)
    if not a.quick:
        rows = {k: rows[k] for k in (*ROWS, 'memory, sample', 'memory, training') if k in rows}
        table = dict(command='; '.join(filter(None, (before['command'], command))), threads=a.threads,
                     machine=this_machine(device)['name'],
                     versions=dict(torch=torch.__version__, diffusers=diffusers.__version__,
                                   python=platform.python_version()), rows=rows)
        with atomic_path(out) as path: path.write_text(json.dumps(table, indent=1) + '\n')
        print(f'wrote {", ".join(rows)} to {out} after {(time.time() - start)/60:.1f} minutes')
    lost = [f'{name}, {way}' for name in names if name != 'memory' for way in ways_of(name, device, a.quick)
            if way not in rows[name]]
    if lost: raise SystemExit(f'without {"; ".join(lost)}: their processes ended')
