// The steps of the last drawing: a strip to choose from, and what the network answered at the chosen one.
import {Job, byId, element, paint, short, showChannels, svg} from '../ui.js'

const MOST = 50 // steps in the strip; of more, some are left out

export function start(app) {
  const job = new Job(byId('steps-job'))
  const background = new Job(element('div'), {quiet: true}) // fills the upper row
  const strip = byId('strip')
  let inside = new Map() // step -> what the network answered there
  let chosen = null
  let inView = false

  byId('steps-draw').addEventListener('click', () => app.draw(job))

  app.addEventListener('drawn', () => {
    inside = new Map()
    const {levels, caption, guidance} = app.drawing
    byId('steps-of').textContent = `Of “${short(caption)}”, guidance ${guidance}.`
    byId('steps-draw').textContent = 'Draw it again'
    const at = picked(levels.length)
    strip.replaceChildren(strip.firstElementChild, ...at.map(k => option(k, levels[k], levels.length)))
    strip.hidden = false
    byId('inside').hidden = true
    chosen = null
    fill()
  })

  strip.addEventListener('change', event => {
    chosen = Number(event.target.value)
    background.cancel()
    job.run(async ({signal, job}) => {
      job.say('Looking inside …')
      const {drawing} = app
      if (!inside.has(chosen)) inside.set(chosen, await app.client.call('inspect', {handle: drawing.handle, step: chosen}, {signal}))
      if (signal.aborted || drawing !== app.drawing) return ''
      open(drawing, chosen, inside.get(chosen))
      fill()
      return ''
    })
  })
  byId('word').addEventListener('change', () => showAttention(inside.get(chosen), chosen))

  function fill() { // the upper row, one step after another, while the strip is seen
    if (!app.drawing || !inView) return
    const {handle, levels} = app.drawing
    background.run(async ({signal}) => {
      for (const step of picked(levels.length)) {
        const canvas = byId(`z-${step}`)
        if (canvas.dataset.painted) continue
        const {pictures} = await app.client.call('inspect', {handle, step, ask: false}, {signal})
        if (signal.aborted) return ''
        paint(canvas, pictures.z_t)
        canvas.dataset.painted = true
      }
      return ''
    })
  }

  new IntersectionObserver(entries => {
    inView = entries.at(-1).isIntersecting
    if (inView) fill()
    else background.cancel()
  }).observe(strip)
}

const picked = n => n <= MOST
  ? [...Array(n).keys()] : [...Array(MOST).keys()].map(k => Math.round(k*(n - 1)/(MOST - 1)))

function option(k, {sigma, preview}, n) { // radio buttons: arrow keys come with them
  const name = `Step ${k + 1} of ${n}, sigma ${sigma.toFixed(2)}`
  const input = element('input', {type: 'radio', name: 'step', value: k, 'aria-label': name})
  const above = element('canvas', {id: `z-${k}`, width: 64, height: 64, 'aria-hidden': 'true'})
  const below = element('canvas', {width: 64, height: 64, 'aria-hidden': 'true'})
  if (preview) paint(below, preview)
  return element('label', {}, input, above, below, element('span', {'aria-hidden': 'true'}, String(k + 1)))
}

function open(drawing, step, answer) {
  byId('inside').hidden = false
  byId('inside-title').textContent =
    `Step ${step + 1} of ${drawing.levels.length}: sigma ${answer.sigma.toFixed(2)}, t ${Math.round(answer.t)}`
  showChannels(byId('channels-z'), answer.z_t, 'z_t')
  showChannels(byId('channels-z0'), answer.z0_hat, 'z0_hat')
  showArrows(answer, drawing.guidance)
  showWords(answer)
  showAttention(answer, step)
}

// --- the two answers, in the plane through them and z_t

const minus = (a, b) => a.map((v, i) => v - b[i])
const dot = (a, b) => a.reduce((sum, v, i) => sum + v*b[i], 0)
const size = a => Math.sqrt(dot(a, a))

export function project({z_t, uncond, cond}, w) { // z_t at 0, the unconditional answer on the x axis
  const [z, u, c] = [z_t, uncond, cond].map(a => Array.from(a))
  const along = minus(u, z)
  const length = size(along)
  const axis = along.map(v => v/(length || 1))
  const apart = minus(c, u)
  const x = dot(apart, axis)
  const y = size(apart.map((v, i) => v - x*axis[i]))
  return {u: [length, 0], c: [length + x, y], g: [length + w*x, w*y],
          lengths: {u: length, c: Math.hypot(length + x, y), apart: size(apart)}}
}

function showArrows(answer, w) {
  const holder = byId('arrows')
  const text = byId('arrows-text')
  if (!answer.uncond || !answer.cond) {
    holder.replaceChildren()
    text.textContent = 'This model gives one answer a step, so there are not two to compare.'
    return
  }
  const {u, c, g, lengths} = project(answer, w)
  const far = Math.max(u[0], Math.abs(g[1]), 1e-6)
  const near = Math.max(Math.hypot(g[0] - u[0], g[1] - u[1]), lengths.apart, 1e-6)
  const whole = {points: {z_t: [0, 0], u, c, g}, span: 1.1*Math.max(far, Math.abs(g[0])), from: 'z_t', title: 'From z_t'}
  const close = {points: {u, c, g}, span: 1.2*near, from: 'u', title: `The answers alone, ${(whole.span/near/1.2).toFixed(1)} times larger`}
  const worth = whole.span > 2.5*close.span // of a second look
  holder.replaceChildren(...(worth ? [whole, close] : [whole]).map(plot))
  text.textContent = `From z_t the unconditional answer is ${lengths.u.toFixed(1)} away, the conditional one ` +
    `${lengths.c.toFixed(1)}. The two are ${lengths.apart.toFixed(2)} apart; guidance ${w} goes ${w} times as far: ` +
    `${(Math.abs(w)*lengths.apart).toFixed(2)}.`
}

