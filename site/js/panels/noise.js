// Noise a picture's latent, and see what the model takes for the picture behind it.
import {Chooser} from '../pictures.js'
import {Job, byId, later, paint, toPlanes} from '../ui.js'

const MODEL = 'postcards-text'

export function start(app, shown) {
  const job = new Job(byId('noise-job'))
  const slider = byId('noise-t')
  let picture = null // its planes
  let wanted = false // the model is large: it is loaded when the slider or a picture is touched

  const level = () => { byId('noise-level').textContent = `t = ${slider.value}` }

  const look = later(() => {
    if (!picture || !wanted) return
    job.run(async ({signal, job}) => {
      await app.models.load(job, MODEL, ['encoder'])
      if (signal.aborted) return ''
      const options = {model: MODEL, x: picture.slice(), t: Number(slider.value), seed: 0, prompt: byId('noise-caption').value}
      const {sigma, t, pictures} = await app.client.call('noise', options, {signal})
      paint(byId('noise-noised'), pictures.noised, `The picture with noise of timestep ${Math.round(t)}`)
      paint(byId('noise-guess'), pictures.guess, `What the model takes it for at timestep ${Math.round(t)}`)
      return `At t = ${Math.round(t)} there is ${sigma.toFixed(2)} times as much noise as picture.`
    })
  }, 30)

  const touch = () => {
    wanted = true
    look()
  }
  slider.addEventListener('input', () => {
    level()
    touch()
  })
  byId('noise-caption').addEventListener('input', touch)
  level()
  job.show('idle', 'Move the slider: the model is loaded first.')

  const chooser = new Chooser(byId('noise-chooser'), (rgba, caption) => {
    picture = toPlanes(rgba)
    paint(byId('noise-picture'), rgba, `The picture: ${caption}`)
    if (chooser.ready) wanted = true
    look()
  })
  if (shown) chooser.start().then(() => { chooser.ready = true })
}
