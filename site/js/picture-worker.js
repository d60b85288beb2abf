// Turns a picture file into 64 by 64 pixels, away from the page, so that a large one does not stop it.

const SIDE = 64
const MOST_BYTES = 30e6
const MOST_PIXELS = 50e6

const KINDS = 'expected a PNG, JPEG, GIF, WebP or BMP picture'

function jpegSize(view) { // walks the segments up to the one that holds the size
  let at = 2
  while (at + 9 < view.byteLength) {
    if (view.getUint8(at) !== 0xff) return null
    const marker = view.getUint8(at + 1)
    if (marker === 0xff) { at++; continue } // filling
    const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)
    if (frame) return [view.getUint16(at + 7), view.getUint16(at + 5)]
    at += 2 + view.getUint16(at + 2)
  }
  return null
}

function webpSize(view, text) {
  const kind = text(12, 4)
  const three = at => view.getUint8(at) + (view.getUint8(at + 1) << 8) + (view.getUint8(at + 2) << 16)
  if (kind === 'VP8X') return [three(24) + 1, three(27) + 1]
  if (kind === 'VP8 ') return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff]
  const bits = view.getUint32(21, true)
  return kind === 'VP8L' ? [(bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1] : null
}

export function sizeOf(buffer) { // [width, height] from the header; null: not a picture that we know
  const view = new DataView(buffer)
  if (view.byteLength < 30) return null
  const text = (at, n) => String.fromCharCode(...new Uint8Array(buffer, at, n))
  if (text(1, 3) === 'PNG') return [view.getUint32(16), view.getUint32(20)]
  if (view.getUint16(0) === 0xffd8) return jpegSize(view)
  if (text(0, 3) === 'GIF') return [view.getUint16(6, true), view.getUint16(8, true)]
  if (text(0, 4) === 'RIFF' && text(8, 4) === 'WEBP') return webpSize(view, text)
  if (text(0, 2) === 'BM') return [view.getInt32(18, true), Math.abs(view.getInt32(22, true))]
  return null
}

async function read(file) {
  if (file.size > MOST_BYTES) throw new Error(`This file has ${Math.round(file.size/1e6)} MB; at most 30 MB are read.`)
  const size = sizeOf(await file.slice(0, 1 << 18).arrayBuffer())
  if (!size) throw new Error(`This file is no picture that can be read here: ${KINDS}.`)
  const pixels = size[0]*size[1]
  if (pixels > MOST_PIXELS) {
    throw new Error(`This picture has ${Math.round(pixels/1e6)} megapixels; at most 50 are read.`)
  }
  let picture
  try { picture = await createImageBitmap(file) }
  catch { throw new Error(`This picture is damaged, or is none: ${KINDS}.`) }
  return square(picture)
}

function square(picture) { // its middle, on white where it is transparent
  const side = Math.min(picture.width, picture.height)
  const canvas = new OffscreenCanvas(SIDE, SIDE)
  const pen = canvas.getContext('2d')
  pen.fillStyle = '#fff'
  pen.fillRect(0, 0, SIDE, SIDE)
  pen.imageSmoothingQuality = 'high'
  pen.drawImage(picture, (picture.width - side)/2, (picture.height - side)/2, side, side, 0, 0, SIDE, SIDE)
  picture.close()
  return pen.getImageData(0, 0, SIDE, SIDE).data
}

onmessage = async ({data}) => {
  try { postMessage({rgba: await read(data)}) }
  catch (error) { postMessage({error: error.message}) }
}
