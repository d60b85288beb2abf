// Conditions: what a prompt of each kind becomes before the model's embedder, or the network itself, takes it.
// Derived in the chapters story/11_text, paper/00_layouts, paper/01_maps and paper/02_images.

import {checkFloats, checkWhole, fail, shown} from './errors.js';
import {roundEven} from './schedule.js';
import {Tokenizer} from './text.js';

export const floats = (data, ...dims) => ({data, dims});
const ids = (list, ...dims) => ({data: BigInt64Array.from(list, BigInt), dims});
const repeat = (list, n) => Array.from({length: n}, () => list).flat();

function captionIds({condition}, caption) {
  if (typeof caption !== 'string') fail('input', `expected a caption, not ${shown(caption)}`);
  const {ids: row, n, room, tooLong, fits} = new Tokenizer(condition).encode(caption);
  if (!n) fail('input', 'an empty caption: say what to draw');
  if (tooLong) {
    fail('input', `a caption of ${n} tokens, where ${room} fit: leave out what follows "${fits.slice(-40)}"`);
  }
  return row;
}

function classId({condition: {names, n_classes}}, prompt) {
  const named = names?.indexOf(prompt) ?? -1;
  return named >= 0 ? named : checkWhole('class', prompt, 0, n_classes - 1);
}

function boxIds({condition: {names, n_classes, max_boxes, grid, end}}, boxes) {
  if (!Array.isArray(boxes)) fail('input', `expected a list of boxes, not ${shown(boxes)}`);
  if (boxes.length > max_boxes) {
    fail('input', `${boxes.length} boxes, where ${max_boxes} fit: leave the least important ones out`);
  }
  const corner = (x, y) => {
    const at = v => roundEven(Math.fround(Math.fround(v)*(grid - 1)));
    return n_classes + at(y)*grid + at(x);
  };
  const words = boxes.flatMap((box, k) => {
    const [name, x0, y0, x1, y1] = Array.isArray(box) ? box : [];
    const known = names?.indexOf(name) ?? -1;
    const id = known >= 0 ? known : name;
    if (!Number.isInteger(id) || id < 0 || id >= n_classes) fail('input', `box ${k + 1}: no class ${shown(name)}`);
    const fits = [x0, y0, x1, y1].every(v => v >= 0 && v <= 1) && x0 < x1 && y0 < y1;
    if (!fits) fail('input', `box ${k + 1}: expected x0 < x1 and y0 < y1, fractions of the picture, 0 to 1`);
    return [id, corner(x0, y0), corner(x1, y1)];
  });
  return [...words, ...repeat([end], 3*max_boxes - words.length)];
}

function mapIds({condition: {n_classes}, size}, map) {
  if (map?.length !== size**2) fail('input', `expected a map of ${size} x ${size} class ids, not ${shown(map)}`);
  const strange = map.find(id => !(Number.isInteger(id) && id >= 0 && id < n_classes));
  if (strange !== undefined) {
    fail('input', `the map has a class ${shown(strange)}: this model knows 0 to ${n_classes - 1}`);
  }
  return map;
}

const EMBEDDED = {   // inputs of embedder.onnx: for a prompt, and for n times nothing
  text: {
    of: (m, prompt) => ({ids: ids(captionIds(m, prompt), 1, m.condition.max_length)}),
    nothing: ({condition: c}, n) => ({ids: ids(repeat(c.null, n), n, c.max_length)}),
  },
  class: {
    of: (m, prompt) => ({ids: ids([classId(m, prompt)], 1)}),
    nothing: ({condition: c}, n) => ({ids: ids(repeat([c.null], n), n)}),
  },
  layout: {
    of: (m, prompt) => ({ids: ids(boxIds(m, prompt), 1, 3*m.condition.max_boxes)}),
    nothing: ({condition: c}, n) => ({ids: ids(repeat([c.nothing], 3*c.max_boxes*n), n, 3*c.max_boxes)}),
  },
  map: {
    of: (m, prompt) => ({map: ids(mapIds(m, prompt), 1, m.size, m.size)}),
    nothing: (m, n) => ({map: ids(new Uint8Array(n*m.size**2), n, m.size, m.size)}),
  },
};

