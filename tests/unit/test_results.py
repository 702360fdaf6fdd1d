"""Results and audit: verdicts follow from the data, and bad input is one sentence."""
import ast
import json
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from conftest import ROOT, python, says
from medvlthinker.results import audit
from medvlthinker.core.files import UserError
from medvlthinker.app.profile import load_profile
from medvlthinker.results.contract import compare, counted, to_lines
from medvlthinker.results.published import COLUMNS, published

PAPER = published()


def rows(change, *models):
    "A copy of the paper with changed scores in some rows; the averages follow."
    def changed(row):
        if models and row.model not in models:
            return row
        scores = {name: Decimal(change(name, score)) for name, score in row.scores.items()}
        return replace(row, scores=scores, average=round(sum(scores.values()) / 6, 2))
    return replace(PAPER, rows=tuple(map(changed, PAPER.rows)))


def plus(points, *models, only=COLUMNS):
    return rows(lambda name, score: score + points if name in only else score, *models)


def bars(change):
    return replace(PAPER, repeated=tuple(replace(bar, **change(bar)) for bar in PAPER.repeated))


def own_row(bar):
    return PAPER.row(bar.label).scores[bar.dataset_name]


FLIPS = {
    "rl_beats_sft": (plus(10, "MedVLThinker-3B RL(PMC)"), "holds"),
    "text_beats_images": (plus(5, "MedVLThinker-3B RL(m23k)", "MedVLThinker-7B RL(m23k)"), "holds"),
    "best_open_7b": (plus(-5, "HuatuoGPT-Vision-7B", "Qwen2.5-VL-7B-Instruct"), "holds"),
    "tops_all_open": (plus(-10, "HuatuoGPT-Vision-34B"), "within noise"),
    "new_records": (plus(-25, "MedGemma 4B", "MedGemma 27B", "HuatuoGPT-Vision-34B", "HuatuoGPT-Vision-7B", "Qwen2.5-VL-32B-Instruct", "Gemma 3 27B"), "holds"),
    "on_par_with_gpt4o": (plus(-10, "MedVLThinker-32B RL(m23k)"), "does not hold"),
    "three_runs": (rows(lambda name, score: "44.13" if name == "MMMU-medical" else score, "Qwen2.5-VL-3B-Instruct"), "does not hold"),
    "text_beats_base": (plus(5, "MedVLThinker-7B RL(m23k)"), "yes"),
    "second_stage_beats_base": (plus(20, *(f"MedVLThinker-{size} {stages}+RL(PMC)" for size in ("3B", "7B") for stages in ("SFT(m23k)", "RL(m23k)"))), "yes"),
    "averages_recompute": (replace(PAPER, rows=(replace(PAPER.rows[0], average=Decimal("49.20")), *PAPER.rows[1:])), "no"),
    "one_denominator": (rows(lambda name, score: "25.00" if name == "MedXpertQA-MM" else score), "yes"),
    "cells_are_possible": (rows(lambda name, score: "53.40" if name == "pmc_vqa" else score, "HuatuoGPT-Vision-7B", "HuatuoGPT-Vision-34B"), "yes"),
    "order_is_one": (rows(lambda name, score: "50.00", *[row.model for row in PAPER.rows if row.model != "GPT-4o"]), "yes"),
    "above_chance": (plus(15), "yes"),
    "gain_is_not_format": (replace(PAPER, curves=PAPER.curves | {(bar.model, bar.dataset_name): {1: bar.average} for bar in PAPER.repeated}), "yes"),
    "greedy_shows_all": (bars(lambda bar: {"average": own_row(bar)}), "yes"),
    "bars_show_their_label": (bars(lambda bar: {"average": own_row(bar)} if "@" in bar.model else {}), "yes"),
    "answers_stay_diverse": (bars(lambda bar: {"passed": bar.average + 25}), "yes"),
    "filter_fits_the_model": (replace(PAPER, histogram=(1000, *[3000] * 7, *[100] * 9)), "yes"),
}


@pytest.mark.parametrize("key", FLIPS)
def test_a_verdict_changes_with_its_numbers(key):
    before, changed = audit.audit(PAPER)[key], getattr(audit, key)
    paper, expected = FLIPS[key]
    after = audit._asked(key, changed, paper, changed(paper))
    assert after.verdict == expected != before.verdict, after.because
    assert after.because != before.because


def test_every_claim_and_question_is_flipped_or_rests_on_code():
    rest_on_code = {"one_grader", "last_checkpoints", "budgets_are_equal"}  # the graders and the recipes, which have their own tests
    assert set(FLIPS) | rest_on_code == {question.__name__ for question in (*audit.CLAIMED, *audit.ASKED)}


def test_all_averages_recompute():
    verdict = audit.audit(PAPER)["averages_recompute"]
    assert len(verdict.numbers) == 25 and verdict.verdict == "yes"


def lines(right):
    return [{"dataset_name": name, "dataset_index": i, "image": f"{name}/{i}", "gold": "A", "regrade_correct": bool(hit)}
            for name, hits in right.items() for i, hit in enumerate(hits)]


