"""What a notebook cannot hold of the viewer: every filter against brute force, hostile texts, and both ways to see it in a browser."""

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import encoded, python, watched

from medvlthinker.data import synthetic
from medvlthinker.core.files import UserError
from medvlthinker.app.profile import load_profile
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.core.grade import RULES, grade
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import generate
from medvlthinker.data.sample import write_samples
from medvlthinker.results.viewer import (SCRIPT, STYLE, Entry, Look, State, data_uri, entry_html, island, parse_state, page_data, spread, stored, visible,
                                 write_page, write_state)

ATTACKS = ("<script>window.pwned = 1; alert(1)</script>", "<img src=x onerror='window.pwned = 2; alert(2)'>", "</script><script>window.pwned = 3</script>",
           "<!--<script>", "[click](javascript:window.pwned=4)", "</pre></details><svg onload=alert(5)>", "<iframe src='https://evil.example/'></iframe>",
           "<a href='javascript:alert(6)'>", "<link rel=stylesheet href=https://evil.example/a.css>", "$\\href{javascript:alert(7)}{x^2}$", "{{7*7}} ${window.pwned=8}",
           "\x1b[2J\x1b]0;title\x07", "nul \x00 end", "\u202eright to left", "line\u2028end\u2029", "&lt;b&gt;", "\ud800 half", "\U000e0041\U000e0042 tags", "unbroken" * 40)
EVIL = "\n".join(ATTACKS)


def said(*texts):
    return [{"text": text, "finish_reason": "stop", "tokens": 9} for text in texts]


def answer(sample, number):
    "A completion that is right, wrong, right in words only, or none at all."
    other = next(label for label in sample.options if label != sample.answer_label)
    return (f"<think> x </think>\n<answer> {sample.answer_label} </answer>", f"<think> x </think>\n<answer> {other} </answer>",
            f"The answer is ({sample.answer_label}).", f"<answer>{sample.answer}</answer>", "I cannot tell.")[number % 5]


def toy(n=1):
    "Twelve questions of three sets; three models, of which `c` left out every fourth question."
    drawn = [sample for name in ("pmc_vqa", "vqa_rad_closed", "MMMU-medical") for sample in synthetic.benchmark(name, 4)]
    entries = []
    for i, sample in enumerate(drawn):
        answers = {model: said(*(answer(sample, i * step + k * (i + step)) for k in range(n))) for model, step in (("a", 1), ("b/x", 2), ("c", 3))}
        entries.append(Entry(sample, {model: texts for model, texts in answers.items() if model != "c" or i % 4}))
    return Look(entries, "synthetic")


# --- the view and its text ---------------------------------------------------------------------------------------------------


def test_a_view_survives_its_text():
    odd = ("", "a&b=c", "100 %+#", "é 眼 \u202e", "a b", "<script>", "~*'()!", "\x00\n\t")
    for name, text in itertools.product(odd, odd):
        state = State(benchmark=name, models=(name or "m", text or "n"), model=text, text=text, low=0, high=3, at=7)
        assert parse_state("#" + write_state(state)) == state
        assert re.fullmatch(r"[\w&=%+.~-]*", write_state(state), re.A)
    assert parse_state("models=&models=a&models=b&text=") == State(models=("a", "b"))
    for wrong in ("nonsense=1", "at=-1", "at=1e9", "low=", "__proto__=1", "at=" + "9" * 5000):
        with pytest.raises(UserError):
            parse_state(wrong)


def brute(look, state):
    "The definition of every filter, written out anew."
    def right(entry, model, rule):
        return [grade(c["text"], entry.sample.options, entry.sample.answer_label, rule).correct for c in entry.answers.get(model, [])]

    hits = []
    for place, entry in enumerate(look.entries):
        mine, again = right(entry, state.model or "a", state.rule), right(entry, state.model or "a", state.against or state.rule)
        theirs = right(entry, state.other, state.rule)
        words = [entry.sample.question, *entry.sample.options.values(),
                 *(c["text"] for model in state.models or entry.answers for c in entry.answers.get(model, []))]
        share = {"right": lambda: mine and all(mine), "wrong": lambda: mine and not any(mine), "partly": lambda: any(mine) and not all(mine), "": lambda: True}
        if ((not state.benchmark or entry.sample.dataset_name == state.benchmark) and share[state.verdict]()
                and (not state.other or mine and theirs and sum(mine) / len(mine) != sum(theirs) / len(theirs))
                and (not state.against or mine and mine != again)
                and (state.low is None or mine and sum(mine) >= state.low) and (state.high is None or mine and sum(mine) <= state.high)
                and any(state.text.lower() in text.lower() for text in words)):
            hits.append(place)
    return hits