async function inpaintConcat(model, prompt) {                  // the latent of the known part, and the mask beside it
  const {size, condition: {hole, any_pixel, mask_first}, latent: {factor, channels, height, width}} = model.manifest;
  const {image, mask} = checkHole(prompt, size);
  const known = await model.encode(image.map((v, i) => mask[i % size**2] ? hole : v));
  const small = new Float32Array(height*width);                // 1 where any pixel of a position is to be filled
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const counts = any_pixel || (y % factor === 0 && x % factor === 0);
      if (counts && mask[y*size + x]) small[Math.floor(y/factor)*width + Math.floor(x/factor)] = 1;
    }
  }
  const data = mask_first ? joinFloats(small, known) : joinFloats(known, small.map(v => 2*v - 1));
  return floats(data, 1, channels + 1, height, width);
}

export function checkHole(prompt, size) {                      // {image, mask} of an inpainting prompt
  const image = checkFloats('picture', prompt?.image, 3*size**2);
  const mask = prompt.mask;
  if (mask?.length !== size**2 || !mask.every(v => v === 0 || v === 1)) {
    fail('input', `expected a mask of ${size} x ${size}: 1 = fill, 0 = keep`);
  }
  return {image, mask};
}

function smallPicture({manifest: {size, condition: {factor}, latent: {height, width}}}, prompt) {
  const side = size/factor;
  if (side !== height || side !== width) {
    fail('input', 'a model whose small picture has another size than its latent is not supported here');
  }
  return floats(checkFloats('picture', prompt?.image, 3*side**2), 1, 3, side, side);
}

export async function embed(model, prompt) {   // -> {context, vector, concat}: those that the network has
  const {condition} = model.manifest;
  if (prompt === null || prompt === undefined) return nullCondition(model, 1);
  if (!condition) return fail('input', 'this model is unconditional: it takes no prompt');
  if (condition.kind === 'inpaint') return {concat: await inpaintConcat(model, prompt)};
  if (condition.kind === 'x4') return {concat: smallPicture(model, prompt)};
  if (!EMBEDDED[condition.kind]) {
    return fail('input', `a condition of the kind ${condition.kind} is not supported here`);
  }
  return model.run('embedder', EMBEDDED[condition.kind].of(model.manifest, prompt));
}

export function hasNull({condition}) {                         // false: the model cannot be guided
  return Boolean(condition) && !(condition.kind === 'class' && condition.null === null);
}

export async function nullCondition(model, n) {
  const {condition, latent: {channels, height, width}} = model.manifest;
  if (!condition) return {};
  if (!hasNull(model.manifest)) fail('input', 'this model has no null condition: it cannot be guided; take guidance 1');
  const zeros = c => ({concat: floats(new Float32Array(n*c*height*width), n, c, height, width)});
  if (condition.kind === 'inpaint') return zeros(channels + 1);
  if (condition.kind === 'x4') return zeros(3);
  const c = await model.run('embedder', EMBEDDED[condition.kind].nothing(model.manifest, n));
  return condition.kind === 'map' ? zeros(c.concat.dims[1]) : c;
}

export function tokensOf(manifest, prompt) {                   // a name for each token of the attention, or undefined
  const {condition} = manifest;
  if (condition?.kind === 'text') {
    const row = prompt === null || prompt === undefined ? condition.null : captionIds(manifest, prompt);
    return row.map(id => condition.vocab[id]);
  }
  if (condition?.kind === 'layout') {
    const nameOf = id => condition.names?.[id] ?? String(id);
    const named = (prompt ?? []).flatMap(([name]) => [nameOf(name), 'top left', 'bottom right']);
    return [...named, ...repeat([''], 3*condition.max_boxes - named.length)];
  }
  if (condition?.kind === 'class') return [condition.names?.[prompt] ?? String(prompt ?? '')];
  return undefined;
}

export function joinFloats(...arrays) {
  const out = new Float32Array(arrays.reduce((n, a) => n + a.length, 0));
  arrays.reduce((at, a) => (out.set(a, at), at + a.length), 0);
  return out;
}

export function join(a, b) {                                   // two conditions as one batch
  return Object.fromEntries(Object.keys(b).map(slot => [slot, {
    data: joinFloats(a[slot].data, b[slot].data),
    dims: [a[slot].dims[0] + b[slot].dims[0], ...b[slot].dims.slice(1)],
  }]));
}
