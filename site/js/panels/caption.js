// Type a caption: the fast model draws at every pause, the full one when asked.
import {Tokenizer} from '../text.js'
import {Job, byId, calm, element, later, paint, readNumber, short} from '../ui.js'

const FAST = 'postcards-text-fast'
const FULL = 'postcards-text'
const PAUSE = 60 // ms without a key

// What is left of the vocabulary is offered as other words.
const KINDS = {
  Time: 'dawn sunrise noon midday dusk sunset night stars',
  Season: 'spring blossoming summer green autumn golden winter snowy',
  House: 'house red yellow blue white without',
  'How many': 'no one two three four',
  'What else': 'tree trees mountains clouds lake',
  Place: 'hill landscape postcard',
}

export function start(app, shown) {
  const field = byId('caption')
  const note = byId('caption-note')
  const job = new Job(byId('caption-job'), {id: 'status'})
  const fastJob = new Job(byId('fast-job'), {quiet: true})
  let tokenizer
  let latest // {caption, ...}: the last answer of the tokenizer, which is slow for a long caption

  const encode = caption => {
    if (latest?.caption !== caption) latest = {caption, ...tokenizer.encode(caption)}
    return latest
  }

  const asked = () => { // what the model gets; null: nothing to draw
    if (!field.value.trim()) return null
    return tokenizer ? encode(field.value).fits : field.value
  }

  function tell() { // of an empty caption, of words the model has never seen, of a caption too long
    const said = []
    if (!field.value.trim()) said.push('The caption is empty: type what to draw.')
    else if (tokenizer) {
      const {n, tooLong, fits, unknown} = encode(field.value)
      const words = [...new Set(unknown)]
      if (words.length) {
        const some = words.slice(0, 8).map(word => `“${short(word, 24)}”`).join(', ')
        const more = words.length > 8 ? ` and ${words.length - 8} more` : ''
        said.push(`Unknown to the model: ${some}${more}. What they do to the picture is chance.`)
      }
      if (tooLong) said.push(`This caption has ${n} tokens, too many: the model reads it up to “…${fits.trim().slice(-30)}”.`)
    }
    const text = said.join(' ')
    if (note.textContent !== text) note.textContent = text
    note.classList.toggle('marked', Boolean(text))
  }

  function drawFast() {
    const caption = asked()
    tell()
    if (!caption) return fastJob.cancel()
    fastJob.run(async ({signal, job}) => {
      const manifest = await app.models.load(job, FAST)
      if (!tokenizer) {
        tokenizer = new Tokenizer(manifest.condition)
        offerWords(tokenizer, manifest.condition.vocab, field)
        tell()
      }
      if (signal.aborted) return ''
      const steps = Math.max(...manifest.fast.steps)
      const options = {model: FAST, prompt: asked() ?? caption, seed: readNumber(byId('seed')) ?? 0, steps,
                       sampler: 'consistency', previews: false, keep: false}
      const {pixels, seconds} = await app.client.call('sample', options, {signal})
      const canvas = byId('fast-picture')
      paint(canvas, pixels, `The fast model's picture of: ${short(field.value)}`)
      canvas.dataset.drawn = field.value
      return `${steps} steps, ${seconds.toFixed(2)} s`
    })
  }

  app.draw = job => { // the full model's drawing; job: whose line tells of it
    const [steps, guidance, seed] = ['steps', 'guidance', 'seed'].map(id => readNumber(byId(id)))
    const bad = document.querySelector('#caption-form [aria-invalid]')
    tell()
    if (!field.value.trim() || bad) return (bad ?? field).focus()
    const caption = field.value
    const sampler = byId('sampler').value
    pause.cancel()
    job.run(async ({signal, job}) => {
      job.say('Drawing …')
      const manifest = await app.models.load(job, FULL)
      if (signal.aborted) return ''
      tokenizer ??= new Tokenizer(manifest.condition)
      const prompt = encode(caption).fits
      const options = {model: FULL, prompt, seed, steps, guidance, sampler, previews: true, keep: true}
      const levels = []
      const onStep = step => {
        levels.push(step)
        job.step(step)
        if (step.preview && !calm()) paint(byId('picture'), step.preview)
      }
      const began = performance.now()
      const result = await app.client.call('sample', options, {onStep, signal})
      const seconds = (performance.now() - began)/1000
      paint(byId('picture'), result.pixels, `The full model's picture of: ${short(caption)}`)
      byId('picture').dataset.drawn = caption
      byId('picture').dataset.seconds = seconds.toFixed(2)
      app.drawing = {handle: result.handle, levels, caption, guidance, prompt}
      app.dispatchEvent(new Event('drawn'))
      return `Drawn in ${seconds.toFixed(1)} seconds: ${steps} ${steps === 1 ? 'step' : 'steps'} of ${sampler}, guidance ${guidance}, seed ${seed}.`
    })
  }

  const pause = later(drawFast, PAUSE)
  field.addEventListener('input', pause)
  for (const id of ['steps', 'guidance', 'seed']) byId(id).addEventListener('input', () => readNumber(byId(id)))
  byId('seed').addEventListener('input', pause)
  byId('new-seed').addEventListener('click', () => {
    byId('seed').value = Math.floor(Math.random()*1e6)
    readNumber(byId('seed'))
    pause()
  })
  byId('caption-form').addEventListener('submit', event => {
    event.preventDefault()
    app.draw(job)
  })
  if (!shown) return
  if (!app.only) {
    field.focus({preventScroll: true})
    field.select()
  }
  drawFast()
}

function offerWords(tokenizer, vocab, field) {
  const whole = vocab.filter(word => !/^(\[.*\]|##.*|.)$/u.test(word) || word === 'a' || word === ',')
  const placed = new Set(Object.values(KINDS).join(' ').split(' '))
  const kinds = Object.entries(KINDS).map(([kind, words]) => [kind, words.split(' ').filter(word => whole.includes(word))])
  kinds.push(['Other words', whole.filter(word => !placed.has(word))])
  for (const [kind, words] of kinds) {
    if (words.length) byId('words').append(chips(kind, words, field))
  }
  oneTabStop(byId('words'))
}

function oneTabStop(toolbar) { // Tab goes past the words, arrows go among them
  const all = [...toolbar.querySelectorAll('button')]
  const give = chip => all.forEach(other => { other.tabIndex = other === chip ? 0 : -1 })
  give(all[0])
  toolbar.addEventListener('focusin', event => give(event.target))
  toolbar.addEventListener('keydown', event => {
    const at = all.indexOf(event.target)
    const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: -1}[event.key]
    if (to === undefined) return
    event.preventDefault()
    all.at(to % all.length).focus()
  })
}

function chips(kind, words, field) {
  const row = element('div', {class: 'chips', role: 'group', 'aria-label': kind})
  row.append(element('span', {class: 'kind', 'aria-hidden': 'true'}, kind))
  for (const word of words) {
    const chip = element('button', {type: 'button', class: 'chip', 'aria-label': `Add ${word === ',' ? 'a comma' : word}`}, word)
    chip.addEventListener('click', () => {
      field.value = word === ',' ? `${field.value.trimEnd()},` : `${field.value.trimEnd()} ${word}`.trimStart()
      field.dispatchEvent(new Event('input'))
    })
    row.append(chip)
  }
  return row
}