def views():
    "Views of every filter alone and in pairs."
    single = [{"benchmark": "pmc_vqa"}, {"benchmark": "MMMU-medical"}, *({"verdict": v} for v in ("right", "wrong", "partly")), {"other": "b/x"}, {"other": "c"},
              *({"against": rule} for rule in RULES), {"low": 1}, {"high": 1}, {"low": 1, "high": 2}, {"text": "CANNOT tell"}, {"text": "lesion"}, {"text": "none of this"},
              {"text": "cannot", "models": ("b/x",)}, {"model": "c"}, {"model": "b/x"}, {"rule": "reward"}, {"rule": "lenient"}]
    for one, two in itertools.combinations_with_replacement(single, 2):
        yield State(**{**one, **two})


@pytest.mark.parametrize("n", [1, 4])
def test_filters_are_what_they_say(n):
    look, counts = toy(n), set()
    for state in views():
        assert look.hits(state) == brute(look, state), state
        counts.add(len(look.hits(state)))
    assert len(counts) > 8, "the filters differ, and some pass nothing"


def test_what_is_not_there_gets_a_sentence():
    for state in (State(benchmark="x"), State(models=("a", "x")), State(model="x"), State(rule="kind"), State(other="x"), State(against="x"), State(verdict="maybe")):
        with pytest.raises(UserError, match="is not here; there are"):
            toy().hits(state)


# --- hostile texts -------------------------------------------------------------------------------------------------------------


def tags(page):
    "The tags that open in a page, with their attributes, as an HTML parser sees them."
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Parser().feed(page)
    return found


def test_no_text_breaks_out_of_its_place():
    held = island({EVIL: [EVIL]})
    assert json.loads(held) == {EVIL: [EVIL]} and held.isascii() and not set("<>&") & set(held)
    sample = dataclasses.replace(synthetic.benchmark("pmc_vqa", 1)[0], question=EVIL, options={"A": EVIL, "B": "no"}, answer_label="A", answer=EVIL, dataset_name=EVIL)
    shown = entry_html(Entry(sample, {EVIL: [{"text": EVIL, "finish_reason": EVIL, "tokens": EVIL}]}))
    found = tags(shown)
    assert {tag for tag, _ in found} <= {"div", "p", "b", "img", "pre", "bdi", "ul", "li", "i", "span", "details", "summary"}
    assert {name for _, attributes in found for name in attributes} <= {"class", "style", "dir", "src", "alt"}
    assert [attributes["src"][:22] for tag, attributes in found if tag == "img"] == ["data:image/png;base64,"]
    assert not re.search("[\x00\x1b\u202e\u2028\ud800]", shown)


def test_a_long_text_is_cut_and_says_so(tmp_path):
    text = "<think>" + "x" * 1_000_000 + "</think><answer> A </answer>"
    sample = synthetic.benchmark("pmc_vqa", 1)[0]
    page = write_page(Look([Entry(sample, {"m": said(text)})]), tmp_path / "long.html", quality=0)
    assert page.stat().st_size < 150_000 and f"{len(text) - 20_000:,} of {len(text):,} characters are left out here" in page.read_text()
    assert "answer\\u003e A \\u003c/answer" in page.read_text(), "the answer is kept"
    assert "are left out here" in entry_html(Entry(sample, {"m": said(text)}))


def test_the_policy_names_what_is_there(tmp_path):
    page = write_page(toy(), tmp_path / "page.html", title=EVIL).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    inline = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.S)
    assert inline == [STYLE, SCRIPT]
    for kind, block in zip(("style", "script"), inline):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert [value for _, given in tags(page) for name, value in given.items() if name in ("src", "href", "action", "style")] == ["data:,"]
    assert [tag for tag, _ in tags(page)].count("script") == 2 and not [name for _, given in tags(page) for name in given if name.startswith("on")]


def test_only_pictures_become_addresses():
    assert data_uri(encoded(kind="JPEG")).startswith("data:image/jpeg;base64,/9j/") and data_uri(encoded()).startswith("data:image/png;")
    for kind in ("GIF", "BMP", "TIFF", "WEBP"):
        assert data_uri(encoded(kind=kind)).startswith("data:image/png;")
    for junk in (b"", b"<svg onload=alert(1)>", b"<html>", b"\xff" * 9):
        assert data_uri(junk) == ""
    assert data_uri(encoded(), 75).startswith("data:image/jpeg;")


