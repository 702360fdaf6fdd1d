"use strict";
// Shows the question whose row of the table passes; Python made table, form and articles.
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const form = $("filters"), fields = [...form.elements], {model, models_disagree} = form.elements;
const short = new Map(Object.entries(data.short)), first = field => field.options?.[0].value ?? "";
const rows = data.data.map(row => Object.fromEntries(row.map((cell, i) => [data.columns[i], cell])));
const textsOf = part => [...part.querySelectorAll(".text")].map(each => each.textContent);
for (const row of rows) {
  row.article = $("question-" + row.question);
  const mine = [...row.article.querySelectorAll(".model")].find(e => e.dataset.model === row.model);
  row.text = [row.article.querySelector(".asked"), mine].flatMap(textsOf).join("\n").toLowerCase();
}
let hits = [], at = 1, unknown = [];

function read() {  // the address fills the form
  [at, unknown] = [1, []];
  form.reset();
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    const field = fields.find(each => each.name === key), before = field?.value;
    const name = key === "benchmark" && short.get(text.toLowerCase().replaceAll("-", "_"));
    if (field) field.value = name || text;
    if (key === "at" && /^\d{1,9}$/.test(text)) at = Number(text);
    else if (field?.value !== (name || text)) unknown.push(`${key}=${text}`);
    if (field?.value === "") field.value = before;  // a select without such an option
  }
  show();
}
function write(isTyping) {  // the form fills the address
  const chosen = fields.filter(field => field.value !== first(field));
  const view = new URLSearchParams(chosen.map(field => [field.name, field.value]));
  if (at > 1) view.set("at", at);
  if (isTyping) history.replaceState(null, "", "#" + view), show();  // no step to go back to
  else location.hash = view;
}
const passes = row => fields.every(({name, value}) => !value || (name === "text"
  ? row.text.includes(value.toLowerCase()) : [row[name]].flat().includes(value)));
function show() {
  hits = rows.filter(passes);
  at = Math.min(Math.max(at, 1), hits.length);
  for (const row of rows) row.article.hidden = row.question !== hits[at - 1]?.question;
  const article = hits[at - 1]?.article, opened = [model.value, models_disagree?.value];
  for (const img of article?.querySelectorAll("img") ?? []) img.src = data.images[img.dataset.image];
  for (const section of article?.querySelectorAll(".model") ?? [])
    section.open = opened.includes(section.dataset.model);
  const total = rows.filter(row => row.model === model.value).length;
  $("count").textContent = `${hits.length} of ${total} questions match`
    + (at ? `; this is number ${at}.` : ". Set one of the filters back to all.")
    + (unknown.length ? ` Not here: ${unknown.join(", ").slice(0, 200)}.` : "");
  [$("previous").disabled, $("next").disabled] = [at <= 1, at >= hits.length];
}
const step = by => { if (hits[at + by - 1]) [at, unknown] = [at + by, []], write(); };
form.oninput = ({target}) => { [at, unknown] = [1, []]; write(target.name === "text"); };
[$("previous").onclick, $("next").onclick] = [() => step(-1), () => step(1)];
onhashchange = read;
onkeydown = ({key, target, ctrlKey, metaKey, altKey}) => {
  const by = {ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1}[key];
  if (by && !(ctrlKey || metaKey || altKey || target.closest("input, select"))) step(by);
};
$("site").hidden = !location.pathname.endsWith("/paper/viewer.html");  // else they lead nowhere
$("panel").open = innerWidth >= 700;
read();
