// Looks through pages.js, which is loaded as a script when somebody first asks: that works from a file too.
(() => {
  const input = document.getElementById("search"), found = document.getElementById("found")
  const up = document.currentScript.dataset.up
  let loading

  const load = () => loading ??= new Promise(ready => {
    const script = document.createElement("script")
    script.src = up + "assets/pages.js"
    script.onload = () => ready(window.sitePages.map(([href, title, heading, text]) =>
      ({ href, title, heading, text, fields: [heading, title, text].map(each => " " + each.toLowerCase()) })))
    document.head.append(script)
  })

  // "evaluate" also finds "evaluating" and "evaluation"
  const stem = word => word.length > 5 ? word.replace(/(ations?|ing|ion|ed|es|e|s)$/, "") : word
  const places = (entry, word) => entry.fields.map(field => field.search(new RegExp(`[^\\p{L}\\p{N}]${word}`, "u")) >= 0)

  // a rare word counts more than a common one, a heading more than a title, and that more than the text
  const best = (entries, query) => {
    const words = (query.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? []).map(stem)
    const scores = new Map(entries.map(entry => [entry, 0]))
    for (const word of new Set(words)) {
      const hits = entries.map(entry => [entry, places(entry, word)]).filter(([, at]) => at.some(Boolean))
      const weight = Math.log(1 + entries.length / (hits.length || 1)) ** 2
      for (const [entry, [heading, title, text]] of hits)
        scores.set(entry, scores.get(entry) + weight * (3 * heading + title + text))
    }
    for (const [entry, score] of scores) if (entry.fields[0].trim() == query.trim().toLowerCase()) scores.set(entry, score + 1e3)
    return entries.filter(entry => scores.get(entry)).sort((a, b) => scores.get(b) - scores.get(a)).slice(0, 12)
  }

  const show = async () => {
    const query = input.value, hits = best(await load(), query)
    found.replaceChildren(...hits.map(({ href, title, heading, text }) => {
      const link = document.createElement("a")
      link.href = up + href
      for (const [tag, words] of [["b", heading], ["small", heading == title ? "" : title], ["span", text.slice(0, 140)]])
        link.appendChild(document.createElement(tag)).textContent = words
      return link
    }))
    if (!hits.length) found.textContent = "No page has one of these words."
    found.hidden = !query.trim()
  }

  input.addEventListener("input", show)
  document.addEventListener("click", event => { if (!event.target.closest("#search")) found.hidden = true })
  document.addEventListener("keydown", event => {
    if (event.key == "/" && !event.target.closest("input[type=search], textarea, select")) input.focus(), event.preventDefault()
    else if (event.key == "Escape") found.hidden = true
    else if (event.key == "Enter" && event.target == input) found.querySelector("a")?.click()
  })
})()
