"""Every library notebook runs from top to bottom in a process of its own (which finds torch loaded), and the house keeps its order."""
import json
import re
import sys
from pathlib import Path

import pytest
import warm
from conftest import ROOT, python

LIBRARY = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))
PAPER = sorted((ROOT / "nbs" / "paper").glob("*.ipynb"))
MODULES = sorted(path.stem for path in (ROOT / "medvlthinker").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", LIBRARY)
def test_runs(name):
    nbdev_test = Path(sys.executable).with_name("nbdev-test")
    done = warm.run(nbdev_test, f"nbs/{name}", "--n-workers", "0", cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_modules_import_no_torch():
    "Importing is free: no module loads torch, and none loads a library that takes seconds."
    code = "import sys, importlib\nfor m in sys.argv[1:]: importlib.import_module('medvlthinker.' + m)\n" \
           "print([m for m in ('torch', 'transformers', 'datasets', 'vllm', 'trl', 'ray', 'plotly', 'pandas', 'scipy') if m in sys.modules])"
    done = python("-c", code, *MODULES)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_imports_point_downwards():
    "A module imports only from notebooks with smaller numbers, and the grader from none: verl loads it by its path."
    number = {m.group(2): int(m.group(1)) for name in LIBRARY if (m := re.match(r"(\d+)_(\w+)\.ipynb", name))}
    uses = {module: set(re.findall(r"from \.(\w+) import", source := (ROOT / "medvlthinker" / f"{module}.py").read_text()))
            | {name for line in re.findall(r"from \. import ([\w, ]+)", source) for name in line.split(", ")} for module in MODULES}
    assert not [(module, used) for module in MODULES for used in uses[module] if number[used] >= number[module]]
    assert uses["grade"] == set() and uses["report"], "the pattern finds what it looks for"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_notebooks_are_clean(path):
    "Sources of paper notebooks hold no outputs, no definitions, and one cell of parameters."
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    assert not any(re.search(r"^(def|class) ", "".join(cell["source"]), re.M) for cell in cells)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
