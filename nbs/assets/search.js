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

  // "evaluate" also finds "evaluating" and "evaluation", but "add" no "address"
  const pattern = word => {
    const stem = word.length > 5 ? word.replace(/(ations?|ing|ion|ed|es|e|s)$/, "") : word
    return new RegExp(`[^\\p{L}\\p{N}]${stem}${stem.length < 5 ? "s?(?![\\p{L}\\p{N}])" : ""}`, "u")
  }

  // a rare word counts more than a common one, a heading more than a title, and that more than the text; first pages come first
  const best = (entries, query) => {
    const common = /^(an?|and|are|can|does?|for|how|i|in|is|it|my|of|on|the|to|what|where|with)$/
    const all = query.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [], rare = all.filter(word => !common.test(word))
    const words = rare.length ? rare : all
    const scores = new Map(entries.map(entry => [entry, 0]))
    for (const word of new Set(words)) {
      const found = pattern(word)
      const hits = entries.map(entry => [entry, entry.fields.map(field => found.test(field))]).filter(([, at]) => at.some(Boolean))
      const weight = Math.log(1 + entries.length / (hits.length || 1)) ** 2
      for (const [entry, [heading, title, text]] of hits)
        scores.set(entry, scores.get(entry) + weight * (3 * heading + title + text) * (entry.href.includes("/") ? 1 : 1.5))
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
