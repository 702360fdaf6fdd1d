"""A byte that changed is found in whatever file it stands, and a cell of a table leads back to its completions."""
import contextlib
import io
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, python, says

from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.core.files import file_hash, record_path, write_record, atomic_write
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.app.crate import CRATE, run_files, write_cards
from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
from medvlthinker.generation.request import Sampling
from medvlthinker.evaluation.evaluate import evaluate, grade_rollout, read_records
from medvlthinker.results.tables import results_table, write_table
from medvlthinker.app.runs import rollouts
from medvlthinker.app.verify import findings, main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "A small run with one artefact of each kind, by a model that was never warmed up."
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDVLTHINKER_HOME", str(tmp_path_factory.mktemp("runs")))
    profile, workspace = load_profile("smoke", limit=3, train_limit=6, max_tokens=6, corpus="pmc_vqa"), Workspace("smoke")
    make_tiny_model(workspace.checkpoints / "raw", steps=0)
    with contextlib.redirect_stdout(io.StringIO()), write_record(workspace.notebooks / "5_results.ipynb", {"its code": "0", "seed": 42}) as facts:
        evaluate(rollouts(profile, "raw"), workspace.results / "synthetic")
        record, = read_records(workspace.results / "synthetic", ["raw"])
        samples, rows = rollouts(profile, "raw", Sampling(n=2, temperature=1.0, max_tokens=6), kind="corpus")["pmc_vqa"]
        counts = keep_band(pass_counts(grade_rollout(samples, rows, ("strict",))), 0, 1)
        curate(samples.path, counts, workspace.curated / "synthetic", by="raw")
        with atomic_write(workspace.results / "difficulty_synthetic.csv") as file:
            right = counts.correct.value_counts()
            file.write("model,corpus,right,of,questions\n" + "".join(f"raw,pmc_vqa,{k},2,{right.get(k, 0)}\n" for k in range(3)))
        paths = write_table("comparison", results_table([record], "comparison", only=("GPT-4o",)), workspace.results)
        with atomic_write(workspace.notebooks / "5_results.ipynb") as file:
            file.write('{"cells": []}')
        facts["outputs"] = {path.relative_to(workspace.root).as_posix(): file_hash(path) for path in [*paths, workspace.results / "difficulty_synthetic.csv"]}
    write_cards(profile, lambda line: None)
    yield workspace.root
    patch.undo()


def wrong(root: Path) -> dict[str, str]:
    return {finding.path: finding.state for finding in findings(root) if finding.state != "fits"}


