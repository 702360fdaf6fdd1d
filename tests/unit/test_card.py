"""Cards against what they describe: the code block runs where it stands, and the hub's library reads the metadata."""
import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from medvlthinker.app.cards import model_card, write_card
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.core.files import record_path, write_record
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.recipe import get_recipe


@pytest.fixture
def made(home):
    "A model with the record of its training, and where its evaluation would lie."
    workspace = Workspace("smoke")
    folder = make_tiny_model(workspace.checkpoints / "tiny-RL_PMC", steps=0, show=lambda line: None)
    with write_record(folder, {}) as facts:
        facts.update(steps=60, seed=42)
    return folder, workspace.results / "synthetic/tiny-RL_PMC/evaluation.json"


def test_a_card_holds_what_was_measured_and_its_code_runs_where_it_stands(made, monkeypatch, capsys):
    (folder, path), arguments = made, (get_recipe("tiny-RL_PMC"), load_profile("smoke"))
    write_card(*arguments)
    text = (folder / "README.md").read_text()
    assert "Not measured." in text and "| steps | 60 |" in text and "means nothing medical" in text
    with write_record(path, {}):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"source": "synthetic", "rule": "regrade", "seed": 42, "counts": {"pmc_vqa": [71, 100]}}))
    write_card(*arguments)
    text = (folder / "README.md").read_text()
    assert "| pmc_vqa | 71.0 | 71 | 100 | 61.5 to 79.0 | synthetic | regrade | 42 |" in text
    record = record_path(folder).read_text()
    record_path(folder).write_text(re.sub('"started": "20', '"started": "21', record))
    write_card(*arguments)
    assert "Not measured." in (folder / "README.md").read_text(), "trained again since: these are other weights' numbers"
    monkeypatch.chdir(folder)
    block, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block.replace("max_new_tokens=200", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("init", ["Qwen/Qwen2.5-VL-3B-Instruct", "/data/my-base"])
def test_a_card_names_its_base_model_and_the_licence_that_comes_with_it(init):
    text = model_card(replace(get_recipe("3B-RL_m23k"), init=init))
    data = ModelCard(text).data
    assert (data.base_model, data.license_name) == (init if init[0] != "/" else None, "qwen-research")
    assert f"RL of {init}" in text and "Not for clinical use" in text
