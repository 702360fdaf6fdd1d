"""Published numbers, tables and claims: verdicts follow from the data, bad input is one sentence."""
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from medvlthinker.app.profile import load_profile
from medvlthinker.app.runs import stored_records
from medvlthinker.core.files import UserError
from medvlthinker.results import claims
from medvlthinker.results.published import COLUMNS, published
from medvlthinker.results.tables import markdown_table, results_table, to_latex
from test_evaluate import graded

PAPER = published()


def rows(change, *models):
    "A copy of the paper with changed scores in some rows; the averages follow."
    def changed(row):
        if models and row.model not in models:
            return row
        scores = {name: Decimal(change(name, score)) for name, score in row.scores.items()}
        return replace(row, scores=scores, average=round(sum(scores.values()) / 6, 2))
    return replace(PAPER, rows=tuple(map(changed, PAPER.rows)))


def plus(points, *models):
    return rows(lambda name, score: score + points, *models)


def only(column, value, *models):
    return rows(lambda name, score: value if name == column else score, *models)


RL, HUATUO = "MedVLThinker-{} RL({})", "HuatuoGPT-Vision-{}"
STAGES = [f"MedVLThinker-{size} {first}(m23k)+RL(PMC)" for size in ("3B", "7B") for first in ("SFT", "RL")]
STRONG = ["MedGemma 4B", "MedGemma 27B", HUATUO.format("34B"), HUATUO.format("7B"),
          "Qwen2.5-VL-32B-Instruct", "Gemma 3 27B"]
OWN_ROW = PAPER.bars.assign(average=[float(PAPER.row(bar.label).scores[bar.dataset_name])
                                     for bar in PAPER.bars.itertuples()])
NO_FORMAT = PAPER.bars.assign(k=1, percent=PAPER.bars["average"])
FLIPS = {
    "rl_beats_sft": (plus(10, RL.format("3B", "PMC")), "holds"),
    "text_beats_images": (plus(5, RL.format("3B", "m23k"), RL.format("7B", "m23k")), "holds"),
    "best_open_7b": (plus(-5, HUATUO.format("7B"), "Qwen2.5-VL-7B-Instruct"), "holds"),
    "tops_all_open": (plus(-10, HUATUO.format("34B")), "within noise"),
    "new_records": (plus(-25, *STRONG), "holds"),
    "on_par_with_gpt4o": (plus(-10, RL.format("32B", "m23k")), "does not hold"),
    "three_runs": (only("MMMU-medical", "44.13", "Qwen2.5-VL-3B-Instruct"), "does not hold"),
    "text_beats_base": (plus(5, RL.format("7B", "m23k")), "holds"),
    "second_stage_beats_base": (plus(20, *STAGES), "holds"),
    "averages_recompute": (replace(PAPER, rows=(replace(PAPER.rows[0], average=Decimal("49.20")),
                                                *PAPER.rows[1:])), "does not hold"),
    "cells_are_possible": (only("pmc_vqa", "53.40", HUATUO.format("7B"), HUATUO.format("34B")), "holds"),
    "above_chance": (plus(15), "holds"),
    "gain_is_not_format": (replace(PAPER, curves=NO_FORMAT), "holds"),
    "bars_show_their_label": (replace(PAPER, bars=OWN_ROW), "holds"),
}


BEFORE = claims.audit_claims(PAPER)


@pytest.mark.parametrize("key", claims.QUESTIONS)
def test_a_verdict_changes_with_its_numbers(key):
    paper, expected = FLIPS[key]
    verdict, because, _ = claims.QUESTIONS[key](paper)
    assert verdict == expected != BEFORE[key].verdict and because != BEFORE[key].because, because


# ------------------------------------------------------------------------------------ tables

COUNTS = {name: [60, 100] for name in COLUMNS}
LONG = "UCSC-VLAA/MedVLThinker-3B-SFT_m23k-RL_PMC"


