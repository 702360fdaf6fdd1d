"""The package alone: what its wheel holds, that it works where nothing else is, that importing it is free, and which extra each absence names."""
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import medvlthinker
import pytest
from conftest import ROOT, python, says, succeeded
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = ("torch", "torchvision", "transformers", "datasets", "vllm", "verl", "ray", "trl", "peft", "accelerate", "openai", "plotly", "kaleido", "ipywidgets", "IPython", "nbdev", "papermill",
         "snakemake", "jupyterlab", "pypandoc", "datasketch", "imagehash", "pandas", "pyarrow", "scipy", "statsmodels", "PIL", "huggingface_hub")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The project's wheel, built without a network from a copy."
    tree = tmp_path_factory.mktemp("wheel") / "project"
    shutil.copytree(ROOT / "medvlthinker", tree / "medvlthinker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.ini"):
        shutil.copy(ROOT / name, tree)
    for name in ("nbs", "tests", "locks"):  # what must stay outside
        (tree / name).symlink_to(ROOT / name)
    succeeded(python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                     "--quiet", "--wheel-dir", tree / "dist", tree))
    return next((tree / "dist").glob("*.whl"))


def required(distribution: importlib.metadata.Distribution, extras=("",)) -> list[Requirement]:
    "What a distribution asks for here, with these of its extras."
    found = [Requirement(line) for line in distribution.requires or ()]
    return [each for each in found if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras)]


def closure(requirements: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    "All that these requirements bring, by name; what is not installed here is left out."
    found, todo = {}, list(requirements)
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found or one.extras:
            found[name] = distribution
            todo += [each for each in required(distribution, ("", *one.extras)) if canonicalize_name(each.name) not in found]
    return found


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    "The Python of a new environment with the wheel and its base dependencies, and nothing else: those are linked from where they are installed."
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    bin_python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", bin_python, "install", "--no-deps", "--no-index", "--quiet", wheel], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    [installed] = importlib.metadata.distributions(path=[str(site)])
    for distribution in closure(required(installed)).values():
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return bin_python


def alone(bare: Path, folder: Path, *words, **environment) -> subprocess.CompletedProcess:
    "Run the bare Python in a folder, with nothing of this environment or of the checkout in sight."
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MEDVLTHINKER_HOME", "VIRTUAL_ENV")}
    return subprocess.run([bare, *map(str, words)], cwd=folder, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**kept, "HF_HUB_OFFLINE": "1", **{key: str(value) for key, value in environment.items()}})


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        [meta] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata, settings = file.read(meta).decode(), file.read("medvlthinker/settings.ini")
    assert {name.split("/")[0] for name in names} == {"medvlthinker", meta.split("/")[0]}, "no tests, no notebooks"
    assert not [name for name in names if name.endswith(".ipynb")] and "medvlthinker/py.typed" in names
    assert settings == (ROOT / "settings.ini").read_bytes() and (ROOT / "medvlthinker" / "settings.ini").is_symlink(), "one source of the profiles"
    assert {f"medvlthinker/published/{path.name}" for path in (ROOT / "nbs" / "published").glob("*.csv")} == {name for name in names if name.endswith(".csv")}, "the published numbers"
    assert re.search(r"^Version: (.*)$", metadata, re.M)[1] == medvlthinker.__version__
    assert {"vllm", "train", "verl", "notebooks"} <= set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.M))
    assert {name for name in names if name.endswith(".py")} == {path.relative_to(ROOT).as_posix() for path in (ROOT / "medvlthinker").rglob("*.py")}


def test_importing_is_free(bare, tmp_path):
    "Each module of the package, in an environment without the extras; none loads a heavy library."
    code = f"""
import importlib, json, pkgutil, sys
import medvlthinker
names = [each.name for each in pkgutil.walk_packages(medvlthinker.__path__, "medvlthinker.")]
for name in names: importlib.import_module(name)
print(json.dumps([medvlthinker.__file__, names, sorted(set({HEAVY}) & set(sys.modules))]))
from medvlthinker import *  # each of the main nouns"""
    done = succeeded(alone(bare, tmp_path, "-c", code))
    where, names, loaded = json.loads(done.stdout)
    assert Path(where).is_relative_to(bare.parent.parent) and {f"medvlthinker.{name}" for name in ("core.grade", "generation.engine", "app.workflow", "training.verl_cpu")} <= set(names)
    assert not loaded


