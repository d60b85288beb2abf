// The page's side of the worker: a call is a promise, with steps and progress on the way, and can be cancelled.
// No chapter derives it: it only carries messages.

const said = (message, kind, cancelled = false) => Object.assign(new Error(message), {kind, cancelled});

export class Client {
  constructor(workerUrl, makeWorker = url => new Worker(url, {type: 'module'})) {
    Object.assign(this, {workerUrl, makeWorker});
    this.worker = null;                                        // made at the first call, and anew after it died
    this.waiting = new Map();                                  // id -> {resolve, reject, onStep, onProgress}
    this.ids = 0;
  }

  start() {
    const worker = this.makeWorker(this.workerUrl);
    worker.onmessage = ({data}) => this.receive(data);
    worker.onerror = event => {
      event.preventDefault?.();
      const why = event.message ? ` (${event.message})` : '';
      this.drop(`The part of this page that draws has stopped${why}. Try again.`);
    };
    return worker;
  }

  drop(message) {                                              // all calls fail; the next one makes a new worker
    this.worker?.terminate();
    this.worker = null;
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const {reject} of waiting) reject(said(message, 'worker'));
  }

  receive({id, kind, ...rest}) {
    const call = this.waiting.get(id);
    if (!call) return;                                         // it was cancelled
    if (kind === 'step') return call.onStep?.(rest);
    if (kind === 'progress') return call.onProgress?.(rest);
    this.waiting.delete(id);
    if (kind === 'result') return call.resolve(rest);
    call.reject(said(rest.message, rest.error, rest.cancelled));
    if (rest.error === 'worker') this.drop(rest.message);
  }

  // type and args as the worker takes them; the promise rejects with an Error that has `kind` and `cancelled`
  call(type, args = {}, {onStep, onProgress, signal} = {}) {
    return new Promise((resolve, reject) => {
      const cancelled = said('cancelled', 'input', true);
      if (signal?.aborted) return reject(cancelled);
      const id = ++this.ids;
      try {
        this.worker ??= this.start();
        this.worker.postMessage({...args, id, type});
      } catch (e) {
        return reject(said(e.message, 'worker'));              // no workers here, or something that cannot be sent
      }
      this.waiting.set(id, {resolve, reject, onStep, onProgress});
      signal?.addEventListener('abort', () => {
        if (!this.waiting.delete(id)) return;
        this.worker?.postMessage({type: 'cancel', id});
        reject(cancelled);
      }, {once: true});
    });
  }
}