def table(which="recipes"):
    "A table as a run leaves it: long names and differences."
    records = [{"model": model, "source": "hub", "rule": "regrade", "counts": COUNTS}
               for model in (LONG, "tiny", *(f"7B-RL_mine_{i}" for i in range(16)))]
    gains = pd.DataFrame.from_dict(dict.fromkeys((*COLUMNS, "macro average"), (-12, -21.5, -10.4, 100)), "index",
                                   columns=["difference", "low", "high", "n"])
    return results_table(records, which, differences=[(f"{LONG} - Qwen/Qwen2.5-VL-3B-Instruct", "hub", gains)])


@pytest.mark.parametrize("which", ["recipes", "comparison"])
def test_a_table_for_latex_compiles_and_fits_its_page(which, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed (apt-get install texlive-latex-recommended)")
    (tmp_path / "page.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{array,booktabs,longtable}\n"
        f"\\begin{{document}}\n{to_latex(table(which))}\\end{{document}}\n", encoding="utf-8")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "page.tex"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "page.pdf").is_file(), done.stdout[-2000:]
    assert not re.findall(r"Overfull.*|too large.*", done.stdout)


def test_no_text_in_a_cell_is_markup():
    "A bar, code, an entity, a formula, a link, HTML stay text."
    evil = "a|b `c` &lt;i&gt; $x$ [go](javascript:1) <script> \\| _x_\n\n# head"
    mistune = pytest.importorskip("mistune", reason="it comes with nbconvert")
    page = mistune.create_markdown(escape=False, plugins=["table"])(markdown_table(("text", "n"), [(evil, 1)]))
    cell, = re.findall(r"<td>(.*?)</td>\s*<td>1</td>", page)
    assert "<" not in cell and html.unescape(cell) == " ".join(evil.split()), page


# ------------------------------------------------------------------- every number beside a run

def compared(*found):
    "What a comparison with the paper says of the numbers that were measured."
    table = claims.compare_to_paper(PAPER, *found)
    assert not table.duplicated(["measure", "model", "benchmark"]).any() and len(table) == 494
    return table[table["status"] != "not run"]


def test_several_answers_are_compared_with_the_figures():
    def line(measure, k, value):
        return {"dataset_name": "pmc_vqa", "measure": measure, "k": k, "percent": value,
                "low": value - 2, "high": value + 2, "n": 2000, "answers": 64}
    five = [line("average", 1, 43.65), line("majority of 5", 0, 46.0), line("pass@5", 5, 90)]
    record = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "source": "hub",
              "rules": {"regrade": five, "strict": [line("pass@64", 64, 92.4)]}}
    found = {(each.measure, each.status) for each in compared([], [record]).itertuples()}
    assert found == {("average, regrade", "match"), ("majority of 5, regrade", "inside"),
                     ("pass@5, regrade", "outside"), ("pass@64, strict", "match")}


def test_the_tables_are_compared_under_their_own_rule_and_prompt():
    row = PAPER.row("Qwen2.5-VL-3B-Instruct")
    right = {name: [round(float(score) * row.sizes[name] / 100), row.sizes[name]] for name, score in row.scores.items()}
    record = {"model": row.hub_id, "source": "hub", "rule": "lenient", "instruction": "trained",
              "counts": {name: [n, n] for name, (_, n) in right.items()}, "rules": {"regrade": right}}
    measured = compared([record])
    assert len(measured) == 7 and set(measured.status) <= {"match", "inside"}
    for other in ({"instruction": "none"}, {"source": "synthetic"}):
        assert compared([record | other]).empty


# ------------------------------------------------------------------------------ claims on runs

def evaluated(folder, right):
    "What paper/4_evaluate leaves of a model's grades, written by hand."
    folder.mkdir(parents=True)
    graded(right).to_json(folder / "questions.jsonl", orient="records", lines=True)


