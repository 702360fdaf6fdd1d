"""The viewer: every filter against brute force, hostile texts, and both ways to read in a browser."""

import dataclasses
import itertools
import re

import pytest
from conftest import watched

from medvlthinker.app.profile import load_profile
from medvlthinker.app.runs import stored_viewer
from medvlthinker.core.files import UserError
from medvlthinker.core.grade import RULES, grade
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.evaluation.evaluate import evaluate
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import generate
from medvlthinker.results.viewer import (
    Entry, Viewer, entry_html, escape_invisible, write_page, write_view)

ATTACKS = (
    "<script>window.pwned = 1; alert(1)</script>", "<img src=x onerror='window.pwned = 2; alert(2)'>",
    "</script><script>window.pwned = 3</script>", "<!--<script>", "[click](javascript:window.pwned=4)",
    "</pre></details><svg onload=alert(5)>", "<iframe src='https://evil.example/'></iframe>",
    "<a href='javascript:alert(6)'>", "<link rel=stylesheet href=https://evil.example/a.css>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(7)>", "\"'><b onclick=alert(8)>",
    "$\\href{javascript:alert(9)}{x^2}$", "{{7*7}} {% raw %} ${window.pwned=8}",
    "\x1b[2J\x1b]0;title\x07", "nul \x00 end", "\u202eright to left", "line\u2028end\u2029",
    "&lt;b&gt;", "\ud800 half", "\U000e0041\U000e0042 tags", "unbroken" * 40)
EVIL = "\n".join(ATTACKS)


def written(*texts, reason="stop"):
    return [{"text": text, "finish_reason": reason, "tokens": 9} for text in texts]


def answer(sample, number):
    "A completion that is right, wrong, right for some rules only, or none at all."
    other = next(label for label in sample.options if label != sample.answer_label)
    return (f"<think> x </think>\n<answer> {sample.answer_label} </answer>",
            f"<think> x </think>\n<answer> {other} </answer>",
            f"The answer is ({sample.answer_label}).", f"<answer>{sample.answer}</answer>",
            "I cannot tell.", "")[number % 6]


def toy(n=4):
    "Twelve questions of three sets; three models, of which `c` left out every fourth question."
    sets = ("pmc_vqa", "vqa_rad_closed", "MMMU-medical")
    samples = [sample for name in sets for sample in synthetic.benchmark(name, 4)]
    entries = []
    for i, sample in enumerate(samples):
        answers = {model: written(*(answer(sample, i * step + k * (i + step)) for k in range(n)),
                                  reason="length" if i % 3 == step - 1 else "stop")
                   for model, step in (("a", 1), ("b/x", 2), ("c", 3)) if model != "c" or i % 4}
        entries.append(Entry(sample, answers))
    return Viewer(entries, "synthetic")


# --- filters and links ---


def views(viewer):
    "Views of every value of every filter alone, and of many pairs."
    single = [{key: value} for key, values in viewer.choices.items() for value in values]
    single += [{"text": "CANNOT tell"}, {"text": "lesion"}, {"text": "none of this"}]
    pairs = [{**one, **two} for one, two in itertools.combinations(single, 2)]
    return single + pairs[::9]


def test_filters_are_what_they_say():
    viewer = toy()

    def right(entry, model, rule="regrade"):
        key = entry.sample.options, entry.sample.answer_label, rule
        return [grade(each["text"], *key).correct for each in entry.answers.get(model, ())]

    def those(passes):
        return [i for i, entry in enumerate(viewer.entries) if passes(entry)]

    words = {"right": all, "wrong": lambda found: not any(found),
             "partly": lambda found: any(found) and not all(found)}
    for rule, (word, passes) in itertools.product(RULES, words.items()):
        assert viewer.hits(f"model=b/x&{rule}={word}") == those(lambda each: passes(right(each, "b/x", rule)))
    unlike = those(lambda each: "c" in each.answers and sum(right(each, "a")) != sum(right(each, "c")))
    assert viewer.hits("models_disagree=c") == unlike != viewer.hits("models_disagree=any") != []
    split = those(lambda each: right(each, "a", "strict") != right(each, "a", "lenient"))
    assert viewer.hits("rules_disagree=strict+/+lenient") == split != []
    assert viewer.hits("cut_off=yes") == [0, 3, 6, 9] and viewer.hits("model=c&text=LESION") == viewer.hits(
        "model=c&text=lesion")
    both = {*viewer.hits("benchmark=pmc_vqa")} & {*viewer.hits("no_answer=yes")}
    assert viewer.hits("benchmark=PMC&no_answer=yes") == sorted(both) != []


