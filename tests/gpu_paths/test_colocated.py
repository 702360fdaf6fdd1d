"GRPO through TRL as `mini` runs it on GPUs, tried on a CPU: vLLM answers beside the trainer, in one process and in two that share both models."
import json
import shutil
from pathlib import Path

import pytest
import warm
from conftest import ROOT, succeeded
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.train import accelerate_config

pytestmark = pytest.mark.heavy
WORKER = str(ROOT / "tests" / "gpu_paths" / "colocated.py")


def trained(folder: Path, tiny: Path, processes: int, lora_rank: int, samples=None) -> dict:
    "What the worker saw of two steps; their learning rates are 0 and the recipe's."
    shutil.copytree(tiny, folder / "tiny")
    write_samples(samples or synthetic.corpus("pmc_vqa", 16), folder / "data.parquet")
    words = [WORKER, str(folder), str(lora_rank)]
    if processes > 1:
        config = folder / "accelerate.json"
        config.write_text(json.dumps(accelerate_config(get_recipe("3B-RL_PMC"), TrainingSettings(gpus=processes, dtype="float32"))))
        words = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0", *words]
    succeeded(warm.run(*words, cwd=ROOT, VLLM_CPU_KVCACHE_SPACE="1"))
    return json.loads((folder / "seen.json").read_text())


def test_vllm_answers_with_the_weights_that_were_learnt_and_two_gpus_take_the_step_of_one(warm_tiny, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed; ./reproduce.sh setup full")
    one, two = trained(tmp_path / "one", warm_tiny, 1, lora_rank=8), trained(tmp_path / "two", warm_tiny, 2, lora_rank=0)
    for seen in (one, two):
        first, second = seen["steps"]
        assert first["kl"] == 0 and first["learning_rate"] == 0 < second["learning_rate"] and first["reward"] > 0.3 and first["grad_norm"] > 0
        assert "image_grid_thw" in seen["moved"] and "pixel_values" not in seen["moved"]  # a step's images would fill a GPU
        assert set(seen["image tokens"]) <= {16, 32}  # vLLM reads what the trainer reads: one image, or two
        assert not seen["compiles for CUDA"]  # a machine with no more than a driver has no nvcc
        assert seen["equal"] and seen["weights"] > 5
        woken = ["wakes: weights", "wakes: kv_cache", "sleeps"]
        assert seen["slept"] == ["made for 24 at once, to sleep", "sleeps", *woken, *woken, "wakes: weights"]
    assert one["frozen"] > 10 and one["as at the start"]  # adapters were added to them at each sync, and taken off
    assert two["reference gathered"] == 0  # no GPU holds a whole part of it while another model is at work
    names = ("loss", "reward", "length")  # adapters begin as nothing: both start from one model, and draw the same answers
    assert [two["steps"][0][name] for name in names] == pytest.approx([one["steps"][0][name] for name in names], rel=1e-3)


def test_vllm_answers_questions_with_and_without_images_of_one_step(warm_tiny, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed; ./reproduce.sh setup full")
    mixed = [sample for pair in zip(synthetic.corpus("m23k", 8), synthetic.corpus("pmc_vqa", 8)) for sample in pair]
    seen = trained(tmp_path / "one", warm_tiny, 1, 8, mixed)
    assert seen["steps"][0]["kl"] == 0 and seen["steps"][0]["grad_norm"] > 0
    assert {0, 16} <= set(seen["image tokens"]) <= {0, 16, 32} and "image_grid_thw" in seen["moved"]
