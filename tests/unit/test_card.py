"""Cards against the things that they describe: rows read back by Croissant, files by RO-Crate, code blocks run; and what is missing, torn or unchanged."""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, encoded, python, says
from medvlthinker.app import card, crate
from medvlthinker.app.card import Hashes
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.core.files import UserError, record_path, write_record
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.data.corpora import load_corpus
from medvlthinker.app.crate import write_cards
from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
from medvlthinker.evaluation.evaluate import grade_rollout
from medvlthinker.generation.rollout import generate
from medvlthinker.data.sample import InvalidRow, Sample, SampleFile, read_samples, store_samples, write_samples

pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}") for words in ("ConjunctiveGraph is deprecated", "The inplace keyword")]  # within rdflib and mlcroissant


def odd_rows():
    "Rows that a reader may get wrong: two images, none, other letters, null and empty texts; and two that are no samples."
    yield Sample("Which?\n| a | \u2028 <b>", {"A": "one", "B": 'two "2"'}, "B", 'two "2"', (encoded(), encoded(30, 30, "JPEG")), "because", "slake_closed", 3, "0123456789abcdef", {"k": ["ü", None]})
    yield Sample("Wie groß? 大きい", {"A": "1", "B": "2", "C": "3"}, "A", "1", (), None, "slake_closed", 4)
    yield InvalidRow("row 2", "options", "1 of them; a choice needs two")
    yield InvalidRow("row 3", "answer_type", "OPEN", filtered=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A run in little: every kind of artefact once, each made by the function that makes it in a real run."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLTHINKER_HOME", str(home))
        workspace = Workspace("smoke")
        store_samples(workspace.samples / "local/slake_closed.parquet", odd_rows, {"source": "local", "seed": 42}, max_rejected=1)
        corpus = load_corpus("pmc_vqa", load_profile("smoke", train_limit=12), workspace.samples)
        engine = FunctionEngine(lambda request: [Completion(f"<think> x </think>\n<answer> {letter} </answer>", "stop", 9) for letter in "ABAB"], "tiny")
        rollout = generate(corpus, engine, Sampling(n=4, temperature=1.0, seed=42), workspace.rollouts / "tiny/synthetic/corpus/pmc_vqa", lambda line: None)
        curated = curate(corpus.path, keep_band(pass_counts(grade_rollout(corpus, rollout, ("strict",))), 1, 3), workspace.curated / "synthetic", "tiny")
        with write_record(workspace.checkpoints / "tiny-RL_PMC", {"data": hashlib.sha256(curated.read_bytes()).hexdigest()}) as facts:
            facts.update(steps=60, seed=42, start="/elsewhere/checkpoints/tiny")
            (workspace.checkpoints / "tiny-RL_PMC").mkdir()
            (workspace.checkpoints / "tiny-RL_PMC/config.json").write_text("{}")
        with write_record(workspace.notebooks / "2_difficulty.ipynb", {"its code": "0123456789ab", "of": "", "name": "smoke", "step 1_data": "x"}) as facts:
            (workspace.notebooks / "2_difficulty.ipynb").write_text("{}")
            facts["outputs"] = [str(curated.relative_to(workspace.root))]
        (workspace.notebooks / "3_train-tiny-RL_m23k.running.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"output_type": "error", "ename": "UserError", "evalue": "No data."}]}]}))
        (workspace.notebooks / "4_evaluate-tiny.running.ipynb").write_text(json.dumps({"cells": [{"outputs": []}]}))
        said: list[str] = []
        assert len(write_cards(load_profile("smoke", train_limit=12), said.append)) == 9, said
    return workspace.root


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    "A copy of that run, to be changed."
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path))
    return Path(shutil.copytree(made, tmp_path / "smoke"))