def test_contract_names_every_number_once():
    table = compare(PAPER, [])
    assert set(table.status) == {"not run"} and not table.duplicated(["what", "model", "benchmark"]).any()
    hidden = sum(bar.majority is None for bar in PAPER.repeated)
    of_known = [bar for bar in PAPER.repeated if "@" not in bar.model]
    assert len(table) == 25 * 7 + 3 * len(of_known) - sum(bar.majority is None for bar in of_known) + sum(map(len, PAPER.curves.values())) + len(PAPER.histogram) and hidden
    assert to_lines(table)[-1].startswith("0 match, 0 inside, 0 outside")


def test_contract_of_repeats_and_pass_counts():
    line = lambda measure, k, value: {"dataset_name": "pmc_vqa", "measure": measure, "k": k, "percent": value, "low": value - 2, "high": value + 2, "n": 2000, "answers": 64}
    record = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "source": "hub", "rules": {"regrade": [line("average", 1, 43.65), line("majority of 5", 0, 46.0), line("pass@5", 5, 90)],
                                                                              "strict": [line("pass@64", 64, 92.4)]}}
    table = compare(PAPER, [], [record])
    found = {(each.what, each.status) for each in table[table.status != "not run"].itertuples()}
    assert found == {("average of 5", "match"), ("majority of 5", "inside"), ("pass@5", "outside"), ("pass@64, strict", "match")}


def test_no_number_is_typed_in_the_results_notebooks():
    "Layout may have numbers; results may not: every literal is small, a width, or a tolerance."
    for name in ("5_results", "6_audit"):
        cells = json.loads((ROOT / "nbs" / "paper" / f"{name}.ipynb").read_text())["cells"]
        tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
        numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)}
        assert numbers <= {0, 1, 2, 3, 100, 0.0051}, (name, numbers)


def test_commands_say_what_is_wrong_in_one_sentence(home):
    says(python("-m", "medvlthinker.results.contract", "compare", "smke"), "No profile 'smke'")
    says(python("-m", "medvlthinker.results.contract"), "compare [PROFILE]")
    says(python("-m", "medvlthinker.app.cli", "results", "smoke"), "Nothing of the profile smoke has been evaluated", "./reproduce.sh smoke first")
    done = python("-m", "medvlthinker.results.contract", "compare", "smoke")
    assert done.returncode == 0 and "Nothing has been evaluated in the profile smoke yet" in done.stdout
    assert counted(load_profile("smoke")) == []


def evaluated(home, profile, source, model, right):
    "What paper/4_evaluate leaves of a model, written by hand."
    from medvlthinker.generation.model import folder_name

    folder = home / profile / "results" / source / folder_name(model)
    folder.mkdir(parents=True)
    counts = {name: [int(sum(hits)), len(hits)] for name, hits in right.items()}
    (folder / "evaluation.json").write_text(json.dumps({"model": model, "source": source, "rule": "regrade", "instruction": "trained", "counts": counts, "rules": {"regrade": counts}}))
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(right)))


def test_models_that_were_asked_other_questions_are_left_open(home):
    evaluated(home, "smoke", "synthetic", "tiny", {name: [1, 0] for name in COLUMNS})
    evaluated(home, "smoke", "synthetic", "tiny-RL_m23k", {name: [1, 1, 0] for name in COLUMNS})
    profile = load_profile("smoke")
    verdict = audit.audit_runs(profile)["text_beats_base"]
    assert verdict.verdict == "open" and "not compared" in verdict.because and "18 and 12 questions" in verdict.numbers[0]["why"]
    assert audit.difference_rows(profile, audit.base_pairs(set(audit.measured_models(profile)))) == []
    with pytest.raises(UserError, match="No rule 'foo'"):
        audit.audit_runs(profile, "foo")


def test_published_weights_are_known_by_their_hub_id(home):
    dice = np.random.default_rng(0)
    trained = "UCSC-VLAA/MedVLThinker-3B-RL_m23k"
    evaluated(home, "mini", "hub", "Qwen/Qwen2.5-VL-3B-Instruct", {name: (dice.random(200) < .4).tolist() for name in COLUMNS})
    evaluated(home, "mini", "hub", trained, {name: (dice.random(200) < .7).tolist() for name in COLUMNS})
    profile = load_profile("mini", models=f"Qwen/Qwen2.5-VL-3B-Instruct, {trained}", recipes="")
    assert audit.measured_models(profile) == {"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen/Qwen2.5-VL-3B-Instruct", "3B-RL_m23k": trained}
    verdict = audit.audit_runs(profile)["text_beats_base"]
    assert verdict.verdict == "yes" and "1,200 questions" in verdict.on and "LoRA of rank 32" in verdict.on
    rows = audit.difference_rows(profile, audit.base_pairs(set(audit.measured_models(profile))))
    assert rows[0]["differences"]["average"][0] == pytest.approx(.3, abs=.05)


def test_the_contract_holds_the_rule_of_the_tables_against_the_tables():
    row = PAPER.row("Qwen2.5-VL-3B-Instruct")
    right = {name: [round(float(score) * row.sizes[name] / 100), row.sizes[name]] for name, score in row.scores.items()}
    record = {"model": row.hub_id, "source": "hub", "rule": "lenient", "instruction": "trained", "counts": {name: [n, n] for name, (_, n) in right.items()}, "rules": {"regrade": right}}
    assert set(compare(PAPER, [record]).query("what == 'table' and ours == ours").status) <= {"match", "inside"}
    assert set(compare(PAPER, [record | {"instruction": "none"}]).status) == {"not run"}, "another prompt is another measurement"
