// The worker: models live here, so that the page answers to keys while one draws. The page talks through client.js.
// What it does for the page is what the chapters lab/ do with widgets.

import {fail, shown} from './errors.js';
import {joinFloats} from './conditions.js';
import {loadModel, toPixels} from './model.js';

const KEPT = 2;                                                // drawings whose steps can be looked into

const hasSimd = () => WebAssembly.validate(new Uint8Array([    // a module of one function that makes a vector
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]));

async function startRuntime(folder) {                          // onnxruntime-web
  if (!hasSimd()) {
    fail('simd', 'This browser cannot run the models: it lacks WebAssembly SIMD. Any browser from 2023 on has it.');
  }
  const ort = await import(new URL('ort.wasm.min.mjs', folder).href).catch(e => {
    fail('arrival', `The program that runs the models did not arrive (${e.message}). Try again.`);
  });
  Object.assign(ort.env.wasm, {wasmPaths: folder.href, numThreads: 1, proxy: false});
  return ort;
}

function orAborted(promise, signal) {                          // a call that is cancelled does not wait
  return new Promise((resolve, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason), {once: true});
    promise.then(resolve, reject);
  });
}

function buffersOf(answer) {                                   // of all arrays in it: they are handed over, not copied
  const inside = v => {
    if (ArrayBuffer.isView(v)) return [v.buffer];
    return v?.constructor === Object ? Object.values(v).flatMap(inside) : [];
  };
  return [...new Set(inside(answer))];
}

export class Service {                                         // post(message, buffers) sends to the page
  constructor(post, models, runtime) {
    Object.assign(this, {post, folder: models, runtime});
    this.calls = new Map();                                    // id -> AbortController
    this.models = new Map();                                   // name -> {model: promise, listeners}
    this.loaded = [];
    this.queue = Promise.resolve();                            // of long drawings, one at a time
    this.short = Promise.resolve();                            // of all else, which goes between their steps
    this.kept = new Map();                                     // handle -> a drawing
    this.handles = 0;
  }

  async receive({id, type, ...args}) {
    if (type === 'cancel') return this.calls.get(id)?.abort();
    const {signal} = this.calls.set(id, new AbortController()).get(id);
    const tell = (kind, more) => {
      if (!signal.aborted) this.post({id, kind, ...more}, buffersOf(more));
    };
    try {
      if (!JOBS[type]) fail('input', `no such call: ${shown(type)}`);
      const result = await orAborted(this.answer(type, args, tell, signal), signal);
      this.post({id, kind: 'result', ...result}, buffersOf(result));
    } catch (e) {
      const broken = e instanceof WebAssembly.RuntimeError;    // nothing runs in it any more
      this.post({id, kind: 'error', message: e?.message ?? String(e), cancelled: signal.aborted,
                 error: broken ? 'worker' : e?.kind ?? 'internal'});
    } finally {
      this.calls.delete(id);
    }
  }

  async answer(type, args, tell, signal) {
    const drawing = type === 'inspect' ? this.drawing(args.handle) : null;
    const model = drawing?.model ?? await this.model(args.model, p => tell('progress', p));
    const fills = type === 'sample' && model.manifest.condition?.kind === 'inpaint';
    const encodes = fills || type === 'noise' || type === 'encode';
    await model.load(encodes ? ['encoder'] : args.files ?? [], {onProgress: p => tell('progress', p)});
    if (type === 'load') return {manifest: model.manifest};
    const job = () => {
      signal.throwIfAborted();
      return JOBS[type].call(this, model, args, {tell, signal, drawing});
    };
    const queue = type === 'sample' && !model.manifest.fast ? 'queue' : 'short';
    const turn = this[queue].then(job);
    this[queue] = turn.catch(() => {});
    return turn;
  }

  model(name, onProgress) {                                    // loaded once, whoever asks
    if (typeof name !== 'string' || !/^[\w-]+$/.test(name)) fail('input', `no model ${shown(name)}`);
    if (!this.models.has(name)) this.models.set(name, this.startLoading(name));
    const {model, listeners} = this.models.get(name);
    listeners.add(onProgress);
    return model.finally(() => listeners.delete(onProgress));
  }

