"""What is absent is a sentence: data of the hub where it cannot be asked, and a GPU.

Without a browser figures are still written as pages and numbers: test_figures. Without Quarto pandoc renders the site: test_site.
"""
from pathlib import Path

import pytest
from conftest import python, says


@pytest.fixture
def model(tmp_path) -> Path:
    "A folder that passes for a model until somebody loads it."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path / "model"


@pytest.mark.parametrize("words, parts", [
    ("rollout smoke data=hub limit=6 model={}", ["The data set UCSC-VLAA/MedVLThinker-Eval cannot be read", "data_dir="]),
    ("rollout mini data=synthetic limit=2 model={}", ["gpus=1", "this machine shows none"]),  # before the model is loaded
    ("train smoke gpus=8 recipe=tiny-SFT_PMC init={}", ["gpus=8", "this machine shows none"])])  # before the data are read
def test_what_is_absent_is_a_sentence(home, model, words, parts):
    says(python("-m", "medvlthinker.app.cli", *words.format(model).split(), CUDA_VISIBLE_DEVICES="", HF_HOME=home), *parts)
