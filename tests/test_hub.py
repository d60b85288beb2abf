"A name on the hub: fetched once; what can go wrong there is one sentence. The hub is a server on this machine."
import hashlib, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest, torch
import ldm_nb.engine.files as files_module
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.files import data_path, find_pretrained

COMMIT, PAGE = 'a'*40, b'<!DOCTYPE html><html>Log in to the network</html>'

class Hub(BaseHTTPRequestHandler):
    "What huggingface_hub asks for: HEAD and GET of owner/model/resolve/REVISION/FILE."
    files, mode, asked, over = {}, 'well', [], None
    def log_message(self, *_): pass

    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        if '/resolve/' in self.path: self.asked.append(self.path) # huggingface_hub also asks for things of its own
        if self.mode == 'silent': return self.over.wait(20)
        found = self.files.get(self.path.split('/')[-1]) if self.path.startswith('/me/model/resolve/') else None
        if self.mode == 'broken' or found is None:
            self.send_response(500 if self.mode == 'broken' else 404)
            if found is None: self.send_header('X-Error-Code', 'RepoNotFound')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        self.send_response(200)
        etag = hashlib.sha256(found).hexdigest()
        for k, v in {'ETag': f'"{etag}"', 'X-Repo-Commit': COMMIT, 'Content-Length': str(len(found))}.items():
            self.send_header(k, v)
        self.end_headers()
        if body: self.wfile.write(found)

@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    source = data_path('pretrained', 'postcards')
    files = {f: (source/f).read_bytes() for f in ('config.json', 'model.safetensors')}
    handler = type('Here', (Hub,), dict(files=files, asked=[], over=threading.Event()))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    here = f'http://127.0.0.1:{server.server_port}'
    for k, v in dict(ENDPOINT=here, HUGGINGFACE_CO_URL_TEMPLATE=here + '/{repo_id}/resolve/{revision}/{filename}',
                     HF_HUB_CACHE=str(tmp_path/'hub')).items():
        monkeypatch.setattr(constants, k, v)
    monkeypatch.setattr(files_module, 'HUB_SECONDS', 1)
    monkeypatch.chdir(tmp_path)
    yield handler
    handler.over.set()
    server.shutdown()
    server.server_close()

def refused(name): # the sentence, and how long it took
    start = time.time()
    with pytest.raises((FileNotFoundError, ValueError)) as e: LatentDiffusion.from_pretrained(name)
    said = str(e.value)
    assert '\n' not in said and len(said) < 900 and name in said, said
    return said, time.time() - start

def test_a_model_is_fetched_once(hub):
    model = LatentDiffusion.from_pretrained('me/model')
    assert torch.equal(model.sample(steps=2), LatentDiffusion.from_pretrained('postcards').sample(steps=2))
    assert {p.split('/')[-1] for p in hub.asked} == {'config.json', 'model.safetensors'}
    hub.mode = 'broken' # the hub is down: what was fetched is still there
    assert LatentDiffusion.from_pretrained('me/model').size == 64

def test_the_network_is_asked_for_nothing_else(hub, tmp_path):
    for name in ('no-such', 'postcards', str(tmp_path/'a'/'b'), './a/b', 'a/b/c', 'x'*99, '~/a', '..\\a', 'a/'):
        if name != 'postcards': refused(name)
    (tmp_path/'runs').mkdir()
    refused('runs/mine') # there is a folder runs: a path, with a slip
    assert find_pretrained('postcards') and hub.asked == []

def test_unknown_offline_and_silent(hub, monkeypatch):
    said, _ = refused('me/other')
    assert 'on the hub' in said and 'postcards-text' in said and 'RepositoryNotFound' in said, said
    hub.mode = 'broken'
    assert '500' in refused('me/model')[0] and refused('me/model')[1] < 2
    hub.mode = 'silent'
    said, seconds = refused('me/model')
    assert 'Timeout' in said and seconds < 5, said
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE is set' in refused('me/model')[0]

@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_login_page_in_place_of_a_file(hub, file):
    hub.files = hub.files | {file: PAGE}
    with pytest.raises(ValueError, match=f'{file} is a web page') as e: LatentDiffusion.from_pretrained('me/model')
    assert '\n' not in str(e.value)

def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants
    (tmp_path/'in the way').write_text('')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'in the way'/'hub'))
    with pytest.raises(OSError, match='HF_HOME names another place'): LatentDiffusion.from_pretrained('me/model')