@pytest.mark.parametrize("path", ["samples/local/slake_closed", "samples/synthetic/corpus/pmc_vqa-12", "curated/synthetic/pmc_vqa-12-tiny-easy_to_hard"])
def test_croissant_reads_our_rows_back(made, path):
    import mlcroissant

    file, name = made / f"{path}.parquet", Path(path).name
    records = list(mlcroissant.Dataset(str(file.with_name("croissant.json"))).records(name))
    text = lambda value: value.decode() if isinstance(value, bytes) else value
    for sample, record in zip(SampleFile(file), records, strict=True):
        found = {key.removeprefix(f"{name}/"): text(value) for key, value in record.items() if not key.endswith("/images")}
        pictures = tuple(picture.fp.getvalue() for picture in record[f"{name}/images"] or ())
        assert Sample(found["question"], json.loads(found["options"]), found["answer_label"], found["answer"], pictures, found["reasoning"], found["dataset_name"], found["dataset_index"],
                      found["hash"], found["misc"] and json.loads(found["misc"])) == sample and pictures == sample.images
    if "curated" in path:
        assert {(record[f"{name}/pass_count"], record[f"{name}/pass_of"]) for record in records} <= {(k, 4) for k in (1, 2, 3)}


def test_croissant_refuses_another_file(run):
    import mlcroissant

    write_samples(read_samples(run / "samples/local/slake_closed.parquet")[:1], run / "samples/local/slake_closed.parquet")
    with pytest.raises(Exception, match="Hash of downloaded file|error occurred"):
        list(mlcroissant.Dataset(str(run / "samples/local/croissant.json")).records("slake_closed"))


def test_the_card_says_what_was_set_aside_and_what_is_not_known(made):
    text = (made / "samples/local/README.md").read_text()
    for part in ("license: other", "CC BY 4.0", "| broken, options: 1 of them; a choice needs two | 1 |", "left out by rule, answer_type: OPEN", "arXiv:2102.09542", "must not be trained on", "seed 42"):
        assert part in text, part
    assert "nothing medical" not in text and "nothing medical" in (made / "curated/synthetic/README.md").read_text()
    (answers,) = (made / "rollouts/tiny/synthetic/corpus/pmc_vqa").iterdir()
    assert answers.name in (made / "rollouts/tiny/README.md").read_text() and str(made) not in text


def test_every_code_block_runs_where_its_card_lies(made, own_cache, monkeypatch, capsys):
    import datasets

    cards = [path for path in sorted(made.rglob("README.md")) if "checkpoints" not in path.parts]
    assert len(cards) == 4
    blocks = {path.parent: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for path in cards}
    assert sum(map(len, blocks.values())) == 7
    for folder, found in blocks.items():
        monkeypatch.chdir(folder)
        for block in found:
            exec(block, {})
            assert capsys.readouterr().out.strip()
    assert len(datasets.load_dataset(str(made / "samples/local"), "slake_closed", split="test")) == 2  # the metadata name each file, as on the hub


def test_rocrate_reads_the_run_back(made):
    from rocrate.rocrate import ROCrate

    described = ROCrate(made)
    files = {each.id: each for each in described.get_by_type("File") if each.id != "ro-crate-metadata.json"}
    assert {made / name for name in files} == set(crate.run_files(made)) and len(files) > 15
    for name, file in files.items():
        data = (made / name).read_bytes()
        assert (file["sha256"], file["contentSize"]) == (hashlib.sha256(data).hexdigest(), str(len(data))), name
    assert described.root_dataset["conformsTo"].id == crate.PROFILE and described.root_dataset["datePublished"]
    actions = {each["name"]: each for each in described.root_dataset["mentions"] if each.type == "CreateAction"}
    assert all(each["instrument"].get("name") for each in actions.values())
    ids = lambda name, key: [each.id for each in actions[name].get(key, [])]
    curated, corpus, answers = "curated/synthetic/pmc_vqa-12-tiny-easy_to_hard.parquet", "samples/synthetic/corpus/pmc_vqa-12.parquet", next(made.glob("rollouts/*/*/*/*/*")).relative_to(made).as_posix() + "/"
    assert ids(answers[:-1], "object") == [corpus] and ids(answers[:-1], "result") == [answers]
    assert ids(curated, "object") == [corpus] and ids("checkpoints/tiny-RL_PMC", "object") == [curated]  # the start was another run's
    assert ids("notebooks/2_difficulty.ipynb", "result") == ["notebooks/2_difficulty.ipynb", curated]
    assert actions[curated]["startTime"] <= actions[curated]["endTime"]
    assert actions["failed-3_train-tiny-RL_m23k"]["error"] == "UserError: No data." and not any("4_evaluate" in name for name in actions)


