// Keeps what was loaded, so that the page works without a network. The network comes first: it has the newest.
const KEPT = 'explainer'

addEventListener('install', () => skipWaiting())
addEventListener('activate', event => event.waitUntil(clients.claim()))

async function keep(url) {
  const response = await fetch(url, {cache: 'no-cache'})
  if (response.ok) await (await caches.open(KEPT)).put(url, response)
}

async function answer(event) {
  const {url, mode, cache} = event.request
  try {
    const response = await fetch(url, {cache: cache === 'reload' ? 'reload' : 'no-cache'})
    // a response that breaks off is not put into the cache: `put` fails then
    if (response.status === 200) {
      const copy = response.clone()
      event.waitUntil(caches.open(KEPT).then(cache => cache.put(url, copy)).catch(() => {}))
    }
    return response
  } catch (error) {
    const kept = await caches.match(url, {ignoreSearch: mode === 'navigate'})
    if (kept) return kept
    throw error
  }
}

addEventListener('fetch', event => {
  const here = event.request.url.startsWith(registration.scope)
  if (here && event.request.method === 'GET') event.respondWith(answer(event))
})

// what the page had loaded before this worker was there
addEventListener('message', event => {
  const urls = event.data.keep.filter(url => url.startsWith(registration.scope))
  event.waitUntil(Promise.allSettled(urls.map(keep)))
})
