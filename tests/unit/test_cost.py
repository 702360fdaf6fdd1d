"""What a run takes is said before it starts, from numbers that hold: sizes by the models themselves, sums against another estimate, and the disk against what is kept."""
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from medvlthinker.app import cost
from medvlthinker.app.cost import cost_summary, dry_run
from medvlthinker.app.workflow import reasons, run_workflow
from medvlthinker.core.files import UserError
from medvlthinker.generation.request import Sampling
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.training.recipe import find, wanted

SHAPES = {  # of the config.json on the hub: hidden, inner, layers, heads, pairs, words, tied, inner of the vision tower
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420), "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420), "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456)}


@pytest.mark.parametrize("size", SHAPES)
def test_the_numbers_of_parameters_are_those_of_the_models(size):
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden, inner, layers, heads, pairs, words, tied, seen = SHAPES[size]
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": pairs, "vocab_size": words, "tie_word_embeddings": tied}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": seen, "num_heads": 16, "out_hidden_size": hidden}
    with torch.device("meta"):
        net = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))
    assert sum(weight.numel() for weight in net.parameters()) == cost.PARAMETERS[size]


def test_the_whole_paper_takes_what_another_estimate_says_within_a_factor_of_two():
    "GPU hours of an estimate that was made by hand, from step times: pass counts, four SFT, eight RL, the 32B."
    paper = load_profile("paper")
    runs = wanted(paper.recipes)
    kinds = {"SFT": [each for each in runs if each.method == "SFT"], "RL": [each for each in runs if each.method == "RL" and each.size != "32B"], "32B": [each for each in runs if each.size == "32B"]}
    assert [len(each) for each in kinds.values()] == [4, 8, 1]
    found = {kind: cost.total_cost(cost.training_cost(each, paper) for each in recipes).gpu_hours for kind, recipes in kinds.items()}
    found["counts"] = cost.total_cost(cost.asking_cost(model, paper, [Sampling(n=16)], "corpus") for model in paper.models).gpu_hours
    for kind, expected in {"SFT": 168, "RL": 960, "32B": 352, "counts": 176}.items():
        least, likely, most = found[kind]
        assert expected / 2 <= likely <= 2 * expected and least <= expected <= most, (kind, found[kind])


def test_a_profile_s_limits_and_repeats_are_in_it():
    paper = load_profile("paper")
    hours = lambda **keys: cost.training_cost(find("7B-RL_m23k"), load_profile("paper", **keys)).gpu_hours[1]
    assert hours(max_steps=32) == pytest.approx(hours() / 10)
    assert hours(train_limit=2346) < hours() / 8
    one, many = (cost.asking_cost("Qwen/Qwen2.5-VL-7B-Instruct", paper, [Sampling(n=n)]) for n in (1, 64))
    assert many.gpu_hours[1] == pytest.approx(64 * one.gpu_hours[1]) and many.downloads == one.downloads
    assert cost.checkpoint_bytes(find("7B-RL_m23k"), load_profile("paper", lora_rank=32)) < 0.1 * cost.checkpoint_bytes(find("7B-RL_m23k"), paper)
    assert cost.training_cost(find("7B-SFT_m23k"), load_profile("paper", gpus=32)).hours == pytest.approx(cost.training_cost(find("7B-SFT_m23k"), paper).hours), "16 rows an update do not feed 32 GPUs"


def test_a_model_is_fetched_once(home):
    text = cost_summary(profile := load_profile("mini"), reasons(profile))
    lines = {line.split()[0]: line.split()[-2] for line in text.splitlines()}
    assert lines["2_difficulty"] == "7.5" and lines["3_train-3B-SFT_m23k"] == "-" and lines["4_evaluate-Qwen--Qwen2.5-VL-3B-Instruct"] == "-"


def disk_of(free: int):
    return lambda path: SimpleNamespace(total=10**13, used=10**13 - free, free=free)


def test_a_disk_that_is_too_small_is_said_at_the_start(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10**12))
    profile = load_profile("paper", nodes=1)  # else the nodes of 32B are missed first
    with pytest.raises(UserError, match=r"The models and checkpoints of paper need about 2,\d{3} GB more, and 1,000 GB are free in .*paper; make room") as said:
        run_workflow(profile)
    assert "\n" not in str(said.value) and not list(home.rglob("*.ipynb"))
    assert "the run would be refused" in cost_summary(profile, reasons(profile))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(4 * 10**12))
    assert "refused" not in cost_summary(profile, reasons(profile))


def test_what_is_there_already_needs_no_more_room(home, monkeypatch):
    profile, recipe = load_profile("paper"), find("3B-RL_m23k")
    needed = cost.checkpoint_bytes(recipe, profile)
    monkeypatch.setattr(shutil, "disk_usage", disk_of(int(needed) - 10**6))
    with pytest.raises(UserError, match="GB are free"):
        cost.refuse_small_disk([recipe], profile)
    kept = Workspace("paper").checkpoints / "3B-RL_m23k.training" / "global_step_50" / "actor"
    kept.mkdir(parents=True)
    with open(kept / "model_world_size_1_rank_0.pt", "wb") as file:
        file.truncate(10**7)  # a file with a hole
    cost.refuse_small_disk([recipe], profile)


def test_the_embedded_runs_fit_on_any_disk(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_of(0))
    smoke = load_profile("smoke")
    cost.refuse_small_disk(wanted(smoke.recipes), smoke)
    assert "refused" not in cost_summary(smoke, reasons(smoke))


def test_the_merge_of_a_checkpoint_on_the_way_comes_first(home):
    "7B-SFT_m23k-RL_PMC-sft_epoch_5 starts from step 7335 of another run, which only this call merges."
    steps = dict(part.split("\n", 1) for part in dry_run(load_profile("paper", recipes="7B-SFT_m23k-RL_PMC-sft_epoch_5", nodes=1), {}))
    lines = steps["3_train-7B-SFT_m23k-RL_PMC-sft_epoch_5"].split("  command   ")[1].splitlines()
    assert shlex.split(lines[0])[-5:-1] == ["merge", "paper", "nodes=1", "recipe=7B-SFT_m23k"] and lines[0].endswith("step=7335"), lines[0]
    assert shlex.split(lines[1])[2:4] == ["medvlthinker.app.cli", "train"]


def test_a_printed_command_runs_in_another_folder(tmp_path, home):
    "As it stands, from a folder without settings: it gets as far as it can without a GPU, in our code and not in the shell."
    steps = dict(part.split("\n", 1) for part in dry_run(load_profile("smoke", recipes="tiny-SFT_m23k"), {}))
    line = next(line for line in steps["3_train-tiny-SFT_m23k"].splitlines() if line.startswith("  merge "))
    done = subprocess.run(["bash", "-c", line.split(None, 1)[1]], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "No checkpoint in" in done.stderr, done.stderr
    assert not list(home.rglob("*.safetensors")), "the model to start from is not made for nothing"
