"""README.md and the site, made from a small project of five notebooks; then the real site in a browser."""
import contextlib
import functools
import io
import json
import os
import re
import shutil
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("nbdev", reason="the site needs the extra `notebooks`")
import yaml
from bs4 import BeautifulSoup
from conftest import FLOORS, ROOT, copy_project, stand_in, watched
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

from medvlthinker.app import site
from medvlthinker.core.files import UserError
from servers import serving

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
COMPLETION = "<think> </pre><script>alert('model')</script>\n```\n:::\n{{< include x >}}</think> **B**"
TABLE = "<table><tr><td>0.5</td></tr></table>"
WIDGET = "application/vnd.jupyter.widget-view+json"


def prose(text):
    return mk_cell(text, "markdown")


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def display(**data):
    return {"output_type": "display_data", "metadata": {}, "data": data}


def figure():
    data = {"data": [{"type": "bar", "x": ["</script>", "SLAKE"], "y": [0.5, 0.7]}], "layout": {"width": 1400}}
    return display(**{"application/vnd.plotly.v1+json": data, "image/png": PNG})


def write_project(root):
    "A home, two library notebooks, one of which is named as a module of ours, and two paper notebooks."
    for folder in ("nbs/paper", "nbs/core", "_runs/smoke/notebooks"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "_quarto.yml", root)
    shutil.copytree(ROOT / "nbs" / "assets", root / "nbs" / "assets")
    (root / "settings.ini").write_text("[smoke]\nlimit = 3\n")
    (root / "pyproject.toml").write_text('[project]\nname = "toy"\n[tool.nbdev]\n')
    write_nb(new_nb([
        prose("# Toy\n\n> A project made for tests."),
        prose("Read [words](core/00_words.ipynb#counting-them), [results](paper/5_results.ipynb), "
              "[settings](../settings.ini)."),
        prose("## How do I evaluate my own model?\n\nName its folder."),
        mk_cell("#| hide\nhidden_from_readers = 1", outputs=[printed("hidden output")]),
        mk_cell("print(completion)", outputs=[printed(COMPLETION)]),
    ]), root / "nbs" / "index.ipynb")
    write_nb(new_nb([
        prose("# Words\n\n> What a sentence is made of."), mk_cell("#| default_exp core.words"),
        mk_cell("#| export\nimport re"),
        prose("## Counting them\n\nBack to the [start](../index.ipynb). A count is $n \\ge 0$, not \\boxed{n}; see pass@k:\n- `wilson(k, n)`, no `k`"),
        mk_cell("#| exports\ndef count(\n    text: str,  # any text at all\n) -> int:\n    return len(text.split())"),
        mk_cell("count('one two')", outputs=[printed("2 words\n"),
                                             display(**{"text/html": TABLE, "text/plain": "0.5"}),
                                             display(**{WIDGET: {}, "text/plain": "HBox()"})]),
    ]), root / "nbs" / "core" / "00_words.ipynb")
    write_nb(new_nb([
        prose("# Stats\n\n> Numbers in, numbers out."), mk_cell("#| default_exp core.stats"),
        mk_cell("#| exports\ndef wilson(k: int, n: int = 1):  # both bounds\n    'Bounds of `k` < n.'\ndef _hidden(): ..."),
    ]), root / "nbs" / "core" / "01_stats.ipynb")
    paper = new_nb([prose("# The middle teaches"), mk_cell("profile = 'smoke'"), mk_cell("draw()")])
    write_nb(paper, root / "nbs" / "paper" / "5_results.ipynb")
    write_nb(new_nb([prose("# Evaluated"), mk_cell("evaluate()")]), root / "nbs" / "paper" / "4_evaluate.ipynb")
    paper.cells[2].outputs = [figure(), figure()]
    paper["metadata"] = {"papermill": {"end_time": "2026-11-22T09:00:00", "duration": 12.3, "parameters": {"profile": "smoke"}}}
    write_nb(paper, root / "_runs" / "smoke" / "notebooks" / "5_results.ipynb")
    return root


