// A live panel is as high as what it shows: it comes from this site, so its page may be measured.
for (const frame of document.querySelectorAll('iframe.panel')) {
  const fit = () => {
    const body = frame.contentDocument?.body
    if (!body) return
    const measure = () => { frame.style.height = `${Math.ceil(body.getBoundingClientRect().height) + 4}px` }
    new ResizeObserver(measure).observe(body)
    measure()
  }
  frame.addEventListener('load', fit)
  if (frame.contentDocument?.readyState === 'complete' && frame.contentDocument.URL !== 'about:blank') fit()
}

// What a search result shows of a page: its text, not the buttons above it.
if (typeof Search === 'object') {
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, 'text/html')
    page.querySelectorAll('.headerlink, .chapter-tools, script, style, nav, summary').forEach(e => e.remove())
    const article = page.querySelector('article') ?? page.body
    return ((anchor && article.querySelector(anchor)) || article).textContent
  }
}
