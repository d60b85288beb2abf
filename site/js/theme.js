// Light or dark before the first paint; the same keys as the course's pages, so that one switch serves both.
(() => {
  const mode = () => { try { return localStorage.getItem('mode') } catch { return null } }
  const apply = () => {
    if (['light', 'dark'].includes(mode())) document.documentElement.dataset.theme = mode()
    else delete document.documentElement.dataset.theme
  }
  apply()
  addEventListener('storage', apply)
})()
