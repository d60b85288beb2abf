"""Loading a model as large as Stable Diffusion v1, with random weights, from files in float32 and in float16: seconds,
processor seconds, and in sizes of its weights the peak of the memory and what of it is the process's own (RssAnon).

    python tests/prove/loading.py
        writes 6.4 GB into a temporary folder, reads them in processes of their own: about 3 minutes"""
import argparse, json, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from ldm_nb.core import LatentDiffusion
from ldm_nb.diffusion import Schedule
from ldm_nb.interop.embedders import FrozenText
from ldm_nb.engine.files import atomic_path
from ldm_nb.interop.pipelines import save_diffusers
from ldm_nb.paper.published import paper_model

READ = '''
import re, sys, time
import torch, diffusers
from ldm_nb.pretrained import load_diffusers
memory = lambda what: int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1])*1024
open('/proc/self/clear_refs', 'w').write('5')                # the peak of the imports is forgotten
before, own, start, busy = memory('VmRSS'), memory('RssAnon'), time.perf_counter(), time.process_time()
if sys.argv[1] == 'ours':
    m = load_diffusers(sys.argv[2])
    parts = [m.autoencoder, m.net, m.embedder.model[0]]
else:
    m = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[2], torch_dtype=torch.float32)
    parts = [m.vae, m.unet, m.text_encoder]
seconds, busy = time.perf_counter() - start, time.process_time() - busy
size = sum(p.numel()*p.element_size() for part in parts for p in part.parameters())
print(seconds, busy, (memory('VmHWM') - before)/size, (memory('RssAnon') - own)/size, size)
'''


def write(folder: Path) -> dict: # type -> folder: a Stable Diffusion v1, all weights random
    letters = ['<|startoftext|>', '<|endoftext|>', *'abcdefghijklmnopqrstuvwxyz',
               *(k + '</w>' for k in 'abcdefghijklmnopqrstuvwxyz')]
    (folder/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(letters)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    text = FrozenText.of(paper_model('sd-v1/conditioner'),
                         CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), model_max_length=77))
    ae = paper_model('kl-f8')
    ae.latent_scale.fill_(.18215)
    save_diffusers(LatentDiffusion(ae, paper_model('sd-v1'), text, Schedule('scaled_linear', .00085, .012), size=512,
                                   sampling={}), folder/'sd')
    half = shutil.copytree(folder/'sd', folder/'half')
    for file in half.rglob('*.safetensors'):
        tensors = {k: v.half() for k, v in load_file(file).items()}
        file.unlink() # not over what is mapped
        save_file(tensors, file, metadata=dict(format='pt'))
    return dict(float32=folder/'sd', float16=half)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=Path('data/results/loading.json'))
    p.add_argument('--turns', type=int, default=3,
                   help='of each, taken in turn; the best time and the largest memory are kept (default 3)')
    a, start, rows = p.parse_args(), time.time(), {}
    with tempfile.TemporaryDirectory() as tmp:
        folders = write(Path(tmp))
        for _ in range(a.turns):
            for kind, folder in folders.items():
                for who in ('ours', 'diffusers'):
                    out = subprocess.run([sys.executable, '-c', READ, who, str(folder)], capture_output=True, text=True,
                                         check=True).stdout
                    got = rows.setdefault(f'{who}, {kind}', [])
                    got.append([float(v) for v in out.split()[-5:]])
                    print(who, kind, got[-1], flush=True)
    table = {k: dict(seconds=min(r[0] for r in got), processor_seconds=min(r[1] for r in got),
                     memory=max(r[2] for r in got), own=max(r[3] for r in got), bytes=got[0][4])
             for k, got in rows.items()}
    table = dict(command='python tests/prove/loading.py', device='cpu', threads=torch.get_num_threads(), **table)
    with atomic_path(a.out) as path: path.write_text(json.dumps(table, indent=1) + '\n')
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
