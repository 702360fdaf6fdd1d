"""SFT on several GPUs, tried on a CPU: two processes on gloo under our own accelerate settings learn what one process learns, and go on after a kill."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, succeeded
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.sft import read_metrics
from medvlthinker.training.train import accelerate_config
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.heavy  # three starts of two processes, a minute and a half of two cores

WORKER = ROOT / "tests" / "gpu_paths" / "worker.py"
CASES = {  # name: model, data, settings
    "tied, layers computed again": ("tied", "images", {"gradient_checkpointing": "true"}),
    "untied": ("untied", "images", {}),
    "text": ("untied", "text", {}),
    "LoRA": ("tied", "images", {"lora_rank": 4}),
    "LoRA, both halves": ("tied", "images", {"lora_rank": 4}),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    "Two models, one with a head of its own, and four questions with and without images."
    folder = tmp_path_factory.mktemp("gpu_paths")
    tied = make_tiny_model(folder / "tied", steps=0)
    net = AutoModelForImageTextToText.from_pretrained(tied)
    for part in (net.config, net.config.text_config):
        part.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.flip(0) / 2)
    shutil.copytree(tied, folder / "untied")
    (folder / "untied" / "model.safetensors").unlink()
    net.save_pretrained(folder / "untied")
    write_samples(synthetic.corpus("pmc_vqa", 4), folder / "images.parquet")
    write_samples(synthetic.corpus("m23k", 4), folder / "text.parquet")
    return folder


def run(places: Path, name: str, cases: dict, processes: int) -> None:
    "Train cases in one process, or in two as accelerate starts GPUs."
    for case in cases.values():
        Path(case["folder"]).mkdir(parents=True)
    listed = places / f"{name}.json"
    listed.write_text(json.dumps(list(cases.values())))
    words = [str(WORKER), str(listed)]
    if processes > 1:
        config = accelerate_config(get_recipe("3B-SFT_m23k"), TrainingSettings(gpus=processes, dtype="float32"))
        path = places / f"{name}.accelerate.json"
        path.write_text(json.dumps(config))
        words = ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", "0", *words]
    succeeded(warm.run(*words, cwd=ROOT))


def case(places: Path, group: str, name: str, gpus: int, more: dict | None = None, **keys) -> dict:
    model, data, settings = CASES[name]
    return {"model": str(places / model), "data": str(places / f"{data}.parquet"), "folder": str(places / group / name.replace(" ", "_")),
            "settings": {"gpus": gpus, **settings, **(more or {})}, "drawn": "halves" in name, **keys}


@pytest.fixture(scope="module")
def trained(places) -> dict[str, dict]:
    """The gradients of each case, by group: one process, two that share the weights (FSDP), and in bfloat16, two that do not (DDP), and two rows at once;
    and the folders of two steps of which the second was taken away and trained again."""
    groups = {"one": {name: case(places, "one", name, 1, sharded=False) for name in CASES},
              "rows": {"untied": case(places, "rows", "untied", 1, {"micro_batch": 2}, sharded=False)},
              "fsdp": {name: case(places, "fsdp", name, 2) for name in CASES},
              "half": {name: case(places, "half", name, 2, {"dtype": "bfloat16"}) for name in ("untied", "LoRA")},
              "ddp": {"untied": case(places, "ddp", "untied", 2, sharded=False)}}
    again = {name: case(places, "again", name, 2, again=True, steps=2) for name in ("untied", "text", "LoRA")}
    for processes, names in ((1, ("one", "rows")), (2, ("fsdp", "half", "ddp"))):
        cases = {f"{group} {name}": each for group in names for name, each in groups[group].items()}
        run(places, str(processes), cases | (again if processes == 2 else {}), processes)
    found = {group: {name: torch.load(Path(each["folder"]) / "gradients.pt") for name, each in cases.items()} for group, cases in groups.items()}
    return found | {"again": {name: Path(each["folder"]) for name, each in again.items()}}


def distances(one: dict, other: dict) -> dict[str, float]:
    "How far two gradients of each weight are apart, as a share of the second where that is not 0 (half of each new adapter)."
    assert one["gradients"].keys() == other["gradients"].keys()
    found = {name: float((one["gradients"][name] - grad).norm() / (grad.norm() or 1)) for name, grad in other["gradients"].items()}
    assert all(distance == distance for distance in found.values()), "one that is no number is near to nothing"
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_one_process(trained, name):
    shared, alone = trained["fsdp"][name], trained["one"][name]
    assert (shared["sharded"], shared["processes"]) == (True, 2) and (alone["sharded"], alone["processes"]) == (False, 1)
    far = {weight: distance for weight, distance in distances(shared, alone).items() if distance > 1e-5}
    assert not far
    assert any(float(grad.norm()) > 1e-3 for grad in alone["gradients"].values()), "and there is something to compare"
    assert "halves" not in name or all(grad.any() for grad in alone["gradients"].values()), "in both halves of each adapter"


@pytest.mark.parametrize("name", ["untied", "LoRA"])
def test_bfloat16_on_several_gpus_is_near_to_float32(trained, name):
    "Computed and averaged in bfloat16, kept in float32."
    half, alone = trained["half"][name], trained["one"][name]
    assert {grad.dtype for grad in half["gradients"].values()} == {torch.float32}
    far = {weight: distance for weight, distance in distances(half, alone).items() if alone["gradients"][weight].any() and not 1e-4 < distance < 0.05}
    assert not far


def test_processes_with_whole_models_agree(trained):
    assert not trained["ddp"]["untied"]["sharded"]
    assert max(distances(trained["fsdp"]["untied"], trained["ddp"]["untied"]).values()) < 1e-5


def test_rows_at_once_do_not_change_what_is_learnt(trained):
    "The mean of the rows' means, whether a pass takes one row or two."
    assert max(distances(trained["rows"]["untied"], trained["one"]["untied"]).values()) < 1e-5


def test_text_leaves_the_vision_tower_alone(trained):
    assert not [name for name in trained["fsdp"]["text"]["gradients"] if "visual" in name]
    assert [name for name in trained["fsdp"]["untied"]["gradients"] if "visual" in name]


@pytest.mark.parametrize("name", ["untied", "text", "LoRA"])
def test_a_shared_run_goes_on_as_if_nothing_had_been(trained, name):
    "The last checkpoint is taken away; from the one before the same loss comes again."
    folder = trained["again"][name]
    whole, again = (read_metrics(path) for path in (folder / "undisturbed.jsonl", folder / "logs" / "metrics.jsonl"))
    assert [line["step"] for line in again] == [1, 2]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    assert whole[0]["loss"] != whole[1]["loss"]
