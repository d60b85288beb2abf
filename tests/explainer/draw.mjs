// Exported models, served on loopback with faults on demand, drawn with by the worker's service: reads and writes JSON.
// Arguments: the folder of the models, onnxruntime-web's folder, questions, answers.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import {pathToFileURL} from 'node:url';
import {Client} from '../../site/js/client.js';
import {Model, loadModel} from '../../site/js/model.js';
import {Service} from '../../site/js/worker.js';

const [, , models, ortFolder, questions, answers] = process.argv;
const ort = await import(pathToFileURL(path.join(ortFolder, 'dist/ort.wasm.min.mjs')).href);
ort.env.wasm.numThreads = 1;

const faults = new Map();                                      // name/file -> (bytes, which try) => {status, bytes}
const asked = [];
const server = http.createServer((request, response) => {
  const name = decodeURIComponent(request.url.slice(1));
  asked.push(name);
  let answer = {status: 404, bytes: Buffer.from('no such file')};
  const file = path.join(models, name);
  if (fs.existsSync(file)) answer = {status: 200, bytes: fs.readFileSync(file)};
  if (faults.has(name)) answer = {...answer, ...faults.get(name)(answer.bytes, asked.filter(n => n === name).length)};
  response.writeHead(answer.status, answer.headers);
  response.write(answer.bytes);
  if (answer.breaks) setTimeout(() => response.destroy(), 50);
  else response.end();
});
server.keepAliveTimeout = 0;                                   // or a connection closes while it is being used again
await new Promise(listening => server.listen(0, '127.0.0.1', listening));
const base = `http://127.0.0.1:${server.address().port}/`;

const plain = v => ArrayBuffer.isView(v) ? Array.from(v) : Array.isArray(v) ? v.map(plain)
  : v?.constructor === Object ? Object.fromEntries(Object.entries(v).map(([k, w]) => [k, plain(w)])) : v;
const typed = (key, v) => v?.float32 ? Float32Array.from(v.float32) : v?.uint8 ? Uint8Array.from(v.uint8)
  : v?.number ? Number(v.number) : v;

let workers = 0;                                               // made so far
function makeClient(runtime = async () => ort) {   // a client and a service in one thread; messages are cloned
  return new Client('worker.js', () => {
    workers++;
    const worker = {terminate() { worker.gone = true; }};
    const post = (message, transfer) => {
      const data = structuredClone(message, {transfer});
      setTimeout(() => worker.gone || worker.onmessage({data}));
    };
    const service = new Service(post, new URL(base), runtime);
    worker.postMessage = message => {
      const data = structuredClone(message);
      setTimeout(() => service.receive(data));
    };
    return worker;
  });
}

async function settled(client, {type, cancelAt, ...args}, seen = {}) {   // what became of a call
  const stop = new AbortController();
  const onStep = step => {
    (seen.steps ??= []).push(step);
    if (step.i === cancelAt) stop.abort();
  };
  const onProgress = p => (seen.progress ??= []).push(p);
  if (cancelAt === 'at once') setTimeout(() => stop.abort(), 5);
  try {
    seen.result = await client.call(type, args, {onStep, onProgress, signal: stop.signal});
  } catch (e) {
    seen.error = {message: e.message, kind: e.kind, cancelled: e.cancelled};
  }
  return seen;
}

const kept = new Map();
async function opened(name) {
  if (!kept.has(name)) kept.set(name, await loadModel(base + name, {ort}));
  return kept.get(name);
}

const ANSWERS = {
  async paths(list) {                                          // every z and z0_hat
    const out = [];
    for (const {model, ...options} of list) {
      const steps = [];
      for await (const {z, z0_hat} of (await opened(model)).sample(options)) steps.push({z, z0_hat});
      out.push(steps);
    }
    return out;
  },

  async calls(list) {                                          // one after the other, of one client
    const client = makeClient();
    const out = [];
    for (const one of list) {
      if (one.handle === 'last') one.handle = out.findLast(o => o.result?.handle).result.handle;
      out.push(await settled(client, one));
    }
    return out;
  },

  async atOnce({load, calls}) {   // all at once; how often each was answered, and the network asked
    const client = makeClient();
    await settled(client, load);
    let questions = 0;
    const {ask} = Model.prototype;
    Model.prototype.ask = function (...args) {
      questions++;
      return ask.apply(this, args);
    };
    const counts = calls.map(() => 0);
    const all = calls.map(async (one, k) => {
      const seen = await settled(client, one);
      counts[k]++;
      return {...seen, steps: seen.steps?.length ?? 0, result: Boolean(seen.result)};
    });
    const seen = await Promise.all(all);
    Model.prototype.ask = ask;
    return {seen, counts, questions, left: client.waiting.size};
  },

  async order({load, calls}) {   // models, as they were answered; how often the network was asked while they were loaded
    const client = makeClient();
    let questions = 0;
    const {ask} = Model.prototype;
    Model.prototype.ask = function (...args) {
      questions++;
      return ask.apply(this, args);
    };
    for (const model of load) await settled(client, {type: 'load', model});
    Model.prototype.ask = ask;
    const order = [];
    await Promise.all(calls.map(async one => {
      const {error} = await settled(client, one);
      order.push(error ?? one.model);
    }));
    return {order, questions};
  },

  async arrivals({faults: names, file}) {                      // a model for each fault: with it, then without
    const flip = bytes => {
      const other = Buffer.from(bytes);
      other[other.length >> 1] ^= 1;
      return other;
    };
    const FAULTS = {
      missing: () => ({status: 404}),
      short: bytes => ({bytes: bytes.subarray(0, bytes.length - 100)}),
      long: bytes => ({bytes: Buffer.concat([bytes, bytes])}),
      damaged: bytes => ({bytes: flip(bytes)}),
      'breaks-off': bytes => ({bytes: bytes.subarray(0, 500), headers: {'content-length': bytes.length}, breaks: true}),
      'damaged-once': (bytes, nth) => nth === 1 ? {bytes: flip(bytes)} : {},
    };
    const client = makeClient();
    const out = {};
    for (const name of names) {
      faults.set(`${name}/${file}`, FAULTS[name]);
      const first = await settled(client, {type: 'load', model: name});
      faults.clear();
      out[name] = [first, await settled(client, {type: 'load', model: name})];
    }
    return out;
  },

  async runtime(model) {                                       // without SIMD; broken in the middle; then whole
    const lacks = async () => { throw Object.assign(new Error('no SIMD here'), {kind: 'simd'}); };
    const out = {simd: await settled(makeClient(lacks), {type: 'load', model})};
    const client = makeClient();
    const {run} = Model.prototype;
    Model.prototype.run = async () => { throw new WebAssembly.RuntimeError('unreachable'); };
    out.broken = await settled(client, {type: 'encode', model, x: new Float32Array(3*16*16)});
    Model.prototype.run = run;
    workers = 0;
    out.again = await settled(client, {type: 'encode', model, x: new Float32Array(3*16*16)});
    return {...out, workers};
  },
};

const found = {};
for (const [what, q] of Object.entries(JSON.parse(fs.readFileSync(questions), typed))) {
  found[what] = plain(await ANSWERS[what](q));
}
fs.writeFileSync(answers, JSON.stringify(found));
server.close();
server.closeAllConnections();
