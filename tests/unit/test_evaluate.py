"""Grades, accuracies, paired differences and several answers a question: against direct loops, scipy and each other, and refused where they would say something else."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from medvlthinker.core.files import UserError
from medvlthinker.core.grade import RULES, grade
from medvlthinker.core.stats import majority
from medvlthinker.data.benchmarks import BENCHMARKS
from medvlthinker.data.sample import SampleFile, write_samples
from medvlthinker.evaluation.evaluate import (
    accuracy, count_right, evaluate, evaluate_repeats, grade_rollout, image_cluster_id, paired_difference, question_scores, read_records, repeated_accuracy)
from test_compare import reply, sixty


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(sixty(), path := tmp_path_factory.mktemp("samples") / "samples.parquet") or SampleFile(path)


def rows(samples, n):
    "Answers of many shapes, with odd characters, the same each time."
    return [{"dataset_name": sample.dataset_name, "dataset_index": sample.dataset_index, "completions": [reply(sample, k).to_row() for k in range(n)]} for sample in samples]


def test_scores_are_those_of_a_direct_loop(samples):
    answers = rows(samples, 7)
    grades = grade_rollout(samples, answers)
    for rule in RULES:
        scores = question_scores(grades, rule)
        for sample, row, score in zip(samples, answers, scores.itertuples(), strict=True):
            verdicts = [grade(completion["text"], sample.options, sample.answer_label, rule) for completion in row["completions"]]
            votes = [verdict.label or verdict.answer for verdict in verdicts[:5]]
            assert (score.dataset_index, score.image, score.n) == (sample.dataset_index, image_cluster_id(sample), 7)
            assert (score.right, score.majority) == (sum(verdict.correct for verdict in verdicts), majority(votes, sample.answer_label)), rule


def test_a_table_of_cut_answers_says_so_above_its_numbers(samples):
    answers = rows(samples, 1)
    for place, text in ((2, ""), (3, "7% CUT at max_tokens")):  # of 60
        for row in answers[:place + 1]:
            row["completions"][0]["finish_reason"] = "length"
        assert accuracy(grade_rollout(samples, answers)).to_string().startswith(text)
        assert ("CUT" in accuracy(grade_rollout(samples, answers)).to_html()) == bool(text)


class Stored(list):
    "The rows of a rollout, with what a rollout knows of itself."

    def __init__(self, rows, folder, **config):
        super().__init__(rows)
        self.folder, self.record = folder, {"sha256": folder.name}
        self.config = SimpleNamespace(**{"model": "llava/med", "instruction": "none", "dialect": "llava_med", "seed": 7, "engine": "vllm", "dtype": "bfloat16", "n": 1, "temperature": 0.0, "top_p": 1.0} | config)


def test_a_record_says_how_the_model_was_asked_and_not_how_others_are(samples, tmp_path):
    folder = tmp_path / "run" / "results" / "hub"
    rolled = {"pmc_vqa": (samples, Stored(rows(samples, 1), tmp_path / "run" / "rollouts" / "ab"))}
    grades = evaluate(rolled, folder, "strict")
    (record,) = read_records(folder, ["tiny", "llava/med"])
    assert {key: record[key] for key in ("model", "source", "rule", "instruction", "dialect", "seed", "engine", "dtype", "rollouts")} == {
        "model": "llava/med", "source": "hub", "rule": "strict", "instruction": "none", "dialect": "llava_med", "seed": 7, "engine": "vllm", "dtype": "bfloat16", "rollouts": {"pmc_vqa": "rollouts/ab"}}
    assert record["counts"] == record["rules"]["strict"] == count_right(grades, "strict") and record["cut"] == 0
    manifest = json.loads((folder / "llava--med" / "evaluation.json.manifest.json").read_text())
    assert manifest["inputs"] == {"rollouts": {"pmc_vqa": "rollouts/ab"}, "answers": {"pmc_vqa": "ab"}, "rule": "strict"}
    assert "refused" not in record
    rolled["pmc_vqa"][1].record["dropped_parameters"] = ["temperature"]  # by a server
    evaluate(rolled, folder)
    assert read_records(folder, ["llava/med"])[0]["refused"] == "temperature"


def test_several_answers_are_stored_under_every_rule(samples, tmp_path, capsys):
    rolled = {"pmc_vqa": (samples, Stored(rows(samples, 4), tmp_path / "a" / "ab", n=4, temperature=0.5, top_p=0.95))}
    tables = evaluate_repeats(rolled, tmp_path / "results" / "hub")
    assert capsys.readouterr().out == "25% of these answers were CUT at max_tokens.\n"
    (record,) = read_records(tmp_path / "results" / "hub", ["llava/med"], "repeats.json")
    assert (record["answers"], record["temperature"], record["top_p"], list(record["rules"])) == (4, 0.5, 0.95, list(RULES))
    assert record["rules"]["regrade"] == tables["regrade"].to_dict("records")
    lines = [json.loads(line) for line in (tmp_path / "results" / "hub" / "llava--med" / "repeats.jsonl").open()]
    assert len(lines) == 60 * len(RULES) and lines[0].keys() == {"dataset_name", "dataset_index", "image", "n", "rule", "right", "majority"}


def test_nothing_to_evaluate_is_a_sentence(tmp_path):
    for function in (evaluate, evaluate_repeats):
        with pytest.raises(UserError, match="no rollout to evaluate"):
            function({}, tmp_path)


def graded(right, images=None, gold="A"):
    "Grades by hand: benchmark -> whether each question was answered correctly."
    return pd.DataFrame([{"dataset_name": name, "dataset_index": i, "image": images[i] if images else f"{name}/{i}", "gold": gold, "regrade_correct": bool(hit)} for name, hits in right.items() for i, hit in enumerate(hits)])


def test_a_paired_difference_against_hand_and_scipy():
    from scipy.stats import binomtest

    rng = np.random.default_rng(1)
    first, second = ({name: rng.random(200) < p for name in ("b", "a")} for p in (.6, .5))
    made = paired_difference(graded(first), graded(second))
    assert list(made.index) == ["b", "a", "macro average"]
    for name in ("a", "b"):
        gained, lost = (first[name] & ~second[name]).sum(), (second[name] & ~first[name]).sum()
        assert (made.gained[name], made.lost[name], made.n[name]) == (gained, lost, 200)
        assert made.p[name] == pytest.approx(binomtest(int(gained), int(gained + lost)).pvalue, abs=1e-12)
    assert made.holm[made.p.idxmin()] == pytest.approx(min(1, 2 * made.p.min()))
    assert made.difference["macro average"] == pytest.approx(100 * np.mean([first[name].mean() - second[name].mean() for name in ("a", "b")]), abs=1e-9)


def test_shared_images_widen_the_interval():
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.random(60) < .5, 5)  # an image's five questions are right together
    worse, images = np.zeros(300, bool), [f"image {i // 5}" for i in range(300)]
    width = lambda made: made.high["macro average"] - made.low["macro average"]
    alone = width(paired_difference(graded({"a": hits}), graded({"a": worse})))
    together = width(paired_difference(graded({"a": hits}, images), graded({"a": worse}, images)))
    assert together > 1.8 * alone, "five copies of an answer are one piece of evidence: the square root of five"


def test_the_test_of_a_benchmark_takes_an_image_once():
    "Nine questions gained on one image are one coin: either model may have had its luck."
    made = paired_difference(graded({"a": [1] * 12}, ["scan"] * 9 + list("bcd")), graded({"a": [0] * 9 + [1] * 3}, ["scan"] * 9 + list("bcd")))
    assert (made.gained["a"], made.p["a"], made.holm["a"]) == (9, 1, 1)


def test_other_questions_are_not_compared():
    one = graded({"a": [1, 0]})
    for other in (graded({"a": [1]}), graded({"a": [1, 0, 0]}), graded({"b": [1, 0]}), graded({"a": [1, 0]}, gold="B"), graded({"a": [1, 0]}, images=["x", "y"])):
        with pytest.raises(UserError, match="same questions only"):
            paired_difference(one, other)


def test_what_is_all_alike_is_not_certain():
    asked = pd.DataFrame([{"dataset_name": name, "image": f"{name}{i}", "n": 4, "right": 4, "majority": 1.0}
                          for name in BENCHMARKS for i in range(10)])
    table = repeated_accuracy(asked)
    assert table.percent.tolist() == pytest.approx([100] * len(table)) and (table.low < 99).all()
    once = repeated_accuracy(asked[asked.image.str[-1] < "7"].assign(n=10, right=1))  # the mean of tenths is not exact
    assert (once.high[once.measure == "average"] > 11).all()
    own = repeated_accuracy(asked.assign(dataset_name="OmniMedVQA"))
    assert {*own.dataset_name} == {"OmniMedVQA"}, "the paper's averages are over its six sets"
