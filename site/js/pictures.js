// A choice of pictures: postcards of the course, or the reader's own by file or drop.
import {element} from './ui.js'

let postcards // one fetch for all panels

async function fetchPostcards() {
  const response = await fetch('postcards/postcards.json')
  if (!response.ok) throw new Error('The postcards did not arrive.')
  return response.json()
}

function pixelsOf(image) { // of a postcard that has been loaded
  const canvas = element('canvas', {width: 64, height: 64})
  const pen = canvas.getContext('2d', {willReadFrequently: true})
  pen.drawImage(image, 0, 0, 64, 64)
  return pen.getImageData(0, 0, 64, 64).data
}

function readFile(file) { // its 64x64 pixels; the worker ends with it, and so does its memory
  const worker = new Worker(new URL('./picture-worker.js', import.meta.url), {type: 'module'})
  const answer = new Promise((resolve, reject) => {
    worker.onmessage = ({data}) => data.error ? reject(new Error(data.error)) : resolve(data.rgba)
    worker.onerror = () => reject(new Error('The picture could not be read.'))
  })
  worker.postMessage(file)
  return answer.finally(() => worker.terminate())
}

export class Chooser {
  constructor(holder, onPicture) { // onPicture(rgba, caption)
    this.holder = holder
    this.onPicture = onPicture
    this.row = element('div', {class: 'postcards', role: 'group', 'aria-label': 'Postcards'})
    this.file = element('input', {type: 'file', accept: 'image/*', id: `${holder.id}-file`})
    this.note = element('p', {class: 'note', role: 'status'})
    const label = element('label', {for: this.file.id}, 'Your own picture (choose it, or drop it here)')
    holder.append(this.row, element('div', {class: 'field wide'}, label, this.file), this.note)
    this.file.addEventListener('change', () => {
      this.own(this.file.files[0])
      this.file.value = '' // so that the same file can be chosen again
    })
    this.takeDrops()
  }

  async start() { // shows the postcards and takes the first
    postcards ??= fetchPostcards()
    try { (await postcards).forEach(card => this.offer(card)) }
    catch {
      postcards = null
      this.note.textContent = 'The postcards did not arrive; your own picture will do.'
      return
    }
    await this.take(this.row.querySelector('img'))
  }

  offer({file, caption}) {
    const image = element('img', {src: `postcards/${file}`, width: 64, height: 64, alt: caption})
    const button = element('button', {type: 'button', 'aria-pressed': 'false', title: caption}, image)
    button.addEventListener('click', () => this.take(image))
    this.row.append(button)
  }

  mark(chosen) {
    for (const button of this.row.children) button.setAttribute('aria-pressed', String(button === chosen))
  }

  async take(image) {
    this.latest = image
    let said = ''
    try { await image.decode() }
    catch { said = 'This postcard did not arrive; take another one, or your own picture.' }
    if (this.latest !== image) return // another was chosen meanwhile
    this.note.textContent = said
    this.note.classList.toggle('error', Boolean(said))
    if (said) return
    this.mark(image.parentElement)
    this.onPicture(pixelsOf(image), image.alt)
  }

  async own(file) {
    if (!file) return
    this.latest = file
    this.note.classList.remove('error')
    this.note.textContent = 'Reading your picture …'
    try {
      const rgba = await readFile(file)
      if (this.latest !== file) return // another was chosen meanwhile
      this.mark(null)
      this.note.textContent = 'Your picture, cut to a square and scaled to 64 by 64 pixels.'
      this.onPicture(rgba, 'your picture')
    } catch (error) {
      if (this.latest !== file) return
      this.note.classList.add('error')
      this.note.textContent = error.message
    }
  }

  takeDrops() {
    const over = on => event => {
      event.preventDefault()
      this.holder.classList.toggle('over', on)
    }
    this.holder.addEventListener('dragover', over(true))
    this.holder.addEventListener('dragleave', over(false))
    this.holder.addEventListener('drop', event => {
      over(false)(event)
      const file = event.dataTransfer.files[0]
      if (file) this.own(file)
      else {
        this.note.classList.add('error')
        this.note.textContent = 'That was no file: drop a picture file here.'
      }
    })
  }
}