def build(root, home=None):
    "The site of the project in `root`, rendered by pandoc, and what was printed."
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(root)
        patch.setattr(site.shutil, "which", lambda name: None)
        patch.setenv("MEDVLTHINKER_HOME", str(home or root / "_runs"))
        return site.build("smoke").parent, printed.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(write_project(tmp_path_factory.mktemp("toy")))[0]


def read(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def soup(folder, name):
    return BeautifulSoup(read(folder, name), "html.parser")


# --- the staged pages, which both renderers read ---


def test_no_notebook_and_no_html_output_is_staged(tmp_path):
    "Quarto would add require.js and jquery of another host to a notebook with HTML in its outputs."
    root = write_project(tmp_path)
    staged = site.stage(root, root / "_runs" / "smoke" / "notebooks")
    assert not list(staged.rglob("*.ipynb")) and len(list(staged.rglob("*.md"))) == 5
    text = read(staged, "core/words.md")
    assert f'```{{=html}}\n<div class="output">{TABLE}</div>\n```' in text and "HBox" not in text
    home = read(staged, "index.md")
    assert "{{<" not in home and "{{&lt; include" in home, "a command of Quarto in a completion is text"
    fences = re.findall(r"^(`{3,}\{=html\}\n.*?^`{3,})$", home, re.M | re.S)
    assert all("<script" not in block for block in fences) and "&lt;script&gt;alert" in home


def test_both_renderers_get_one_list_of_pages(tmp_path):
    root = write_project(tmp_path)
    for model in ("tiny", "7B-RL_m23k", "tiny.running"):
        shutil.copy(root / "nbs/paper/4_evaluate.ipynb", root / f"_runs/smoke/notebooks/4_evaluate-{model}.ipynb")
    staged = site.stage(root, root / "_runs" / "smoke" / "notebooks")
    config = yaml.safe_load(read(staged, "_quarto.yml"))
    assert all((staged / name).is_file() for name in config["project"]["render"])
    paper = next(entry for entry in config["website"]["sidebar"]["contents"] if entry.get("section") == "The paper")
    folded = {"section": "4 Evaluated", "href": "paper/evaluate.md", "contents": [
        {"text": "7B-RL_m23k", "href": "paper/evaluate-7B-RL_m23k.md"}, {"text": "tiny", "href": "paper/evaluate-tiny.md"}]}
    assert paper["contents"] == [folded, {"text": "5 The middle teaches", "href": "paper/results.md"}]
    assert '"title": "Evaluated · tiny"' in read(staged, "paper/evaluate-tiny.md")
    assert config["format"]["html"]["css"] == "assets/content.css" and (staged / "assets/content.css").is_file()


def test_quarto_renders_the_same_folder_where_it_is_installed(tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path)
    quarto = 'mkdir "$2/_docs"\n(ls "$2"; echo "$1 $3") > "$2/_docs/index.html"'
    monkeypatch.chdir(root)
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(root / "_runs"))
    monkeypatch.setenv("PATH", str(stand_in(tmp_path / "bin", quarto=quarto)), prepend=":")
    first = site.build()
    assert {"_quarto.yml", "index.md", "paper", "assets", "render --no-execute"} < set(first.read_text().splitlines())
    assert "1 pages, rendered by Quarto" in capsys.readouterr().out
    for script, problem in (("echo 'ERROR: no such theme' >&2\nexit 1", "no such theme"),
                            ('mkdir "$2/_docs"\necho \'<script src="https://cdn.example/require.js">\' > "$2/_docs/a.html"', "a.html loads https://cdn.example")):
        stand_in(tmp_path / "bin", quarto=script)
        with pytest.raises(UserError, match=problem):
            site.build()
        assert first.is_file(), "the old site is kept"


# --- the pages that pandoc makes ---


def dead_links(folder):
    "Links within a site that lead to no file, or to no anchor of a page; what follows a # of the viewer is a view."
    pages = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html") if path.name != "viewer.html"}
    anchors = {path: {*re.findall(r'\bid="([^"]+)"', page)} for path, page in pages.items()}
    found = []
    for path, page in pages.items():
        for target in re.findall(r'<a [^>]*?href="(?![\w+.-]+:|//)([^"]*)"', page):
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.is_file() or anchor and there in anchors and anchor not in anchors[there]:
                found.append(f"{path.relative_to(folder)} leads to {target}")
    return found