def test_pages_choose_their_questions_by_rule(tmp_path):
    look = toy()
    assert spread(look, 99) == list(range(12)) and spread(look, 2) == [0, 2, 4, 6, 8, 10] and spread(look, 1) == [0, 4, 8]
    page = write_page(look, tmp_path / "page.html", limit=2).read_text(encoding="utf-8")
    assert "This page holds 6 of 12 questions: of each set 2 at most, evenly spaced." in page and "mean nothing medical" in page
    assert write_page(look, tmp_path / "again.html", limit=2).read_text(encoding="utf-8") == page
    assert "mean nothing medical" not in write_page(Look(look.entries, "hub"), tmp_path / "hub.html").read_text(encoding="utf-8")
    assert visible(page_data(look, 1, 0, 100)["entries"][0]["question"]) == look.entries[0].sample.question


# --- what a run has left -------------------------------------------------------------------------------------------------------


def run_left(home, model="tiny", sets=("pmc_vqa", "slake_closed"), n=1, text="<think> x </think><answer> {} </answer>", part="", instruction="trained", temperature=None):
    "Samples and a rollout of each set, as a run leaves them; the folder of the last one."
    engine = FunctionEngine(lambda request: [Completion(text.format(request.sample.answer_label), "stop", 5)] * n, model, version=text)
    engine.instruction = instruction
    sampling = Sampling(n=n, temperature=(0.0 if n == 1 else 1.0) if temperature is None else temperature, seed=42)
    for number, each in enumerate(sets):
        samples = synthetic.corpus(each, 6) if part else synthetic.benchmark(each, 6)
        path = home / "smoke" / "samples" / "synthetic" / part / f"{each}-{200 if part else 100}.parquet"  # as many as `smoke` asks for, by name
        write_samples(samples, path)
        rollout = generate(samples, engine, sampling, home / "smoke" / "rollouts" / model / "synthetic" / part / each, lambda line: None)
    return rollout.folder


def test_stored_reads_and_makes_nothing(home):
    run_left(home)
    before = sorted(path for path in home.rglob("*"))
    look = stored(load_profile("smoke"))
    assert look.models == ["tiny"] and look.sets == ["pmc_vqa", "slake_closed"] and len(look.hits(State(verdict="right"))) == 12
    assert look.entries[7].whole() == synthetic.benchmark("slake_closed", 2)[1] and look.entries[7].sample.images == ()
    assert sorted(path for path in home.rglob("*")) == before
    assert [len(stored(load_profile("smoke"), "tiny", limit=2).entries), len(stored(load_profile("smoke", benchmark="slake")).entries)] == [4, 6]
    done = python("-c", "import sys; from medvlthinker.results.viewer import *; from medvlthinker.app.profile import load_profile; stored(load_profile('smoke')); print('torch' in sys.modules)",
                  MEDVLTHINKER_HOME=home)
    assert done.stdout.strip() == "False", done.stderr


def test_stored_says_what_is_missing(home):
    profile = load_profile("smoke")
    with pytest.raises(UserError, match=r"No whole rollout of tiny on any set with n=1 is stored; `\./reproduce\.sh smoke` makes it \(paper/4_evaluate\)"):
        stored(profile)
    folder = run_left(home)
    with pytest.raises(UserError, match="No whole rollout of tiny-RL_PMC on pmc_vqa"):
        stored(profile, ["tiny", "tiny-RL_PMC"])
    with pytest.raises(UserError, match="rollout smoke model=tiny n=5"):
        stored(profile, n=5)
    with pytest.raises(UserError, match="with n=8 is stored; .*paper/2_difficulty"):
        stored(profile, kind="corpus")
    with pytest.raises(UserError, match="No kind of questions"):
        stored(profile, kind="exam")
    (folder / "rollout.jsonl").write_bytes((folder / "rollout.jsonl").read_bytes()[:-5])
    with pytest.raises(UserError, match="No whole rollout of tiny on slake_closed"):
        stored(profile, ["tiny"])
    assert stored(profile).entries[6].answers == {}, "without names, what is there is shown"
    write_samples(synthetic.benchmark("pmc_vqa", 6, seed=1), home / "smoke" / "samples" / "synthetic" / "pmc_vqa-100.parquet")
    with pytest.raises(UserError, match="No whole rollout of tiny on pmc_vqa with n=1 is of the questions that are stored now"):
        stored(profile, ["tiny"])


