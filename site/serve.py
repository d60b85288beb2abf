"The built site, on this machine alone: `python site/serve.py --port 8867`. Ctrl-C ends it."
import argparse
import functools
import gzip
import signal
import sys
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TYPES = {'.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm',
         '.onnx': 'application/octet-stream',
         '.json': 'application/json', '.ipynb': 'application/json', '.svg': 'image/svg+xml', '.woff2': 'font/woff2',
         '.webmanifest': 'application/manifest+json', '.html': 'text/html', '.css': 'text/css', '.md': 'text/plain'}
TEXT = ('text/', 'application/json', 'application/manifest') # sent as UTF-8
SQUEEZED = {'.mjs', '.js', '.wasm', '.json', '.css', '.html', '.svg', '.ipynb', '.webmanifest'}


@functools.lru_cache(maxsize=256)
def squeezed(path: Path, when: int) -> bytes: # gzip of a file as of a time in ns
    return gzip.compress(path.read_bytes(), compresslevel=6, mtime=0)


class Handler(SimpleHTTPRequestHandler):
    root: Path
    protocol_version = 'HTTP/1.1'

    def file(self) -> Path | None: # that is asked for; nothing outside of the site, nothing hidden
        parts = [p for p in unquote(urlsplit(self.path).path).split('/') if p]
        if any(p.startswith('.') or '\\' in p or '\0' in p for p in parts): return None
        path = self.root.joinpath(*parts)
        if path.is_dir(): path /= 'index.html'
        return path if path.is_file() and path.resolve().is_relative_to(self.root) else None

    def kind(self, path: Path) -> str:
        kind = TYPES.get(path.suffix.lower()) or self.guess_type(path)
        return f'{kind}; charset=utf-8' if kind.startswith(TEXT) else kind

    def answer(self, with_body: bool):
        split = urlsplit(self.path)
        path = self.file()
        if path is None: return self.send_error(HTTPStatus.NOT_FOUND, 'There is no such page')
        if path.name == 'index.html' and not split.path.endswith(('/', 'index.html')):
            query = f'?{split.query}' if split.query else ''
            return self.short(HTTPStatus.MOVED_PERMANENTLY, Location=f'/{split.path.lstrip("/")}/{query}')
        stat = path.stat()
        small = path.suffix.lower() in SQUEEZED and 'gzip' in self.headers.get('Accept-Encoding', '')
        tag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}{"-gz" if small else ""}"'
        if tag in self.headers.get('If-None-Match', ''): return self.short(HTTPStatus.NOT_MODIFIED, ETag=tag)
        data = squeezed(path, stat.st_mtime_ns) if small else None
        self.send_response(HTTPStatus.OK)
        length = len(data) if small else stat.st_size
        for name, value in {'Content-Type': self.kind(path), 'Content-Length': str(length), 'ETag': tag,
                            'Vary': 'Accept-Encoding', 'Cache-Control': 'no-cache',
                            'X-Content-Type-Options': 'nosniff'}.items():
            self.send_header(name, value)
        if small: self.send_header('Content-Encoding', 'gzip')
        self.end_headers()
        if not with_body: return
        if small: self.wfile.write(data)
        else:
            with open(path, 'rb') as f: self.copyfile(f, self.wfile)

    def short(self, status: HTTPStatus, **headers): # an answer without a body
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def do_GET(self): self.answer(True)
    def do_HEAD(self): self.answer(False)
    def log_message(self, *words): pass


class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True

    def handle_error(self, request, address): # a browser that goes away in the middle is nothing to report
        if not isinstance(sys.exc_info()[1], ConnectionError): super().handle_error(request, address)


def server(root: Path, port: int) -> Server:
    return Server(('127.0.0.1', port), type('SiteHandler', (Handler,), dict(root=root.resolve())))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent/'_site',
                        help='the built site')
    parser.add_argument('--port', type=int, default=8867)
    args = parser.parse_args()
    if not (args.root/'index.html').is_file(): sys.exit(f'serve: there is no site in {args.root}: run make site')
    if not 0 <= args.port < 65536: sys.exit(f'serve: port {args.port}: expected 0 ... 65535')
    try: s = server(args.root, args.port)
    except OSError as e:
        sys.exit(f'serve: port {args.port} cannot be had ({e.strerror}): something else listens there; '
                 f'try make serve PORT={args.port + 1}')
    for end in (signal.SIGINT, signal.SIGTERM): # also where a shell that runs it in the background has them ignored
        signal.signal(end, signal.default_int_handler)
    try:
        print(f'The site: http://127.0.0.1:{s.server_port}/ (this machine alone; Ctrl-C ends it)', flush=True)
        s.serve_forever()
    except KeyboardInterrupt: print()
    finally: s.server_close()


if __name__ == '__main__': main()