@contextlib.contextmanager
def flipped(path: Path, rng: random.Random):
    "One bit of one byte is another; in the end the file is as it was."
    whole = path.read_bytes()
    place = rng.randrange(len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
    yield
    path.write_bytes(whole)


def is_record(path: Path) -> bool:
    return path.name.endswith(".manifest.json") or path.name in ("rollout.json", CRATE)


def flip_each(root: Path, count, most: int = 10**6) -> None:
    "A byte flipped in each file that is vouched for, all at once; and in each that vouches, one at a time."
    rng, paths = random.Random(0), [path for path in [*run_files(root), root / CRATE, record_path(root / CRATE)] if path.stat().st_size]
    plain, records = [path for path in paths if not is_record(path)], [path for path in paths if is_record(path)]
    with contextlib.ExitStack() as stack:
        for path in plain:
            stack.enter_context(flipped(path, rng))
        found = wrong(root)
        count.tried += len(plain)
        missed = [path for path in plain if found.get(path.relative_to(root).as_posix()) != "changed"]
        count.survived += len(plain) - len(missed)
        assert missed == []
    for path in rng.sample(records, min(most, len(records))):
        count.tried += 1
        with flipped(path, rng):
            assert wrong(root).get(path.relative_to(root).as_posix()) == "changed", path
        count.survived += 1
    assert wrong(root) == {}


def test_a_flipped_bit_is_found_in_every_file(finished, tally):
    assert wrong(finished) == {}
    with tally("faults", "a flipped bit in a file of a run, found by verify", seed=0) as count:
        flip_each(finished, count)


@pytest.mark.heavy
def test_a_flipped_bit_is_found_in_every_file_of_the_whole_pipeline(tmp_path, tally):
    if not (ROOT / "_runs" / "smoke" / CRATE).is_file():
        pytest.skip("there is no finished run in _runs/smoke; ./reproduce.sh makes one, and .ci/run does so before these tests")
    root = shutil.copytree(ROOT / "_runs" / "smoke", tmp_path / "smoke")
    assert wrong(root) == {}
    with tally("faults", "a flipped bit in a file of a run, found by verify", seed=0) as count:
        flip_each(root, count, most=25)


def test_what_is_gone_unfinished_or_unknown_is_said(finished):
    answers = next(finished.glob("rollouts/raw/synthetic/corpus/*/*/rollout.jsonl"))
    table, note, old = finished / "results" / "comparison.csv", finished / "results" / "my-notes.txt", finished / "samples" / "synthetic" / "slake_closed-3.parquet.manifest.json"
    kept = {path: path.read_bytes() for path in (answers, table, old)}
    answers.unlink(), table.unlink(), note.write_text("mine")
    early = {key: value for key, value in json.loads(kept[old]).items() if key not in ("format", "seal")}
    old.write_text(json.dumps(early, indent=1))
    assert wrong(finished) == {table.relative_to(finished).as_posix(): "gone", note.relative_to(finished).as_posix(): "not recorded", answers.relative_to(finished).as_posix(): "gone",
                               old.relative_to(finished).as_posix(): "not recorded"}
    note.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


def test_other_weights_and_other_questions_are_found(finished):
    "Each file for itself may be whole and sealed, and yet not what the evaluation was made from."
    weights = finished / "checkpoints" / "raw" / "generation_config.json"
    before = weights.read_bytes()
    weights.write_bytes(before + b"\n")
    found = {finding.path: finding.why for finding in findings(finished) if finding.state == "changed"}
    assert "the weights in checkpoints/raw are others" in found["results/synthetic/raw/evaluation.json"]
    weights.write_bytes(before)
    file = finished / "samples" / "synthetic" / "slake_closed-3.parquet"
    before = file.read_bytes()
    shutil.copy(finished / "samples" / "synthetic" / "pmc_vqa-3.parquet", file)
    assert any("the questions in samples/synthetic/slake_closed-3.parquet are others" in finding.why for finding in findings(finished))
    file.write_bytes(before)


def said(capsys, *words) -> str:
    main(["smoke", *words])
    return capsys.readouterr().out


def test_a_cell_leads_to_its_completions(finished, capsys):
    text = said(capsys, "cell=raw/SLAKE", "show=2")
    place = re.search(r"completions +(rollouts/raw/synthetic/slake_closed/\w{16}): 3 answers to 3 questions, as they were written", text)[1]
    who = json.loads((finished / place / "rollout.json").read_text())
    assert f"weights {who['weights']}, in checkpoints/raw" in text and f"commit {who['commit'][:12]}" in text and "trained (chat): You will solve" in text
    shown = re.findall(r"(rollout\.jsonl) line (\d+) +question (\d+), gold (\w), (right|wrong)", text)
    assert len(shown) == 2
    for name, line, question, _, _ in shown:
        row = json.loads((finished / place / name).read_text().split("\n")[int(line) - 1])
        assert row["dataset_index"] == int(question)
    record = json.loads((finished / "results" / "synthetic" / "raw" / "evaluation.json").read_text())
    assert f"{record['counts']['slake_closed'][0]} of 3 under the rule regrade" in text
    assert said(capsys, "cell=raw/Avg.", "show=0").count("    completions  rollouts/raw/") == 6
    assert "published number" in said(capsys, "cell=GPT-4o/PMC")
    assert "the same counts under the rule" in said(capsys, "cell=difficulty:raw/pmc_vqa")


def test_a_number_that_does_not_come_out_again_is_a_sentence(finished):
    table, home = finished / "results" / "comparison.csv", os.environ["MEDVLTHINKER_HOME"]
    whole = table.read_text()
    for words, change in (("cell=raw/SLAKE", lambda text: re.sub(r"(?m)^(.*,raw,.*)$", lambda line: re.sub(r"\b\d+\.\d\d\b", "99.99", line[1]), text)),):
        table.write_text(change(whole))
        says(python("-m", "medvlthinker.app.verify", "smoke", words, MEDVLTHINKER_HOME=home), "raw/SLAKE cannot be trusted as it stands", "99.99")
    says(python("-m", "medvlthinker.app.verify", "smoke", MEDVLTHINKER_HOME=home), "1 of", "not what was recorded")
    table.write_text(whole)
    folder = next(finished.glob("rollouts/raw/synthetic/slake_closed/*"))
    answers = folder / "rollout.jsonl"
    before = answers.read_bytes()
    answers.write_bytes(before.replace(b'"stop"', b'"stap"').replace(b'"length"', b'"lenght"'))
    says(python("-m", "medvlthinker.app.verify", "smoke", "cell=raw/SLAKE", MEDVLTHINKER_HOME=home), "line 1 is damaged")
    answers.write_bytes(before)


@pytest.mark.parametrize("words, parts", [(["cell=raw/SLAKEN"], ["No cell 'raw/SLAKEN' in comparison.csv", "a row of GPT-4o, raw"]), (["cell=nonsense"], ["No cell"]), (["cell=nowhere:raw/PMC"], ["no table nowhere"]),
                                          (["show=many"], ["show wants a whole number"]), (["colour=red"], ["Unknown profile key colour"])])
def test_bad_input_is_a_sentence(finished, words, parts):
    says(python("-m", "medvlthinker.app.verify", "smoke", *words), *parts)


def test_where_nothing_was_run_it_says_so(tmp_path):
    says(python("-m", "medvlthinker.app.verify", "smoke", MEDVLTHINKER_HOME=tmp_path), "Nothing of the profile smoke has been made")
