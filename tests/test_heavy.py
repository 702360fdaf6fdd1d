"""What needs vLLM or verl, which `./reproduce.sh test all` installs: other programs agree with ours about the same files."""
import importlib.util
import json
from pathlib import Path

import pytest
from conftest import ROOT, python

pytestmark = pytest.mark.heavy


def need(module: str) -> None:
    if not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed; ./reproduce.sh test all installs it")


def test_vllm_agrees_with_transformers(warm_home):
    "Greedy answers of the embedded model to the six miniature benchmarks, both in float32: at least 99 % of the texts are equal."
    need("vllm")
    for engine in ("transformers", "vllm"):
        done = python("-m", "medvlthinker.rollout", "smoke", "model=tiny", "limit=40", f"engine={engine}")
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    texts = {}
    for path in warm_home.rglob("shard-*.jsonl"):
        header, *rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        for row in rows:
            texts.setdefault((row["dataset_name"], row["dataset_index"]), {})[header["engine"].split()[0]] = row["completions"][0]
    assert len(texts) == 240 and all(len(pair) == 2 for pair in texts.values())
    different = {key: pair for key, pair in texts.items() if pair["vllm"]["text"] != pair["transformers"]["text"]}
    assert len(different) <= 2, different
    assert all(pair["vllm"]["finish_reason"] == pair["transformers"]["finish_reason"] for key, pair in texts.items() if key not in different)


def test_verl_loads_our_reward_by_path():
    "verl's own loader takes medvlthinker/grade.py by its path, and the reward is the metric."
    need("verl")
    code = """
import json, sys
from omegaconf import OmegaConf
from verl.trainer.ppo.reward import get_custom_reward_fn
score = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": {"path": sys.argv[1], "name": "compute_score"}}}))
info = {"answer_label": "B", "answer": "No", "options": json.dumps({"A": "Yes", "B": "No"})}
answers = ["<think> x </think>\\n<answer> B </answer>", "<think> x </think>\\n<answer> A </answer>", "<think> x </think>\\n<answer>\\nB\\n</answer>"]
print([float(score(data_source="toy", solution_str=text, ground_truth="No", extra_info=info)) for text in answers])
"""
    done = python("-c", code, ROOT / "medvlthinker" / "grade.py", cwd=Path("/"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[1.0, 0.0, 0.0]"
