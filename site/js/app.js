// The page: starts its panels, the worker that draws, and the worker that keeps files for use without a network.
import {Client} from './client.js'
import {Models, byId} from './ui.js'
import * as caption from './panels/caption.js'
import * as steps from './panels/steps.js'
import * as noise from './panels/noise.js'
import * as firststage from './panels/firststage.js'
import * as layout from './panels/layout.js'
import * as inpaint from './panels/inpaint.js'

const PANELS = {caption, steps, noise, firststage, layout, inpaint}

function startTheme() {
  const button = byId('theme')
  const root = document.documentElement
  const dark = () => root.dataset.theme === 'dark' // set by theme.js, which hears of changes first
  const name = () => { button.textContent = dark() ? 'Light colours' : 'Dark colours' }
  button.addEventListener('click', () => {
    root.dataset.theme = dark() ? 'light' : 'dark'
    try { localStorage.setItem('mode', root.dataset.theme) } catch { /* not kept: a private window */ }
    name()
  })
  addEventListener('storage', name)
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', name)
  name()
}

// Embedded in a chapter, the page is one panel alone.
function onlyPanel() {
  const name = new URLSearchParams(location.search).get('panel')
  if (!Object.hasOwn(PANELS, name ?? '')) return null
  document.documentElement.dataset.panel = name
  for (const section of document.querySelectorAll('[data-panel]')) {
    if (section.tagName === 'SECTION') section.hidden = section.dataset.panel !== name
  }
  return name
}

// Files that arrive before the service worker is there would have to be loaded twice: wait for it a moment.
async function keepFiles() {
  const service = navigator.serviceWorker
  if (!service) return
  const there = new Promise(resolve => {
    if (service.controller) resolve()
    else service.addEventListener('controllerchange', resolve, {once: true})
  })
  const keep = urls => service.controller?.postMessage({keep: urls})
  const kept = service.register('sw.js').then(() => there).then(() => {
    keep([location.href.split(/[?#]/)[0]])
    const past = entries => entries.filter(entry => !entry.workerStart).map(entry => entry.name) // the service worker
    new PerformanceObserver(list => keep(past(list.getEntries()))).observe({type: 'resource', buffered: true})
  }).catch(() => {}) // the page works without it
  await Promise.race([kept, new Promise(resolve => setTimeout(resolve, 1000))])
}

// A file dropped beside the place for it would open in the page's stead.
function refuseDrops() {
  for (const kind of ['dragover', 'drop']) {
    addEventListener(kind, event => { if (event.dataTransfer?.types.includes('Files')) event.preventDefault() })
  }
}

function start() {
  startTheme()
  refuseDrops()
  const only = onlyPanel()
  const kept = keepFiles().catch(() => {}) // a page that may not have a service worker draws all the same
  const client = new Client(new URL('./worker.js', import.meta.url))
  const call = (...words) => kept.then(() => client.call(...words)) // panels answer at once, models wait
  const app = new EventTarget() // panels tell each other of a drawing by it
  Object.assign(app, {client: {call}, models: new Models({call}), only})
  for (const [name, panel] of Object.entries(PANELS)) panel.start(app, name === (only ?? name))
}

start()
