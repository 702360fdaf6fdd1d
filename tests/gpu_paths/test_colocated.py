"GRPO through TRL as `mini` runs it on GPUs, tried on a CPU: vLLM answers beside the trainer, in one process and in two that share the model."
import json
import shutil
from pathlib import Path

import pytest
import warm
from conftest import ROOT
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.training.recipe import TrainingSettings, find
from medvlthinker.training.sft import accelerate_config

pytestmark = pytest.mark.heavy
WORKER = str(ROOT / "tests" / "gpu_paths" / "colocated.py")


@pytest.mark.parametrize("processes, lora_rank", [(1, 8), (2, 0)], ids=["one GPU, LoRA", "two GPUs, all weights"])
def test_vllm_answers_with_the_weights_that_were_learnt_and_the_first_step_is_at_no_distance_from_the_start(processes, lora_rank, warm_tiny, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed; ./reproduce.sh setup full")
    shutil.copytree(warm_tiny, tmp_path / "tiny")
    write_samples(synthetic.corpus("pmc_vqa", 16), tmp_path / "data.parquet")
    words = [WORKER, str(tmp_path), str(lora_rank)]
    if processes > 1:
        config = tmp_path / "accelerate.json"
        config.write_text(json.dumps(accelerate_config(find("3B-RL_PMC"), TrainingSettings(gpus=processes, dtype="float32"))))
        words = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0", *words]
    done = warm.run(*words, cwd=ROOT, VLLM_CPU_KVCACHE_SPACE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen = json.loads(Path(tmp_path / "seen.json").read_text())
    first, second = seen["steps"]
    assert first["kl"] == 0 and first["learning_rate"] == 0 and first["reward"] > 0.3 and first["grad_norm"] > 0
    assert second["learning_rate"] > 0
    assert seen["equal"] and seen["weights"] > 5
    woken = ["wakes: weights", "wakes: kv_cache", "sleeps"]
    assert seen["slept"] == ["made for 24 at once, to sleep", "sleeps", *woken, *woken, "wakes: weights"]