def test_a_second_call_writes_and_reads_nothing(run, monkeypatch):
    profile = load_profile("smoke")
    write_cards(profile, print)  # a copy has new times, so each file is read once more
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(card, "file_hash", lambda path: pytest.fail(f"{path} was read again") if Path(path).is_relative_to(run) else "x" * 64)
    monkeypatch.setattr(crate, "_locks", lambda crate: [])
    assert [path.name for path in write_cards(profile, print)] == ["ro-crate-metadata.json"]  # the locks are gone from it
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} <= {run, run / "ro-crate-metadata.json", run / "ro-crate-metadata.json.manifest.json"}


def test_a_hash_that_a_manifest_holds_is_taken_from_it(run, monkeypatch):
    corpus, told = run / "samples/synthetic/corpus/pmc_vqa-12.parquet", "curated/synthetic/pmc_vqa-12-tiny-easy_to_hard.parquet.manifest.json"
    (run / ".hashes.json").unlink()
    monkeypatch.setattr(card, "file_hash", lambda path: "read")
    os.utime(corpus, (1, 1))
    assert Hashes(run)[corpus] == json.loads((run / told).read_text())["inputs"]["samples"]
    os.utime(corpus)  # written after the manifest: it may hold anything
    assert Hashes(run)[corpus] == "read"


def test_what_was_measured_later_gets_into_the_models_card(run):
    folder, readme = run / "results/synthetic/tiny-RL_PMC", run / "checkpoints/tiny-RL_PMC/README.md"
    assert "Not measured." in readme.read_text() and "steps 60, seed 42" in readme.read_text() and '"kept": ' in readme.read_text()
    with write_record(folder / "evaluation.json", {}):
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"source": "synthetic", "rule": "regrade", "seed": 42, "counts": {"pmc_vqa": [71, 100]}}))
    assert readme in write_cards(load_profile("smoke", train_limit=12), print)
    assert "| pmc_vqa | 71 | 100 | 71.0 | 61.5 to 79.0 |" in readme.read_text()


def test_torn_files_cost_a_sentence(run):
    (run / "samples/local/slake_closed.parquet").write_bytes(b"PAR1")
    record_path(run / "curated/synthetic/pmc_vqa-12-tiny-easy_to_hard.parquet").write_text("{")
    (run / ".hashes.json").write_text("[")
    next(run.rglob("rollout.json")).write_text("\udcff{", errors="surrogateescape")
    said: list[str] = []
    written = {str(path.relative_to(run)) for path in write_cards(load_profile("smoke", train_limit=12), said.append)}
    assert len([line for line in said if "was not written" in line]) == 2, said  # card and Croissant of the torn set
    assert {"curated/synthetic/README.md", "rollouts/tiny/README.md", "ro-crate-metadata.json"} <= written, said
    with pytest.raises(UserError, match="2 cards could not be written; .*slake_closed.parquet"):
        crate.main(["smoke"])


def test_without_the_libraries_there_is_a_sentence(run, monkeypatch, capsys):
    for path in (run / "ro-crate-metadata.json", run / "samples/local/croissant.json", run / "samples/local/README.md"):
        path.unlink()
    for name in ("rocrate", "mlcroissant"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, and it is not found
    crate.main(["smoke"])
    assert capsys.readouterr().out.count("pip install 'medvlthinker[notebooks]'") == 2
    assert (run / "samples/local/README.md").is_file() and not (run / "ro-crate-metadata.json").exists()


def test_where_there_is_nothing(home):
    says(python("-m", "medvlthinker.app.crate", "smoke"), "Nothing of the profile smoke has been made", "./reproduce.sh smoke")
    assert write_cards(load_profile("smoke", train_limit=12), pytest.fail) == [] and not home.exists()


@pytest.mark.parametrize("old, new, said", [
    ("pipeline_tag: image-text-to-text\n", "", "no pipeline_tag"), ("language: en", "base_model: a/b/c", "not valid for the hub"), ("license: apache-2.0", "license: other", "without the name and link")])
def test_a_card_that_the_hub_would_not_take_is_refused(old, new, said):
    from medvlthinker.training.recipe import find

    text = card.model_card(find("tiny-RL_m23k"))
    assert old in text
    with pytest.raises(UserError, match=said):
        card.check_card(text.replace(old, new))


def test_the_script_knows_the_verb():
    assert re.search(r"\./reproduce\.sh card \[PROFILE\]", (ROOT / "reproduce.sh").read_text()) and re.search(r"^    .*\bcard\b.*\)$", (ROOT / "reproduce.sh").read_text(), re.MULTILINE)