def test_a_view_survives_its_text():
    viewer = toy(1)
    for text in ("a&b=c", "100 %+#", "é 眼 \u202e", "<script>", "~*'()!", "\x00\n\t"):
        address = write_view({"model": "b/x", "benchmark": "PMC", "text": text, "at": 7})
        found = viewer.parse("#" + address)
        assert (found["model"], found["benchmark"], found["text"], found["at"]) == ("b/x", "pmc_vqa", text, 7)
        assert re.fullmatch(r"[\w&=%+.~-]*", address, re.A)
    for wrong in ("model=x", "rules_disagree=a", "__proto__=1", "at=-1", "at=1e9", "at=" + "9" * 5000):
        with pytest.raises(UserError):
            viewer.parse(wrong)


# --- hostile texts ---


def hostile():
    "An attack in every place that can hold a text."
    viewer = toy(2)
    sample = dataclasses.replace(
        viewer.entries[0].sample, question=EVIL, options={"A": EVIL, "B": "no"}, answer_label="A",
        answer=EVIL, images=(b"<svg onload=alert(1)>", *viewer.entries[1].sample.images))
    answers = {"a": written(EVIL, f"<answer>{ATTACKS[1]}</answer>", reason=EVIL),
               "b/x": written(EVIL * 200, ""), ATTACKS[1]: written(EVIL, EVIL)}
    named = dataclasses.replace(sample, dataset_name=ATTACKS[0], dataset_index=1)
    return Viewer([*viewer.entries[1:], Entry(sample, answers), Entry(named, answers)],
                  "synthetic", {"a": ATTACKS[1], ATTACKS[1]: EVIL})


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return write_page(hostile(), tmp_path_factory.mktemp("viewer") / "viewer.html")


def test_no_text_becomes_markup(page_file):
    from bs4 import BeautifulSoup

    page = page_file.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for text in (page, entry_html(hostile().entries[-1])):
        found = BeautifulSoup(text, "html.parser").find_all(True)
        assert {tag.name for tag in found} <= set(
            "html meta title link style body nav a h1 noscript p details summary form label select "
            "option input div button main article img pre ul li b q span footer script".split())
        assert not [name for tag in found for name in tag.attrs if name.startswith("on")]
        assert sum(tag.name == "script" for tag in found) == (2 if text is page else 0)
        assert not re.search("[\x00\x1b\u202e\u2028\ud800\U000e0041]", text)
        addresses = {tag[name][:15] for tag in found for name in ("src", "href") if tag.get(name)}
        assert addresses <= {"data:image/jpeg", "data:,", "results.html", "../index.html"}
        assert "Image 1 cannot be displayed." in text


def test_a_page_stays_small_and_says_what_it_holds(tmp_path):
    text = "<think>" + "x" * 1_000_000 + "</think><answer> A </answer>"
    sample = synthetic.benchmark("pmc_vqa", 1)[0]
    page = write_page(Viewer([Entry(sample, {"m": written(text)})]), tmp_path / "long.html")
    words, left_out = page.read_text(encoding="utf-8"), f"{len(text) - 20_000:,} of {len(text):,}"
    assert len(words) < 150_000 and f"{left_out} characters are left out here" in words
    assert "answer&gt; A &lt;/answer" in words, "the answer is kept"
    many = Viewer([Entry(dataclasses.replace(sample, dataset_index=i), {"m": written("y")}) for i in range(100)])
    words = write_page(many, tmp_path / "many.html").read_text(encoding="utf-8")
    assert "This page holds 50 of the 100 questions" in words and words.count("data:image/jpeg") == 1


# --- what a run has left ---


def leave_run(home, words, size=6):
    "Samples, rollouts and the record of two sets, as an evaluation leaves them."
    def reply(request):
        return [Completion(f"{words} <answer> {request.sample.answer_label} </answer>", "stop", 5)]

    rolled, folder = {}, home / "smoke"
    for name in ("pmc_vqa", "slake_closed"):
        samples = synthetic.benchmark(name, size)
        write_samples(samples, folder / "samples" / "synthetic" / f"{name}-{size}.parquet")
        place = folder / "rollouts" / "tiny" / "synthetic" / name
        engine = FunctionEngine(reply, "tiny", version=words)
        rolled[name] = samples, generate(samples, engine, Sampling(), place, lambda line: None)
    evaluate(rolled, folder / "results" / "synthetic")


