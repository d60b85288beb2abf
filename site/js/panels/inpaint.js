// Paint a mask over a picture, and have the model fill it.
import {Chooser} from '../pictures.js'
import {Job, byId, calm, paint, toPlanes} from '../ui.js'

const MODEL = 'postcards-inpaint'
const SIDE = 64
// few steps, fresh noise in each: no sampler or guidance that was tried came nearer to the true picture
const HOW = {steps: 20, guidance: 1, sampler: 'ddpm'}

const clip = v => Math.min(SIDE - 1, Math.max(0, v))

export function start(app, shown) {
  const canvas = byId('mask')
  const job = new Job(byId('inpaint-job'))
  let picture = null // RGBA
  let mask = new Uint8Array(SIDE*SIDE)
  let brush = null // [x, y] of the keys' brush, while the canvas has the focus
  let last = null // where the pointer was
  let seed = 0

  function show() {
    if (!picture) return
    const out = picture.slice()
    for (let i = 0; i < mask.length; i++) if (mask[i]) hatch(out, i)
    if (brush) ring(out, brush, radius())
    paint(canvas, out)
  }

  function tell() {
    const share = mask.reduce((a, b) => a + b, 0)/mask.length
    byId('mask-text').textContent = `${Math.round(100*share)} % is to be filled.`
  }

  const radius = () => Number(byId('brush').value)/2 + .5

  function dab([x, y], value) {
    const r = radius()
    for (let v = Math.floor(clip(y - r)); v <= clip(y + r); v++) {
      for (let u = Math.floor(clip(x - r)); u <= clip(x + r); u++) {
        if ((u + .5 - x)**2 + (v + .5 - y)**2 <= r*r) mask[v*SIDE + u] = value
      }
    }
  }

  // --- the pointer
  const at = event => {
    const place = canvas.getBoundingClientRect()
    return [SIDE*(event.clientX - place.left)/place.width, SIDE*(event.clientY - place.top)/place.height]
  }
  const value = event => byId('erase').checked || event.buttons === 2 ? 0 : 1
  function stroke(event) {
    const to = at(event)
    const n = Math.max(1, Math.ceil(2*Math.hypot(to[0] - last[0], to[1] - last[1])))
    for (let k = 1; k <= n; k++) dab([0, 1].map(i => last[i] + (to[i] - last[i])*k/n), value(event))
    last = to
    show()
  }
  canvas.addEventListener('pointerdown', event => {
    event.preventDefault()
    canvas.setPointerCapture(event.pointerId)
    canvas.focus({preventScroll: true})
    brush = null
    last = at(event)
    stroke(event)
  })
  canvas.addEventListener('pointermove', event => { if (last) stroke(event) })
  const drop = () => {
    last = null
    tell()
  }
  canvas.addEventListener('pointerup', drop)
  canvas.addEventListener('pointercancel', drop)
  canvas.addEventListener('contextmenu', event => event.preventDefault())

  // --- the keys
  canvas.addEventListener('keydown', event => {
    const way = {ArrowLeft: [-2, 0], ArrowRight: [2, 0], ArrowUp: [0, -2], ArrowDown: [0, 2]}[event.key]
    const rubs = ['Delete', 'Backspace'].includes(event.key)
    if (!way && !rubs && event.key !== ' ') return
    event.preventDefault()
    brush ??= [SIDE/2, SIDE/2]
    if (way) brush = [clip(brush[0] + way[0]), clip(brush[1] + way[1])]
    else dab(brush, rubs || byId('erase').checked ? 0 : 1)
    show()
    tell()
  })
  canvas.addEventListener('focus', () => {
    if (canvas.matches(':focus-visible')) brush ??= [SIDE/2, SIDE/2]
    show()
  })
  canvas.addEventListener('blur', () => {
    brush = null
    show()
  })

  // --- the buttons
  byId('clear-mask').addEventListener('click', () => {
    mask = new Uint8Array(SIDE*SIDE)
    show()
    tell()
  })
  byId('fill').addEventListener('click', fill)
  byId('fill-again').addEventListener('click', () => {
    seed++
    fill()
  })

  function fill() {
    if (!picture) return job.cancel('Choose a picture first.')
    if (!mask.some(Boolean)) return job.cancel('There is no hole yet: paint one.')
    const prompt = {image: toPlanes(picture), mask: mask.slice()}
    const hole = Math.round(100*mask.reduce((a, b) => a + b, 0)/mask.length)
    job.run(async ({signal, job}) => {
      job.say('Filling …')
      await app.models.load(job, MODEL, ['encoder'])
      if (signal.aborted) return ''
      const options = {model: MODEL, prompt, seed, ...HOW, previews: true, keep: false}
      const onStep = step => {
        job.step(step)
        if (step.preview && !calm()) paint(byId('filled'), step.preview)
      }
      const {pixels} = await app.client.call('sample', options, {onStep, signal})
      paint(byId('filled'), pixels, `The picture with ${hole} percent of it filled by the model`)
      return `Filled ${hole} % of the picture, seed ${seed}.`
    })
  }

  const chooser = new Chooser(byId('inpaint-chooser'), rgba => {
    picture = rgba
    show()
    tell()
    const filled = byId('filled') // what is there is of another picture
    filled.getContext('2d').clearRect(0, 0, SIDE, SIDE)
    filled.setAttribute('aria-label', 'Nothing filled yet')
    job.cancel('Paint a hole, then choose Fill.')
  })
  startMask()
  if (shown) chooser.start()

  function startMask() { // a hole to begin with
    for (let y = 28; y < 52; y++) for (let x = 20; x < 44; x++) mask[y*SIDE + x] = 1
  }
}

function hatch(rgba, i) { // stripes, so that it is not told by colour alone
  const stripe = (i % SIDE + Math.floor(i/SIDE)) % 4 < 2
  const colour = stripe ? [255, 0, 200] : [40, 0, 40]
  for (let k = 0; k < 3; k++) rgba[4*i + k] = .25*rgba[4*i + k] + .75*colour[k]
}

function ring(rgba, [x, y], r) { // the brush: dark and light pixels in turn
  const n = Math.max(12, Math.ceil(7*r))
  for (let k = 0; k < n; k++) {
    const [u, v] = [x + r*Math.cos(2*Math.PI*k/n), y + r*Math.sin(2*Math.PI*k/n)].map(Math.floor)
    if (u < 0 || v < 0 || u >= SIDE || v >= SIDE) continue
    const i = 4*(v*SIDE + u)
    rgba.fill(k % 2 ? 255 : 0, i, i + 3)
  }
}
