"""JupyterLab as `./reproduce.sh lab` starts it: the map opens, notebooks run in the project's own kernel, widgets answer, and no other host hears of it."""
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, answers, free_port, python, succeeded, until, watched

pytestmark = pytest.mark.heavy
TOKEN = "of-these-tests"

LOOK = ["import sys; print(sys.prefix)", "from medvlthinker.results.viewer import browse\nfrom test_viewer import hostile\nbrowse(hostile(), at='at=12')"]


@pytest.fixture(scope="module")
def project(chromium, tmp_path_factory) -> Path:
    "A copy of what JupyterLab is started on, for it writes into notebooks; the environment is this one, under another name."
    pytest.importorskip("jupyterlab", reason="JupyterLab comes with the extra `notebooks`")
    from fastcore.nbio import mk_cell, new_nb, write_nb

    folder = tmp_path_factory.mktemp("lab") / "project"
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    script, found = re.subn(r"(\n    \*\)\n +)ready; exec", r"\1exec", (ROOT / "reproduce.sh").read_text())  # set up it is
    assert found == 1
    (folder / "reproduce.sh").write_text(script)
    shutil.copytree(ROOT / "locks", folder / "locks")
    (folder / ".venv").symlink_to(sys.prefix)
    look = new_nb([mk_cell(source) for source in LOOK])
    look["metadata"] = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    write_nb(look, folder / "nbs" / "look.ipynb")
    return folder


@pytest.fixture(scope="module")
def home(project, warm_tiny) -> Path:
    "What 5_results reads, as 4_evaluate leaves it."
    home = project.parent / "runs"
    shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
    succeeded(python("-m", "papermill", "nbs/paper/4_evaluate.ipynb", home / "4_evaluate.ipynb", "-k", "python3", "--cwd", "nbs/paper", "--no-progress-bar",
                     "-p", "limit", "12", "-p", "repeats", "2", cwd=project, MEDVLTHINKER_HOME=home, BROWSER_PATH="none"))
    return home