def test_links_lead_to_pages_and_files(built):
    assert dead_links(built) == []
    assert 'href="core/words.html#counting-them"' in read(built, "index.html")
    assert "limit = 3" in read(built, "files/settings.ini.txt")
    menu = soup(built, "paper/results.html").nav
    assert [link.get_text() for link in menu.select("a")] == ["Home", "4 Evaluated", "5 The middle teaches", "00 Words", "01 Stats"]
    assert [link["href"] for link in menu.select("[aria-current]")] == ["../paper/results.html"]


@pytest.mark.parametrize("loads", [
    '<link href="//fonts.example/a.css">', '<img src="https://a.example/b.png">', '<img srcset="http://a.example/b.png">', '<object data="https://a.example/">',
    '<style>@import "https://a.example/a.css"</style>', '<p style="background: url(//a.example/b)">', '<svg><image xlink:href="https://a.example/b"/></svg>'])
def test_a_page_that_loads_from_another_host_stops_the_build(built, tmp_path, loads):
    shutil.copytree(built, tmp_path / "site")
    (tmp_path / "site" / "bad.html").write_text(f'<a href="https://fine.example">a link</a>{loads}')
    with pytest.raises(UserError, match=r"bad.html loads (https?:)?//\w+\.example"):
        site.check_site(tmp_path / "site")


def test_hidden_cells_stay_hidden_code_can_be_folded_and_numbers_have_a_source(built):
    home, words = read(built, "index.html"), read(built, "core/words.html")
    assert not re.search("hidden_from|hidden output", home) and "default_exp" not in words and "#|" not in re.sub("<.*?>", "", words)
    assert '<details class="code"><summary>Imports</summary>' in words
    assert '<details class="code" id="medvlthinker.core.words.count" open><summary>count</summary>' in words
    paper = read(built, "paper/results.html")
    assert paper.count("<summary>Code</summary>") == 1, "neighbours fold into one line"
    assert "Executed on 2026-11-22 in 12 seconds, profile = smoke." in paper and "From published numbers alone" in read(built, "paper/evaluate.html")


def test_a_notebook_that_is_stored_with_its_results_folds_its_code(tmp_path):
    "As 5_results and 6_audit are: a visitor reads what came out, before any run."
    root = write_project(tmp_path)
    (root / "_runs" / "smoke" / "notebooks" / "5_results.ipynb").replace(root / "nbs" / "paper" / "5_results.ipynb")
    staged = site.stage(root, root / "_runs" / "smoke" / "notebooks")
    assert "<summary>Code</summary>" in read(staged, "paper/results.md") and "<summary>" not in read(staged, "paper/evaluate.md")


def test_text_is_shown_as_it_was_written(built):
    words = read(built, "core/words.html")
    assert "<math" in words and "pass@k" in words and "\\boxed{n}" in words and "<li>" in words
    assert "2 words" in words
    shown = [block.get_text() for block in soup(built, "index.html").select(".output pre")]
    assert shown == [COMPLETION] and "<script>alert" not in read(built, "index.html")


# --- README.md and the configuration ---


def test_first_cells_hold_a_title_and_one_sentence():
    "A page's front matter is made from the first cell; what else stood there would be lost."
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("*/*.ipynb")]:
        first = read_nb(path).cells[0]
        assert first.cell_type == "markdown" and re.fullmatch(r"# .+\n\n> .+\s*", first.source), path.name


def test_each_notebook_of_this_project_stands_in_the_sidebar_once():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    found = site.find_pages(ROOT / "nbs", ROOT / "no_run")
    names = [source.relative_to(ROOT / "nbs").as_posix() for _, source in found.values()] + [f"{floor}/99_new.ipynb" for floor in FLOORS]
    entries = site.sidebar_entries(config["website"]["sidebar"]["contents"], {name: {"href": name} for name in names})
    assert sorted(page["href"] for entry in entries for page in entry.get("contents", [entry])) == sorted(names)
    assert not re.findall(r"https?://", json.dumps(config)) and len(names) == len(set(names))


