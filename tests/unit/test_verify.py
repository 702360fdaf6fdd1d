"""A byte that changed is found in whatever file it is, and a cell of a table leads back to its answers."""
import contextlib
import csv
import io
import random
import re
import shutil
from pathlib import Path

import pytest
from medvlthinker.app import cli
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.app.runs import rollouts
from medvlthinker.app.verify import check_run, recorded_files, run_files, trace
from medvlthinker.core.files import UserError, file_hash, write_record
from medvlthinker.data.benchmarks import LOCAL
from medvlthinker.data.readers import write_csv
from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
from medvlthinker.evaluation.evaluate import evaluate, grade_rollout, read_records
from medvlthinker.generation.request import Sampling
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.results.claims import measured_grades, paired_differences
from medvlthinker.results.tables import own_sets, results_table, write_table

MODELS = ("raw", "llama:8b")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "A small run by two models that were never trained; one of them was asked with two limits."
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDVLTHINKER_HOME", str(tmp_path_factory.mktemp("runs")))
    run = Workspace("smoke")
    results, notebook = run.results, run.notebooks / "5_results.ipynb"
    with contextlib.redirect_stdout(io.StringIO()), write_record(notebook, {"seed": 42}) as facts:
        for seed, model in enumerate(MODELS):
            make_tiny_model(run.checkpoints / model, seed, steps=0)
            for limit in (2, 3) if seed == 0 else (3,):
                profile = load_profile("smoke", limit=limit, train_limit=6, max_tokens=6, corpus="pmc_vqa")
                evaluate(rollouts(profile, model), results / "synthetic")
        sampling = Sampling(n=2, temperature=1.0, max_tokens=6)
        samples, rows = rollouts(profile, "raw", sampling, kind="corpus")["pmc_vqa"]
        counts = keep_band(pass_counts(grade_rollout(samples, rows, ("strict",))), 0, 1)
        curate(samples.path, counts, run.curated / "synthetic", by="raw")
        records = read_records(results / "synthetic", MODELS)
        pair, = paired_differences(measured_grades(results / "synthetic", MODELS), [MODELS])
        row = " - ".join(MODELS), "synthetic", pair[2]
        only = ("GPT-4o", "Qwen2.5-VL-3B-Instruct")
        table = results_table(records, "recipes", only=only, differences=[row])
        paths = write_table("recipes", table, results)
        notebook.write_text("{}")
        facts["outputs"] = {str(path.relative_to(run.root)): file_hash(path) for path in paths}
    yield run.root
    patch.undo()


def wrong(root: Path) -> dict[str, str]:
    return {each.path: each.state for each in check_run(root) if each.state != "unchanged"}


def test_two_limits_in_one_run_are_both_as_recorded(finished):
    assert wrong(finished) == {}
    assert len([*finished.glob("samples/synthetic/slake_closed-*.parquet")]) == 2


@contextlib.contextmanager
def flipped(path: Path, rng: random.Random):
    "One bit of one byte is another; in the end the file is as it was."
    whole = path.read_bytes()
    place = rng.randrange(len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
    yield
    path.write_bytes(whole)


def test_a_flipped_bit_is_found_in_every_file(finished):
    "In each file that is on record, all at once; and in some of the records, one at a time."
    rng, known = random.Random(0), recorded_files(finished)
    plain = [finished / name for name in known if (finished / name).stat().st_size]
    records = [path for path in run_files(finished) if path not in {finished / name for name in known}]
    with contextlib.ExitStack() as stack:
        for path in plain:
            stack.enter_context(flipped(path, rng))
        found = wrong(finished)
        assert [str(path) for path in plain if found.get(str(path.relative_to(finished))) != "changed"] == []
    for path in rng.sample(records, 6):
        with flipped(path, rng):
            assert wrong(finished).get(str(path.relative_to(finished))) == "changed", path
    assert wrong(finished) == {}


def test_what_is_missing_unfinished_or_without_a_record_is_named(finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "smoke"))
    name = "results/recipes.csv"
    (root / name).unlink()
    (root / "results/my-notes.txt").write_text("mine")
    rollout = next(root.glob("rollouts/raw/synthetic/corpus/*/*"))
    for path in (rollout / "rollout.json", root / "curated/synthetic"):
        path.rename(tmp_path / path.name)
    found = wrong(root)
    assert (found[name], found["results/my-notes.txt"]) == ("missing", "no record")
    assert found[str((rollout / "rollout.jsonl").relative_to(root))] == "unfinished"


