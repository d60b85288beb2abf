// An exported model: its networks run by onnxruntime-web, and a picture appears step by step.
// Derived in the chapters story/09_latent_diffusion, story/12_guidance and story/14_one_object.

import * as conditions from './conditions.js';
import {checkFloats, checkNumber, checkWhole, fail, shown} from './errors.js';
import {fetchFile, fetchManifest} from './files.js';
import {ItemNoise} from './rng.js';
import {SAMPLERS} from './samplers.js';
import {abarOf, netInput, samplingSigmas, sigmaToT, toZ0, tToSigma} from './schedule.js';

const OFFERED = Object.keys(SAMPLERS).filter(name => name !== 'consistency');   // that one is for distilled models
const sessions = new Map();                                    // sha256 -> promise: models share a first stage

let turn = Promise.resolve();
function inTurn(work) {                                        // the runtime has one stack: its calls must not overlap
  const mine = turn.then(work);
  turn = mine.catch(() => {});
  return mine;
}

export async function loadModel(url, {ort, onProgress, signal} = {}) {   // url of the folder
  const folder = String(url).replace(/\/*$/, '/');
  const manifest = await fetchManifest(folder, signal);
  const model = new Model(folder, manifest, ort);
  await model.load(['network', 'embedder', 'decoder'], {onProgress, signal});
  return model;
}

export function breathe() {                                    // let waiting messages in, e.g. a cancel
  return new Promise(done => {
    const {port1, port2} = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      done();
    };
    port2.postMessage(0);
  });
}

export function toPixels(x, size) {   // (b, 3, size, size) in [-1, 1] -> RGBA, one array a picture
  const n = size**2;
  const pictures = [];
  for (let at = 0; at < x.length; at += 3*n) {
    const rgba = new Uint8ClampedArray(4*n).fill(255);         // rounds by itself
    for (let i = 0; i < n; i++) {
      for (let c = 0; c < 3; c++) rgba[4*i + c] = (x[at + c*n + i] + 1)*127.5;
    }
    pictures.push(rgba);
  }
  return pictures;
}

export class Model {
  constructor(folder, manifest, ort) { Object.assign(this, {folder, manifest, ort}); }

  // Fetch and open files that are not there yet; onProgress({loaded, total, file}) counts bytes of these
  async load(files, {onProgress = () => {}, signal} = {}) {
    const entries = files.map(name => this.manifest.files[name]).filter(Boolean);
    const wanted = entries.filter(entry => !sessions.has(entry.sha256));
    const total = wanted.reduce((sum, entry) => sum + entry.bytes, 0);
    const arrived = new Map();
    for (const entry of wanted) {
      const onBytes = n => {
        arrived.set(entry.file, n);
        const loaded = [...arrived.values()].reduce((sum, v) => sum + v, 0);
        onProgress({loaded, total, file: entry.file});
      };
      const opened = this.open(entry, {onBytes, signal});
      opened.catch(() => sessions.delete(entry.sha256));       // the next call tries again
      sessions.set(entry.sha256, opened);
    }
    await Promise.all(entries.map(entry => sessions.get(entry.sha256)));
  }

  async open(entry, how) {
    const data = await fetchFile(this.folder, entry, how);
    return inTurn(() => this.ort.InferenceSession.create(data, {executionProviders: ['wasm']}));
  }

  async run(part, inputs, wanted) {                            // {name: {data, dims}} -> the same of the outputs
    if (!this.manifest.files[part]) fail('input', `this model has no ${part}`);
    await this.load([part]);
    const session = await sessions.get(this.manifest.files[part].sha256);
    const feeds = {};
    for (const name of session.inputNames) {
      if (!inputs[name]) fail('input', `the ${part} of this model also needs ${name}`);
      const {data, dims} = inputs[name];
      feeds[name] = new this.ort.Tensor(data instanceof BigInt64Array ? 'int64' : 'float32', data, dims);
    }
    const answers = await inTurn(() => session.run(feeds, wanted ?? session.outputNames));
    return Object.fromEntries(Object.entries(answers).map(([name, {data, dims}]) => [name, {data, dims}]));
  }

  async warm() {                                               // the first run of a network is slow, so it draws nothing
    const z = new Float32Array(this.numbers);
    await this.ask(z, 1, await this.nullCondition());
    await this.decode(z);
  }

  get numbers() {                                              // of one latent
    const {channels, height, width} = this.manifest.latent;
    return channels*height*width;
  }

  async embed(prompt) { return conditions.embed(this, prompt); }

  async nullCondition(n = 1) { return conditions.nullCondition(this, n); }

  async encode(x) {                                            // (3, size, size) in [-1, 1] -> a latent
    const {size} = this.manifest;
    checkFloats('picture', x, 3*size**2);
    const {z} = await this.run('encoder', {x: conditions.floats(x, 1, 3, size, size)});
    return z.data;
  }

  async decode(z) {                                            // one latent or several -> pixels in [-1, 1]
    const {channels, height, width} = this.manifest.latent;
    const {x} = await this.run('decoder', {z: conditions.floats(z, z.length/this.numbers, channels, height, width)});
    if (!x.data.every(Number.isFinite)) fail('input', 'the picture is not finite: is the guidance too large?');
    return x.data.map(v => Math.min(Math.max(v, -1), 1));
  }

  // The network's guess of the clean latent at a noise level; z is z0 + sigma times unit noise, one latent or several
  async ask(z, sigma, c, wanted = ['out']) {
    const {latent: {channels, height, width}, prediction_type} = this.manifest;
    const n = z.length/this.numbers;
    const abar = abarOf(sigma);
    const z_t = z.map(v => Math.sqrt(abar)*v);
    const answers = await this.run('network', {
      z: conditions.floats(netInput(this.manifest, z_t, abar), n, channels, height, width),
      t: conditions.floats(new Float32Array(n).fill(sigmaToT(this.manifest, sigma)), n),
      ...c,
    }, wanted);
    return {z0_hat: toZ0(prediction_type, answers.out.data, z_t, abar), attention: answers.attention};
  }

  async denoise(z, sigma, c) { return (await this.ask(z, sigma, c)).z0_hat; }

  // Classifier-free guidance: w of the way from the unconditional to the conditional answer, both in one call
  guided(cond, uncond, w) {
    if (w === 1) return (z, sigma) => this.denoise(z, sigma, cond);
    if (w === 0) return (z, sigma) => this.denoise(z, sigma, uncond);
    const both = conditions.join(uncond, cond);
    return async (z, sigma) => {
      const answers = await this.denoise(conditions.joinFloats(z, z), sigma, both);
      return guide(answers.subarray(0, z.length), answers.subarray(z.length), w);
    };
  }

  settings({prompt, steps, guidance, sampler, eta = 0}) {      // checked, and what was left out filled in
    const {manifest} = this;
    steps ??= manifest.fast ? manifest.fast.steps.at(-1) : manifest.steps;
    sampler ??= 'ddim';
    if (manifest.fast) return fastSettings(manifest.fast, steps, guidance, sampler, eta);
    checkWhole('steps', steps, 1, manifest.path.sigma.length);
    if (!OFFERED.includes(sampler)) fail('input', `no sampler ${shown(sampler)}; there are ${OFFERED.join(', ')}`);
    checkNumber('eta', eta, 0, 1, ' (0 is deterministic, 1 as noisy as ddpm)');
    if (eta && sampler !== 'ddim') {
      fail('input', 'only ddim takes eta; for fresh noise at every step take ddpm or euler_a');
    }
    if (!manifest.condition && (guidance ?? null) !== null) {
      fail('input', 'this model is unconditional: there is nothing to guide it to');
    }
    const w = checkNumber('guidance', guidance ?? manifest.guidance ?? 1, -1000, 1000, ', e.g. 3');
    const nothingSaid = prompt === null || prompt === undefined;
    return {steps, sampler, eta, w: nothingSaid ? 1 : w};
  }

  // A picture, step by step: yields, after each step, what the step started from and what became of it
  async *sample({prompt = null, seed = 0, latents, signal, ...rest} = {}) {
    const {steps, sampler, eta, w} = this.settings({prompt, ...rest});
    const sigmas = samplingSigmas(this.manifest, steps);
    const noise = new ItemNoise(seed);
    const unit = latents ? checkFloats('latents', latents, this.numbers) : noise.normal(this.numbers);
    const cond = await this.embed(prompt);
    const uncond = w === 1 ? null : await this.nullCondition();
    let z = unit.map(v => v*Math.sqrt(1 + sigmas[0]**2));      // unit latents plus noise: so large
    const path = SAMPLERS[sampler](this.guided(cond, uncond, w), z, sigmas, {noise: n => noise.normal(n), eta});
    for (let i = 0; i < sigmas.length - 1; i++) {
      await breathe();
      signal?.throwIfAborted();
      const {value} = await path.next();
      const z_t = paperScale(z, sigmas[i]);
      z = value.z;
      yield {i, of: sigmas.length - 1, sigma: sigmas[i], t: sigmaToT(this.manifest, sigmas[i]), w,
             z_t, z0_hat: value.z0_hat, z: paperScale(z, sigmas[i + 1])};
    }
  }

  // Both answers at one noise level, and where the network looks; z_t at the paper's scale
  async inspect(z_t, sigma, prompt, w) {
    const {files, fast} = this.manifest;
    const wanted = files.network.outputs.includes('attention') ? ['out', 'attention'] : ['out'];
    const z = z_t.map(v => v*Math.sqrt(1 + sigma**2));
    const cond = await this.embed(prompt);
    const pair = conditions.hasNull(this.manifest) && !fast;
    const c = pair ? conditions.join(await this.nullCondition(), cond) : cond;
    const {z0_hat, attention} = await this.ask(pair ? conditions.joinFloats(z, z) : z, sigma, c, wanted);
    const out = {w, cond: z0_hat.slice(-z.length)};
    if (pair) {
      out.uncond = z0_hat.slice(0, z.length);
      out.guided = guide(out.uncond, out.cond, w);
    }
    if (attention) {
      out.attention = attention.data.slice(-attention.data.length/attention.dims[0]);
      out.tokens = conditions.tokensOf(this.manifest, prompt);
    }
    return out;
  }

  // Noise a picture, and ask what is there
  async noised({x, sigma, t, seed = 0, prompt}) {
    if (sigma === undefined) sigma = tToSigma(this.manifest, t);
    t = sigmaToT(this.manifest, checkNumber('sigma', sigma, 0, 1e6));
    const eps = new ItemNoise(seed).normal(this.numbers);
    const z0 = await this.encode(x);
    const z = z0.map((v, i) => v + sigma*eps[i]);
    const nothingSaid = typeof prompt === 'string' && !prompt.trim();
    const z0_hat = await this.denoise(z, sigma, await this.embed(nothingSaid ? null : prompt));
    return {sigma, t, z_t: paperScale(z, sigma), z0_hat};
  }

  keepKnown(x, prompt) {                                       // pixels that were not to be filled are put back
    const {condition, size} = this.manifest;
    if (condition?.kind !== 'inpaint' || !prompt) return x;
    const {image, mask} = conditions.checkHole(prompt, size);
    return x.map((v, i) => mask[i % size**2] ? v : image[i]);
  }
}

const guide = (uncond, cond, w) => uncond.map((v, i) => v + w*(cond[i] - v));
const paperScale = (z, sigma) => z.map(v => v/Math.sqrt(1 + sigma**2));

function fastSettings(fast, steps, guidance, sampler, eta) {
  if (!fast.steps.includes(steps)) {
    fail('input', `steps is ${shown(steps)}: this model was distilled for ${fast.steps.join(', ')} steps`);
  }
  if ((guidance ?? null) !== null) {
    fail('input', `this model was distilled with a guidance of ${fast.guidance} built in: leave guidance out`);
  }
  if (!['ddim', 'consistency'].includes(sampler) || eta) {
    fail('input', 'a distilled model jumps, and has one way to sample: leave sampler and eta out');
  }
  return {steps, sampler: 'consistency', eta: 0, w: 1};
}
