"""The README and the site, made from a small project of three notebooks."""

import base64
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("nbdev", reason="the site needs the extra `notebooks`")
from fastcore.nbio import mk_cell, new_nb, write_nb

from medvlthinker import site
from medvlthinker.config import UserError

ROOT = Path(__file__).resolve().parents[1]
PNG = base64.b64encode(base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")).decode()
COMPLETION = "<think> </pre><script>alert('model')</script>\n```\n:::\n</think> **B**"


def prose(text):
    return mk_cell(text, "markdown")


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def shown(**data):
    return {"output_type": "display_data", "metadata": {}, "data": {key.replace("_", "/", 1): value for key, value in data.items()}}


def figure():
    data = {"data": [{"type": "bar", "x": ["PMC", "SLAKE"], "y": [0.5, 0.7]}], "layout": {"width": 1400, "title": {"text": "Accuracy"}}}
    return {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.plotly.v1+json": data, "text/plain": "Figure()"}}


def write_project(root):
    "A home, a library notebook, a paper notebook and its executed copy."
    (root / "nbs" / "paper").mkdir(parents=True)
    shutil.copy(ROOT / "_quarto.yml", root)
    shutil.copytree(ROOT / "nbs" / "assets", root / "nbs" / "assets")
    (root / "settings.ini").write_text("[smoke]\nlimit = 3\n")
    (root / "pyproject.toml").write_text('[project]\nname = "toy"\n[tool.nbdev]\n')
    write_nb(new_nb([
        prose("# Toy\n\n> A project made for tests."),
        prose("Read [words](00_words.ipynb#counting-them), [results](paper/5_results.ipynb), [settings](../settings.ini)."),
        mk_cell("#| hide\nhidden_from_readers = 1", outputs=[printed("hidden output")]),
        mk_cell("#| echo: false\nunseen_code()", outputs=[printed(COMPLETION)]),
        mk_cell("picture", outputs=[shown(image_png=PNG, text_plain="<Image>")]),
        mk_cell("table", outputs=[shown(text_html="<table><tr><td>0.5</td></tr></table>", text_plain="   0.5")]),
    ]), root / "nbs" / "index.ipynb")
    write_nb(new_nb([
        prose("# Words\n\n> What a sentence is made of."), mk_cell("#| default_exp words"), mk_cell("#| export\nimport re"),
        prose("## Counting them\n\nBack to the [start](index.ipynb). A count is $n \\ge 0$, not \\boxed{n}; see pass@k."),
        mk_cell("#| exports\ndef count(\n    text: str,  # any text at all\n) -> int:\n    return len(text.split())"),
        mk_cell("count('one two')", outputs=[printed("\x1b[31m1\x1b[0m %\r"), printed("2 words\n")]),
    ]), root / "nbs" / "00_words.ipynb")
    paper = new_nb([prose("# The middle teaches"), mk_cell("profile = 'smoke'", metadata={"tags": ["parameters"]}), mk_cell("draw()")])
    write_nb(paper, root / "nbs" / "paper" / "5_results.ipynb")
    write_nb(new_nb([prose("# Evaluated"), mk_cell("evaluate()")]), root / "nbs" / "paper" / "4_evaluate.ipynb")
    paper.cells[2].outputs = [figure(), figure()]
    paper["metadata"] = {"papermill": {"end_time": "2026-11-22T09:00:00", "duration": 12.3, "parameters": {"profile": "smoke"}}}
    (root / "_runs" / "smoke" / "notebooks").mkdir(parents=True)
    write_nb(paper, root / "_runs" / "smoke" / "notebooks" / "5_results.ipynb")
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site of the small project, rendered by pandoc."
    root = write_project(tmp_path_factory.mktemp("toy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MEDVLTHINKER_HOME", raising=False)
        patch.setattr(site.shutil, "which", lambda name: None)
        return site.build("smoke").parent


def read(built, name):
    return (built / name).read_text(encoding="utf-8")


# --- the site --------------------------------------------------------------------------------------------------------------


def test_every_notebook_is_a_page_under_its_floor(built):
    assert sorted(path.relative_to(built).as_posix() for path in built.rglob("*.html")) == [
        "index.html", "paper/evaluate.html", "paper/results.html", "words.html"]
    menu = re.search(r"<nav.*?</nav>", read(built, "paper/results.html"), re.S)[0]
    assert re.findall(r'section">(.*?)<', menu) == ["The paper", "Floor 0 · words"]
    assert re.findall(r'href="(.*?)"', menu) == ["../index.html", "../paper/evaluate.html", "../paper/results.html", "../words.html"]
    assert re.findall(r'aria-current="page">(.*?)<', menu) == ["The middle teaches"]
    assert '<a href="#counting-them"' in re.search(r"<aside>.*?</aside>", read(built, "words.html"), re.S)[0]


def test_links_lead_somewhere_and_to_pages(built):
    assert site.audit(built) == []
    assert 'href="words.html#counting-them"' in read(built, "index.html")
    assert 'href="index.html"' in read(built, "words.html")
    assert "limit = 3" in (built / "files" / "settings.ini.txt").read_text()
    assert not re.search(r'href="[^"]*\.ipynb', "".join(read(built, path) for path in built.rglob("*.html")))


def test_the_audit_can_fail(built, tmp_path):
    shutil.copytree(built, tmp_path / "site")
    (tmp_path / "site" / "words.html").unlink()
    wrong = site.audit(tmp_path / "site")
    assert "index.html leads to words.html#counting-them, which is not there." in wrong
    (tmp_path / "site" / "words.html").write_text('<link href="//fonts.example/a.css"><img src="https://cdn.example/a.png"><a href="https://example.org">fine</a>')
    assert {"words.html loads //fonts.example/a.css.", "words.html loads https://cdn.example/a.png."} < set(site.audit(tmp_path / "site"))
    assert "index.html leads to words.html#counting-them, where there is no such anchor." in site.audit(tmp_path / "site")


def test_no_page_loads_anything_from_another_host(built):
    for path in built.rglob("*.html"):
        loads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", path.read_text(encoding="utf-8"))
        assert loads and not [target for target in loads if re.match(r"https?:|//", target)]
    assert not re.search(r"@import|url\(", read(built, "assets/site.css"))


def test_what_is_hidden_stays_hidden_and_code_can_be_folded(built):
    home, words = read(built, "index.html"), read(built, "words.html")
    assert "hidden_from_readers" not in home and "hidden output" not in home and "unseen_code" not in home
    assert "default_exp" not in words and "#|" not in re.sub("<.*?>", "", words)
    assert '<details class="code"><summary>Imports</summary>' in words
    assert '<details class="code" open><summary>count</summary>' in words and "# any text at all" in words
    assert '<details class="code"><summary>Code</summary>' in read(built, "paper/results.html")


def test_what_a_model_wrote_stays_text(built):
    home = read(built, "index.html")
    assert "<script>alert" not in home and "&lt;/pre&gt;&lt;script&gt;alert(&#39;model&#39;)" in home and "**B**" in home
    assert "<table><tr><td>0.5</td></tr></table>" in home
    assert "2 words" in read(built, "words.html") and "1 %" not in read(built, "words.html") and "\x1b" not in read(built, "words.html")


def test_prose_reads_as_it_was_written(built):
    words = read(built, "words.html")
    assert "<math" in words and "pass@k" in words and "\\boxed{n}" in words and "mailto:" not in words
    assert '<div class="lead">\nA project made for tests.\n</div>' in read(built, "index.html")


def test_paper_pages_say_where_their_numbers_come_from(built):
    assert "Executed on 2026-11-22 in 12 seconds, with profile = smoke." in read(built, "paper/results.html")
    assert "has not run in the profile smoke" in read(built, "paper/evaluate.html")


def test_figures_share_one_local_script(built):
    page = read(built, "paper/results.html")
    assert page.count("Plotly.newPlot(") == 2 and page.count("../assets/plotly.min.js") == 1 and '"width":1400' not in page
    assert [path.relative_to(built).as_posix() for path in built.rglob("plotly*.js")] == ["assets/plotly.min.js"]


def test_a_notebook_that_ran_for_two_models_gives_two_pages(tmp_path):
    root = write_project(tmp_path)
    done = root / "_runs" / "smoke" / "notebooks"
    for model in ("tiny", "7B-RL_m23k", "tiny.running"):
        shutil.copy(root / "nbs" / "paper" / "4_evaluate.ipynb", done / f"4_evaluate-{model}.ipynb")
    made = site.render_by_pandoc(site.stage(root, done))
    assert [path.name for path in sorted((made / "paper").glob("evaluate*"))] == ["evaluate-tiny.html", "evaluate.html"]
    assert "<h1>Evaluated · 7B-RL_m23k</h1>" in read(made, "paper/evaluate.html")
    assert "<h1>Evaluated · tiny</h1>" in read(made, "paper/evaluate-tiny.html")


def test_the_viewer_that_a_run_left_is_a_page_of_the_site(tmp_path, built):
    assert "viewer.html" not in read(built, "index.html"), "without a run there is none, and nothing links to it"
    root = write_project(tmp_path)
    done = root / "_runs" / "smoke" / "notebooks"
    (done.parent / "results").mkdir()
    (done.parent / "results" / "viewer.html").write_text("<!doctype html><html lang=en><title>Viewer</title></html>")
    made = site.render_by_pandoc(site.stage(root, done))
    assert 'href="../viewer.html"' in read(made, "paper/results.html") and (made / "viewer.html").is_file() and not site.audit(made)


def test_quarto_renders_the_same_folder_where_it_is_installed(tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path)
    stand_in = tmp_path / "bin" / "quarto"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nmkdir "$2/_docs"\nls "$2" > "$2/_docs/index.html"\necho "$1 $3" >> "$2/_docs/index.html"\n')
    stand_in.chmod(0o755)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    first = site.build()
    assert {"_quarto.yml", "index.ipynb", "paper", "assets", "render --no-execute"} < set(first.read_text().splitlines())
    assert "1 pages, rendered by Quarto" in capsys.readouterr().out
    stand_in.write_text("#!/bin/sh\necho 'ERROR: no such theme' >&2\nexit 1\n")
    with pytest.raises(UserError, match="no such theme"):
        site.build()
    assert first.is_file()  # the old site is kept


# --- the README ------------------------------------------------------------------------------------------------------------


def test_readme_is_the_same_each_time_and_hides_what_is_hidden(tmp_path):
    root = write_project(tmp_path)
    (root / "README_files").mkdir()
    (root / "README_files" / "old.png").write_bytes(b"from a former notebook")
    text = site.readme(root).read_text(encoding="utf-8")
    pictures = {path.name: path.read_bytes() for path in (root / "README_files").iterdir()}
    assert site.readme(root).read_text(encoding="utf-8") == text
    assert {path.name: path.read_bytes() for path in (root / "README_files").iterdir()} == pictures
    assert list(pictures.values()) == [base64.b64decode(PNG)] and f"![](README_files/{next(iter(pictures))})" in text
    assert "hidden" not in text and "unseen_code" not in text and "#|" not in text and not text.startswith("---")
    assert "[words](nbs/00_words.ipynb#counting-them)" in text and "[settings](settings.ini)" in text
    assert f"````\n{COMPLETION}\n````" in text and "# Toy\n\n> A project made for tests.\n\nRead" in text


def test_readme_links_of_this_project_lead_somewhere():
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


# --- the command and the configuration -------------------------------------------------------------------------------------


def run(folder, *words):
    return subprocess.run([sys.executable, "-m", "medvlthinker.site", *words], cwd=folder, capture_output=True, text=True, timeout=60)


def test_mistakes_get_one_sentence(tmp_path):
    root = write_project(tmp_path)
    (root / "nbs" / "00_words.ipynb").write_text('{"cells": [')
    broken = run(root, "build")
    assert broken.returncode == 2 and "00_words.ipynb is not a notebook" in broken.stderr and len(broken.stderr.strip().splitlines()) == 1
    assert "No profile 'smke'" in run(root, "build", "--profile", "smke").stderr
    unknown = run(root, "biuld")
    assert unknown.returncode == 2 and "Say `readme` or `build" in unknown.stderr and len(unknown.stderr.strip().splitlines()) == 1
    (root / "nbs" / "index.ipynb").unlink()
    missing = run(root, "readme")
    assert missing.returncode == 2 and "it is the README and the site's first page" in missing.stderr and not (root / "README.md").exists()


def test_first_cells_hold_a_title_and_one_sentence():
    "What else stood there would be lost: the renderers get the first cell as front matter."
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("paper/*.ipynb")]:
        first = site.read_notebook(path).cells[0]
        assert first.cell_type == "markdown" and re.fullmatch(r"# .+\n\n> .+\s*", first.source), path.name


def test_each_notebook_of_this_project_stands_in_one_section():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    names = sorted(path.relative_to(ROOT / "nbs").as_posix() for pattern in config["project"]["render"] for path in (ROOT / "nbs").glob(pattern))
    pages = {name: {"title": name, "href": name} for name in [*names, *(f"{floor}9_new.ipynb" for floor in range(7))]}
    entries = site.menu(config["website"]["sidebar"]["contents"], pages)
    listed = [page["href"] for entry in entries for page in entry.get("pages", [entry])]
    assert sorted(listed) == sorted(pages)
    assert config["project"]["type"] == "website" and config["execute"]["enabled"] is False and "http" not in json.dumps(config)


def look(page, home, width, scheme):
    "Visit the pages in one size and one colour scheme, use the button and the menu; what failed, and which addresses were asked for."
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    for name in ("index.html", "words.html", "paper/results.html"):
        page.goto(home + name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
    page.wait_for_selector("#figure-1 .main-svg")
    assert page.locator(".js-plotly-plot").count() == 2 and page.locator("#figure-0").bounding_box()["width"] <= width
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    assert (before == "rgb(255, 255, 255)") == (scheme == "light")
    page.click("#theme")
    page.goto(home + "words.html")
    assert page.evaluate(ground) != before  # the choice is kept from page to page
    if width == 400:
        assert not page.is_visible("nav")
        page.click("label[for=menu]")
        page.click("nav >> text=The middle teaches")
        assert page.url == home + "paper/results.html"
    return wrong, asked


@pytest.mark.heavy
def test_in_a_browser(built):
    "Phone and desktop, light and dark: nothing overflows, nothing fails, nothing leaves this machine."
    if not (chromium := shutil.which("chromium")):
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(built))

        def log_message(self, *args): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server, playwright.sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home, browser = f"http://127.0.0.1:{server.server_port}/", play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in ((1300, "light"), (1300, "dark"), (400, "light"), (400, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            wrong, asked = look(page, home, width, scheme)
            page.close()
            assert wrong == [] and [url for url in asked if not url.startswith((home, "data:"))] == []
        browser.close()
        server.shutdown()
