// The search. The words of all pages lie in pages.js, which is loaded as a script when somebody first asks, so that it works from a file too.
(() => {
  const input = document.getElementById("search"), found = document.getElementById("found"), up = document.currentScript.dataset.up
  let loading, entries = []

  const load = () => loading ??= new Promise(ready => {
    const script = document.createElement("script")
    script.src = up + "assets/pages.js"
    script.onload = () => {
      entries = window.sitePages.map(([href, title, head, text]) => ({ href, title, head, text, low: [head, title, text].map(each => each.toLowerCase()) }))
      ready()
    }
    document.head.append(script)
  })

  // a heading counts more than its page's title, and that more than the text; every word has to be somewhere
  const score = ({ low: [head, title, text], href, head: written }, words, whole) => {
    let sum = (head == whole && 100) + (href.includes("#medvlthinker.") && 2) + (written == input.value.trim() && 5)
    for (const word of words) {
      const here = head.startsWith(word) ? 30 : head.includes(word) ? 15 : title.includes(word) ? 6 : (" " + text).includes(" " + word) ? 3 : text.includes(word)
      if (!here) return 0
      sum += +here
    }
    return sum
  }

  const marked = (text, words) => {  // the neighbourhood of the first word that is found, with all of them marked
    const first = Math.max(0, Math.min(...words.map(word => text.toLowerCase().indexOf(word)).filter(at => at >= 0), text.length) - 50)
    const from = first && first < text.length - 50 ? text.indexOf(" ", first) + 1 : 0
    const line = document.createElement("span"), pattern = new RegExp(words.map(word => word.replace(/[^\p{L}\p{N}]/gu, "\\$&")).join("|"), "giu")
    let done = from
    for (const hit of text.slice(from, from + 150).matchAll(pattern)) {
      const mark = document.createElement("mark")
      mark.textContent = hit[0]
      line.append(text.slice(done, from + hit.index), mark)
      done = from + hit.index + hit[0].length
    }
    line.append(text.slice(done, from + 150))
    return line
  }

  const show = async () => {
    await load()
    const whole = input.value.trim().toLowerCase(), words = whole.split(/\s+/).filter(Boolean)
    const best = words.length ? entries.map(entry => [score(entry, words, whole), entry]).filter(([sum]) => sum).sort((a, b) => b[0] - a[0]).slice(0, 20) : []
    found.replaceChildren(...best.map(([, { href, title, head, text }]) => {
      const link = document.createElement("a"), name = document.createElement("b"), page = document.createElement("small")
      link.href = up + href
      name.append(marked(head, words))
      page.textContent = head == title ? "" : title
      link.append(name, page, marked(text, words))
      return link
    }))
    if (words.length && !best.length) found.textContent = "No page has all of these words."
    found.hidden = !words.length
  }

  const close = () => { found.hidden = true }
  input.addEventListener("focus", () => { load(); if (input.value) show() })
  input.addEventListener("input", show)
  document.addEventListener("click", event => { if (!event.target.closest("#found, #search")) close() })
  document.addEventListener("keydown", event => {
    const links = [...found.querySelectorAll("a")], at = links.indexOf(document.activeElement), typing = document.activeElement == input
    if (event.key == "/" && !event.target.closest("input:not([type=checkbox]), textarea, select, [contenteditable]")) input.focus(), input.select()
    else if (event.key == "Escape" && !found.hidden) close(), input.focus()
    else if (found.hidden || !typing && at < 0) return
    else if (event.key == "ArrowDown") links[Math.min(at + 1, links.length - 1)]?.focus()
    else if (event.key == "ArrowUp") (links[at - 1] ?? input).focus()
    else if (event.key == "Enter" && typing) links[0]?.click()
    else return
    event.preventDefault()
  })
  found.addEventListener("click", event => { if (event.target.closest("a")) close() })
})()
