"""Two rules, two engines or two models on the same questions: what flips and why, and whether two numbers may be compared."""
from dataclasses import asdict, replace

import pandas as pd
import pytest
from conftest import by_hand, encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from medvlthinker.core.grade import RULES, grade
from medvlthinker.data.sample import Sample, SampleFile, write_samples
from medvlthinker.evaluation.compare import (
    SAFE, TOO_FEW, UNSAFE, _edits, compare_rollouts, config_difference, engine_agreement, explain_flips, flip_cause, paired_changes, rescore)
from medvlthinker.evaluation.evaluate import count_right, grade_rollout, paired_difference
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import Rollout, generate

ODD = ("\0", "\u2028", "\u202e", "\U0001fac0", "é", "e\u0301", '"', "\\", "\r\n", "\ufeff", "<|im_end|>", "\x7f", "\U0010ffff", "\ud800")
SHAPES = ("<think> {odd} </think>\n<answer> {x} </answer>", "<answer>{odd}\n{x}\n</answer>", "{odd} The answer is ({x}).", "<answer> A </answer> no <answer> {x} </answer>", "<answer> {x}{odd}", "{odd}",
          "<think></think><answer>{odd} elsewhere</answer>")
TEXTS = {"A": "Yes", "B": "No", "C": "Liver", "D": "not seen"}

def reply(sample: Sample, k: int) -> Completion:
    "Answers of many shapes, with odd characters, the same each time."
    i = sample.dataset_index
    return Completion(SHAPES[(i + k) % len(SHAPES)].format(odd=ODD[(3 * i + k) % len(ODD)], x="ABCD"[(i * k) % 4]), "length" if k == 3 else "stop", 9)


