"""The logs of another tool hold every answer and score, and that tool reads the same numbers."""
import json
import subprocess
import sys

import pytest
from conftest import by_hand
from medvlthinker.core.grade import RULES
from medvlthinker.evaluation.evaluate import grade_rollout, question_scores
from medvlthinker.evaluation.export import write_inspect_log
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import generate
from test_compare import reply, sixty


@pytest.fixture
def finished(tmp_path):
    "Sixty questions and four answers to each; the last one failed."
    samples = sixty("Question\u2028")
    answer = lambda sample, k: Completion("", "failed", 0, "HTTP 500") if (sample.dataset_index, k) == (59, 3) else reply(sample, k)
    return samples, generate(samples, by_hand(answer, "org/a model"), Sampling(n=4, temperature=0.5), tmp_path, show=lambda line: None)


def every_text(rollout) -> list[str]:
    "As UTF-8 can hold it: half a character becomes U+FFFD."
    return [completion["text"].replace("\ud800", "\ufffd") for row in rollout for completion in row["completions"]]


def test_a_log_for_inspect_holds_every_answer_and_score(finished, tmp_path):
    samples, rollout = finished
    path = write_inspect_log(*finished, tmp_path / "logs")
    log = json.loads(path.read_text(encoding="utf-8"))
    assert [sample["output"]["completion"] for sample in log["samples"]] == every_text(rollout)
    grades = grade_rollout(*finished)
    for rule in RULES:
        assert [sample["scores"][rule]["value"] == "C" for sample in log["samples"]] == grades[f"{rule}_correct"].tolist()
        assert log["results"]["scores"][RULES.index(rule)]["metrics"]["accuracy"]["value"] == pytest.approx((question_scores(grades, rule).right / 4).mean())
    assert log["results"]["completed_samples"] == 239 and log["samples"][-1]["error"]["message"] == "HTTP 500"
    assert write_inspect_log(*finished, tmp_path / "again").read_bytes() == path.read_bytes()
    rollout.record["dropped_parameters"] = ["temperature"]  # by a server, which took its own
    assert "temperature" not in json.loads(write_inspect_log(*finished, tmp_path).read_text())["eval"]["model_generate_config"]


READ = """
import json, sys
from inspect_ai.log import read_eval_log, recompute_metrics
log = read_eval_log(sys.argv[1])
scores = lambda: {score.name: [score.metrics[name].value for name in ("accuracy", "stderr")] for score in log.results.scores}
before = scores()
recompute_metrics(log)  # from the samples' scores, by its own arithmetic
print(json.dumps({"status": log.status, "task": log.eval.task, "model": log.eval.model, "epochs": log.eval.config.epochs, "before": before, "after": scores(),
                  "texts": [sample.output.completion for sample in log.samples], "values": [sample.scores["lenient"].value for sample in log.samples]}))
"""


@pytest.mark.heavy
def test_inspect_ai_reads_the_same_accuracy(finished, tmp_path):
    "In an environment of its own, into which it is installed from the configured registry."
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "inspect-ai==0.3.285"], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"inspect_ai cannot be installed from the configured registry: {done.stderr.strip().splitlines()[-1]}")
    samples, rollout = finished
    path = write_inspect_log(*finished, tmp_path / "logs")
    done = subprocess.run([python, "-c", READ, path], check=True, capture_output=True, text=True)
    log, grades = json.loads(done.stdout.splitlines()[-1]), grade_rollout(*finished)
    assert (log["status"], log["task"], log["model"], log["epochs"]) == ("success", "pmc_vqa", "org/a model", 4)
    assert log["texts"] == every_text(rollout) and [value == "C" for value in log["values"]] == grades.lenient_correct.tolist()
    for rule in RULES:
        assert log["before"][rule][0] == pytest.approx((question_scores(grades, rule).right / 4).mean())
        assert log["after"][rule] == pytest.approx(log["before"][rule])