@pytest.fixture(scope="module")
def lab(project, home):
    "The script's own command, by a user who has another kernel called python3, which would not even start."
    user = project.parent / "user"
    (kernel := user / ".local" / "share" / "jupyter" / "kernels" / "python3").mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "Another", "language": "python"}))
    port = free_port()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "HF_HUB_OFFLINE", "XDG_"))}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "browser")))
    environment = kept | {"HOME": str(user), "JUPYTER_PREFER_ENV_PATH": "0", "PYTHONPATH": paths,
                          "MEDVLTHINKER_HOME": str(home), "BROWSER_PATH": "none"}  # pictures have their own tests
    words = ["bash", "reproduce.sh", "lab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    with open(project.parent / "server.log", "w") as log, subprocess.Popen(words, cwd=project, env=environment, stdout=log, stderr=log) as server:
        until(lambda: answers(port), server, project.parent / "server.log")
        address = f"http://127.0.0.1:{port}"
        yield SimpleNamespace(address=address, pid=server.pid, nbs=project / "nbs")
        server.terminate()


@pytest.fixture
def page(chromium, lab):
    "A page of its own; in the end nothing has failed in it and nothing was asked of another host."
    page, wrong, asked = watched(chromium, viewport={"width": 1400, "height": 1400})
    yield page
    page.close()
    assert wrong == []
    assert any(url.startswith("ws://127.0.0.1:") for url in asked)
    assert [url for url in asked if urlsplit(url).hostname != "127.0.0.1" and not url.startswith(("data:", "blob:http://127.0.0.1:"))] == []


def run_all(page, path: Path, seconds: int = 300) -> list[dict]:
    "Run All from the menu, and save; the code cells as they were saved."
    page.locator("#jp-main-statusbar", has_text="Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)  # connected: a Run All before that is lost
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator("li[data-command='runmenu:run-all']").click()
    cells = []
    for _ in range(seconds):
        page.wait_for_timeout(1000)
        page.keyboard.press("Control+s")
        try:
            cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        except ValueError:  # it is being written
            continue
        assert not (failed := [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]), failed
        if all(cell["execution_count"] for cell in cells):
            return cells
    raise AssertionError(f"{path.name}: {sum(not cell['execution_count'] for cell in cells)} of {len(cells)} cells have not run after {seconds} s")


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_it_opens_at_the_map(lab, page):
    page.goto(f"{lab.address}/?token={TOKEN}")
    page.locator(".jp-NotebookPanel:visible h1", has_text="A companion to MedVLThinker").wait_for(timeout=60_000)
    assert urlsplit(page.url).path == "/lab/tree/index.ipynb"
    run_all(page, lab.nbs / "index.ipynb")
    page.locator("td", has_text="At 32B the recipe is on par with GPT-4o.").wait_for()


def test_quickstart_takes_an_image_of_ones_own(lab, page, project):
    from PIL import Image

    Image.new("RGB", (90, 60), "gray").save(project / "mine.jpg")
    page.goto(f"{lab.address}/lab/tree/quickstart.ipynb?token={TOKEN}&reset")
    run_all(page, lab.nbs / "quickstart.ipynb")
    cell = page.locator(".jp-NotebookPanel:visible .jp-CodeCell", has_text="picker.value[0].content")
    picture = cell.locator(".jp-OutputArea img")
    size = lambda: picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size() == [112, 112], "a drawn scan"
    with page.expect_file_chooser() as chooser:
        page.locator(".jp-NotebookPanel:visible button", has_text="Your image").click()
    chooser.value.set_files(project / "mine.jpg")
    page.locator("button", has_text="Your image (1)").wait_for()
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea img')].some(image => image.naturalWidth == 90)", timeout=30_000)
    assert size() == [90, 60]


def test_results_are_drawn(lab, page, home):
    "The table of one's own sets that an earlier evaluation left is no result of this one."
    (stale := home / "smoke" / "results" / "own_sets.csv").write_text("model,benchmark\ntiny,chest\n")
    page.goto(f"{lab.address}/lab/tree/paper/5_results.ipynb?token={TOKEN}&reset")
    cells = run_all(page, lab.nbs / "paper" / "5_results.ipynb")
    assert re.search(r"models? of smoke were measured, on synthetic data", printed(cells[1])) and not stale.exists()
    figures = sum("application/vnd.plotly.v1+json" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    page.locator(".js-plotly-plot").last.scroll_into_view_if_needed(timeout=30_000)
    page.locator(".js-plotly-plot").last.locator(".main-svg").first.wait_for(timeout=30_000)
    assert page.locator(".js-plotly-plot:has(.main-svg)").count() == figures > 4
    assert page.locator("a[href*='viewer.html']").count() == 0, "JupyterLab serves no page of a run; the widget shows the questions"
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()


def test_the_viewer_answers_and_nothing_that_a_model_wrote_comes_alive(chromium, lab, project):
    from playwright.sync_api import expect
    from test_viewer import ATTACKS, hostile

    from medvlthinker.results.viewer import escape_invisible

    page, wrong, asked = watched(chromium, viewport={"width": 1400, "height": 1400})
    page.goto(f"{lab.address}/lab/tree/look.ipynb?token={TOKEN}&reset")
    cells = run_all(page, lab.nbs / "look.ipynb")
    assert printed(cells[0]).split() == [str(project / ".venv")], "the kernel is the project's environment"
    shown = page.locator(".jp-NotebookPanel:visible .jp-OutputArea", has=page.locator("[role=status]")).last
    count = shown.locator("[role=status]")
    expect(count).to_have_text("13 of 13 questions match; this is number 12.", timeout=90_000)
    for attack in ATTACKS:
        assert escape_invisible(attack) in shown.inner_text(), attack
    alive = ".widget-html-content :is(script, svg, math, iframe, a), mjx-container"
    assert page.locator(alive).count() == 0 and page.evaluate("window.pwned === undefined")
    hits = len(hostile().hits("benchmark=vqa_rad_closed"))
    shown.locator("label:has-text('Questions of') + select").select_option("vqa_rad_closed")
    expect(count).to_have_text(f"{hits} of 13 questions match; this is number 1.", timeout=30_000)
    shown.locator("label:has-text('Question') + input[type=number]").focus()
    page.keyboard.press("ArrowUp")
    expect(count).to_contain_text("this is number 2.", timeout=30_000)
    expect(shown.locator("[role=status] ~ code")).to_have_text("benchmark=vqa_rad_closed&model=a&at=2")
    assert not [line for line in wrong if "dialog" in line or "pwned" in line or "evil" in line]
    assert not [url for url in asked if "evil.example" in url]
    page.close()


def test_only_this_machine_may_ask(lab):
    import psutil

    server = psutil.Process(lab.pid)
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1, "the server, and the kernels of the notebooks before"
    assert {line.laddr.ip for each in family for line in each.net_connections("inet") if line.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.address}/api/contents", timeout=10)