def sixty(word: str = "Question ") -> list[Sample]:
    "Sixty questions; every second pair shares an image."
    images = [encoded() for _ in range(30)]
    return [Sample(f"{word}{i}?", TEXTS, "ABCD"[i % 4], TEXTS["ABCD"[i % 4]], (images[i // 2],) if i % 3 else (), dataset_name="pmc_vqa", dataset_index=i) for i in range(60)]


@pytest.fixture
def finished(tmp_path):
    "Samples in a file, and a rollout of four answers to each."
    write_samples(sixty(), tmp_path / "samples.parquet")
    samples = SampleFile(tmp_path / "samples.parquet")
    return samples, generate(samples, by_hand(reply), Sampling(n=4, temperature=0.5), tmp_path, show=lambda line: None)


@pytest.mark.parametrize("old, new", [("strict", "regrade"), ("reward", "lenient"), ("llava", "strict")])
def test_the_flips_are_those_of_the_grades(finished, old, new):
    table = rescore([finished], old, new)
    grades = grade_rollout(*finished, (old, new))
    for side, rule in (("first", old), ("second", new)):
        assert table[f"{side}_correct"].tolist() == grades[f"{rule}_correct"].tolist()
        assert table[f"{side}_label"].fillna("").tolist() == grades[f"{rule}_label"].astype(object).fillna("").tolist()
    differ = (table.first_label.fillna("") != table.second_label.fillna("")) | (table.first_correct != table.second_correct)
    assert ((table.flip != "") == differ).all() and differ.any()
    assert table.image.tolist() == grades.image.tolist() and table.parts_at.isna().all()


def test_the_changes_are_the_paired_difference(finished):
    samples, rollout = finished
    greedy = [row | {"completions": row["completions"][:1]} for row in rollout]
    table, grades = rescore([(samples, greedy)], "strict", "lenient"), grade_rollout(samples, greedy)
    changes = paired_changes(table)
    counts = {rule: count_right(grades, rule)["pmc_vqa"] for rule in ("strict", "lenient")}
    assert changes.loc["pmc_vqa", ["first", "second"]].tolist() == pytest.approx([100 * right / n for right, n in counts.values()])
    one = paired_difference(grades.assign(strict_correct=grades.lenient_correct), grades, "strict")
    pd.testing.assert_frame_equal(changes[one.columns], one)
    turns = table.flip.value_counts()
    assert changes.difference["macro average"] == pytest.approx(100 / 60 * (turns.get("wrong -> right", 0) - turns.get("right -> wrong", 0)))


def test_two_rollouts_of_different_models(finished, tmp_path):
    samples, rollout = finished
    one, two = (Rollout(tmp_path, vars(replace(rollout.config, weights=weights, engine=engine))) for weights, engine in (("c3de", "vllm"), ("77aa", "openai")))
    assert config_difference(one, two) == "", "a server does not tell its weights"
    other = by_hand(lambda sample, k: reply(sample, k + 1), "another")
    another = generate(samples, other, Sampling(n=4, temperature=0.5), tmp_path, lambda line: None)
    table = compare_rollouts(samples, rollout, another, same_model=False)
    assert set(table.cause) <= {"", "cut at max_tokens", "no option read", "another option"}
    assert table.parts_at.notna().sum() > 200
    unread = table[table.cause == "no option read"][["first_label", "second_label"]]
    assert (unread.isna().sum(axis=1) == 1).all()


TEXTS_OF_ANSWERS = st.lists(st.sampled_from([
    "<answer>", "</answer>", "<Answer>", "< /answer >", "<think>", "</think>", "A", "B", "(B)", "liver", "\n", " ",
    "the answer is", ":", "or", "\u2028"]), max_size=14).map("".join)
ORGAN = Sample("Which organ?", {"A": "Lung", "B": "Liver", "C": "Spleen"}, "B", "Liver")


@settings(max_examples=300)
@given(TEXTS_OF_ANSWERS, st.sampled_from(RULES), st.sampled_from(RULES))
def test_without_the_cause_two_rules_agree(text, old, new):
    "On an option that one of them had read."
    one, two = (grade(text, ORGAN.options, "B", rule) for rule in (old, new))
    if (one.label, one.correct) == (two.label, two.correct) or (cause := flip_cause(text, ORGAN, old, new)) == "other":
        return
    read = {one.label, two.label} - {None}
    without = [edited for letter in read for name, edited in _edits(text, letter) if name == cause]
    pairs = [[grade(edited, ORGAN.options, "B", rule).label for rule in (old, new)] for edited in without]
    assert any(a == b and a in read for a, b in pairs)


def rows(texts):
    return [{"dataset_name": "toy", "dataset_index": i, "completions": [{"text": text, "finish_reason": "stop", "tokens": 5}]} for i, text in enumerate(texts)]


@pytest.mark.parametrize("n, lost, gained, verdict", [
    (600, 0, 0, SAFE), (2000, 0.015, 0.015, SAFE), (1000, 0.03, 0, UNSAFE), (1000, 0, 0.03, UNSAFE),
    (2000, 0.05, 0.05, UNSAFE), (10, 0, 0, TOO_FEW), (10, 0.1, 0, TOO_FEW), (2000, 0.01, 0, TOO_FEW)])
def test_verdicts_on_planted_flips(n, lost, gained, verdict):
    "Of n questions shares flip from right to wrong and back."
    samples = [Sample(f"Question {i}", {"A": "left", "B": "right"}, "A", "left", dataset_name="toy", dataset_index=i) for i in range(n)]
    first = ["<answer>A</answer>" if i % 2 else "<answer>B</answer>" for i in range(n)]
    flipping = {*range(1, 2 * round(lost * n), 2), *range(0, 2 * round(gained * n), 2)}
    second = [("<answer>B</answer>" if i % 2 else "<answer>A</answer>") if i in flipping else text for i, text in enumerate(first)]
    found = engine_agreement(compare_rollouts(samples, rows(first), rows(second)))
    assert found.verdict == verdict and found.sentence.startswith(f"{verdict}: "), found.sentence
    assert found.flips[0] == pytest.approx(lost + gained) == 1 - found.equal_texts and found.difference[0] == pytest.approx(lost - gained)
    for value, low, high in (found.flips, found.difference):
        assert low <= value <= high and high > low


def test_questions_of_one_image_count_less():
    "Flips that come in heaps, all questions of an image at once, leave more doubt."
    table = pd.DataFrame({"first_correct": True, "second_correct": [i >= 20 for i in range(1000)], "first_label": "A", "second_label": ["A" if i >= 20 else "B" for i in range(1000)],
                          "parts_at": [None if i >= 20 else 0 for i in range(1000)], "completion": 0, "failed": False})
    alone, heaped = (asdict(engine_agreement(table.assign(image=[str(i // size) for i in range(1000)]))) for size in (1, 10))
    for name in ("flips", "difference"):
        assert heaped[name][2] - heaped[name][1] > 1.5 * (alone[name][2] - alone[name][1])


def test_what_a_model_wrote_does_not_steer_a_terminal(capsys):
    samples = [Sample("Question", {"A": "left", "B": "right"}, "A", "left", dataset_name="toy\x1b[2J", dataset_index=0)]
    first, second = ([{"completions": [{"text": text, "finish_reason": "stop", "tokens": 5}]}] for text in ("<answer>A</answer>", "<answer>B</answer> \x1b[31mred\x07 \u202eesrever"))
    explain_flips(compare_rollouts(samples, first, second), ("old", "new"))
    said = capsys.readouterr().out
    assert r"A -> B  |  <answer>B</answer> \x1b[31mred\x07 \u202eesrever" in said and said.replace("\n", "").isprintable()
