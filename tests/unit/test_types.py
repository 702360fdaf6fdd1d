"""The type hints hold, and every public function says what it is."""
import ast
import importlib.util
import shutil

import pytest
from conftest import ROOT, python

PACKAGE = ROOT / "medvlthinker"


def mypy(folder, cache):
    "mypy over the package in a folder, by this project's settings."
    return python("-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, "--no-error-summary", "medvlthinker", cwd=folder)


def test_types_hold_and_a_wrong_one_is_found(tmp_path):
    if not importlib.util.find_spec("mypy"):
        pytest.skip("mypy is not installed, which checks the type hints; ./reproduce.sh setup installs it")
    done = mypy(ROOT, tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(PACKAGE, tmp_path / "medvlthinker", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "medvlthinker" / "results" / "claims.py", "a") as file:  # little imports it, and from the cache the rest is read
        file.write('\n\ndef planted(paper: Paper) -> str:\n    return difference_interval("7B-RL_m23k", paper.rows[0])\n')
    found = mypy(tmp_path, tmp_path / "cache").stdout
    assert 'has incompatible type "str"; expected "Published"' in found and "Incompatible return value type" in found, found


def complaints(source: str) -> list[str]:
    "The public functions, classes and methods of a module that do not say in a sentence what they are."
    tree, found = ast.parse(source), []
    names = next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), [])
    for node in (node for node in tree.body if getattr(node, "name", None) in names):
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        for each in [node, *(each for each in methods if not each.name.startswith("_"))]:
            first = (ast.get_docstring(each) or "").partition("\n")[0]
            if not first.endswith((".", "?")):
                found.append(f"{node.name}: the docstring of {each.name} begins with no sentence: {first!r}")
    return found


def test_public_functions_say_what_they_are():
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "_modidx"]
    wrong = {path.stem: said for path in modules if (said := complaints(path.read_text(encoding="utf-8")))}
    assert not wrong, "\n".join(f"{name}.{line}" for name, lines in wrong.items() for line in lines)


def test_silence_is_found():
    planted = '__all__ = ["f", "g", "H"]\ndef f(a): "Adds."\ndef g(b): "Adds"\nclass H:\n    "A thing."\n    def go(self): pass\n'
    assert [line.split()[0] + line.split()[-1] for line in complaints(planted)] == ["g:'Adds'", "H:''"]
