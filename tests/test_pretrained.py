"""Names on the hub: fetched once, found again without a network, and refused in words. The hub is a server of this
test on loopback."""
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import run
from ldm_nb.interop.pipelines import save_diffusers
from ldm_nb.autoencoder import Autoencoder
from ldm_nb.core import LatentDiffusion
from ldm_nb.unet import UNet

SHA = '0123456789abcdef0123456789abcdef01234567'
PROGRAM = '''
import sys
from ldm_nb.pretrained import load_diffusers
try: ldm = load_diffusers('someone/a-model')
except (FileNotFoundError, ValueError) as e: sys.exit(f'error: {e}')
print('drew', tuple(ldm.sample(n=1, steps=2).shape))
'''


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path: # as it lies on the hub, with files beside it that nobody needs here
    torch.manual_seed(0)
    ldm = LatentDiffusion(Autoencoder(4, 32, (1, 1), 1, groups=8), UNet(ch=32, ch_mult=(1, 2), groups=8), size=32)
    folder = save_diffusers(ldm, tmp_path_factory.mktemp('model'))
    (folder/'README.md').write_text('a model')
    (folder/'whole.safetensors').write_bytes(b'0'*1000)
    (folder/'unet'/'diffusion_pytorch_model.fp16.safetensors').write_bytes(b'0'*1000)
    (folder/'safety_checker').mkdir()
    (folder/'safety_checker'/'model.safetensors').write_bytes(b'0'*1000)
    return folder


def tag(p: Path) -> str: return hashlib.sha1(p.read_bytes()).hexdigest() # what the hub knows a file by


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as a download asks for."
    folder, asked, broken = None, [], False

    def answer(self, body: bool):
        path = self.path.split('?')[0]
        if path.startswith('/api/models/someone/a-model'):
            files = {str(p.relative_to(self.folder)): p for p in sorted(self.folder.rglob('*')) if p.is_file()}
            tree = [dict(type='file', path=f, size=p.stat().st_size, oid=tag(p)) for f, p in files.items()]
            out = json.dumps(tree if '/tree/' in path else dict(id='someone/a-model', sha=SHA,
                                                                siblings=[dict(rfilename=f) for f in files])).encode()
        elif '/resolve/' in path and (f := self.folder/path.split(f'/resolve/{SHA}/')[-1]).is_file():
            out = f.read_bytes()
        else: return self.send_error(404)
        mark = tag(f) if '/resolve/' in path else 'list'
        self.send_response(200)
        for k, v in {'Content-Length': len(out), 'ETag': f'"{mark}"', 'X-Repo-Commit': SHA,
                     'Content-Type': 'application/octet-stream'}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if body and '/resolve/' in path: self.asked.append(path.split(f'{SHA}/')[-1])
        if body: self.wfile.write(out[:len(out)//2] if self.broken and path.endswith('safetensors') else out)

    def do_GET(self): self.answer(True)
    def do_HEAD(self): self.answer(False)
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def hub(model):
    Hub.folder = model
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def load(home, hub, **env):
    return run(sys.executable, '-c', PROGRAM, timeout=120, HF_HOME=str(home), HF_ENDPOINT=hub,
               HF_HUB_DISABLE_XET='1', **env)


def test_a_name_is_fetched_once_and_found_again_without_a_network(hub, tmp_path):
    Hub.asked.clear()
    r = load(tmp_path, hub)
    assert r.returncode == 0 and 'drew (1, 3, 32, 32)' in r.stdout, r.stderr
    weights = {f for f in Hub.asked if f.endswith('.safetensors')}
    assert weights == {'unet/diffusion_pytorch_model.safetensors',
                       'vqvae/diffusion_pytorch_model.safetensors'}, 'and nothing that nobody needs'
    before = len(Hub.asked)
    r = load(tmp_path, 'http://127.0.0.1:9', HF_HUB_OFFLINE='1')
    assert r.returncode == 0 and 'drew' in r.stdout and len(Hub.asked) == before, r.stderr


def test_without_a_network_and_without_a_cache_it_says_so(tmp_path):
    for env in (dict(HF_HUB_OFFLINE='1'), {}):
        r = load(tmp_path, 'http://127.0.0.1:9', **env)
        assert (r.returncode == 1 and 'error: no folder someone/a-model' in r.stderr and
                'Traceback' not in r.stderr), r.stderr


def test_half_a_download_is_no_model(hub, tmp_path):
    Hub.broken = True
    try: r = load(tmp_path, hub)
    finally: Hub.broken = False
    assert r.returncode == 1 and 'error: ' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    r = load(tmp_path, hub)
    assert r.returncode == 0 and 'drew' in r.stdout, r.stderr


def test_a_pipeline_of_diffusers_opens_what_we_wrote(model):
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    assert (type(pipe) is diffusers.LDMPipeline and type(pipe.scheduler) is diffusers.DDIMScheduler and
            not pipe.scheduler.config.clip_sample)
