"""Training as processes: killed and called again it ends with the same weights, two processes share a run, adapters become a model, and mistakes are sentences."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import warm
from conftest import ROOT, python, succeeded, until
from medvlthinker.data import synthetic
from medvlthinker.core.files import UserError
from medvlthinker.data.sample import write_samples
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.training.recipe import ROWS, TrainingSettings, get_recipe, total_steps
from medvlthinker.training.sft import WHOLE, last_whole, plan
from medvlthinker.training.train import accelerate_config, curves
from safetensors.numpy import load_file


@pytest.fixture
def ready(warm_home) -> Path:
    "A folder with the warm model in its checkpoints, and questions beside it."
    write_samples(synthetic.corpus("pmc_vqa", 64), warm_home / "pmc_vqa.parquet")
    write_samples(synthetic.corpus("pmc_vqa", 40), Workspace("smoke").curated / "synthetic" / "pmc_vqa-200-tiny-easy_to_hard.parquet")
    return warm_home


def words(recipe: str, steps: int, home: Path) -> list[str]:
    "The words for Python that train a recipe in a home."
    return ["-m", "medvlthinker.training.train", f"recipe={recipe}", f"data={home / 'pmc_vqa.parquet'}",
            f"checkpoints={home / 'smoke' / 'checkpoints'}", f"logs={home / 'logs'}", f"max_steps={steps}"]


def weights(home: Path, recipe: str, update: int) -> dict:
    path, = (home / "smoke" / "checkpoints" / f"{recipe}.training").glob(f"*/checkpoint-{update}")
    assert (path / WHOLE).is_file()
    return load_file(path / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def killed_at(command: list[str], logs: Path, step: int) -> None:
    "Start a run, and end it with SIGKILL once its curves have come to a step."
    process = warm.start(*command, cwd=ROOT)
    try:
        until(lambda: len(curves(logs)) >= step or not process.is_alive())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.parametrize("recipe, steps, at, often", [("tiny-SFT_PMC", 10, 4, ["save_every=3"]), ("tiny-RL_PMC", 7, 3, ["save_every=2"])])
def test_killed_and_called_again(ready, tmp_path, recipe, steps, at, often):
    """A run that was killed goes on from its checkpoint, and ends with the steps, the curves and, to the bit, the weights of one that was not;
    so do two runs in two processes. Checkpoints lie within an epoch, and before the first that the recipe of RL has; the second start saves more often."""
    whole, mine, theirs = tmp_path / "whole", words(recipe, steps, ready) + often, words(recipe, steps, tmp_path / "whole")
    later = words(recipe, steps, ready) + ["save_every=1", "keep_checkpoints=3"]
    shutil.copytree(ready, whole)
    succeeded(python(*theirs))  # with a hash seed of its own
    killed_at(mine, ready / "logs", at)
    torn = next((ready / "smoke" / "checkpoints" / f"{recipe}.training").glob("*/checkpoint-*")).with_name("checkpoint-7777")
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    done = succeeded(warm.run(*later, cwd=ROOT))
    assert "going on from a checkpoint" in done.stdout and not torn.exists(), done.stdout
    seen, expected = curves(ready / "logs"), curves(whole / "logs")
    assert seen.tokens.is_monotonic_increasing
    assert list(seen.index) == list(range(1, steps + 1)), "every step once"
    assert (seen.drop(columns="seconds") == expected.drop(columns="seconds")).all().all()
    assert same(weights(ready, recipe, steps), weights(whole, recipe, steps))
    left = (ready / "smoke" / "checkpoints" / f"{recipe}.training").glob("*/checkpoint-*")
    assert {path.name for path in left} == {f"checkpoint-{steps - back}" for back in range(3)}, "as many as were asked for stay on the disk"
    left = (whole / "smoke" / "checkpoints" / f"{recipe}.training").glob("*/checkpoint-*")
    assert [path.name for path in left] == [f"checkpoint-{steps}"], "only what is needed stays on the disk"
    start = load_file(ready / "smoke" / "checkpoints" / "tiny" / "model.safetensors")
    assert not same(weights(ready, recipe, steps), start), "and they have moved"
    again = succeeded(warm.run(*later, cwd=ROOT))
    assert "step" not in again.stdout, "a run that has ended is not run again"


STARTS = """
import sys
from medvlthinker.app import cli, commands
from medvlthinker.core.commands import run_logged, run_main
from medvlthinker.training import recipe, train

def long(*_):  # in place of a training: a process that starts another
    inner = "from medvlthinker.core.commands import run_logged; import sys; run_logged([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(99)'], sys.argv[1])"
    run_logged([sys.executable, "-c", inner, sys.argv[-1] + ".2"], sys.argv[-1])