def lines(root: Path, cell: str) -> str:
    return "\n".join(trace(root, cell))


def test_every_row_of_every_table_is_followed(finished):
    "Rows of differences and of models with a colon in their name too; a table lists no row that verify refuses."
    with open(finished / "results/recipes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"paper", "ours", "difference"} == {row["origin"] for row in rows}
    for row in rows:
        for column in [name for name in ("SLAKE", "Avg.") if row[name]]:
            text = lines(finished, f"{row['model']}/{column}")
            assert "published number" in text or "counted again" in text
    text = lines(finished, f"{' - '.join(MODELS)}/SLAKE")
    assert len(re.findall(r"rollouts/\S+/synthetic/slake_closed/\w{16}/rollout.jsonl: \d of 3 right", text)) == 2
    assert text.count("on samples/synthetic/slake_closed-3.parquet") == 2


def test_a_set_of_ones_own_is_followed(finished, tmp_path, monkeypatch, capsys):
    "Its table is results/own_sets.csv, and no other table names the set."
    root = Path(shutil.copytree(finished, tmp_path / "smoke"))
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path))
    monkeypatch.setitem(LOCAL, "chest", [])  # other tests of this process know no such set
    (tmp_path / "chest").mkdir()
    (tmp_path / "chest" / "test.csv").write_text("question,answer_label\nIs it?,A\nIs it not?,B\n")
    (own := tmp_path / "mine.py").write_text(f"""from medvlthinker.data.benchmarks import register_benchmark
from medvlthinker.data.readers import DatasetLayout
register_benchmark("chest", {str(tmp_path / "chest")!r}, DatasetLayout("test.csv", "", lambda row, where: {{"options": {{"A": "Yes", "B": "No"}}, **row}}))
""")
    keys = {"extend": str(own), "benchmark": "chest", "max_tokens": 6}
    evaluate(rollouts(load_profile("smoke", **keys), "raw"), root / "results" / "synthetic")
    write_csv(own_sets(read_records(root / "results" / "synthetic", ["raw"])), root / "results" / "own_sets.csv")
    capsys.readouterr()
    assert cli.main(["verify", "smoke", *(f"{key}={value}" for key, value in keys.items()), "cell=raw/chest"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rollouts/raw/\S*chest/\w{16}/rollout.jsonl: \d of 2 right by regrade\n", said) and "counted again" in said, said
    with pytest.raises(UserError, match="columns are .*Avg., chest.$"):
        lines(root, "raw/ches")
    table = root / "results" / "own_sets.csv"
    table.write_text(re.sub(r"2,[\d.]+,", "2,99.0,", table.read_text()))
    with pytest.raises(UserError, match="raw/chest does not come out again: .*the table says 99.0"):
        lines(root, "raw/chest")


def test_a_model_that_was_trained_again_is_not_the_one_that_was_asked(finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "smoke"))
    with open(root / "checkpoints/raw/generation_config.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="checkpoints/raw holds other weights by now"):
        lines(root, "raw/SLAKE")


def test_a_number_that_does_not_come_out_again_is_a_sentence(finished, tmp_path, monkeypatch):
    root = Path(shutil.copytree(finished, tmp_path / "smoke"))
    table = root / "results/recipes.csv"
    table.write_text(re.sub(r"(?m)^(.*,raw,.*)$", lambda line: re.sub(r"\b\d+\.\d\d\b", "99.99", line[1]), table.read_text()))
    with pytest.raises(UserError, match=r"raw/SLAKE does not come out again: .*99\.99"):
        lines(root, "raw/SLAKE")
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path))
    with pytest.raises(UserError, match="is not what was recorded: 1 files, named above"):
        cli.main(["verify", "smoke"])
    for answers in root.glob("rollouts/raw/synthetic/slake_closed/*/rollout.jsonl"):  # of both limits
        answers.write_bytes(answers.read_bytes().replace(b'"length"', b'"lenght"'))
    with pytest.raises(UserError, match="is damaged"):
        lines(root, "raw/SLAKE")


def test_an_edited_table_is_not_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path))
    with write_record(table := Workspace("smoke").results / "table.txt", {}):
        table.write_text("tiny 50.0")
    cli._show_results(load_profile("smoke"))
    assert "tiny 50.0" in capsys.readouterr().out
    table.write_text("tiny 90.0")
    with pytest.raises(UserError, match="table.txt was changed after it was made"):
        cli._show_results(load_profile("smoke"))
