// What every panel needs: elements, pictures on canvases, checked number fields, and one running job at a time.

export const byId = id => document.getElementById(id)

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...children) // strings become text, never markup
  return made
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...children)
  return made
}

// Short enough to be read aloud, whatever was typed.
export const short = (text, most = 120) => text.length <= most ? text : text.slice(0, most) + '…'

export function later(work, pause) { // waits for a pause in a row of calls
  let timer
  const wait = () => { clearTimeout(timer); timer = setTimeout(work, pause) }
  wait.cancel = () => clearTimeout(timer)
  return wait
}

export const calm = () => matchMedia('(prefers-reduced-motion: reduce)').matches

// --- pictures: RGBA bytes on a canvas; planes of numbers in [-1, 1] for the model

export function paint(canvas, rgba, label) {
  const side = Math.round(Math.sqrt(rgba.length/4))
  const pixels = new ImageData(new Uint8ClampedArray(rgba), side, side)
  if (canvas.width !== side) canvas.width = canvas.height = side
  canvas.getContext('2d', {willReadFrequently: true}).putImageData(pixels, 0, 0)
  if (label) canvas.setAttribute('aria-label', label)
}

export function toPlanes(rgba) { // (h, w, 4) bytes -> (3, h, w) in [-1, 1]
  const n = rgba.length/4
  const x = new Float32Array(3*n)
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) x[c*n + i] = rgba[4*i + c]/127.5 - 1
  return x
}

export function toRgba(x) { // (3, h, w) in [-1, 1] -> (h, w, 4) bytes
  const n = x.length/3
  const rgba = new Uint8ClampedArray(4*n).fill(255)
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) rgba[4*i + c] = (x[c*n + i] + 1)*127.5
  return rgba
}

const RANGE = 3 // latents have unit size: three standard deviations reach from black to white

export function channelRgba(z, k, n = 256) { // channel k of a latent, grey
  const rgba = new Uint8ClampedArray(4*n).fill(255)
  for (let i = 0; i < n; i++) rgba.fill((z[k*n + i]/RANGE + 1)*127.5, 4*i, 4*i + 3)
  return rgba
}

export function showChannels(holder, z, what) { // four small canvases, made once
  if (!holder.children.length) {
    holder.append(element('p', {}, what))
    for (let k = 0; k < 4; k++) {
      const canvas = element('canvas', {width: 16, height: 16, role: 'img'})
      holder.append(element('figure', {}, canvas, element('figcaption', {}, `channel ${k + 1}`)))
    }
  }
  holder.querySelectorAll('canvas').forEach((canvas, k) => {
    const part = z.subarray(256*k, 256*(k + 1))
    const mean = part.reduce((a, b) => a + b, 0)/256
    paint(canvas, channelRgba(z, k), `${what}, channel ${k + 1}: mean ${mean.toFixed(2)}`)
  })
}

// --- number fields: what is wrong is said beside the field, and nothing is sent

export function readNumber(input) { // the number, or null where it will not do
  const [low, high] = [Number(input.min), Number(input.max)]
  const value = input.valueAsNumber
  const whole = 'whole' in input.dataset
  const good = value >= low && value <= high && (!whole || Number.isInteger(value))
  const id = `${input.id}-error`
  let note = byId(id)
  if (!note) {
    note = element('p', {id, class: 'error', role: 'status'})
    input.closest('.field').append(note)
  }
  const wanted = whole && high > 1e6 ? 'A whole number, 0 or more' : `${whole ? 'A whole number' : 'A number'}, ${low} to ${high}`
  note.textContent = good ? '' : `${wanted}, is needed here.`
  if (good) {
    input.removeAttribute('aria-invalid')
    input.removeAttribute('aria-describedby')
    return value
  }
  input.setAttribute('aria-invalid', 'true')
  input.setAttribute('aria-describedby', id)
  return null
}

// --- jobs: the newest wins; the one before is stopped, and none waits in a queue

const megabytes = bytes => (bytes/1e6).toFixed(1)

export class Job {
  constructor(holder, {quiet = false, id} = {}) {
    this.holder = holder
    this.quiet = quiet // announces errors alone
    this.status = element('p', {class: 'status', role: 'status'})
    if (id) this.status.id = id
    this.bar = element('progress', {'aria-label': 'Progress', hidden: ''})
    this.detail = element('p', {class: 'detail'})
    this.stop = element('button', {type: 'button', class: 'stop', hidden: ''}, 'Stop')
    this.stop.addEventListener('click', () => this.cancel('Stopped.'))
    this.again = element('button', {type: 'button', class: 'retry', hidden: ''}, 'Try again')
    holder.append(this.status, this.bar, this.detail, this.stop, this.again)
    this.turn = 0
    this.ended = Promise.resolve()
  }

  async run(work) { // work({signal, job}) -> a sentence about what was done
    const turn = ++this.turn
    this.stopper?.abort()
    await this.ended
    if (turn !== this.turn) return
    this.stopper = new AbortController()
    this.ended = this.attempt(work, this.stopper.signal)
    return this.ended
  }

  cancel(said = '') {
    this.turn++
    this.stopper?.abort()
    this.show('idle', said)
  }

  async attempt(work, signal) {
    this.show('busy', '')
    try {
      const said = await work({signal, job: this})
      if (!signal.aborted) this.show('done', said)
    } catch (error) {
      if (!signal.aborted) this.fail(error, work)
    }
  }

  show(state, text = '') {
    this.holder.dataset.state = state
    this.status.textContent = this.quiet && state !== 'error' ? '' : text
    this.status.classList.toggle('error', state === 'error')
    this.detail.textContent = this.quiet && state === 'done' ? text : ''
    this.bar.hidden = this.stop.hidden = this.again.hidden = true
  }

  say(text) { if (!this.quiet) this.status.textContent = text }

  fail(error, work) {
    this.show('error', error.message || 'Something went wrong, and the browser does not say what.')
    this.again.hidden = ['simd', 'input', 'forgotten'].includes(error.kind) // the same again will not help
    this.again.onclick = () => this.run(work)
  }

  progress(value, of, text) { // text is seen, not announced: it changes often
    this.bar.hidden = false
    this.bar.max = of
    this.bar.value = value
    this.detail.textContent = text
  }

  loading({loaded, total}) {
    this.progress(loaded, total, `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`)
  }

  step({i, of}) {
    this.progress(i + 1, of, `Step ${i + 1} of ${of}`)
    this.stop.hidden = false
  }
}

// --- models: each is loaded once, when first asked for

export class Models {
  constructor(client) {
    this.client = client
    this.loads = new Map()
  }

  async load(job, model, files = []) { // its manifest
    const key = [model, ...files].join()
    if (!this.loads.has(key)) this.loads.set(key, this.fetch(model, files))
    const load = this.loads.get(key)
    const watch = progress => job.loading(progress)
    load.watchers.add(watch)
    try { return (await load.done).manifest }
    catch (error) {
      this.loads.delete(key) // so that another try loads it again
      throw error
    } finally {
      load.watchers.delete(watch)
      job.bar.hidden = true
      job.detail.textContent = ''
    }
  }

  fetch(model, files) {
    const load = {watchers: new Set()}
    const onProgress = progress => load.watchers.forEach(watch => watch(progress))
    load.done = this.client.call('load', {model, files}, {onProgress})
    return load
  }
}
