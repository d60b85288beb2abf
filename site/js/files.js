// Files of a model: fetched with progress, and checked by size and sha256 before anything is done with them.
// What a model's folder holds is told in the chapter interop/10_onnx.

import {fail} from './errors.js';

const PATIENCE = 30_000;                                       // milliseconds without a byte
const megabytes = n => `${(n/1e6).toFixed(1)} MB`;

function inTime(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} has stopped arriving`)), PATIENCE);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

async function request(url, name, how) {
  let response;
  try {
    response = await inTime(fetch(url, how), name);
  } catch (e) {
    how.signal?.throwIfAborted();
    fail('arrival', `${name} did not arrive (${e.message}). Is there a connection? Try again.`);
  }
  if (!response.ok) fail('arrival', `${name} did not arrive: the server answered ${response.status}. Try again.`);
  return response;
}

export async function fetchManifest(folder, signal) {          // model.json
  const response = await request(new URL('model.json', folder), 'model.json', {signal, cache: 'no-cache'});
  const manifest = await response.json().catch(() => null);
  if (!manifest?.files?.network) fail('arrival', 'model.json is damaged: it describes no model. Try again.');
  if (manifest.format !== 1) {
    fail('arrival', `this model has format ${manifest.format}, and this page reads 1. Reload the page.`);
  }
  return manifest;
}

async function read(response, {file, bytes}, onBytes) {        // the body; null if it is not as long as it should be
  const out = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let n = 0;
  for (;;) {
    const {done, value} = await inTime(reader.read(), file);
    if (done) return n === bytes ? out : null;
    if (n + value.length > bytes) {
      await reader.cancel();
      return null;
    }
    out.set(value, n);
    n += value.length;
    onBytes(n);
  }
}

async function isIntact(data, sha256) {
  if (!globalThis.crypto?.subtle) return true;   // outside https and localhost browsers have none: the size must do
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', data));
  return sha256 === Array.from(digest, byte => byte.toString(16).padStart(2, '0')).join('');
}

// The bytes of one file. A wrong one may come from a cache that is out of date: it is asked for again, past all caches.
export async function fetchFile(folder, entry, {onBytes = () => {}, signal} = {}) {
  for (const cache of ['default', 'reload']) {
    const response = await request(new URL(entry.file, folder), entry.file, {signal, cache});
    let data;
    try {
      data = await read(response, entry, onBytes);
    } catch (e) {
      signal?.throwIfAborted();
      fail('arrival', `${entry.file} broke off on its way (${e.message}). Try again.`);
    }
    if (data && await isIntact(data, entry.sha256)) return data;
  }
  return fail('arrival', `${entry.file} is damaged: not the ${megabytes(entry.bytes)} that were saved. Try again.`);
}
