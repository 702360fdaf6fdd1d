"""The README and the site, made from a small project of three notebooks."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("nbdev", reason="the site needs the extra `notebooks`")
import yaml
from bs4 import BeautifulSoup
from conftest import FLOORS, ROOT, python, watched
from fastcore.nbio import mk_cell, new_nb, write_nb

from medvlthinker.app import site
from medvlthinker._modidx import d as index
from medvlthinker.core.files import UserError

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
    "A home, two library notebooks, one of which is named as a module of ours, a paper notebook and its executed copy."
    (root / "nbs" / "paper").mkdir(parents=True)
    (root / "nbs" / "core").mkdir()
    shutil.copy(ROOT / "_quarto.yml", root)
    shutil.copytree(ROOT / "nbs" / "assets", root / "nbs" / "assets")
    (root / "settings.ini").write_text("[smoke]\nlimit = 3\n")
    (root / "pyproject.toml").write_text('[project]\nname = "toy"\n[tool.nbdev]\n')
    write_nb(new_nb([
        prose("# Toy\n\n> A project made for tests."),
        prose("Read [words](core/00_words.ipynb#counting-them), [results](paper/5_results.ipynb), [settings](../settings.ini)."),
        mk_cell("#| hide\nhidden_from_readers = 1", outputs=[printed("hidden output")]),
        mk_cell("#| echo: false\nunseen_code()", outputs=[printed(COMPLETION)]),
        mk_cell("picture", outputs=[shown(image_png=PNG, text_plain="<Image>")]),
        mk_cell("table", outputs=[shown(text_html="<table><tr><td>0.5</td></tr></table>", text_plain="   0.5")]),
    ]), root / "nbs" / "index.ipynb")
    write_nb(new_nb([
        prose("# Words\n\n> What a sentence is made of."), mk_cell("#| default_exp core.words"), mk_cell("#| export\nimport re"),
        prose("## Counting them\n\nBack to the [start](../index.ipynb). A count is $n \\ge 0$, not \\boxed{n}; see pass@k."),
        mk_cell("#| exports\ndef count(\n    text: str,  # any text at all\n) -> int:\n    return len(text.split())"),
        mk_cell("count('one two')", outputs=[printed("\x1b[31m1\x1b[0m %\r"), printed("2 words\n")]),
    ]), root / "nbs" / "core" / "00_words.ipynb")
    write_nb(new_nb([
        prose("# Stats\n\n> Numbers in, numbers out."), mk_cell("#| default_exp core.stats"),
        prose("## An interval\n\nHere `wilson(k, n)` is called; a `wilsons` is nobody."),
        mk_cell("#| exports\ndef wilson(k, n): ...\ndef _hidden(): ..."), mk_cell("wilson(1, 2)"),
    ]), root / "nbs" / "core" / "01_stats.ipynb")
    paper = new_nb([prose("# The middle teaches"), mk_cell("profile = 'smoke'", metadata={"tags": ["parameters"]}), mk_cell("from medvlthinker.core.stats import wilson as interval\ninterval(1, 2)")])
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
        "core/stats.html", "core/words.html", "index.html", "paper/evaluate.html", "paper/results.html"]
    menu = re.search(r"<nav.*?</nav>", read(built, "paper/results.html"), re.S)[0]
    assert re.findall(r'section">(.*?)<', menu) == ["The paper", "Core"]
    assert re.findall(r'href="(.*?)"', menu) == ["../index.html", "../paper/evaluate.html", "../paper/results.html", "../core/words.html", "../core/stats.html"]
    assert re.findall(r'aria-current="page"[^>]*>(.*?)<', menu) == ["The middle teaches"]
    assert '<a href="#counting-them"' in re.search(r"<aside>.*?</aside>", read(built, "core/words.html"), re.S)[0]


def test_links_lead_somewhere_and_to_pages(built):
    assert site.audit(built) == []
    assert 'href="core/words.html#counting-them"' in read(built, "index.html")
    assert 'href="../index.html"' in read(built, "core/words.html")
    assert "limit = 3" in (built / "files" / "settings.ini.txt").read_text()
    assert not re.search(r'href="(?!http://127)[^"]*\.ipynb', "".join(read(built, path) for path in built.rglob("*.html")))


def test_the_audit_can_fail(built, tmp_path):
    shutil.copytree(built, tmp_path / "site")
    (tmp_path / "site" / "core" / "words.html").unlink()
    wrong = site.audit(tmp_path / "site")
    assert "index.html leads to core/words.html#counting-them, which is not there." in wrong
    (tmp_path / "site" / "core" / "words.html").write_text('<link href="//fonts.example/a.css"><img src="https://cdn.example/a.png"><a href="https://example.org">fine</a>')
    assert {"core/words.html loads //fonts.example/a.css.", "core/words.html loads https://cdn.example/a.png."} < set(site.audit(tmp_path / "site"))
    assert "index.html leads to core/words.html#counting-them, where there is no such anchor." in site.audit(tmp_path / "site")


def test_no_page_loads_anything_from_another_host(built):
    for path in built.rglob("*.html"):
        loads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", path.read_text(encoding="utf-8"))
        assert loads and not [target for target in loads if re.match(r"https?:|//", target)]
    assert not re.search(r"@import|url\(", read(built, "assets/site.css"))


def test_what_is_hidden_stays_hidden_and_code_can_be_folded(built):
    home, words = read(built, "index.html"), read(built, "core/words.html")
    assert "hidden_from_readers" not in home and "hidden output" not in home and "unseen_code" not in home
    assert "default_exp" not in words and "#|" not in re.sub("<.*?>", "", words)
    assert '<details class="code"><summary>Imports</summary>' in words
    assert '<details class="code" open=""><summary>count</summary>' in words and "# any text at all" in words
    assert '<details class="code"><summary>Code</summary>' in read(built, "paper/results.html")


def test_what_a_model_wrote_stays_text(built):
    home = read(built, "index.html")
    assert "<script>alert" not in home and "&lt;/pre&gt;&lt;script&gt;alert('model')" in home and "**B**" in home
    assert "<table><tr><td>0.5</td></tr></table>" in home
    assert "2 words" in read(built, "core/words.html") and "1 %" not in read(built, "core/words.html") and "\x1b" not in read(built, "core/words.html")


def test_prose_reads_as_it_was_written(built):
    words = read(built, "core/words.html")
    assert "<math" in words and "pass@k" in words and "\\boxed{n}" in words and "mailto:" not in words
    assert '<div class="lead">\nA project made for tests.\n</div>' in read(built, "index.html")


def test_paper_pages_say_where_their_numbers_come_from(built):
    assert "Executed on 2026-11-22 in 12 seconds, with profile = smoke." in read(built, "paper/results.html")
    assert "has not run in the profile smoke" in read(built, "paper/evaluate.html")


def test_figures_share_one_local_script(built):
    page = read(built, "paper/results.html")
    drawn = [json.loads(place.find("script").string) for place in BeautifulSoup(page, "html.parser").select(".live-figure")]
    assert [figure["data"][0]["y"] for figure in drawn] == [[0.5, 0.7]] * 2 and "width" not in drawn[0]["layout"]
    assert page.count("../assets/plotly.min.js") == page.count("../assets/figures.js") == 1
    assert [path.relative_to(built).as_posix() for path in built.rglob("plotly*.js")] == ["assets/plotly.min.js"]
    assert re.match(r'const darkTemplate = \{.*"plot_bgcolor": "rgb\(17,\s?17,\s?17\)"', read(built, "assets/figures.js"))


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
    assert "paper/viewer.html" not in read(built, "index.html"), "without a run there is none, and nothing links to it"
    root = write_project(tmp_path)
    done = root / "_runs" / "smoke" / "notebooks"
    (done.parent / "results").mkdir()
    (done.parent / "results" / "viewer.html").write_text("<!doctype html><html lang=en><title>Viewer</title></html>")
    made = site.render_by_pandoc(site.stage(root, done))
    assert 'href="../paper/viewer.html"' in read(made, "paper/results.html") and "<title>Viewer" in read(made, "paper/viewer.html") and not site.audit(made)


def test_quarto_renders_the_same_folder_where_it_is_installed(tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path)
    stand_in = tmp_path / "bin" / "quarto"
    stand_in.parent.mkdir()
    (tmp_path / "stats.html").write_text('<main><section id="medvlthinker.core.stats.wilson"><h3>wilson</h3></section><div class="cell"><div class="sourceCode cell-code">'
                                         '<pre class="sourceCode python"><code class="sourceCode python"><span id="cb1-1">wilson(<span class="dv">1</span>)</span></code></pre></div></div></main>')
    stand_in.write_text(f'#!/bin/sh\nmkdir "$2/_docs"\nls "$2" > "$2/_docs/index.html"\necho "$1 $3" >> "$2/_docs/index.html"\nmkdir "$2/_docs/core"\ncp {tmp_path}/stats.html "$2/core/01_stats.ipynb" "$2/_docs/core"\n')
    stand_in.chmod(0o755)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    first = site.build()
    assert {"_quarto.yml", "index.ipynb", "paper", "assets", "render --no-execute"} < set(first.read_text().splitlines())
    assert "2 pages, rendered by Quarto" in capsys.readouterr().out
    staged = "".join(cell.source for cell in site.read_notebook(first.parent / "core" / "01_stats.ipynb").cells)
    assert "### `wilson` {#medvlthinker.core.stats.wilson .reference}" in staged and "other-links" in staged, "what Quarto gets holds the reference and the link to JupyterLab"
    assert 'href="stats.html#medvlthinker.core.stats.wilson"' in read(first.parent, "core/stats.html") and not (first.parent / "assets").exists()
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
    assert "[words](nbs/core/00_words.ipynb#counting-them)" in text and "[settings](settings.ini)" in text
    assert f"````\n{COMPLETION}\n````" in text and "# Toy\n\n> A project made for tests.\n\nRead" in text


def test_readme_links_of_this_project_lead_somewhere():
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


# --- the command and the configuration -------------------------------------------------------------------------------------


def run(folder, *words):
    return subprocess.run([sys.executable, "-m", "medvlthinker.app.site", *words], cwd=folder, check=False, capture_output=True, text=True, timeout=60)


def test_mistakes_get_one_sentence(tmp_path):
    root = write_project(tmp_path)
    (root / "nbs" / "core" / "00_words.ipynb").write_text('{"cells": [')
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
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("*/*.ipynb")]:
        first = site.read_notebook(path).cells[0]
        assert first.cell_type == "markdown" and re.fullmatch(r"# .+\n\n> .+\s*", first.source), path.name


def test_each_notebook_of_this_project_stands_in_one_section():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    names = sorted(path.relative_to(ROOT / "nbs").as_posix() for pattern in config["project"]["render"] for path in (ROOT / "nbs").glob(pattern))
    pages = {name: {"title": name, "href": name} for name in [*names, *(f"{floor}/99_new.ipynb" for floor in FLOORS)]}
    entries = site.menu(config["website"]["sidebar"]["contents"], pages)
    listed = [page["href"] for entry in entries for page in entry.get("pages", [entry])]
    assert sorted(listed) == sorted(pages)
    assert config["project"]["type"] == "website" and config["execute"]["enabled"] is False
    assert {re.sub(r":\d+/.*", "", address) for address in re.findall(r"https?://[^\"]*", json.dumps(config))} <= {"http://127.0.0.1"}
    made = [re.sub(r"\d+_", "", name).lower() for name in names] + [site.VIEWER.replace(".html", ".ipynb")]
    assert len(set(made)) == len(made), "two notebooks of one name would be one page"


# --- what one looks up: references, links, search, actions --------------------------------------------------------------------


def soup(folder, name):
    return BeautifulSoup(read(folder, name), "html.parser")


def rows(table):
    return [[cell.get_text() for cell in row.select("td")] for row in table.select("tbody tr")]


def test_a_function_has_its_signature_and_its_parameters(built):
    page = soup(built, "core/stats.html")
    assert [heading.get_text() for heading in page.select("h3.reference")] == ["wilson"], "private helpers have none"
    table = page.select_one("table.parameters")
    assert page.find(id="medvlthinker.core.stats.wilson").find_next("pre").get_text() == "def wilson(k: int, n: int) -> tuple[float, float]"
    assert rows(table)[0] == ["k", "int", "", "questions answered correctly"] and rows(table)[-1][0] == "returns"
    assert table.find_next("details").summary.get_text() == "wilson, _hidden", "above the source"
    assert 'href="#medvlthinker.core.stats.wilson"' in str(page.aside)


def test_a_class_shows_fields_and_methods():
    from medvlthinker.data.sample import Sample, SampleFile

    text = site.reference(Sample)
    assert "### `Sample` {#medvlthinker.data.sample.Sample .reference}" in text and "#### `Sample.pictures` {#medvlthinker.data.sample.Sample.pictures .reference}" in text
    fields = rows(BeautifulSoup(text, "html.parser").table)
    assert [row[0] for row in fields] == [field for field in Sample.__dataclass_fields__] and fields[5][1:3] == ["str | None", "None"]
    assert rows(BeautifulSoup(site.reference(SampleFile), "html.parser").table)[1][2] == "True"


def test_calls_lead_to_their_definition_and_words_do_not(built):
    here, there = soup(built, "core/stats.html"), soup(built, "paper/results.html")
    assert [link["href"] for link in here.select("main p a.name")] == ["stats.html#medvlthinker.core.stats.wilson"], "`wilsons` and `k` are nobody's"
    assert [link["href"] for link in here.select("pre a.name")] == ["stats.html#medvlthinker.core.stats.wilson"]
    assert [link.get_text() for link in there.select("pre a.name")] == ["wilson", "interval"]
    assert {link["href"] for link in there.select("pre a.name")} == {"../core/stats.html#medvlthinker.core.stats.wilson"}
    assert not soup(built, "index.html").select("a.name")


def linked(code, prose="", names=None):
    page = BeautifulSoup(f'<main><pre><code class="sourceCode python">{code}</code></pre><p><code>{prose}</code></p></main>', "html.parser")
    site.link_names(page, names or {}, {f"medvlthinker.core.{each}": each for each in ("grade", "grade.grade", "grade.Grade", "stats.wilson")})
    assert page.code.get_text() == BeautifulSoup(code, "html.parser").get_text(), "the text stays the same"
    return [link["href"] for link in page.select("a")]


@pytest.mark.parametrize("code, prose, links", [
    ("from medvlthinker.core.grade import grade\ngrade(x)", "grade", ["grade.grade"] * 3),
    ("from medvlthinker.core.grade import grade as judge\njudge(x)", "grade", ["grade.grade"] * 2),
    ("import medvlthinker.core.stats as s\ns.wilson(s.other)", "s.wilson(1, 2)", ["stats.wilson"] * 2),
    ("from medvlthinker.core import grade\ngrade.grade(x).grade", "", ["grade", "grade", "grade.grade"]),
    ("from medvlthinker.core.grade import grade\nf(grade=1); x.grade; 'grade'", "", ["grade.grade"]),
    ("from medvlthinker.core.grade import grade\ndef f(grade): return grade", "", ["grade.grade"]),
    ("from medvlthinker.core.grade import grade\nfor grade in x: grade", "grade", ["grade.grade"]),
    ("from elsewhere import grade\ngrade(x)", "grade", []),
    ("grade(x)", "grade", []),
    ("grade of", "medvlthinker.core.grade.grade", []),
    ("from medvlthinker.core.grade import grade\nprint('ü', <span>grade</span>(\n  'é', y))", "", ["grade.grade"] * 2),
])
def test_which_names_are_links(code, prose, links):
    assert linked(code, prose) == links


def test_the_search_knows_every_section(built):
    text = read(built, "assets/pages.js")
    entries = json.loads(text.removeprefix("window.sitePages = "))
    found = {entry[0]: entry[1:] for entry in entries}
    assert found["core/words.html#counting-them"] == ["Words", "Counting them", "Back to the start. A count is n≥0, not \\boxed{n}; see pass@k."]
    assert found["core/stats.html#medvlthinker.core.stats.wilson"][:2] == ["Stats", "wilson"] and "questions answered correctly" in found["core/stats.html#medvlthinker.core.stats.wilson"][2]
    assert "len(text" not in text and "script" not in text, "neither code nor outputs"
    assert not [href for href in found if not (built / href.split("#")[0]).is_file()]


def test_links_to_the_source_come_from_the_configuration(built, tmp_path):
    def links(folder, name):
        return [(link.get_text(), link["href"]) for link in soup(folder, name).select("a.action")]

    assert links(built, "paper/results.html") == [("Open in JupyterLab", "http://127.0.0.1:8888/lab/tree/paper/5_results.ipynb")]
    root = write_project(tmp_path)
    config = yaml.safe_load((root / "_quarto.yml").read_text())
    config["website"] |= {"repo-url": "https://code.example/us/it/", "repo-branch": "dev", "repo-subdir": "nbs", "repo-actions": ["edit", "source", "issue"]}
    del config["jupyterlab"]
    (root / "_quarto.yml").write_text(yaml.safe_dump(config))
    made = site.render_by_pandoc(site.stage(root, root / "_runs" / "smoke" / "notebooks"))
    assert links(made, "core/words.html") == [("Edit this page", "https://code.example/us/it/edit/dev/nbs/core/00_words.ipynb"),
                                         ("View source", "https://code.example/us/it/blob/dev/nbs/core/00_words.ipynb"), ("Report an issue", "https://code.example/us/it/issues/new")]
    assert not site.audit(made)


def test_docs_are_served_on_this_machine_until_interrupted(tmp_path):
    root = write_project(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run(root, "build", "--serve", str(port))
        assert refused.returncode == 2 and f"Port {port} of this machine is taken" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
        assert not (root / "_docs").exists(), "told before the site is made"
    process = subprocess.Popen([sys.executable, "-u", "-m", "medvlthinker.app.site", "build", "smoke", "--serve", "0"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = [process.stdout.readline(), process.stdout.readline()]
        address = re.fullmatch(r"(http://127\.0\.0\.1:\d+/) shows the site until Ctrl-C\.\n", said[1])[1]
        assert "pages, rendered by" in said[0] and b"Toy" in urllib.request.urlopen(address, timeout=10).read()
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
    assert (process.returncode, errors) == (0, "")


# --- the real site ---------------------------------------------------------------------------------------------------------------


def build_real(folder, home):
    "The site of this project, from its committed notebooks and the run in `home`."
    for name in ("nbs", "_quarto.yml", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "reproduce.sh", "tests", "medvlthinker", "locks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MEDVLTHINKER_HOME", str(home))
        patch.setattr(site.shutil, "which", lambda name: None)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            made = site.build("smoke").parent
    assert re.fullmatch(r"_docs/index.html: \d+ pages, rendered by pandoc.\n", said.getvalue()), "the audit has a complaint"
    return made


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return build_real(tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("no_run"))


@pytest.fixture(scope="module")
def real_with_run(tmp_path_factory, request):
    "With the finished run of this checkout, if there is one; otherwise with the smallest one that has figures."
    home = Path(os.environ.get("MEDVLTHINKER_HOME") or ROOT / "_runs")
    if not (home / "smoke" / "notebooks" / "5_results.ipynb").is_file():
        home = tmp_path_factory.mktemp("run")
        shutil.copytree(request.getfixturevalue("warm_tiny"), home / "smoke" / "checkpoints" / "tiny")
        done = python("-m", "medvlthinker.app.cli", "run", "smoke", "limit=6", "train_limit=6", "recipes=", MEDVLTHINKER_HOME=home, BROWSER_PATH="none")
        assert done.returncode == 0, done.stderr
    return build_real(tmp_path_factory.mktemp("real"), home)


def test_the_real_site_is_whole(real):
    "No dead link (or it would not have been built); each exported function of each module has its reference; calls are links."
    texts, missing, tables = {}, [], 0
    for module, known in index["syms"].items():
        library = importlib.import_module(module)
        page = next(iter(known.values()))[0].partition("#")[0]
        texts[page] = text = read(real, page)
        exported = [name for name in library.__all__ if f"{module}.{name}" in known]
        missing += [f"{module}.{name}" for name in exported if f'id="{module}.{name}"' not in text]
        tables += text.count('class="parameters table"')
    assert missing == [] and tables > 400
    assert sum(text.count('class="name"') for text in texts.values()) > 4000
    assert 'href="../core/grade.html#medvlthinker.core.grade.grade"' in texts["evaluation/evaluate.html"]
    assert (real / "assets" / "pages.js").stat().st_size < 1_000_000


def visit(page, home, names, width):
    for name in names:
        page.goto(home + name)
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)


def see_figures(page, home, scheme):
    "A figure is drawn, and takes the colours of the page, also when the button is pressed."
    page.goto(home + "paper/results.html")
    page.locator("#figure-0").scroll_into_view_if_needed()
    page.wait_for_selector("#figure-0 .main-svg")
    ground, ink = "getComputedStyle(document.body).backgroundColor", "getComputedStyle(document.querySelector('#figure-0 .ytick text')).fill"
    before = [page.evaluate(ground), page.evaluate(ink)]
    assert (before[0] == "rgb(255, 255, 255)") == (scheme == "light")
    page.click("#theme")
    page.wait_for_selector(f"#figure-0[data-drawn={'dark' if scheme == 'light' else 'light'}]")
    after = [page.evaluate(ground), page.evaluate(ink)]
    assert before[0] != after[0] and before[1] != after[1]
    page.goto(home + "index.html")
    assert page.evaluate(ground) == after[0], "the choice is kept from page to page"
    page.click("#theme")


def find(page, home):
    "By keyboard alone to the definition of `grade`; then from a call of it to the same place."
    page.goto(home + "paper/results.html")
    page.keyboard.press("/")
    page.keyboard.type("grade")
    page.wait_for_selector("#found a")
    assert page.locator("#found a").first.get_attribute("href") == "../core/grade.html#medvlthinker.core.grade.grade"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_url("**/core/grade.html#medvlthinker.core.grade.grade")
    page.keyboard.press("/")
    page.keyboard.type("grade nowhereatall")
    page.wait_for_selector("text=No page has all of these words")
    page.keyboard.press("Escape")
    assert not page.is_visible("#found")
    page.goto(home + "index.html")
    page.locator("pre a.name[title='medvlthinker.core.grade.grade']").last.click()
    page.wait_for_url("**/core/grade.html#medvlthinker.core.grade.grade")
    assert page.evaluate("document.getElementById('medvlthinker.core.grade.grade').getBoundingClientRect().top") < 200


@pytest.mark.heavy
def test_in_a_browser(chromium, real_with_run):
    "Every page of the real site; phone and desktop, light and dark: nothing overflows, nothing fails, nothing leaves this machine."
    pages = sorted(path.relative_to(real_with_run).as_posix() for path in real_with_run.rglob("*.html"))
    always = ["index.html", "core/grade.html", "paper/results.html", "paper/audit.html", "paper/viewer.html"]
    assert set(always) < set(pages)
    with site.web_server(real_with_run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        for turn, (width, scheme) in enumerate(((1300, "light"), (1300, "dark"), (400, "light"), (400, "dark"))):
            page, wrong, asked = watched(chromium, viewport={"width": width, "height": 900}, color_scheme=scheme)
            visit(page, home, {*always, *pages[turn::4]}, width)
            see_figures(page, home, scheme)
            if width == 400:
                assert not page.is_visible("nav")
                page.click("label[for=menu]")
                page.click("nav >> text=Grade")
                assert page.url == home + "core/grade.html"
            if turn in (0, 3):
                find(page, home)
            page.close()
            assert wrong == [] and [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
        page = chromium.new_page()  # a double click on a page, without a server
        find(page, f"file://{real_with_run}/")
        page.close()
        server.shutdown()
