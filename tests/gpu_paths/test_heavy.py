"""What needs verl, which `./reproduce.sh setup full` installs: it agrees with us about the same files."""
import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT, python

pytestmark = pytest.mark.heavy


def need(module: str) -> None:
    if not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed; ./reproduce.sh setup full installs it")


def test_verl_loads_our_reward_by_path():
    "verl's own loader takes medvlthinker/core/grade.py by its path, and the reward is the metric."
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
    done = python("-c", code, ROOT / "medvlthinker" / "core" / "grade.py", cwd=Path("/"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[1.0, 0.0, 0.0]"
