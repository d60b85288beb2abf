// The first stage: encode a picture, disturb a channel of its latent, decode.
import {Chooser} from '../pictures.js'
import {Job, byId, later, paint, showChannels, toPlanes, toRgba} from '../ui.js'

const MODEL = 'postcards-text'
const N = 256 // positions of a channel

const RANGES = {add: [-3, 3, .1], blank: [0, 100, 1], shuffle: [0, 100, 1]} // low, high, step

export function start(app, shown) {
  const job = new Job(byId('firststage-job'))
  const [channel, how, amount] = ['channel', 'disturb', 'amount'].map(byId)
  let picture = null
  let encoded = null // {of: picture, z}
  let wanted = false

  const update = later(() => {
    if (!picture || !wanted) return
    job.run(async ({signal, job}) => {
      await app.models.load(job, MODEL, ['encoder'])
      if (signal.aborted) return ''
      if (encoded?.of !== picture) {
        const of = picture
        encoded = {of, z: (await app.client.call('encode', {model: MODEL, x: of.slice()}, {signal})).z}
      }
      const z = disturbed(encoded.z, Number(channel.value), how.value, Number(amount.value))
      showChannels(byId('firststage-channels'), z, 'Latent')
      const {pixels, x} = await app.client.call('decode', {model: MODEL, z}, {signal})
      if (signal.aborted) return ''
      paint(byId('firststage-decoded'), pixels, 'The latent, decoded')
      const off = difference(picture, x)
      paint(byId('firststage-difference'), toRgba(off.x), 'Where the decoded picture differs')
      return `Decoded and picture differ by ${off.mean.toFixed(3)} on average; black to white is 2.`
    })
  }, 30)

  const range = () => {
    const [min, max, step] = RANGES[how.value]
    Object.assign(amount, {min, max, step, value: 0})
    tell()
  }
  const tell = () => {
    byId('amount-value').textContent = how.value === 'add' ? amount.value : `${amount.value} %`
  }
  const touch = () => {
    wanted = true
    tell()
    update()
  }
  channel.addEventListener('change', touch)
  how.addEventListener('change', () => {
    range()
    touch()
  })
  amount.addEventListener('input', touch)
  range()
  job.show('idle', 'Move the slider: the model is loaded first.')

  const chooser = new Chooser(byId('firststage-chooser'), (rgba, caption) => {
    picture = toPlanes(rgba)
    paint(byId('firststage-picture'), rgba, `The picture: ${caption}`)
    if (chooser.ready) wanted = true
    update()
  })
  if (shown) chooser.start().then(() => { chooser.ready = true })
}

export function disturbed(z, channel, how, amount) { // a copy
  const out = z.slice()
  const part = out.subarray(channel*N, (channel + 1)*N)
  if (how === 'add') part.forEach((v, i) => { part[i] = v + amount })
  if (how === 'blank') part.forEach((v, i) => { part[i] = v*(1 - amount/100) })
  if (how === 'shuffle') shuffle(part, Math.round(N*amount/100))
  return out
}

function shuffle(part, n) { // n swaps, always the same ones, so that the slider goes back and forth
  let state = 1
  const random = () => (state = state*48271 % 2147483647)/2147483647
  for (let k = 0; k < n; k++) {
    const [i, j] = [Math.floor(random()*N), Math.floor(random()*N)]
    ;[part[i], part[j]] = [part[j], part[i]]
  }
}

function difference(a, b) { // as a picture: black is none, white is half of black to white or more
  const x = new Float32Array(a.length)
  let sum = 0
  for (let i = 0; i < a.length; i++) {
    const off = Math.abs(a[i] - Math.max(-1, Math.min(1, b[i])))
    sum += off
    x[i] = Math.min(1, 2*off - 1)
  }
  return {x, mean: sum/a.length}
}