SCRIPT = """
from medvlthinker.data import synthetic
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.core.grade import grade
from medvlthinker.data.sample import SampleFile, write_samples
profile = load_profile("smoke", limit=5)
write_samples(synthetic.benchmark("pmc_vqa", profile.limit, profile.seed), Workspace(profile.name).samples / "some.parquet")
right = [grade(f"<answer> {sample.answer_label} </answer>", sample.options, sample.answer_label).correct for sample in list(SampleFile("_runs/smoke/samples/some.parquet"))]
print(profile.limit, sum(right), len(right))
"""


def test_a_script_without_a_checkout(bare, tmp_path):
    "Profiles come with the package; what is written goes to _runs in the working folder."
    done = alone(bare, tmp_path, "-c", SCRIPT)
    assert (done.returncode, done.stdout) == (0, "5 5 5\n"), done.stderr
    (tmp_path / "settings.ini").write_text("[mine]\nlimit = 7\n")
    assert alone(bare, tmp_path, "-c", "from medvlthinker.app.profile import load_profile; print(load_profile('mine').limit)").stdout == "7\n", "a settings.ini of one's own comes first"


ABSENT = {  # what a user calls -> the extra that the sentence names
    "from medvlthinker.generation.engine import VllmEngine; VllmEngine(load_profile('smoke'), 'x')": "vllm",
    "from medvlthinker.generation.engine import RayEngine; RayEngine(load_profile('smoke'), 'x')": "ray",
    "from medvlthinker.generation.tiny_model import tiny_processor; tiny_processor()": "torch",
    "from medvlthinker.generation.tiny_model import make_tiny_model; make_tiny_model('x')": "torch",
    "from medvlthinker.difficulty.preflight import open_processor; open_processor('x/y')": "torch",
    "from medvlthinker.training.sft import train_sft; train_sft(None)": "train",
    "from medvlthinker.training.grpo import train_grpo; train_grpo(None)": "train",
    "from medvlthinker.training.sft import open_model; open_model(None)": "torch,train",
    "from medvlthinker.training.verl import train_verl; train_verl(None)": "verl,ray,vllm",
    "from medvlthinker.core.plots import write_figure; write_figure('a', None, '.')": "notebooks",
    "from medvlthinker.difficulty.preflight import length_figure; length_figure({})": "notebooks",
    "from medvlthinker.training.train import curve_figure; curve_figure(None)": "notebooks",
}


def test_each_absent_extra_gives_its_sentence(bare, tmp_path):
    code = """
import json, sys
from medvlthinker.core.files import UserError
from medvlthinker.app.profile import load_profile
for call in json.loads(sys.argv[1]):
    try:
        exec(call)
        print("nothing was missed")
    except Exception as error:
        print("" if isinstance(error, UserError) else f"{type(error).__name__}:", *str(error).splitlines()[:1])
"""
    done = succeeded(alone(bare, tmp_path, "-c", code, json.dumps(list(ABSENT))))
    for (call, extra), sentence in zip(ABSENT.items(), done.stdout.splitlines(), strict=True):
        assert re.search(r" (is|are) not installed; ", sentence) and f"pip install 'medvlthinker[{extra}]'" in sentence, f"{call}: {sentence}"
    says(alone(bare, tmp_path, "-m", "medvlthinker.app.cli", "rollout", "smoke", "model=tiny"), "torch", "pip install 'medvlthinker[torch]'")
    says(alone(bare, tmp_path, "-m", "medvlthinker.app.cli", "status"), "needs a checkout of the project")
    says(alone(bare, ROOT, "-m", "medvlthinker.app.cli", "docs", "--readme"), "fastcore is not installed", "pip install 'medvlthinker[notebooks]'")  # found at the door of the commands