def test_stored_takes_the_newest_of_its_kind(home):
    old = run_left(home, text="old {}")
    new = run_left(home, text="new {}")
    run_left(home, text="other prompt {}", instruction="none")
    run_left(home, text="warm {}", temperature=0.7)
    run_left(home, text="many {}", n=4)
    run_left(home, sets=("m23k", "pmc_vqa"), n=8, part="corpus")
    torn = run_left(home, text="torn {}")
    (old.parent / ("7" * 16)).mkdir()
    (old.parent / ("7" * 16) / "rollout.json").write_text("{")
    texts = {path: path.with_name("rollout.jsonl").read_text() for path in old.parents[1].glob("*/*/rollout.json") if path.with_name("rollout.jsonl").is_file()}
    for age, word in enumerate(("torn", "new", "old")):
        for path in (path for path, text in texts.items() if f'"{word} ' in text):
            os.utime(path, (2e9 - age, 2e9 - age))
            if word == "torn":
                path.with_name("rollout.jsonl").unlink()
    assert new.is_dir() and torn.is_dir()
    profile = load_profile("smoke")
    first = lambda look: look.entries[0].answers["tiny"][0]["text"][:4]
    assert [first(stored(profile)), first(stored(profile, n=4)), first(stored(profile, instruction="none"))] == ["new ", "many", "othe"]
    look = stored(profile, kind="corpus")
    assert look.most == 8 and len(look.entries) == 12 and look.about["tiny"].startswith("n=8, temperature 1.0, seed 42")


# --- in a browser --------------------------------------------------------------------------------------------------------------


def hostile():
    "An attack in every place that can hold a text."
    look = toy(2)
    sample = dataclasses.replace(look.entries[0].sample, question=EVIL, options={"A": EVIL, "B": "no"}, answer_label="A", answer=EVIL, images=(b"<svg onload=alert(1)>",))
    answers = {"a": said(EVIL, "<answer>" + ATTACKS[1] + "</answer>"), "b/x": said(EVIL * 200, ""), ATTACKS[1]: said(EVIL, EVIL)}
    return Look([*look.entries[1:], Entry(sample, answers), Entry(dataclasses.replace(sample, dataset_name=ATTACKS[0], dataset_index=1), answers)], "synthetic",
                {"a": ATTACKS[1], ATTACKS[1]: ATTACKS[0]})


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return write_page(hostile(), tmp_path_factory.mktemp("viewer") / "viewer.html", title=ATTACKS[2])


@pytest.mark.heavy
def test_hostile_texts_in_the_page(chromium, page_file):
    page, wrong, asked = watched(chromium)
    page.goto(f"{page_file.as_uri()}#at=12")
    shown = page.inner_text("body")
    assert "12 of 13" not in shown and "this is number 12." in shown
    for attack in ATTACKS:
        assert visible(attack) in shown, attack
    page.click("#next")
    page.wait_for_function("document.getElementById('count').textContent.includes('number 13')")
    assert "Image 1 cannot be shown." in page.inner_text("body")
    page.locator("summary", has_text="characters)").first.click()
    page.goto(f"{page_file.as_uri()}#text=%3Cscript%3E&model={'%3Cimg'}&__proto__=1&constructor=2&models=&at=x")
    page.wait_for_timeout(300)
    assert "which is not here" in page.inner_text("#count") and page.evaluate("window.pwned === undefined && !document.querySelector('main svg, main iframe, main script, main a')")
    assert wrong == [] and {url.split("#")[0] for url in asked if not url.startswith("data:")} == {page_file.as_uri()}
    page.close()


@pytest.mark.heavy
def test_the_page_filters_as_python_does(chromium, tmp_path):
    look = toy(4)
    page, wrong, _ = watched(chromium)
    page.goto(write_page(look, tmp_path / "page.html").as_uri())
    for number, state in enumerate(views()):
        page.evaluate("text => { history.replaceState(null, '', '#' + text); render() }", write_state(state))
        assert page.evaluate("hits.map(entry => data.entries.indexOf(entry))") == look.hits(state), state
        assert page.evaluate("write(here())") == page.evaluate("new URLSearchParams(location.hash.slice(1)).toString()")
    assert number > 200 and wrong == []
    page.close()