# --- the real site ---


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "The site of this project, with the finished run of this checkout if there is one."
    home = Path(os.environ.get("MEDVLTHINKER_HOME") or ROOT / "_runs")
    folder, printed = build(copy_project(tmp_path_factory.mktemp("real")), home)
    assert re.fullmatch(r"_docs/index.html: \d+ pages, rendered by pandoc.\n", printed), printed[:1000]
    return folder


def test_the_verdicts_are_tables_and_text_on_their_pages(real):
    "And not the name of the object that showed them."
    for page in real.rglob("*.html"):
        assert "IPython.core.display" not in page.read_text(encoding="utf-8"), page
    for page, part in (("index.html", "holds in part"), ("paper/audit.html", "Within noise.")):
        shown = BeautifulSoup((real / page).read_text(encoding="utf-8"), "html.parser").select(".output")
        assert any(part in block.get_text() and block.select("table, strong") for block in shown), page
        assert "<details" not in " ".join(block.get_text() for block in shown), "calculations are folded"


def test_each_exported_function_of_the_real_site_has_a_place_and_no_link_is_dead(real):
    assert dead_links(real) == []
    places = {anchor for path in real.rglob("*.html") for anchor in re.findall(r'<details class="code" id="([^"]+)"', path.read_text())}
    assert {"medvlthinker.core.stats.wilson", "medvlthinker.generation.engine.open_engine", "medvlthinker.data.sample.Sample"} <= places


CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


@pytest.mark.heavy
def test_a_question_in_plain_words_finds_its_section(new_page, built):
    page = new_page()  # a double click on a page, without a server
    page.goto(f"file://{built}/core/stats.html")
    page.fill("#search", "how can I evaluate my own model")
    page.wait_for_selector("#found a")
    assert page.locator("#found a").first.get_attribute("href") == "../index.html#how-do-i-evaluate-my-own-model"
    page.fill("#search", "nowhereatall")
    page.wait_for_selector("text=No page has one of these words")
    page.keyboard.press("Escape")
    assert not page.is_visible("#found")


@pytest.mark.heavy
def test_in_a_browser(chromium, real):
    "Phone and desktop, light and dark: nothing overflows, nothing fails, nothing leaves this machine, all text can be read."
    pages = sorted(path.relative_to(real).as_posix() for path in real.rglob("*.html"))
    always = {"index.html", "core/grade.html", "paper/results.html", "paper/audit.html"}
    with serving(functools.partial(SimpleHTTPRequestHandler, directory=str(real))) as server:
        home = f"{server.url}/"
        for turn, (width, scheme) in enumerate(((1300, "light"), (1300, "dark"), (400, "light"), (400, "dark"))):
            page, wrong, asked = watched(chromium, viewport={"width": width, "height": 900}, color_scheme=scheme)
            for name in sorted({*always, *pages[turn::4]}):
                page.goto(home + name)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
                assert name == site.VIEWER or page.evaluate(CONTRAST) == {}, (name, scheme)
            if width == 400:
                assert not page.is_visible("nav")
                page.click("label[for=menu]")
                page.click("nav >> text=02 Grade")
                assert page.url == home + "core/grade.html"
            page.goto(home + "core/stats.html")
            page.keyboard.press("/")
            page.keyboard.type("grade")
            page.wait_for_selector("#found a", timeout=10_000)
            page.keyboard.press("Enter")
            page.wait_for_url("**/core/grade.html*")
            ground = "getComputedStyle(document.body).backgroundColor"
            before = page.evaluate(ground)
            page.click("#theme")
            page.goto(home + "index.html")
            assert page.evaluate(ground) != before, "the choice is kept from page to page"
            page.close()
            assert wrong == [] and [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []


@pytest.mark.heavy
def test_figures_follow_the_colours_of_the_page(new_page, built):
    page = new_page(color_scheme="dark")
    page.goto(f"file://{built}/paper/results.html")
    page.wait_for_selector("[data-drawn=dark] .main-svg")
    page.click("#theme")
    page.wait_for_selector("[data-drawn=light] .main-svg")
