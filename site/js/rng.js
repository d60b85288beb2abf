// Unit noise from a seed, number for number that of ItemNoise in Python: with the same seed both draw the same picture.
// Derived in the chapter engine/01_seeds; the algorithms are numpy's (SeedSequence) and torch's (mt19937, Box-Muller).

import {checkWhole} from './errors.js';

const f32 = Math.fround;
const TWO_PI = f32(2*Math.PI);

// numpy's SeedSequence: stir the words of a key into a pool of four, then draw words from the pool

function wordsOf(n) {                                          // a whole number as 32-bit words, the lowest first
  return n < 2**32 ? [n] : [n % 2**32, Math.floor(n/2**32)];
}

function stir(key) {
  let constant = 0x43b0d7e5;
  const hash = v => {
    v ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    v = Math.imul(v, constant);
    return (v ^ v >>> 16) >>> 0;
  };
  const mix = (x, y) => {
    const v = Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715);
    return (v ^ v >>> 16) >>> 0;
  };
  const pool = [0, 1, 2, 3].map(i => hash(key[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const extra of key.slice(4)) {
    for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(extra));
  }
  return pool;
}

function drawWords(pool, n) {
  let constant = 0x8b51f9dd;
  return Array.from({length: n}, (_, i) => {
    let v = pool[i % 4] ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    v = Math.imul(v, constant);
    return (v ^ v >>> 16) >>> 0;
  });
}

export function seedOf(...key) {                               // the low 32 bits of `seed_of`: all that mt19937 takes
  const [low, high] = drawWords(stir(key.flatMap(wordsOf)), 2);
  return (low >>> 1 | high << 31) >>> 0;
}

class MT19937 {                                                // Matsumoto and Nishimura, 1998
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, before ^ before >>> 30) + i;
    }
    this.at = 624;
  }

  refill() {
    const s = this.state;
    for (let i = 0; i < 624; i++) {
      const y = s[i] & 0x80000000 | s[(i + 1) % 624] & 0x7fffffff;
      s[i] = s[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.at = 0;
  }

  next() {                                                     // 32 random bits
    if (this.at === 624) this.refill();
    let y = this.state[this.at++];
    y ^= y >>> 11;
    y ^= y << 7 & 0x9d2c5680;
    y ^= y << 15 & 0xefc60000;
    return (y ^ y >>> 18) >>> 0;
  }

  float() { return (this.next() & 0xffffff)/2**24; }           // 24 bits, in [0, 1)

  double() {                                                   // 53 bits, in [0, 1)
    const high = this.next() & 0x1fffff;
    return (high*2**32 + this.next())/2**53;
  }
}

export class ItemNoise {
  constructor(seed, item = 0) {                                // of the whole sample; number of the picture in it
    checkWhole('seed', seed, 0, Number.MAX_SAFE_INTEGER);
    this.bits = new MT19937(seedOf(seed, 0, item));
    this.spare = null;                                         // the second number of a pair, for the next call
  }

  normal(n) {                                                  // the next n numbers of the stream
    const out = new Float32Array(n);
    if (n < 16) return out.map(() => this.one());
    for (let i = 0; i < n; i++) out[i] = this.bits.float();
    for (let i = 0; i + 16 <= n; i += 16) boxMuller(out.subarray(i, i + 16));
    if (n % 16) {                                              // torch draws the last 16 anew
      const last = out.subarray(n - 16);
      for (let i = 0; i < 16; i++) last[i] = this.bits.float();
      boxMuller(last);
    }
    return out;
  }

  one() {                                                      // short draws: in pairs, in double precision
    if (this.spare !== null) {
      const kept = this.spare;
      this.spare = null;
      return kept;
    }
    const theta = 2*Math.PI*this.bits.double();
    const radius = Math.sqrt(-2*Math.log1p(-this.bits.double()));
    this.spare = radius*Math.sin(theta);
    return radius*Math.cos(theta);
  }
}

function boxMuller(u) {                                        // 16 uniform numbers become normal, in single precision
  for (let j = 0; j < 8; j++) {
    const radius = f32(Math.sqrt(f32(-2*f32(Math.log(1 - u[j])))));
    const theta = f32(TWO_PI*u[j + 8]);
    u[j] = radius*Math.cos(theta);
    u[j + 8] = radius*Math.sin(theta);
  }
}