def test_the_answers_that_were_evaluated_last_are_shown_with_their_own_questions(home):
    leave_run(home, "old")
    leave_run(home, "new", size=4)  # with another limit: both files of questions stay
    viewer = stored_viewer(load_profile("smoke"))
    assert len(viewer.hits("regrade=right&text=new")) == len(viewer.entries) == 8
    assert viewer.entries[5].whole() == synthetic.benchmark("slake_closed", 4)[1]
    path = home / "smoke" / "samples" / "synthetic" / "pmc_vqa-4.parquet"
    write_samples(synthetic.benchmark("pmc_vqa", 4, seed=1), path)
    with pytest.raises(UserError, match=r"holds the questions of rollouts/tiny/synthetic/pmc_vqa/\w+, which tiny has answered: .* evaluate tiny again"):
        stored_viewer(load_profile("smoke"))


# --- in a browser ---


@pytest.mark.heavy
def test_hostile_texts_in_the_page(chromium, page_file):
    page, wrong, asked = watched(chromium)
    page.goto(f"{page_file.as_uri()}#at=12")
    for attack in ATTACKS:
        assert escape_invisible(attack) in page.inner_text("main"), attack
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.getElementById('count').textContent.includes('number 13')")
    page.goto(f"{page_file.as_uri()}#text=%3Cscript%3E&model=%3Cimg&__proto__=1&constructor=2&at=x")
    page.reload()
    assert "Not here: model=<img, __proto__=1" in page.inner_text("#count")
    alive = "main svg, main math, main iframe, main script, main a, main style"
    assert page.evaluate(f"window.pwned === undefined && !document.querySelector('{alive}')")
    addresses = {url.split("#")[0] for url in asked if not url.startswith("data:")}
    assert wrong == [] and addresses == {page_file.as_uri()}
    page.close()


@pytest.mark.heavy
def test_the_page_filters_as_python_does(new_page, tmp_path):
    viewer, page = toy(), new_page()
    page.goto(write_page(viewer, tmp_path / "page.html").as_uri())
    for view in views(viewer):
        text = write_view(view)
        page.evaluate("text => { history.replaceState(null, '', '#' + text); read() }", text)
        assert page.evaluate("hits.map(row => row.question)") == viewer.hits(text), view


@pytest.mark.heavy
def test_keys_filters_and_links(new_page, tmp_path):
    viewer, page = toy(), new_page()
    page.goto(write_page(viewer, tmp_path / "paper" / "viewer.html").as_uri())
    assert page.inner_text("#count") == "12 of 12 questions match; this is number 1."
    assert page.inner_text("#site") == "← Results← Home"
    keys = ("ArrowRight", 2), ("j", 3), ("k", 2), ("ArrowLeft", 1), ("ArrowLeft", 1), ("j", 2)
    for key, place in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        assert f"number {place}." in page.inner_text("#count")
    page.focus("[name=text]")
    page.keyboard.press("ArrowLeft")
    page.keyboard.type("jk lesion")
    assert page.inner_text("#count").startswith("0 of 12") and page.inner_text("main").strip() == ""
    page.fill("[name=text]", "")
    page.select_option("[name=benchmark]", "pmc_vqa")
    page.select_option("[name=model]", "b/x")
    page.select_option("[name=regrade]", "partly")
    page.wait_for_timeout(100)
    view = page.url.split("#")[1]
    assert viewer.parse(view) == viewer.parse("benchmark=PMC&model=b/x&regrade=partly")
    assert page.inner_text("#count").startswith(f"{len(viewer.hits(view))} of 12")
    page.go_back()
    page.wait_for_timeout(100)
    assert page.input_value("[name=regrade]") == "" and page.input_value("[name=model]") == "b/x"
    page.goto(page.url.split("#")[0] + "#benchmark=mmmu&at=3")
    page.reload()
    assert page.inner_text("#count") == "4 of 12 questions match; this is number 3."
    assert "MMMU-medical, question 2" in page.inner_text("main")


@pytest.mark.heavy
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1400, "dark")])
def test_sizes_and_schemes(new_page, page_file, width, scheme):
    page = new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for at in (1, 12):
        page.goto(f"{page_file.as_uri()}#at={at}")
        page.reload()
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (at, width)
        verdict = page.locator("article:visible .completion li").first.bounding_box()
        assert verdict["x"] >= 0 and verdict["x"] + verdict["width"] <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
    unlabelled = "[...document.querySelectorAll('select, input')].filter(e => !e.labels.length)"
    assert page.evaluate(f"{unlabelled}.length") == 0
