"""What is absent costs only the feature that needs it, and a sentence says so. Nothing is faked: the thing is out of the reach of the process that is tested.

Without a browser figures are still written as pages and numbers: test_figures. Without Quarto pandoc renders the site: test_site.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, says

MODULES = sorted(".".join(path.relative_to(ROOT / "medvlthinker").with_suffix("").parts) for path in (ROOT / "medvlthinker").glob("*/[!_]*.py"))

# --- a network ---

LOOPBACK = """
import fcntl, os, socket, struct, sys

with socket.socket() as any:  # a machine without a network still speaks to itself: up goes lo (SIOCSIFFLAGS, IFF_UP | IFF_RUNNING)
    fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 0x41))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def cut_off():
    "Runs this environment's Python where there is no network but the machine itself; nobody tells the libraries so."
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}

    def run(*words, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(["unshare", "--map-root-user", "--net", sys.executable, "-S", "-c", LOOPBACK, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
                              stdin=subprocess.DEVNULL, env={**kept, **{key: str(value) for key, value in environment.items()}})

    if not shutil.which("unshare") or run("-c", "").returncode:
        pytest.skip("no process can be cut off from the network here: unshare --net is not permitted")
    assert "unreachable" in run("-c", "import socket; socket.create_connection(('192.0.2.1', 80), 5)").stderr
    return run


IMPORTED = """
import importlib, sys

for name in sys.argv.pop(1).split(","):
    importlib.import_module(f"medvlthinker.{name}")
from medvlthinker.core.commands import run_main
from medvlthinker.app.commands import rollout

run_main(rollout)
"""


@pytest.fixture
def model(tmp_path) -> Path:
    "A folder that passes for a model until somebody loads it."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path / "model"


def test_without_a_network_everything_imports_and_the_data_of_the_hub_are_a_sentence(cut_off, model, tmp_path):
    done = cut_off("-c", IMPORTED, ",".join(MODULES), "smoke", "data=hub", "limit=6", f"model={model}", MEDVLTHINKER_HOME=tmp_path, HF_HOME=tmp_path)
    says(done, "The data set UCSC-VLAA/MedVLThinker-Eval cannot be read", "data_dir=")


# --- a GPU ---


@pytest.mark.parametrize("words, gpus", [(["app.cli", "rollout", "mini", "data=synthetic", "limit=2", "model={}"], 1), (["app.cli", "train", "smoke", "gpus=8", "recipe=tiny-SFT_PMC", "init={}"], 8)])
def test_without_a_gpu_whatever_asks_for_one_says_so(home, model, words, gpus):
    "An engine before the model is loaded, training before the data are read."
    says(python("-m", f"medvlthinker.{words[0]}", *(word.format(model) for word in words[1:]), CUDA_VISIBLE_DEVICES=""), f"gpus={gpus}", "this machine shows none")
