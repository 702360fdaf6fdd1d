// Draws each figure when it comes near the screen, in the colours of the page, and again when these change. darkTemplate is plotly's own.
(() => {
  const isDark = () => {
    const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g).map(Number)
    return red + green + blue < 384
  }
  const clear = "rgba(0, 0, 0, 0)"
  let dark

  const draw = place => {
    const figure = JSON.parse(place.querySelector("script").textContent), template = dark ? darkTemplate : figure.layout.template
    const layout = { ...figure.layout, template, paper_bgcolor: clear, plot_bgcolor: clear, uirevision: "kept" }
    Plotly.react(place.querySelector("div"), { ...figure, layout, config: { responsive: true, displaylogo: false } })
    place.dataset.drawn = dark ? "dark" : "light"
  }
  const places = [...document.querySelectorAll(".live-figure")]
  const near = new IntersectionObserver(seen => seen.filter(each => each.isIntersecting).forEach(({ target }) => { near.unobserve(target); draw(target) }), { rootMargin: "600px" })
  const dress = () => {
    if (dark === (dark = isDark())) return
    places.forEach(place => place.dataset.drawn ? draw(place) : near.observe(place))
  }

  dress()
  // the button changes an attribute of the page, Quarto's a class; the reader's system sends an event
  for (const element of [document.documentElement, document.body]) new MutationObserver(() => setTimeout(dress)).observe(element, { attributes: true })
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress)
  addEventListener("beforeprint", () => places.filter(place => !place.dataset.drawn).forEach(draw))
})()
