"""What needs verl: its configuration takes our commands, its dataset reads our rows, and it trains, saves, is killed, goes on and merges for real, on the CPU."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from conftest import ROOT, at_work, encoded, python, until
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.generation.model import pixel_limits
from medvlthinker.app.profile import load_profile
from medvlthinker.training.recipe import RECIPES, TrainingSettings, get_recipe
from medvlthinker.training.sft import plan, read_metrics
from medvlthinker.training import verl
from medvlthinker.training.verl import complete_checkpoints, verl_overrides, verl_parquet, verl_row
from safetensors.numpy import load_file

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not importlib.util.find_spec("verl"), reason="verl is not installed; ./reproduce.sh setup full installs it")]

# --- (a) the run; it takes longest, and comes first: a file that ends with minutes keeps the next one waiting --------------

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.training.recipe import get_recipe
from medvlthinker.training.train import train_here

name, data, steps = sys.argv[1:]
recipe, workspace = get_recipe(name), Workspace("smoke")
config = replace(recipe.config, kl_coef=0.01, warmup_steps=0, save_every=1, keep=0)
train_here(replace(recipe, config=config), load_profile("smoke", trainer="verl", max_steps=int(steps)),
           Path(data), workspace.checkpoints, workspace.logs / name)
"""


def begin(log: Path, name: str, data: Path, steps: int = 2) -> subprocess.Popen:
    "As a user with a bare PATH and the address of a cluster that a run on one node does not want."
    bare = {**os.environ, "PATH": "/usr/bin:/bin", "RAY_ADDRESS": "http://127.0.0.1:1"}
    return subprocess.Popen([sys.executable, "-c", RUN, name, str(data), str(steps)], cwd=ROOT,
                            stdout=open(log, "w"), stderr=subprocess.STDOUT, env=bare,
                            start_new_session=True)


def slow(log: Path) -> bool:
    "Ray gives its own processes 30 seconds to start, and no setting for more; a machine busy with other things may need them."
    return "The current node timed out during startup" in log.read_text()


def not_in_time(log: Path, code: int | None) -> None:
    if code and slow(log):
        pytest.skip("Ray's own processes did not start within its 30 seconds, in several attempts; this machine is too busy for the run of verl")


