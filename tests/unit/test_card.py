"""Cards against what they describe: code blocks run where they stand, the hub's library reads the metadata, and torn files cost a sentence."""
import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import encoded
from medvlthinker.app.cards import check_card, model_card, write_cards
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.core.files import UserError, file_hash, record_path, write_record
from medvlthinker.data.corpora import load_corpus
from medvlthinker.data.sample import InvalidRow, Sample, store_samples
from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
from medvlthinker.evaluation.evaluate import grade_rollout
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import generate
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.recipe import find


def rows():
    "Two samples, and two rows that are none."
    yield Sample("Which?\n| a | <b>", {"A": "one", "B": "two"}, "B", "two", (encoded(),), "because",
                 "slake_closed", 3)
    yield Sample("Wie groß?", {"A": "1", "B": "2"}, "A", "1", (), None, "slake_closed", 4)
    yield InvalidRow("row 2", "options", "1 of them; a choice needs two")
    yield InvalidRow("row 3", "answer_type", "OPEN", filtered=True)


def quiet(line: str) -> None: ...


def answer(request):
    return [Completion(f"<answer> {letter} </answer>", "stop", 9) for letter in "ABAB"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A small run: every kind of artefact once, each made by the function that makes it in a real run."
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("MEDVLTHINKER_HOME", str(tmp_path_factory.mktemp("home")))
        run, profile = Workspace("smoke"), load_profile("smoke", train_limit=12)
        store_samples(run.samples / "local/slake_closed.parquet", rows, {"source": "local"}, 1)
        corpus = load_corpus("pmc_vqa", profile, run.samples)
        sampling = Sampling(n=4, temperature=1.0, seed=42)
        folder = run.rollouts / "tiny/synthetic/corpus/pmc_vqa"
        rollout = generate(corpus, FunctionEngine(answer, "tiny"), sampling, folder, quiet)
        counts = keep_band(pass_counts(grade_rollout(corpus, rollout, ("strict",))), 1, 3)
        curated = curate(corpus.path, counts, run.curated / "synthetic", "tiny")
        base = make_tiny_model(run.checkpoints / "tiny", steps=0, show=quiet)
        with write_record(run.checkpoints / "tiny-RL_PMC", {"data": file_hash(curated)}) as facts:
            facts.update(steps=60, seed=42)
            shutil.copytree(base, run.checkpoints / "tiny-RL_PMC")
        said: list[str] = []
        assert len(write_cards(profile, said.append)) == 6, said
    return run.root


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    "A copy of that run, to be changed."
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path))
    return Path(shutil.copytree(made, tmp_path / "smoke"))


def test_a_card_says_what_was_left_out_and_what_is_not_known(made):
    text = (made / "samples/local/README.md").read_text()
    for part in ("license: other", "CC BY 4.0", "left_out 1, broken 1, first_broken", "arXiv:2102.09542",
                 "Do not train on them", "Not for clinical use"):
        assert part in text, part
    assert "means nothing medical" in (made / "curated/synthetic/README.md").read_text()
    (answers,) = (made / "rollouts/tiny/synthetic/corpus/pmc_vqa").iterdir()
    assert answers.name in (made / "rollouts/tiny/README.md").read_text() and str(made) not in text


def test_every_code_block_runs_where_its_card_is(made, own_cache, monkeypatch, capsys):
    import datasets

    cards = sorted(made.rglob("README.md"))
    assert len(cards) == 6
    for path in cards:
        block, = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        monkeypatch.chdir(path.parent)
        exec(block.replace("max_new_tokens=200", "max_new_tokens=4"), {})
        assert capsys.readouterr().out.strip(), path
    hub = datasets.load_dataset(str(made / "samples/local"), "slake_closed", split="test")
    assert len(hub) == 2, "the metadata name each file, as the hub reads them"


def test_what_was_measured_later_gets_into_the_card_of_the_model(run):
    from huggingface_hub import ModelCard

    card = run / "checkpoints/tiny-RL_PMC/README.md"
    assert "Not measured." in card.read_text() and "steps 60, seed 42" in card.read_text()
    path = run / "results/synthetic/tiny-RL_PMC/evaluation.json"
    with write_record(path, {}):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"source": "synthetic", "rule": "regrade", "seed": 42,
                                    "counts": {"pmc_vqa": [71, 100]}}))
    assert write_cards(load_profile("smoke", train_limit=12), quiet) == [card]
    assert "| pmc_vqa | 71.0 | 71 | 100 | 61.5 to 79.0 | regrade | 42 |" in card.read_text()
    result, = ModelCard.load(card).data.eval_results
    assert (result.dataset_name, result.metric_value) == ("pmc_vqa", 71.0)
    assert result.metric_args["n"] == 100


def test_torn_files_cost_a_sentence(run):
    (run / "samples/local/slake_closed.parquet").write_bytes(b"PAR1")
    record_path(run / "curated/synthetic/pmc_vqa-12-tiny-easy_to_hard.parquet").write_text("{")
    next(run.rglob("rollout.json")).write_text("\udcff{", errors="surrogateescape")
    said: list[str] = []
    written = write_cards(load_profile("smoke", train_limit=12), said.append)
    assert [line for line in said if "was not written" in line] == [said[-1]], said
    assert "slake_closed.parquet" in said[-1]
    assert {"synthetic", "tiny"} <= {path.parent.name for path in written}


def test_where_nothing_was_made_nothing_is_written(home):
    assert write_cards(load_profile("smoke"), pytest.fail) == [] and not home.exists()


@pytest.mark.parametrize("old, new, said", [
    ("pipeline_tag: image-text-to-text\n", "", "no pipeline_tag"),
    ("language: en", "base_model: a/b/c", "not valid for the hub"),
    ("language: en", "language: [en", "not valid for the hub"),
    ("license: apache-2.0", "license: other", "no license_name, license_link")])
def test_a_card_that_the_hub_would_not_take_is_refused(old, new, said):
    text = model_card(find("tiny-RL_m23k"))
    assert old in text
    with pytest.raises(UserError, match=said):
        check_card(text.replace(old, new))


def test_a_model_that_started_from_a_local_folder_has_a_card():
    own = replace(find("3B-RL_m23k"), init="/data/my-base")
    text = model_card(own)
    assert "RL of /data/my-base" in text and "base_model" not in text and "qwen-research" in text
