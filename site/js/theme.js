// Light or dark before the first paint; the same keys as the course's pages, so that one switch serves both.
(() => {
  const system = matchMedia('(prefers-color-scheme: dark)')
  const chosen = () => { try { return localStorage.getItem('mode') } catch { return null } }
  const apply = () => {
    const mode = ['light', 'dark'].includes(chosen()) ? chosen() : system.matches ? 'dark' : 'light'
    document.documentElement.dataset.theme = mode
  }
  apply()
  addEventListener('storage', apply)
  system.addEventListener('change', apply)
})()