@pytest.mark.heavy
def test_keys_filters_and_links(chromium, tmp_path):
    look, count = toy(4), "document.getElementById('count').textContent.startsWith('{}')"
    page, wrong, _ = watched(chromium)
    home = write_page(look, tmp_path / "page.html").as_uri()
    page.goto(home)
    assert page.inner_text("#count") == "12 of 12 questions pass; this is number 1."
    for key, place in (("ArrowRight", 2), ("j", 3), ("k", 2), ("ArrowLeft", 1), ("ArrowLeft", 1), ("j", 2)):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        assert f"number {place}." in page.inner_text("#count")
    page.focus("#text")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(50)
    assert "number 2." in page.inner_text("#count"), "in a field, an arrow moves the cursor"
    page.keyboard.type("jk lesion")
    assert page.input_value("#text") == "jk lesion" and "none has all" in page.inner_text("#count") and page.inner_text("#entry") == ""
    page.fill("#text", "")
    page.select_option("#benchmark", "pmc_vqa")
    page.wait_for_function(count.format("4 of 12"))
    page.select_option("#verdict", "partly")
    page.uncheck("#models input >> nth=0")
    page.fill("#low", "2")
    page.wait_for_timeout(100)
    state = parse_state(page.url.split("#")[1])
    assert state == State("pmc_vqa", models=("b/x", "c"), verdict="partly", low=2) and page.inner_text("#count").startswith(f"{len(look.hits(state))} of 12")
    url, seen = page.url, page.inner_text("#entry")
    page.go_back()
    page.go_back()
    page.wait_for_timeout(100)
    assert parse_state(page.url.split("#")[1]) == State("pmc_vqa", verdict="partly") and page.is_checked("#models input >> nth=0")
    fresh, more, _ = watched(chromium)
    fresh.goto(url)
    assert fresh.inner_text("#entry") == seen and fresh.input_value("#verdict") == "partly" and fresh.input_value("#low") == "2"
    assert wrong == more == []
    fresh.close()
    page.close()


@pytest.mark.heavy
@pytest.mark.parametrize("width, scheme", [*itertools.product((400, 1400), ("light", "dark"))])
def test_sizes_and_schemes(chromium, page_file, width, scheme):
    page, wrong, _ = watched(chromium, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for at in (1, 12):
        page.goto(f"{page_file.as_uri()}#at={at}")
        page.reload()
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (at, width)
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (scheme == "light")
    unlabelled = "[...document.querySelectorAll('select, input')].filter(each => !each.labels.length).length"
    assert page.evaluate(unlabelled) == 0 and wrong == []
    page.close()


# --- in JupyterLab -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab over a folder with one notebook, which browses the hostile look."
    pytest.importorskip("jupyterlab", reason="JupyterLab comes with the extra `notebooks`")
    from fastcore.nbio import mk_cell, new_nb, write_nb

    folder = tmp_path_factory.mktemp("lab")
    cell = mk_cell("from test_viewer import hostile\nfrom medvlthinker.results.viewer import browse\nbrowse(hostile(), 'at=12')")
    notebook = new_nb([cell])
    notebook["metadata"] = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    write_nb(notebook, folder / "look.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    with subprocess.Popen([sys.executable, *words], cwd=here.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        yield address
        server.terminate()


@pytest.mark.heavy
def test_in_jupyterlab(chromium, lab):
    "The widgets answer, walk by keyboard, filter, and nothing that a model wrote comes alive."
    page, wrong, asked = watched(chromium, viewport={"width": 1400, "height": 1400})
    page.goto(f"{lab}/lab/tree/look.ipynb?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.wait_for_timeout(3000)
    page.click(".jp-Notebook .jp-Cell .jp-Editor")
    page.keyboard.press("Control+Enter")
    count = page.locator(".jp-OutputArea [role=status]")
    count.wait_for(timeout=90_000)
    assert count.inner_text() == "13 of 13 questions pass."
    shown = page.locator(".jp-OutputArea").first
    for attack in ATTACKS:
        assert visible(attack) in shown.inner_text(), attack
    view = page.locator("label:has-text('view') + input")
    page.click("button:has-text('next')")
    page.wait_for_function("[...document.querySelectorAll('input')].some(each => each.value === 'at=13')")
    page.click("button:has-text('previous')")
    page.wait_for_function("[...document.querySelectorAll('input')].some(each => each.value === 'at=12')")
    page.wait_for_function("[...document.querySelectorAll('.noUi-handle')].at(-1).ariaValueNow === '12.0'")
    page.wait_for_timeout(500)  # the slider's own movement
    page.locator(".noUi-handle").last.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("[...document.querySelectorAll('input')].some(each => each.value === 'at=11')")
    page.locator("label:has-text('questions') + select").select_option("pmc_vqa")
    page.wait_for_function("document.querySelector('.jp-OutputArea [role=status]').textContent.startsWith('4 of 13')")
    view.fill("text=unicorn")
    view.press("Enter")
    page.wait_for_function("document.querySelector('.jp-OutputArea [role=status]').textContent.startsWith('0 of 13')")
    alive = page.evaluate("document.querySelectorAll('.widget-html-content script, .widget-html-content svg, .widget-html-content iframe, mjx-container').length")
    assert alive == 0 and page.evaluate("window.pwned === undefined")
    assert [line for line in wrong if line.startswith("dialog") or "pwned" in line or "evil" in line] == [] and not [url for url in asked if "evil.example" in url]
    page.close()