def test_models_that_were_asked_other_questions_are_left_open(tmp_path):
    evaluated(tmp_path / "tiny", {name: [1, 0] for name in COLUMNS})
    evaluated(tmp_path / "tiny-RL_m23k", {name: [1, 1, 0] for name in COLUMNS})
    models = ["tiny", "tiny-RL_m23k"]
    assert claims.audit_runs(claims.measured_grades(tmp_path, models))["text_beats_base"].verdict == "open"
    assert [*claims.paired_differences(grades := claims.measured_grades(tmp_path, models), claims.base_pairs(grades))] == []


def test_published_weights_are_known_by_their_hub_id(tmp_path):
    dice, models = np.random.default_rng(0), ["Qwen/Qwen2.5-VL-3B-Instruct", "UCSC-VLAA/MedVLThinker-3B-RL_m23k"]
    for model, share in zip(models, (.4, .7)):
        evaluated(tmp_path / model.replace("/", "--"), {name: (dice.random(200) < share).tolist() for name in COLUMNS})
    verdict = claims.audit_runs(claims.measured_grades(tmp_path, models))["text_beats_base"]
    assert verdict.verdict == "holds" and verdict.numbers[0]["n"] == 1200
    with pytest.raises(UserError, match="No rule 'foo'"):
        claims.audit_runs(claims.measured_grades(tmp_path, models), "foo")
    (first, second, table), = claims.paired_differences(grades := claims.measured_grades(tmp_path, models), claims.base_pairs(grades))
    assert (first, second) == ("3B-RL_m23k", "Qwen/Qwen2.5-VL-3B-Instruct")
    assert table.loc["macro average", "difference"] == pytest.approx(30, abs=5)


def test_a_verdict_on_some_of_the_sets_names_them(tmp_path):
    dice, models = np.random.default_rng(0), ["tiny", "tiny-RL_m23k"]
    for sets, part in ((["vqa_rad_closed", "pmc_vqa"], " (over PMC, VQA-Rad only)"), (COLUMNS, "]")):
        for model, share in zip(models, (.4, .7)):
            evaluated(tmp_path / str(len(sets)) / model, {name: (dice.random(100) < share).tolist() for name in sets})
        assert claims.audit_runs(claims.measured_grades(tmp_path / str(len(sets)), models))["text_beats_base"].because.endswith(part)


def test_one_table_holds_no_answers_to_different_questions(home):
    "A model that was evaluated again with another limit stands in no table beside the others."
    root = home / "smoke"
    for model, place in (("tiny", "one"), ("tiny-SFT_PMC", "two")):
        (folder := root / "results" / "synthetic" / model).mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"model": model, "rollouts": {"pmc_vqa": f"rollouts/{place}"}}))
        (root / "rollouts" / place).mkdir(parents=True)
        (root / "rollouts" / place / "rollout.json").write_text(json.dumps({"samples": place, "rows": 5}))
    with pytest.raises(UserError, match=r"tiny and tiny-SFT_PMC have answered different questions of pmc_vqa \(5 and 5\).*; evaluate one of them again"):
        stored_records(load_profile("smoke"))
    (root / "rollouts" / "two" / "rollout.json").write_text(json.dumps({"samples": "one", "rows": 5}))
    assert len(stored_records(load_profile("smoke"))) == 2
    (root / "rollouts" / "two" / "rollout.json").unlink()
    assert len(stored_records(load_profile("smoke"))) == 2, "answers that were removed are no different ones: the record has the counts"


def test_answers_to_another_prompt_measure_nothing_of_the_paper():
    "Neither greedy answers nor several."
    counts = {name: [60, 100] for name in COLUMNS}
    line = {"dataset_name": "pmc_vqa", "measure": "average", "k": 1, "percent": 44, "low": 42, "high": 46, "n": 2000, "answers": 5}
    model = "Qwen/Qwen2.5-VL-3B-Instruct"
    greedy = {"model": model, "source": "hub", "rule": "regrade", "counts": counts, "rules": {"regrade": counts}}
    several = {"model": model, "source": "hub", "rules": {"regrade": [line], "strict": []}}
    for instruction, n in (("trained", 8), ("none", 0)):
        asked = {"instruction": instruction}
        assert len(compared([greedy | asked], [several | asked])) == n
