// Errors that are sentences for people, and what kind of trouble they tell of.
// Kinds: input, arrival, simd, forgotten, worker, internal.

export function fail(kind, sentence) {
  throw Object.assign(new Error(sentence), {kind});
}

export function checkWhole(name, v, low, high) {
  if (!Number.isInteger(v) || v < low || v > high) {
    fail('input', `${name} is ${shown(v)}: expected a whole number, ${low} to ${high}`);
  }
  return v;
}

export function checkNumber(name, v, low, high, hint = '') {
  if (typeof v !== 'number' || !(v >= low && v <= high)) {     // NaN is no number either
    fail('input', `${name} is ${shown(v)}: expected a number, ${low} to ${high}${hint}`);
  }
  return v;
}

export function checkFloats(name, v, length) {
  if (!(v instanceof Float32Array) || v.length !== length) {
    fail('input', `${name}: expected ${length} numbers (Float32Array), not ${shown(v)}`);
  }
  if (!v.every(Number.isFinite)) fail('input', `${name}: it holds NaN or infinity`);
  return v;
}

export function shown(v) {                                     // in an error: at most 60 characters
  const words = ArrayBuffer.isView(v) ? `${v.constructor.name} of ${v.length}`
    : typeof v === 'string' ? `"${v}"` : String(v);
  return words.length <= 60 ? words : `${words.slice(0, 57)}...`;
}