train.train_here, train.read_words = long, lambda words: (recipe.get_recipe('tiny-SFT_PMC'), None, ())
commands._read_recipe = long
"""


@pytest.mark.parametrize("ends", ["run_main(train.main)", "sys.argv[1:] = ['train', sys.argv[1]]; cli.console()"])
def test_kill_ends_what_a_training_has_started(tmp_path, ends):
    "SIGTERM to the one process that was started by hand: neither the trainer nor what it started is left."
    said, error = tmp_path / "log.2", tmp_path / "error"
    with error.open("w") as file:
        words = [sys.executable, "-c", STARTS + ends, str(tmp_path / "log")]
        process = subprocess.Popen(words, cwd=ROOT, stderr=file)
    until(lambda: said.exists() and said.read_text().endswith("\n"), process, error)
    family = psutil.Process(process.pid).children(recursive=True)
    assert int(said.read_text()) in [each.pid for each in family] and len(family) == 2
    process.terminate()
    assert process.wait(60) == 130 and "interrupted; the same command goes on" in error.read_text()
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_two_processes_share_a_run(ready):
    "The same rows, the same number of steps, one set of curves: two processes over gloo, started as accelerate starts GPUs."
    config = {**accelerate_config(get_recipe("tiny-SFT_PMC"), TrainingSettings()), "num_processes": 2}
    (path := ready / "accelerate.json").write_text(json.dumps(config))
    done = succeeded(warm.run("-m", "accelerate.commands.launch", "--config_file", path, *words("tiny-SFT_PMC", 4, ready), "micro_batch=8", cwd=ROOT))
    assert list(curves(ready / "logs").index) == [1, 2, 3, 4]
    assert done.stdout.count("rows of pmc_vqa.parquet, 4 steps") == 1, "one of them speaks"
    folder, = (ready / "smoke" / "checkpoints" / "tiny-SFT_PMC.training").iterdir()
    assert last_whole(folder) == 4


@pytest.mark.parametrize("recipe", ["tiny-SFT_PMC", "tiny-RL_PMC"])
def test_a_checkpoint_of_several_gpus_is_not_for_one(ready, recipe):
    from medvlthinker.training import grpo, sft

    run = sft.plan(get_recipe(recipe), TrainingSettings(max_steps=2), ready / "pmc_vqa.parquet", ready / "smoke" / "checkpoints", ready / "logs")
    (run.folder / "checkpoint-1" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (run.folder / "checkpoint-1" / WHOLE).write_text("{}")
    with pytest.raises(UserError, match="checkpoint-1 was written by several GPUs.* set gpus as it was, or remove"):
        (grpo.train_grpo if recipe == "tiny-RL_PMC" else sft.train_sft)(run)


def test_answers_at_once_do_not_change_what_is_rewarded(ready):
    "GRPO: the same answers, rewards and losses, up to rounding, from all answers of an update at once and from eight."
    for size in (64, 8):
        succeeded(warm.run(*words("tiny-RL_PMC", 1, ready), f"logs={ready / f'logs{size}'}", f"micro_batch={size}", cwd=ROOT))
        shutil.rmtree(ready / "smoke" / "checkpoints" / "tiny-RL_PMC.training")
        shutil.rmtree(ready / "smoke" / "checkpoints" / "tiny-RL_PMC")
    whole, parts = (curves(ready / f"logs{size}").iloc[0] for size in (64, 8))
    assert [*whole[["reward", "length"]]] == pytest.approx([*parts[["reward", "length"]]]) and whole.reward > 0
    assert whole.grad_norm == pytest.approx(parts.grad_norm, rel=1e-2)


def test_adapters_become_a_model(ready):
    "LoRA through the whole of `train`: what the adapters add stands in the model, and nothing else has moved."
    succeeded(warm.run(*words("tiny-SFT_PMC", 4, ready), "lora_rank=4", cwd=ROOT))
    home = ready / "smoke" / "checkpoints"
    model, start = load_file(home / "tiny-SFT_PMC" / "model.safetensors"), load_file(home / "tiny" / "model.safetensors")
    assert model.keys() == start.keys()
    moved = {name for name in model if not (model[name] == start[name]).all()}
    assert moved == {name for name in model if "visual" not in name and name.endswith("_proj.weight")}


def test_the_small_gpu_run_has_the_steps_that_it_asks_for():
    "Of mini's questions the share is kept that the paper kept; RL then has all of its steps, and not a quarter."
    mini, share = load_profile("mini"), ROWS["RL", "m23k"][0] / ROWS["SFT", "m23k"][0]
    assert total_steps(get_recipe("3B-RL_m23k"), int(share * mini.train_limit), mini.max_steps) == mini.max_steps == 20


def test_rl_refuses_rows_that_it_cannot_use(ready):
    long = synthetic.corpus("pmc_vqa", 1)[0]
    write_samples([replace(long, question=long.question + " It is seen again." * 200)], ready / "long.parquet")
    with pytest.raises(UserError, match="1 of 1 rows of long.parquet cannot be trained on: 1 longer than 512 tokens.*max_rejected=1"):
        plan(get_recipe("tiny-RL_PMC"), TrainingSettings(), ready / "long.parquet", ready / "smoke" / "checkpoints", ready / "logs")


def test_what_a_trainer_says_last_is_the_sentence(ready):
    "The caller loads nothing heavy, the process that trains dies; its last words are the message, its log is kept, and nothing stands under the model's name."
    data, checkpoints, logs = ready / "pmc_vqa.parquet", ready / "smoke" / "checkpoints", ready / "logs"
    write_samples(synthetic.corpus("pmc_vqa", 3), data)
    call = f"""
import sys
from pathlib import Path
from medvlthinker.core.files import UserError
from medvlthinker.training.recipe import TrainingSettings, get_recipe
sys.executable = {str(Path(os.environ[warm.PLACE]) / "python")!r}  # by which it starts the process that trains
from medvlthinker.training.train import train
try:
    train(get_recipe("tiny-RL_PMC"), TrainingSettings(), Path({str(data)!r}), Path({str(checkpoints)!r}), Path({str(logs)!r}))
except UserError as error:
    print(error, {{"torch", "transformers", "trl"}} & set(sys.modules))
"""
    done = python("-c", call)
    assert done.stdout.endswith(f"there are only 3: not one step. Give it more questions. (log: {logs / 'train.log'}) set()\n"), done
    assert not (checkpoints / "tiny-RL_PMC").exists()