def test_two_steps_with_a_kill_between_them(warm_home, tmp_path):
    "Two steps of GRPO with images through verl itself, SIGKILL after the first; the same command goes on, and the merged model is the trained one."
    write_samples(synthetic.corpus("pmc_vqa", 40, 3), data := tmp_path / "pmc_vqa.parquet")
    checkpoints, logs = warm_home / "smoke" / "checkpoints", warm_home / "smoke" / "logs" / "tiny-RL_PMC"
    first, begun = begin(tmp_path / "first.log", "tiny-RL_PMC", data), 1
    try:
        end = time.monotonic() + 1800
        while not read_metrics(logs / "metrics.jsonl") and time.monotonic() < end and (first.poll() is None or slow(tmp_path / "first.log") and begun < 4):
            if first.poll() is not None:
                first, begun = begin(tmp_path / "first.log", "tiny-RL_PMC", data), begun + 1
            time.sleep(0.2)
        not_in_time(tmp_path / "first.log", first.poll())
        assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        if first.poll() is None:  # where Ray never started it is gone
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    until(lambda: not at_work(warm_home))  # Ray's processes end with the one that started them
    folder, = (checkpoints / "tiny-RL_PMC.training").glob("*/global_step_1/..")
    assert list(complete_checkpoints(folder)) == [1] and [row["step"] for row in read_metrics(logs / "metrics.jsonl")] == [1]
    torn = folder / "global_step_2" / "actor"  # as if the kill had come a second later: a folder begun, a number emptied
    torn.mkdir(parents=True, exist_ok=True)
    (torn / "model_world_size_1_rank_0.pt").write_bytes(b"PK\x03\x04 torn")
    (folder / "latest_checkpointed_iteration.txt").write_text("")

    starts = len(list(logs.glob("verl-*.sh")))
    second = begin(tmp_path / "second.log", "tiny-RL_PMC", data)
    while second.wait(1800) and slow(tmp_path / "second.log") and starts < 5:
        second, starts = begin(tmp_path / "second.log", "tiny-RL_PMC", data), starts + 1
    not_in_time(tmp_path / "second.log", second.returncode)
    assert second.returncode == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert "step 1 of 2" in (tmp_path / "second.log").read_text()
    assert max(complete_checkpoints(folder)) == 2 and (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    rows = read_metrics(logs / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and [row["step"] for row in read_metrics(logs / f"verl-{starts + 1:03}.jsonl")] == [2]
    assert all(0 < row["reward"] < 1 and 1 < row["length"] <= 48 and row["learning_rate"] > 0 and row["seconds"] > 0 and row["tokens"] > 0 for row in rows)
    assert {"kl", "entropy", "loss", "grad_norm"} <= set(rows[0]) and rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 0
    start, merged = (load_file(checkpoints / name / "model.safetensors") for name in ("tiny", "tiny-RL_PMC"))
    assert start.keys() == merged.keys() and any((merged[name] != start[name]).any() for name in start)  # test_checkpoint holds logits against shards

    third = begin(tmp_path / "third.log", "tiny-RL_PMC", data)  # nothing is left to do
    assert third.wait(300) == 0 and len(list(logs.glob("verl-*.sh"))) == starts + 1


# --- (b) the configuration -------------------------------------------------------------------------------------------------

# As published, written down by hand from the paper's launch scripts, not from medvlthinker.training.recipe:
# shuffle, batch, mini batch, micro batch per GPU, tensor parallel, nodes, epochs, save frequency, checkpoints kept
PUBLISHED = {
    "3B-RL_m23k": (True, 256, 128, 32, 2, 1, 5, 50, None),
    "7B-RL_m23k": (True, 256, 128, 32, 2, 1, 5, 50, None),
    "3B-RL_m23k-easy_to_hard": (False, 256, 128, 32, 2, 1, 5, 100, None),
    "7B-RL_m23k-easy_to_hard": (False, 256, 128, 32, 2, 1, 5, 100, None),
    "3B-RL_m23k-easy_to_hard-1_epoch": (False, 256, 128, 32, 2, 1, 1, 50, None),
    "7B-RL_m23k-easy_to_hard-1_epoch": (False, 256, 128, 32, 2, 1, 1, 50, None),
    "3B-RL_PMC": (True, 256, 128, 32, 2, 1, 1, 50, None),
    "7B-RL_PMC": (True, 256, 128, 32, 2, 1, 1, 50, None),
    "3B-RL_PMC-easy_to_hard": (False, 256, 128, 16, 2, 1, 1, 100, 2),
    "7B-RL_PMC-easy_to_hard": (False, 256, 128, 32, 2, 1, 1, 100, None),
    "32B-RL_m23k": (True, 128, 64, 16, 4, 4, 5, 50, 2),
    "3B-RL_m23k-RL_PMC": (True, 64, 32, 8, 2, 1, 1, 50, 3),
    "7B-RL_m23k-RL_PMC": (True, 64, 32, 8, 2, 1, 1, 50, 3),
    "3B-SFT_m23k-RL_PMC": (True, 64, 32, 8, 2, 1, 1, 50, None),
    "7B-SFT_m23k-RL_PMC": (True, 64, 32, 4, 2, 1, 1, 50, None),
    "7B-SFT_m23k-RL_PMC-sft_epoch_5": (True, 64, 32, 4, 2, 1, 1, 50, None),
}
PLACES = ("data.shuffle", "data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
          "actor_rollout_ref.rollout.tensor_model_parallel_size", "trainer.nnodes", "trainer.total_epochs", "trainer.save_freq", "trainer.max_actor_ckpt_to_keep")
SHARED = {  # the same in all of the paper's runs: first what its scripts set, then what they left at the default of the verl of their time
    "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": False, "data.max_prompt_length": 2048, "data.max_response_length": 4096,
    "data.filter_overlong_prompts": False, "data.truncation": "error", "data.image_key": "images", "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": 0.01,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl", "actor_rollout_ref.actor.entropy_coeff": 0, "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.actor.fsdp_config.param_offload": False, "actor_rollout_ref.actor.fsdp_config.optimizer_offload": False,
    "actor_rollout_ref.ref.fsdp_config.param_offload": True, "actor_rollout_ref.rollout.name": "vllm", "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.6,
    "actor_rollout_ref.rollout.enforce_eager": False, "trainer.critic_warmup": 0, "trainer.n_gpus_per_node": 8,
    "reward.custom_reward_function.path": str(ROOT / "medvlthinker" / "core" / "grade.py"), "reward.custom_reward_function.name": "compute_score",
    "reward.custom_reward_function.reward_kwargs.rule": "reward",
    "actor_rollout_ref.actor.clip_ratio": 0.2, "actor_rollout_ref.actor.clip_ratio_low": 0.2, "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0, "actor_rollout_ref.actor.loss_agg_mode": "token-mean", "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.clip_grad": 1.0, "actor_rollout_ref.actor.optim.weight_decay": 0.01, "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant", "actor_rollout_ref.actor.optim.lr_warmup_steps": 0, "actor_rollout_ref.actor.strategy": "fsdp",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla", "actor_rollout_ref.actor.shuffle": False,
    "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.gamma": 1.0, "algorithm.lam": 1.0, "algorithm.filter_groups.enable": False,
    "algorithm.rollout_correction.rollout_is": None, "algorithm.rollout_correction.rollout_rs": None,  # a default that would change the loss if it were on
    "actor_rollout_ref.rollout.temperature": 1.0, "actor_rollout_ref.rollout.top_p": 1.0, "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": False, "actor_rollout_ref.rollout.val_kwargs.temperature": 0, "actor_rollout_ref.rollout.max_model_len": 6144,
    "trainer.balance_batch": True, "trainer.resume_mode": "auto", "reward.reward_manager.name": "naive", "reward.reward_model.enable": False,
    "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra"], "actor_rollout_ref.model.lora_rank": 0, "trainer.device": "cuda",
    "trainer.v1.trainer_mode": "sync",
    **{f"actor_rollout_ref.{who}.fsdp_config.mixed_precision.{kind}_dtype": dtype for who in ("actor", "ref") for kind, dtype in (("param", "bf16"), ("reduce", "fp32"), ("buffer", "fp32"))},
}


# Ours on purpose, written down by hand: with flash-attn, and what is added where it is not installed
SEED = load_profile("paper").seed
OTHERWISE = {"actor_rollout_ref.rollout.free_cache_engine": True, "actor_rollout_ref.rollout.enable_chunked_prefill": True, "data.seed": SEED,
             "actor_rollout_ref.rollout.seed": SEED, "data.val_files": "/data/train.parquet",
             "data.val_max_samples": 1, "trainer.test_freq": -1, "trainer.val_before_train": False,
             "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32"}
UNPADDED = {"actor_rollout_ref.model.use_remove_padding": True,
            "actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2"}
PADDED = {"actor_rollout_ref.model.use_remove_padding": False,
          "actor_rollout_ref.model.override_config.attn_implementation": "sdpa"}


def words(name: str) -> list[str]:
    return verl_overrides(get_recipe(name), load_profile("paper"), "/models/start", "/data/train.parquet",
                     "/checkpoints/here")


def wanted(name: str, flash: bool) -> dict:
    "What our run of a recipe is to have: the paper's values, but for those named above."
    run = dict(zip(PLACES, PUBLISHED[name]))
    run["trainer.max_actor_ckpt_to_keep"] = max(2, PUBLISHED[name][8] or 0)
    run["ray_kwargs.ray_init.num_cpus"] = 40 if run["trainer.nnodes"] == 1 else None  # ours; with fewer than 34 verl waits for ever
    run["trainer.total_training_steps"] = {"3B-SFT_m23k-RL_PMC": 1150}.get(name)  # 64 % of an epoch
    return SHARED | run | OTHERWISE | (UNPADDED if flash else PADDED)


def differing(found: dict, expected: dict) -> dict:
    return {key: (found.get(key), value) for key, value in expected.items()
            if found.get(key) != value}


def composed_by_verl(words: list[str]):
    from hydra import compose, initialize_config_dir

    package = Path(importlib.util.find_spec("verl").origin).parent
    with initialize_config_dir(str(package / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", words)


def accepted_by_verl(words: list[str]) -> dict:
    "The configuration that verl makes of a command, once its own checks have passed."
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    composed = composed_by_verl(words)
    assert need_reference_policy(composed) and not need_critic(composed)
    validate_config(composed, use_reference_policy=True, use_critic=False)
    flat = pandas.json_normalize(OmegaConf.to_container(composed, resolve=True))
    return {key: column[0] for key, column in flat.items()}


def test_every_recipe_is_composed_as_published_or_with_a_named_difference(monkeypatch):
    "verl's own configuration takes every word, and ends with the values that stand above; without flash-attn two words are others, whatever the recipe."
    assert set(PUBLISHED) == {name for name, recipe in RECIPES.items()
                              if recipe.method == "RL" and recipe.size != "tiny"}
    for name, flash in [*((name, True) for name in PUBLISHED), ("32B-RL_m23k", False)]:
        monkeypatch.setattr(verl, "has_flash_attention", lambda: flash)
        assert differing(accepted_by_verl(words(name)), wanted(name, flash)) == {}, name
    with pytest.raises(Exception, match="no_such_key"):
        accepted_by_verl([*words(name), "trainer.no_such_key=1"])


def test_ray_merges_what_a_job_is_given_with_what_verl_gives(monkeypatch, tmp_path):
    "It refuses a job in which both have a key, even an empty one: a run on several nodes would end before its first step."
    import ray
    from ray.runtime_env.runtime_env import _merge_runtime_env
    from verl.trainer.main_ppo import run_ppo

    def init(**given):
        raise RuntimeError(given)

    monkeypatch.setattr(ray, "init", init)
    given = verl.environment(tmp_path, 1, 4)
    job = verl.command(words("32B-RL_m23k"), given, 4, "http://head:8265")
    ours = json.loads(job[job.index("--runtime-env-json") + 1])
    with pytest.raises(RuntimeError) as asked:
        run_ppo(composed_by_verl(words("32B-RL_m23k")), None)
    theirs = asked.value.args[0]["runtime_env"]
    merged = _merge_runtime_env(ours, theirs)
    assert merged and merged["env_vars"] == ours["env_vars"] | theirs["env_vars"]


# --- (c) the data ----------------------------------------------------------------------------------------------------------


def verl_dataset(path, model: Path, most: int, filtered: bool = False, pixels: dict | None = None):
    from omegaconf import OmegaConf
    from transformers import AutoProcessor
    from verl.utils.dataset.rl_dataset import RLHFDataset

    processor = AutoProcessor.from_pretrained(model)
    config = OmegaConf.create({"max_prompt_length": most, "filter_overlong_prompts": filtered, "filter_overlong_prompts_workers": 1, "truncation": "error",
                               "cache_dir": str(Path(path).parent / "verl_cache"), "image_key": "images", "return_raw_chat": True,
                               "mm_processor_kwargs": pixels or {}})
    return RLHFDataset(str(path), processor.tokenizer, config, processor)


def written(samples, folder: Path, model: Path, most: int = 512, max_pixels: int = 0) -> Path:
    "verl's file of samples, as a run with this limit makes it."
    recipe = get_recipe("tiny-RL_PMC")
    recipe = replace(recipe, config=replace(recipe.config, max_prompt_length=most))
    write_samples(samples, folder / f"{samples[0].dataset_name}.parquet")
    settings = TrainingSettings(base=str(model), max_rejected=len(samples), max_pixels=max_pixels)
    return verl_parquet(plan(recipe, settings, folder / f"{samples[0].dataset_name}.parquet", folder, folder / "logs"))


def test_verl_reads_our_rows(tmp_path, own_cache, blank):
    "Order, prompt, pictures and what the reward needs arrive; for texts too, and for a question with two pictures."
    samples = synthetic.corpus("pmc_vqa", 150, 0)
    samples.insert(1, next(sample for sample in synthetic.benchmark("MedXpertQA-MM", 60, 0) if len(sample.images) > 1))
    read = verl_dataset(written(samples, tmp_path, blank), blank, 512)
    assert len(read) == 151
    for place in (0, 1, 64, 150):
        sample, row = samples[place], read[place]
        content = row["raw_prompt"][0]["content"]
        assert [part["type"] for part in content] == ["image"] * len(sample.images) + ["text"]
        assert all(part["image"].tobytes() == picture.tobytes() for part, picture in zip(content, sample.pictures()))
        assert row["reward_model"]["ground_truth"] == sample.answer == row["extra_info"]["answer"] and row["index"] == place
        assert json.loads(row["extra_info"]["options"]) == sample.options
    texts = synthetic.corpus("m23k", 10, 0)
    read = verl_dataset(written(texts, tmp_path, blank), blank, 512)
    assert [row["raw_prompt"][0]["content"] for row in read] == [verl_row(s, 0)["prompt"][0]["content"] for s in texts]
    assert "images" not in read.dataframe.column_names


@pytest.mark.parametrize("corpus, max_pixels", [("pmc_vqa", 0), ("pmc_vqa", 40_000), ("m23k", 0)])
def test_verl_counts_tokens_as_we_do(tmp_path, own_cache, blank, corpus, max_pixels):
    "At a limit that cuts through the corpus, verl's own filter keeps what ours kept, and drops as many of the whole as ours did."
    from medvlthinker.difficulty.preflight import lengths, open_processor

    samples = synthetic.corpus(corpus, 60, 1)
    if max_pixels:  # verl sizes an image twice, and the second time with the limit
        samples = [replace(sample, images=(encoded(200 + 7 * place, 431 - 3 * place),)) for place, sample in enumerate(samples)]
    pixels = pixel_limits(blank, max_pixels)
    most = int(sorted(lengths(samples, open_processor(str(blank), max_pixels)[0]).prompt_tokens)[30])
    ours, whole = (written(samples, tmp_path, blank, limit, max_pixels) for limit in (most, 512))
    kept = len(verl_dataset(ours, blank, 512, pixels=pixels))
    assert 0 < kept < 60
    assert len(verl_dataset(ours, blank, most, True, pixels)) == kept == len(verl_dataset(whole, blank, most, True, pixels))


TEXT = """
import sys
import torch
from transformers import AutoModelForImageTextToText
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.import_utils import import_external_libs

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32")
apply_monkey_patch(model, use_remove_padding=False)
import_external_libs(sys.argv[2])
ids, positions = torch.arange(5, 25).expand(2, -1), torch.arange(20).expand(4, 2, -1)
model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits.logsumexp(-1).sum().backward()
print(all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters()))
"""


def test_verl_reads_questions_without_a_picture(blank):
    "With the module that our settings name every parameter has a gradient; verl 0.9.1 alone ends in its first forward pass."
    named, = (word.split("=")[1] for word in words("3B-RL_m23k") if "model.external_lib=" in word)
    done = python("-c", TEXT, blank, named)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr[-2000:]
