// What the explainer's modules answer to the questions of test_explainer_core.py: reads and writes JSON.
import fs from 'node:fs';
import {ItemNoise} from '../../site/js/rng.js';
import {SAMPLERS} from '../../site/js/samplers.js';
import {netInput, samplingSigmas, sigmaToT, toZ0, tToSigma} from '../../site/js/schedule.js';
import {Tokenizer} from '../../site/js/text.js';

const orError = f => {
  try {
    return f();
  } catch (e) {
    return {error: e.message, kind: e.kind ?? 'none'};
  }
};

async function trajectory({sampler, start, sigmas, eta, noise}) {
  const left = noise.map(list => Float64Array.from(list));
  const denoise = async (z, sigma) => z.map(v => v/(1 + sigma**2) + .1*Math.tanh(v/Math.sqrt(1 + sigma**2)));
  const path = [];
  const options = {noise: () => left.shift(), eta};
  for await (const {z, z0_hat} of SAMPLERS[sampler](denoise, Float64Array.from(start), sigmas, options)) {
    path.push([Array.from(z), Array.from(z0_hat)]);
  }
  return path;
}

const ANSWERS = {
  noise: asked => asked.map(({seed, item, lengths}) => orError(() => {
    const noise = new ItemNoise(seed, item);
    return lengths.map(n => Array.from(noise.normal(n)));
  })),
  captions: ({condition, captions}) => {
    const tokenizer = new Tokenizer(condition);
    return captions.map(c => ({...tokenizer.encode(c), words: tokenizer.words(c)}));
  },
  letters: ({condition, letters}) => letters.map(c => new Tokenizer(condition).words(`a${String.fromCodePoint(c)}b`)),
  levels: ({manifest, asked}) => asked.map(({steps, sampling}) => orError(
    () => samplingSigmas({...manifest, sampling}, steps))),
  times: asked => asked.map(({manifest, sigmas, times}) => ({
    t: sigmas.map(s => orError(() => sigmaToT(manifest, s))),
    sigma: times.map(t => orError(() => tToSigma(manifest, t))),
  })),
  guesses: asked => asked.map(({manifest, out, z_t, abar}) => {
    const [a, b] = [out, z_t].map(list => Float64Array.from(list));
    return [toZ0(manifest.prediction_type, a, b, abar), netInput(manifest, b, abar)].map(v => Array.from(v));
  }),
  trajectories: asked => Promise.all(asked.map(trajectory)),
};

const [, , questions, answers] = process.argv;
const found = {};
for (const [what, asked] of Object.entries(JSON.parse(fs.readFileSync(questions)))) {
  found[what] = await ANSWERS[what](asked);
}
fs.writeFileSync(answers, JSON.stringify(found));
