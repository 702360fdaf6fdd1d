// Draws each figure when it comes near the screen, light or dark as the page is, and again when that changes.
// darkTemplate is plotly's own; the site's first step writes it above this line.
(() => {
  const isDark = () => {
    const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g).map(Number)
    return red + green + blue < 384
  }
  const clear = "rgba(0, 0, 0, 0)", places = [...document.querySelectorAll(".live-figure")]
  let dark

  const draw = place => {
    const figure = JSON.parse(place.querySelector("script").textContent)
    const layout = { ...figure.layout, paper_bgcolor: clear, plot_bgcolor: clear, uirevision: "kept" }
    if (dark) layout.template = darkTemplate
    Plotly.react(place.querySelector("div"), { ...figure, layout, config: { responsive: true, displayModeBar: false } })
    place.dataset.drawn = dark ? "dark" : "light"
  }
  const near = new IntersectionObserver(seen => seen.forEach(({ isIntersecting, target }) => {
    if (isIntersecting) near.unobserve(target), draw(target)
  }), { rootMargin: "600px" })
  const update = () => {
    if (dark === (dark = isDark())) return
    places.forEach(place => place.dataset.drawn ? draw(place) : near.observe(place))
  }

  update()
  // the button changes a class: of the root here, of the body in Quarto
  for (const element of [document.documentElement, document.body])
    new MutationObserver(() => setTimeout(update)).observe(element, { attributes: true })
  addEventListener("beforeprint", () => places.filter(place => !place.dataset.drawn).forEach(draw))
})()
