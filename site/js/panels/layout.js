// Boxes drawn by pointer, by keys or by numbers, and the picture that the layout model makes of them.
import {Job, byId, calm, element, later, paint, svg} from '../ui.js'

const MODEL = 'postcards-layout'
const CLASSES = ['sky', 'sun', 'moon', 'cloud', 'mountain', 'ground', 'lake', 'tree', 'house']
const MOST = 16 // boxes that the model takes
const STEP = 1/32 // the model's grid
const LEAST = 2*STEP // sides below are a slip of the hand
const SIDES = ['left', 'top', 'right', 'bottom']

const clip = (v, low = 0, high = 1) => Math.min(high, Math.max(low, v))

export function start(app) {
  const board = byId('boxes')
  const list = byId('box-list')
  const job = new Job(byId('layout-job'))
  let boxes = [['sun', .6, .07, .72, .19], ['lake', .25, .81, .8, .98], ['house', .08, .35, .39, .62], ['tree', .62, .4, .78, .69]]
  let drag = null
  let wanted = false
  let seed = 0

  byId('box-class').append(...options('house'))

  // --- what changes
  const redraw = later(() => { if (wanted && !drag) draw() }, 400) // a box in the making may have no size yet

  function changed({many = false} = {}) {
    many ? rebuild() : refresh()
    redraw()
  }

  function add(box) {
    if (boxes.length === MOST) {
      job.show('idle', `${MOST} boxes are the most that the model takes.`)
      return false
    }
    boxes.push(box)
    changed({many: true})
    return true
  }

  function remove(k) {
    boxes.splice(k, 1)
    changed({many: true})
    const next = board.children[Math.min(k, boxes.length - 1)] ?? byId('add-box')
    next.focus()
  }

  function move(k, dx, dy) {
    const [name, x0, y0, x1, y1] = boxes[k]
    dx = clip(dx, -x0, 1 - x1)
    dy = clip(dy, -y0, 1 - y1)
    boxes[k] = [name, x0 + dx, y0 + dy, x1 + dx, y1 + dy]
    changed()
  }

  function resize(k, dx, dy) {
    const [name, x0, y0, x1, y1] = boxes[k]
    boxes[k] = [name, x0, y0, clip(x1 + dx, x0 + LEAST), clip(y1 + dy, y0 + LEAST)]
    changed()
  }

  // --- the board and the list
  function rebuild() {
    board.replaceChildren(...boxes.map((_, k) => shape(k)))
    list.replaceChildren(...boxes.map((_, k) => row(k)))
    refresh()
  }

  function refresh() {
    boxes.forEach(([name, x0, y0, x1, y1], k) => {
      const group = board.children[k]
      const [body, handle, text] = group.children
      set(body, {x: 64*x0, y: 64*y0, width: 64*(x1 - x0), height: 64*(y1 - y0)})
      set(handle, {x: 64*x1 - 3, y: 64*y1 - 3})
      set(text, {x: 64*x0 + 1.2, y: 64*y0 + 4.8})
      text.textContent = name
      group.setAttribute('aria-label', `${name}: ${SIDES.map((side, i) => `${side} ${percent(boxes[k][i + 1])}`).join(', ')}`)
      group.setAttribute('class', `box class-${CLASSES.indexOf(name)}`)
      const fields = list.children[k].querySelectorAll('input, select')
      fields[0].value = name
      SIDES.forEach((_, i) => {
        if (document.activeElement !== fields[i + 1]) fields[i + 1].value = percent(boxes[k][i + 1])
      })
    })
  }

  function shape(k) {
    const group = svg('g', {tabindex: 0, role: 'button', 'aria-describedby': 'boxes-help'},
      svg('rect', {class: 'body'}), svg('rect', {class: 'handle', width: 3, height: 3}), svg('text'))
    group.addEventListener('keydown', event => {
      const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key]
      if (way) (event.shiftKey ? resize : move)(k, way[0]*STEP, way[1]*STEP)
      else if (event.key === 'Delete' || event.key === 'Backspace') remove(k)
      else return
      event.preventDefault()
    })
    return group
  }

  function row(k) {
    const what = element('select', {'aria-label': `Class of box ${k + 1}`})
    what.append(...options(boxes[k][0]))
    what.addEventListener('change', () => {
      boxes[k][0] = what.value
      changed()
    })
    const fields = SIDES.map((side, i) => {
      const input = element('input', {type: 'number', min: 0, max: 100, step: 1, 'aria-label': `${side} of box ${k + 1}, percent`})
      input.addEventListener('change', () => type(k, i + 1, input))
      return element('td', {}, input)
    })
    const out = element('button', {type: 'button', 'aria-label': `Remove box ${k + 1}`}, '×')
    out.addEventListener('click', () => remove(k))
    return element('tr', {}, element('td', {}, what), ...fields, element('td', {}, out))
  }

  function type(k, side, input) { // a side as a number: the opposite one stays
    const box = boxes[k]
    const given = input.valueAsNumber/100
    const value = Number.isNaN(given) ? box[side] : clip(given)
    if (side < 3) box[side] = Math.min(value, box[side + 2] - LEAST)
    else box[side] = Math.max(value, box[side - 2] + LEAST)
    box[side] = clip(box[side])
    input.value = percent(box[side])
    changed()
  }

  // --- the pointer
  const at = event => {
    const place = board.getBoundingClientRect()
    return [clip((event.clientX - place.left)/place.width), clip((event.clientY - place.top)/place.height)]
  }
  board.addEventListener('pointerdown', event => {
    event.preventDefault()
    if (event.button) return
    const [x, y] = at(event)
    const group = event.target.closest('g')
    if (group) drag = {k: [...board.children].indexOf(group), how: event.target.matches('.handle') ? 'resize' : 'move'}
    else if (add([byId('box-class').value, x, y, x, y])) drag = {k: boxes.length - 1, how: 'make', from: [x, y]}
    else return
    drag.last = [x, y]
    board.setPointerCapture(event.pointerId)
    board.children[drag.k].focus({preventScroll: true})
  })
  board.addEventListener('pointermove', event => {
    if (!drag) return
    const [x, y] = at(event)
    const [dx, dy] = [x - drag.last[0], y - drag.last[1]]
    drag.last = [x, y]
    if (drag.how === 'move') move(drag.k, dx, dy)
    else if (drag.how === 'resize') resize(drag.k, dx, dy)
    else {
      const [a, b] = drag.from
      boxes[drag.k] = [boxes[drag.k][0], Math.min(a, x), Math.min(b, y), Math.max(a, x), Math.max(b, y)]
      changed()
    }
  })
  const drop = () => {
    if (drag?.how === 'make') {
      const [, x0, y0, x1, y1] = boxes[drag.k]
      if (x1 - x0 < LEAST || y1 - y0 < LEAST) { // a click
        boxes.splice(drag.k, 1)
        changed({many: true})
      }
    }
    if (drag) redraw()
    drag = null
  }
  board.addEventListener('pointerup', drop)
  board.addEventListener('pointercancel', drop)

  // --- the buttons
  byId('add-box').addEventListener('click', () => {
    if (add([byId('box-class').value, .375, .4375, .625, .6875])) board.lastElementChild.focus()
  })
  byId('clear-boxes').addEventListener('click', () => {
    boxes = []
    changed({many: true})
  })
  byId('draw-layout').addEventListener('click', () => {
    if (wanted) seed++
    wanted = true
    draw()
  })

  function draw() {
    if (!boxes.length) {
      job.cancel('There is no box yet: add one.')
      return
    }
    const prompt = boxes.map(box => [...box])
    job.run(async ({signal, job}) => {
      job.say('Drawing …')
      await app.models.load(job, MODEL)
      if (signal.aborted) return ''
      const options = {model: MODEL, prompt, seed, steps: 12, guidance: 3, sampler: 'dpmpp_2m', previews: true, keep: false}
      const onStep = step => {
        job.step(step)
        if (step.preview && !calm()) paint(byId('layout-picture'), step.preview)
      }
      const {pixels} = await app.client.call('sample', options, {onStep, signal})
      paint(byId('layout-picture'), pixels, `The picture of ${prompt.map(box => box[0]).join(', ')}`)
      return `Drawn from ${prompt.length} ${prompt.length === 1 ? 'box' : 'boxes'}, seed ${seed}. Draw again for another.`
    })
  }

  rebuild()
  job.show('idle', 'Choose “Draw the boxes”: the model is loaded first.')
}

const percent = v => Math.round(100*v)

const set = (shape, attributes) => {
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value)
}

const options = chosen => CLASSES.map(name => {
  const option = element('option', {value: name}, name)
  option.selected = name === chosen
  return option
})
