// From noise to a sample: each sampler is a generator that takes one step from each noise level to the next.
// Derived in the chapter story/05_samplers; consistency in beyond/02_few_steps.
//
// All take (denoise, z, sigmas, {noise, eta}) and yield {z, z0_hat}: denoise(z, sigma) answers a guess of the clean
// latent, z is z0 + sigmas[0] times unit noise, sigmas descend and only the last may be 0, noise(n) gives n unit
// normal numbers.

import {checkNumber, fail} from './errors.js';

function* pairs(sigmas) {                                      // (from, to), one a step
  const descend = sigmas.slice(1).every((to, i) => sigmas[i] > to && to >= 0);
  if (sigmas.length < 2 || !descend) fail('input', 'noise levels: expected at least two, descending, none below 0');
  for (let i = 1; i < sigmas.length; i++) yield [sigmas[i - 1], sigmas[i]];
}

function finite(z, to) {
  if (z.every(Number.isFinite)) return z;
  return fail('input', `at noise level ${to.toPrecision(3)} the sample is not finite: is the guidance too large?`);
}

const slopeOf = (z, z0_hat, s) => z.map((v, i) => (v - z0_hat[i])/s);
const move = (z, by, slope) => z.map((v, i) => v + by*slope[i]);
const mean = (a, b) => a.map((v, i) => (v + b[i])/2);

export async function* euler(denoise, z, sigmas) {             // follow the slope (z - z0_hat)/sigma in a straight line
  for (const [s, to] of pairs(sigmas)) {
    const z0_hat = await denoise(z, s);
    z = finite(move(z, to - s, slopeOf(z, z0_hat, s)), to);
    yield {z, z0_hat};
  }
}

export async function* ddim(denoise, z, sigmas, {noise, eta = 0} = {}) {   // z0_hat, old noise and fresh noise
  checkNumber('eta', eta, 0, 1, ' (0 is deterministic, 1 as noisy as ddpm)');
  for (const [s, to] of pairs(sigmas)) {
    const z0_hat = await denoise(z, s);
    const eps = slopeOf(z, z0_hat, s);
    const fresh = eta*to*Math.sqrt(1 - (to/s)**2);
    z = move(z0_hat, Math.sqrt(to**2 - fresh**2), eps);
    if (fresh > 0) z = move(z, fresh, noise(z.length));
    yield {z: finite(z, to), z0_hat};
  }
}

export async function* ddpm(denoise, z, sigmas, {noise} = {}) {   // a step towards z0_hat, then fresh noise
  for (const [s, to] of pairs(sigmas)) {
    const z0_hat = await denoise(z, s);
    z = z.map((v, i) => z0_hat[i] + (to/s)**2*(v - z0_hat[i]));
    if (to > 0) z = move(z, to*Math.sqrt(1 - (to/s)**2), noise(z.length));
    yield {z: finite(z, to), z0_hat};
  }
}

export async function* euler_a(denoise, z, sigmas, {noise} = {}) {   // past the next level, and noise back up to it
  for (const [s, to] of pairs(sigmas)) {
    const z0_hat = await denoise(z, s);
    const down = to**2/s;
    z = move(z, down - s, slopeOf(z, z0_hat, s));
    if (to > 0) z = move(z, Math.sqrt(to**2 - down**2), noise(z.length));
    yield {z: finite(z, to), z0_hat};
  }
}

async function corrected(denoise, z, s, to, slope) {           // the mean of the slopes at both ends of a step
  const there = move(z, to - s, slope);
  return mean(slope, slopeOf(there, await denoise(there, to), to));
}

export async function* heun(denoise, z, sigmas) {              // two calls a step
  for (const [s, to] of pairs(sigmas)) {
    let slope = slopeOf(z, await denoise(z, s), s);
    if (to > 0) slope = await corrected(denoise, z, s, to, slope);
    const z0_hat = move(z, -s, slope);                         // where this slope leads
    z = finite(move(z, to - s, slope), to);
    yield {z, z0_hat};
  }
}

// Weights of the latest slope, of the one before, ... (Adams-Bashforth, exact for equal steps)
const ADAMS = [[1], [3/2, -1/2], [23/12, -16/12, 5/12], [55/24, -59/24, 37/24, -9/24]];

export async function* plms(denoise, z, sigmas) {   // a slope extrapolated from the last four; first step: two calls
  let slopes = [];
  for (const [s, to] of pairs(sigmas)) {
    const first = !slopes.length;
    slopes = [slopeOf(z, await denoise(z, s), s), ...slopes.slice(0, 3)];
    const weights = ADAMS[slopes.length - 1];
    let slope = z.map((_, i) => weights.reduce((sum, w, k) => sum + w*slopes[k][i], 0));
    if (first && to > 0) slope = await corrected(denoise, z, s, to, slope);
    const z0_hat = move(z, -s, slope);                         // where this slope leads
    z = finite(move(z, to - s, slope), to);
    yield {z, z0_hat};
  }
}

export async function* dpmpp_2m(denoise, z, sigmas) {          // towards a z0_hat extrapolated from the last two
  let old = null;                                              // the answer of the step before, and its noise level
  let before = null;
  for (const [s, to] of pairs(sigmas)) {
    const answer = await denoise(z, s);
    const further = old && to > 0 ? Math.log(s/to)/Math.log(before/s)/2 : 0;
    const z0_hat = further ? answer.map((v, i) => v + further*(v - old[i])) : answer;
    z = finite(z.map((v, i) => z0_hat[i] + to/s*(v - z0_hat[i])), to);
    old = answer;
    before = s;
    yield {z, z0_hat};
  }
}

export async function* consistency(denoise, z, sigmas, {noise} = {}) {   // jump, then back up with fresh noise
  for (const [s, to] of pairs(sigmas)) {
    const z0_hat = await denoise(z, s);
    z = to > 0 ? move(z0_hat, to, noise(z.length)) : z0_hat;
    yield {z: finite(z, to), z0_hat};
  }
}

export const SAMPLERS = {ddpm, ddim, plms, euler, euler_a, heun, dpmpp_2m, consistency};