  startLoading(name) {
    const listeners = new Set();
    const onProgress = p => listeners.forEach(listener => listener(p));
    this.ort ??= this.runtime();
    const model = this.ort.then(ort => loadModel(new URL(name, this.folder), {ort, onProgress})).then(async m => {
      if (m.manifest.fast) await m.warm().catch(() => {});     // what fails here fails again when it draws
      return m;
    });
    model.then(m => this.loaded.push(m), () => this.models.delete(name));   // after an error the next call tries again
    this.ort.catch(() => { this.ort = null; });
    return {model, listeners};
  }

  small(model) {   // the fastest decoder for its latents: a distilled model's, if there is one
    const {fast, files} = model.manifest;
    const fits = m => m.manifest.fast && m.manifest.files.encoder?.sha256 === files.encoder?.sha256;
    return fast ? model : this.loaded.find(fits) ?? model;
  }

  drawing(handle) {
    return this.kept.get(handle) ??
      fail('forgotten', `only the last ${KEPT} drawings are kept, and this one is gone: draw it again`);
  }

  keep(drawing) {
    const handle = ++this.handles;
    this.kept.set(handle, drawing);
    if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    return handle;
  }
}

async function picturesOf(decoder, latents) {                  // {name: latent} -> {name: RGBA}
  const x = await decoder.decode(joinFloats(...Object.values(latents)));
  const pixels = toPixels(x, decoder.manifest.size);
  return Object.fromEntries(Object.keys(latents).map((name, k) => [name, pixels[k]]));
}

const JOBS = {                                                 // each is called with the service as `this`
  load() {},

  async sample(model, {prompt, previews, keep, ...options}, {tell, signal}) {
    const began = performance.now();
    const {size} = model.manifest;
    const steps = [];
    let last;
    for await (last of model.sample({prompt, signal, ...options})) {
      const {i, of, sigma, t, z0_hat} = last;
      if (keep) steps.push(last);
      const step = {i, of, sigma, t};
      if (previews) step.preview = (await picturesOf(this.small(model), {z0_hat})).z0_hat;
      tell('step', step);
      if (!model.manifest.fast) await this.short;
    }
    const x = model.keepKnown(await model.decode(last.z), prompt);
    const seconds = (performance.now() - began)/1000;
    const result = {pixels: toPixels(x, size)[0], x, width: size, height: size, seconds};
    if (keep) result.handle = this.keep({model, prompt, steps});
    return result;
  },

  async inspect(model, {step, ask = true}, {drawing: {prompt, steps}}) {
    const at = steps[step] ??
      fail('input', `no step ${shown(step)}: this drawing has the steps 0 to ${steps.length - 1}`);
    const {i, sigma, t, w, z_t, z0_hat, z} = at;
    const inside = ask ? await model.inspect(z_t, sigma, prompt, w) : {};
    const shownLatents = {z_t, z0_hat};
    for (const name of ['uncond', 'cond']) if (inside[name]) shownLatents[name] = inside[name];
    const pictures = await picturesOf(ask ? model : this.small(model), shownLatents);
    return {i, sigma, t, ...inside, z_t: z_t.slice(), z0_hat: z0_hat.slice(), z: z.slice(), pictures};
  },

  async noise(model, args) {
    const {sigma, t, z_t, z0_hat} = await model.noised(args);
    const pictures = await picturesOf(model, {noised: z_t, guess: z0_hat});
    return {sigma, t, z_t, z0_hat, pictures};
  },

  async encode(model, {x}) { return {z: await model.encode(x)}; },

  async decode(model, {z, small}) {
    if (z?.length !== model.numbers) fail('input', `expected a latent of ${model.numbers} numbers, not ${shown(z)}`);
    const x = await (small ? this.small(model) : model).decode(z);
    return {pixels: toPixels(x, model.manifest.size)[0], x};
  },
};

if (typeof DedicatedWorkerGlobalScope !== 'undefined') {
  const here = import.meta.url;
  const service = new Service((message, buffers) => self.postMessage(message, buffers),
                              new URL('../models/', here), () => startRuntime(new URL('../ort/', here)));
  self.onmessage = ({data}) => service.receive(data);
}