const NAMES = {z_t: 'z_t', u: 'unconditional', c: 'conditional', g: 'guided'}

function plot({points, span, from, title}) { // equal scales on both axes, so that angles are true
  const xs = Object.values(points).map(p => p[0])
  const ys = Object.values(points).map(p => p[1])
  const middle = list => (Math.min(...list) + Math.max(...list))/2
  const scale = 180/span // beside the points there is room for their names
  const at = ([x, y]) => [120 + scale*(x - middle(xs)), 110 - scale*(y - middle(ys))]
  const start = at(points[from])
  const drawn = svg('svg', {viewBox: '0 0 300 220', 'aria-hidden': 'true'})
  for (const name of ['g', 'c', 'u']) {
    if (name === from) continue
    const [begin, end] = [name === 'g' ? at(points.u) : start, at(points[name])]
    if (Math.hypot(end[0] - begin[0], end[1] - begin[1]) > 1) drawn.append(arrow(begin, end, name))
  }
  Object.keys(points).forEach(name => {
    const [x, y] = at(points[name])
    drawn.append(svg('circle', {cx: x, cy: y, r: 4, class: `dot ${name}`}))
  })
  drawn.append(...labels(points, at))
  return element('figure', {}, drawn, element('figcaption', {}, title))
}

function arrow([x0, y0], [x1, y1], name) {
  const turn = Math.atan2(y1 - y0, x1 - x0)
  const tip = side => `${x1 - 9*Math.cos(turn + side)},${y1 - 9*Math.sin(turn + side)}`
  return svg('g', {class: `arrow ${name}`},
    svg('line', {x1: x0, y1: y0, x2: x1, y2: y1}),
    svg('polyline', {points: `${tip(.4)} ${x1},${y1} ${tip(-.4)}`}))
}

function labels(points, at) { // beside their points, pushed apart where they would lie on each other
  const placed = Object.keys(points).map(name => ({name, x: at(points[name])[0], y: at(points[name])[1] + 4}))
  const start = placed.find(label => label.name === 'z_t')
  if (start) Object.assign(start, {x: start.x - 14, y: start.y - 14}) // its right is full of arrows
  const others = placed.filter(label => label !== start).sort((a, b) => a.y - b.y)
  others.forEach((label, k) => {
    if (k) label.y = Math.max(label.y, others[k - 1].y + 15)
  })
  return placed.map(({name, x, y}) => svg('text', {x: x + 10, y, class: name}, NAMES[name]))
}

// --- attention of a word, over the picture

const SPECIAL = ['[PAD]', '[CLS]', '[SEP]']

function showWords({tokens, attention}) {
  const select = byId('word')
  const before = Number(select.value)
  const named = select.selectedOptions[0]?.textContent
  const words = attention ? (tokens ?? []).map((word, k) => [word, k]).filter(([word]) => !SPECIAL.includes(word)) : []
  select.replaceChildren(...words.map(([word, k]) => element('option', {value: k}, word)))
  const find = fits => words.find(([word, k]) => fits(word, k))
  const again = find((word, k) => word === named && k === before) ?? find(word => word === named) ??
    find(word => word === 'house') ?? words[0]
  if (again) select.value = again[1]
}

function showAttention(answer, step) {
  const token = Number(byId('word').value)
  const {attention} = answer
  const text = byId('attention-text')
  if (!attention || byId('word').value === '') {
    text.textContent = 'There is no word to look for.'
    return
  }
  const map = attention.subarray(256*token, 256*(token + 1))
  const [least, most] = [Math.min(...map), Math.max(...map)]
  const word = byId('word').selectedOptions[0].textContent
  const where = map.indexOf(most)
  paint(byId('attention'), overlay(answer.pictures.z0_hat, map, least, most), `Attention of “${word}” over step ${step + 1}`)
  byId('scale-least').textContent = least.toFixed(3)
  byId('scale-most').textContent = most.toFixed(3)
  text.textContent = `“${word}” is attended to most at ${spot(where)}: ${most.toFixed(3)} of the attention there.`
}

function spot(k) {
  const [row, column] = [Math.floor(k/16), k % 16]
  const third = (v, names) => names[Math.floor(v/16*3)]
  return `${third(row, ['the top', 'the middle', 'the bottom'])}, ${third(column, ['left', 'centre', 'right'])}`
}

function overlay(picture, map, least, most) { // grey picture, warm where the attention is
  const out = new Uint8ClampedArray(64*64*4).fill(255)
  for (let i = 0; i < 64*64; i++) {
    const share = (map[16*Math.floor(i/256) + Math.floor(i % 64/4)] - least)/(most - least || 1)
    const grey = .3*picture[4*i] + .59*picture[4*i + 1] + .11*picture[4*i + 2]
    const heat = [255, 140, 0]
    for (let k = 0; k < 3; k++) out[4*i + k] = .7*grey*(1 - share) + heat[k]*share
  }
  return out
}
