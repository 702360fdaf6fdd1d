// Each text of the page whose contrast with what lies behind it is below 4.5 (WCAG 2.1), figures and single signs aside.
() => {
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
  const rgba = colour => {
    pixel.clearRect(0, 0, 1, 1)
    pixel.fillStyle = colour
    pixel.fillRect(0, 0, 1, 1)
    const [red, green, blue, alpha] = pixel.getImageData(0, 0, 1, 1).data
    return [red, green, blue, alpha / 255]
  }
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]))
  const parents = element => element ? [...parents(element.parentElement), element] : []
  const light = colour => {
    const [red, green, blue] = colour.map(value => value / 255).map(value => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    return .2126 * red + .7152 * green + .0722 * blue
  }
  const found = {}
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some(node => node.nodeType == 3 && /[\p{L}\p{N}]/u.test(node.textContent))
    if (!hasText || element.closest(".live-figure, script, style") || !element.getClientRects().length) continue
    const line = parents(element).map(each => getComputedStyle(each))
    const ground = line.reduce((below, style) => over(rgba(style.backgroundColor), below), [255, 255, 255])
    const text = rgba(getComputedStyle(element).color)
    text[3] *= line.reduce((all, style) => all * style.opacity, 1)
    const [darker, lighter] = [light(ground), light(over(text, ground))].sort((a, b) => a - b)
    const contrast = (lighter + .05) / (darker + .05)
    if (contrast < 4.5) found[element.textContent.trim().slice(0, 40)] = contrast.toFixed(2)
  }
  return found
}
