// Noise levels: which of them a sampler visits, where they lie on the path, and what the network's answer means there.
// Derived in the chapters story/03_diffusion, story/05_samplers and beyond/00_flow.

import {checkNumber, checkWhole, fail} from './errors.js';

export function roundEven(v) {                                 // as Python rounds: 0.5 to 0, 1.5 to 2
  const down = Math.floor(v);
  if (v - down !== .5) return Math.round(v);
  return down % 2 ? down + 1 : down;
}

const range = (n, f) => Array.from({length: n}, (_, i) => f(i));

function samplingSteps(steps, T, spacing) {                    // which t to visit, descending
  const published = () => {
    const stride = Math.floor(T/steps);
    return range(Math.ceil(T/stride), i => i*stride + 1).reverse();
  };
  if (spacing === 'published') {
    const t = published();
    if (t[0] >= T) {
      fail('input',
           `steps is ${steps}: as published this asks for t = ${T}, which does not exist; take another number`);
    }
    return t;
  }
  if (spacing === 'trailing') return range(steps, i => roundEven(T - i*T/steps) - 1);
  if (steps === 1) return [T - 1];
  if (spacing === 'linspace') return range(steps, i => roundEven((T - 1)*(1 - i/(steps - 1))));
  if (steps === T) return range(T, i => T - 1 - i);            // one more would leave the schedule
  if (T % steps === 0) return published();
  return range(steps, i => roundEven(T - 1 - i*(T - 2)/(steps - 1)));
}

function karras(sigma, steps) {   // on a line in sigma^(1/7), from the largest to the smallest
  const first = sigma.at(-1)**(1/7);
  const slope = sigma[0]**(1/7) - first;
  const s = range(steps, i => (first + (steps > 1 ? i/(steps - 1) : 0)*slope)**7);
  s[0] = sigma.at(-1);                                         // both ends to the last digit
  if (steps > 1) s[steps - 1] = sigma[0];
  return s;
}

export const SPACINGS = ['leading', 'trailing', 'linspace', 'published', 'karras'];

// steps + 1 noise levels, descending; the manifest's `sampling` says where they end
export function samplingSigmas(manifest, steps, spacing) {
  const {sigma} = manifest.path;
  const T = sigma.length;
  const sampling = manifest.sampling ?? {};
  const endsInNoise = manifest.path.zero_snr || manifest.path.kind === 'straight';
  spacing ??= sampling.spacing ?? (endsInNoise ? 'trailing' : 'leading');
  if (!SPACINGS.includes(spacing)) fail('input', `spacing is ${spacing}: expected one of ${SPACINGS.join(', ')}`);
  checkWhole('steps', steps, 1, T);
  const earlier = sampling.offset === 0 && spacing === 'leading' && T % steps === 0 && steps > 1 && steps < T ? 1 : 0;
  const s = spacing === 'karras' ? karras(sigma, steps)
    : samplingSteps(steps, T, spacing).map(t => sigma[t - earlier]);
  let end = sampling.final_sigma ?? null;
  if (end === s.at(-1) && end === sigma[0]) return s;          // already there: no step to add
  if (end === null) end = s.at(-1) > sigma[0] ? sigma[0] : 0;
  if (!(end >= 0 && end < s.at(-1))) {
    fail('input', `these ${steps} steps would end at noise level ${end}, above the one before it`);
  }
  return [...s, end];
}

const NEARLY = 1 - 2**-12;                                     // the straight path's largest share of noise

export function sigmaToT({path: {kind, sigma, shift = 1}}, s) {   // clamped to the path; on the grid a whole number
  checkNumber('sigma', s, 0, Infinity);
  const last = sigma.length - 1;
  s = Math.min(Math.max(s, sigma[0]), sigma[last]);
  if (kind === 'straight') {
    const share = s/(1 + s)/NEARLY;
    const t = sigma.length*share/(shift - (shift - 1)*share) - 1;
    const near = roundEven(t);
    return Math.abs(t - near) < 1e-7 ? near : t;
  }
  let low = 0;   // the last step, but for the very last, whose sigma is not above s
  let high = last;
  while (high - low > 1) {
    const middle = low + high >> 1;
    if (sigma[middle] <= s) low = middle;
    else high = middle;
  }
  return low + Math.log(s/sigma[low])/Math.log(sigma[low + 1]/sigma[low]);
}

export function tToSigma({path: {kind, sigma, shift = 1}}, t) {   // between the steps, too
  checkNumber('t', t, 0, sigma.length - 1);
  if (kind === 'straight') {
    const u = (t + 1)/sigma.length;
    const share = NEARLY*shift*u/(1 + (shift - 1)*u);
    return share/(1 - share);
  }
  const low = sigma[Math.floor(t)];
  return low*(sigma[Math.ceil(t)]/low)**(t - Math.floor(t));
}

export const abarOf = sigma => 1/(1 + sigma**2);

export function netInput({path: {kind}}, z_t, abar) {   // as the network is given it: straight, (1 - s) z0 + s eps
  if (kind !== 'straight') return z_t;
  const scale = Math.sqrt(abar) + Math.sqrt(1 - abar);
  return z_t.map(v => v/scale);
}

export function toZ0(predictionType, out, z_t, abar) {         // the clean latent that a network's answer stands for
  const signal = Math.sqrt(abar);
  const noise = Math.sqrt(1 - abar);
  if (predictionType === 'eps') return z_t.map((v, i) => (v - noise*out[i])/signal);
  if (predictionType === 'x0') return out;
  if (predictionType === 'flow') return z_t.map((v, i) => (v - noise*out[i])/(signal + noise));
  if (predictionType === 'v') return z_t.map((v, i) => signal*v - noise*out[i]);
  return fail('arrival', `this page does not know models that predict "${predictionType}". Reload it.`);
}
