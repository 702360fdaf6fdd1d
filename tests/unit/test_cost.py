"""What a run takes is said before it starts: sums against another estimate, and the disk against what is kept."""
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import python, says
from medvlthinker.app import cost
from medvlthinker.app.cost import cost_summary, dry_run
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.app.workflow import reasons, run_workflow
from medvlthinker.core.files import UserError
from medvlthinker.generation.request import Sampling
from medvlthinker.training.recipe import get_recipe, recipes_to_train


def test_the_whole_paper_takes_what_another_estimate_says_within_a_factor_of_two():
    "GPU hours of an estimate that was made by hand, from step times: pass counts, four SFT, eight RL, the 32B."
    paper = load_profile("paper")
    runs = recipes_to_train(paper.recipes)
    kinds = {"SFT": [each for each in runs if each.method == "SFT"], "RL": [each for each in runs if each.method == "RL" and each.size != "32B"], "32B": [each for each in runs if each.size == "32B"]}
    assert [len(each) for each in kinds.values()] == [4, 8, 1]
    found = {kind: [cost.training_cost(each, paper) for each in recipes] for kind, recipes in kinds.items()}
    found["counts"] = [cost.asking_cost(model, paper, [Sampling(n=16)], "corpus") for model in paper.models]
    for kind, expected in {"SFT": 168, "RL": 960, "32B": 352, "counts": 176}.items():
        least, likely, most = (sum(each.gpu_hours(rate) for each in found[kind]) for rate in ("high", "likely", "low"))
        assert expected / 2 <= likely <= 2 * expected and least <= expected <= most, (kind, found[kind])


def test_a_profile_s_limits_and_repeats_are_in_it():
    paper = load_profile("paper")
    hours = lambda **keys: cost.training_cost(get_recipe("7B-RL_m23k"), load_profile("paper", **keys)).gpu_hours()
    assert hours(max_steps=32) == pytest.approx(hours() / 10)
    assert hours(train_limit=2346) < hours() / 8
    one, many = (cost.asking_cost("Qwen/Qwen2.5-VL-7B-Instruct", paper, [Sampling(n=n)]) for n in (1, 64))
    assert many.gpu_hours() == pytest.approx(64 * one.gpu_hours()) and many.downloads == one.downloads
    assert cost.checkpoint_bytes(get_recipe("7B-RL_m23k"), load_profile("paper", lora_rank=32)) < 0.1 * cost.checkpoint_bytes(get_recipe("7B-RL_m23k"), paper)
    wide, narrow = (cost.training_cost(get_recipe("7B-SFT_m23k"), load_profile("paper", gpus=gpus)) for gpus in (32, 8))
    assert wide.gpu_hours() / 32 == pytest.approx(narrow.gpu_hours() / 8), "16 rows an update do not feed 32 GPUs"


def test_a_model_is_fetched_once(home):
    text = cost_summary(profile := load_profile("mini"), reasons(profile))
    lines = {line.split()[0]: line.split()[-2] for line in text.splitlines()}
    assert lines["2_difficulty"] == "7.5" and lines["3_train-3B-SFT_m23k"] == "-" and lines["4_evaluate-Qwen--Qwen2.5-VL-3B-Instruct"] == "-"


def test_a_step_that_a_run_is_not_asked_for_is_not_called_done(home):
    first, *_, last = dry_run(load_profile("smoke", recipes=""), {"1_data": "it has not run yet"})
    assert "state     it has not run yet" in first and "state     not asked for" in last


def disk_of(free: int):
    return lambda path: SimpleNamespace(total=10**13, used=10**13 - free, free=free)


def test_a_disk_that_is_too_small_is_said_at_the_start(home, monkeypatch):
    "And what is there already needs no more room."
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10**12))
    profile, recipe = load_profile("paper", nodes=1), get_recipe("3B-RL_m23k")  # else the nodes of 32B are missed first
    with pytest.raises(UserError, match=r"The models and checkpoints of paper need about 2,\d{3} GB more, and 1,000 GB are free in .*paper; make room") as said:
        run_workflow(profile)
    assert "\n" not in str(said.value) and not list(home.rglob("*.ipynb"))
    assert "the run would be refused" in cost_summary(profile, reasons(profile))
    mini = load_profile("mini")  # 19 GB of models: what may lie elsewhere, or is there, refuses no run
    for free, said in ((10**10, "too little: the run would be refused"), (3 * 10**10, "too little, unless"), (10**11, "GB are needed.")):
        monkeypatch.setattr(shutil, "disk_usage", disk_of(free))
        assert said in cost_summary(mini, reasons(mini))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10**12))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(int(cost.checkpoint_bytes(recipe, profile)) - 10**6))
    with pytest.raises(UserError, match="GB are free"):
        cost.refuse_small_disk([recipe], profile)
    kept = Workspace("paper").checkpoints / "3B-RL_m23k.training" / "global_step_50" / "actor"
    kept.mkdir(parents=True)
    with open(kept / "model_world_size_1_rank_0.pt", "wb") as file:
        file.truncate(10**7)  # a file with a hole
    cost.refuse_small_disk([recipe], profile)


def test_the_merge_of_a_checkpoint_on_the_way_comes_first_and_runs_in_any_folder(home, tmp_path):
    "7B-SFT_m23k-RL_PMC-sft_epoch_5 starts from step 7335 of another run, which only this call merges."
    steps = dict(part.split("\n", 1) for part in dry_run(load_profile("paper", recipes="7B-SFT_m23k-RL_PMC-sft_epoch_5", nodes=1), {}))
    merge, train = (line.strip() for line in steps["3_train-7B-SFT_m23k-RL_PMC-sft_epoch_5"].split("  command   ")[1].splitlines()[:2])
    assert {"merge", "paper", "nodes=1", "recipe=7B-SFT_m23k", "step=7335"} <= {*shlex.split(merge)} and shlex.split(train)[4:6] == ["medvlthinker.app.cli", "train"]
    *env, program, _, _, verb = shlex.split(merge)[:6]
    assert env == ["/usr/bin/env", f"MEDVLTHINKER_HOME={home}"] and (program, verb) == (sys.executable, "merge"), "whoever pastes it elsewhere has no MEDVLTHINKER_HOME"
    words = shlex.split(merge)[3:]
    says(python(*words, cwd=tmp_path), "No checkpoint in")
    assert not list(home.rglob("*.safetensors")), "the model to start from is not made for nothing"
