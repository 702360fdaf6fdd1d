"""Every library notebook runs from top to bottom in a process of its own (which finds torch loaded), and the house keeps its order."""
import ast
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import warm
from conftest import FLOORS, ROOT, shown
from medvlthinker.core.files import UserError
from medvlthinker.core.plots import find_browser, with_outputs

LIBRARY = ["index.ipynb", *sorted(path.relative_to(ROOT / "nbs").as_posix() for floor in FLOORS for path in (ROOT / "nbs" / floor).glob("*.ipynb"))]
PAPER = sorted((ROOT / "nbs" / "paper").glob("*.ipynb"))
MODULES = sorted(".".join(path.relative_to(ROOT / "medvlthinker").with_suffix("").parts) for path in (ROOT / "medvlthinker").glob("*/[!_]*.py"))


PASSING = {  # what is another one each time -> what stands for it
    r"(?<![0-9a-f])[0-9a-f]{16,64}(?![0-9a-f])": "HASH", r"\d{4}-\d\d-\d\dT[\d+-]+": "TIME", r"\btmp\w{8}\b": "TEMPORARY", r"127\.0\.0\.1:\d+": "SERVER", r"T_[0-9a-f]{5}": "TABLE",
    r"(\| *)?\d+%\|[^\n]*\n": "",  # a bar of progress
    "PosixPath": "Path"}  # a library that the warm kernel has loaded prints paths so
DRAWN = ("core/04_plots.ipynb", "results/62_figures.ipynb")  # they show other things where no browser draws


@pytest.mark.parametrize("name", LIBRARY)
def test_runs_and_shows_what_is_stored(name, monkeypatch):
    "Where a model answers or is trained, numbers are the processor's own: of those chapters it is compared what kind of thing each cell shows."
    nbformat = pytest.importorskip("nbformat", reason="notebooks are not installed")
    if name not in ("core/04_plots.ipynb", "app/78_cli.ipynb"):  # they start kernels of their own, and show what other processes say
        monkeypatch.setenv("JUPYTER_PATH", os.environ[warm.PLACE])  # the kernel finds torch loaded
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # with it ipykernel shows nothing of other processes
    path = ROOT / "nbs" / name
    of_models = name.startswith(("generation", "training")) or "make_tiny_model(" in path.read_text(encoding="utf-8")
    if not of_models:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as where the outputs were stored

    def comparable(nb):
        if of_models:
            return [[(kind, sorted(data or ())) for kind, _, data in cell] for cell in shown(nb)]
        cells = shown(nb)
        for _, _, data in itertools.chain.from_iterable(cells):
            if "text/html" in (data or ()):  # nobody sees the text of a table, whose width is that of the terminal where pandas was loaded
                data.pop("text/plain", None)
        text = json.dumps(cells, indent=1, sort_keys=True).replace("\\n", "\n").replace(f"{os.environ[warm.PLACE]}/python", ".venv/bin/python")
        for pattern, word in PASSING.items():
            text = re.sub(pattern, word, text)
        return text.splitlines()

    stored, now = comparable(nbformat.read(path, 4)), comparable(with_outputs(path, draw=lambda figure: b""))
    if name in DRAWN:
        try:
            find_browser()
        except UserError as error:
            pytest.skip(f"it ran, and what it shows is not compared: {error}")
    assert stored == now, "store it anew: ./reproduce.sh docs --outputs NOTEBOOK"


def order(name: str) -> tuple[int, int]:
    "Where a chapter stands: its floor, and its number there."
    floor, _, file = name.partition("/")
    return FLOORS.index(floor), int(file.split("_")[0])


def imports(module: str) -> set[str]:
    "The modules of this package that a module imports, such as core.grade."
    floor, found = module.split(".")[0], set()
    for node in ast.walk(ast.parse((ROOT / "medvlthinker" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = ".".join(filter(None, [floor if node.level == 1 else "", node.module]))
            found |= {inside} if inside in MODULES else {f"{inside}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_downwards():
    "A module imports from floors below and, on its own floor, from smaller numbers only; the grader imports none: verl loads it by its path."
    place = {f"{name.split('/')[0]}.{re.sub(r'^[0-9]+_', '', Path(name).stem)}": order(name) for name in LIBRARY if "/" in name}
    uses = {module: imports(module) & {*MODULES} for module in MODULES}
    assert set(place) == set(MODULES), "each chapter exports the module of its name"
    assert not [(module, used) for module in MODULES for used in uses[module] if place[used] >= place[module]]
    assert uses["core.grade"] == set() and "core.stats" in uses["results.tables"], "the walk finds what it looks for"


@pytest.mark.parametrize("name", ["quickstart.ipynb", *filter(lambda name: "/" in name, LIBRARY)])
def test_chapters_show_what_their_cells_gave(name):
    "As `docs --outputs` stored it: small, without warnings, and without a word on the machine."
    text = (ROOT / "nbs" / name).read_text(encoding="utf-8")
    shown = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    assert shown and len(text) < 500_000, "store it anew: ./reproduce.sh docs --outputs NOTEBOOK"
    assert not [output for output in shown if output.get("name") == "stderr" or output["output_type"] == "error"]
    assert not re.search(r"/(tmp|root|home|Users)/\w|site-packages|Warning:|plotly\.js v", json.dumps(shown)) and str(ROOT) not in text


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_notebooks_are_clean(path):
    "Sources of paper notebooks hold no outputs (but for two, see test_figures), no definitions, and one cell of parameters."
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert path.stem in ("5_results", "6_audit") or not any(cell["outputs"] for cell in cells)
    assert not any(re.search(r"^(def|class) ", "".join(cell["source"]), re.M) for cell in cells)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
