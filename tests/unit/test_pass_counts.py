"""Pass counts at the places a notebook cannot show: the order of `datasets`, kills, memory, and rounds that are asked again."""
import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from medvlthinker.core.files import UserError
from medvlthinker.data import synthetic
from medvlthinker.difficulty.pass_counts import curate, easy_to_hard, generate_until_decided, keep_band, pass_counts
from medvlthinker.evaluation.evaluate import grade_rollout
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.model import folder_name
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.generation.rollout import generate
from medvlthinker.app.runs import data_file
from medvlthinker.app.profile import load_profile
from medvlthinker.training.recipe import RECIPES
from medvlthinker.data.sample import PARQUET_OPTIONS, Sample, SampleFile, write_samples

QUIET = lambda line: None


def drawn(n: int, size: int = 0) -> tuple[list[Sample], pd.DataFrame]:
    "Questions, each with an image of about `size` bytes that does not compress, and their decisions."
    rng = np.random.default_rng(n)
    samples = [Sample(f"Question {i}?", {"A": "Yes", "B": "No"}, "A", "Yes", images=(rng.bytes(size),) if size else (), dataset_name="toy",
                      dataset_index=3 * i + 5) for i in range(n)]
    return samples, keep_band(counted(samples, rng.binomial(16, rng.beta(.5, 1, n))))


def counted(samples: list[Sample], correct) -> pd.DataFrame:
    "The columns of `pass_counts` that a decision needs, of sixteen completions a question."
    return pd.DataFrame({"dataset_name": [s.dataset_name for s in samples], "dataset_index": [s.dataset_index for s in samples], "n": 16, "correct": correct})


@pytest.mark.parametrize("n", [3, 700, 20_000])
def test_the_order_is_that_of_datasets(n):
    "Dataset.shuffle(seed=42), then sort by pass_count, as the paper did it; ties included."
    import datasets

    decisions = drawn(n)[1]
    kept = decisions[decisions.decision == "keep"]
    theirs = datasets.Dataset.from_dict({"dataset_index": kept.dataset_index, "pass_count": kept.correct})
    theirs = theirs.shuffle(seed=42).sort("pass_count", reverse=True)
    assert easy_to_hard(decisions, 42).dataset_index.tolist() == list(theirs["dataset_index"])


def test_the_curated_file_is_a_dataset_with_images(tmp_path):
    import datasets

    samples = synthetic.corpus("pmc_vqa", 40)
    write_samples(samples, tmp_path / "pmc.parquet")
    path = curate(tmp_path / "pmc.parquet", keep_band(counted(samples, np.arange(40) % 17)), tmp_path / "curated", by="tiny")
    read = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    whole = datasets.load_dataset("parquet", data_files=str(tmp_path / "pmc.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.column_names == [*whole.column_names, "pass_count", "pass_of"]
    assert {name: read.features[name] for name in whole.column_names} == dict(whole.features)
    assert read[0]["images"][0].size == samples[0].pictures()[0].size
    by_index = {s.dataset_index: s for s in samples}
    assert list(SampleFile(path)) == [by_index[index] for index in read["dataset_index"]], "every field as it was, images to the byte"
    assert list(read["pass_count"]) == sorted(read["pass_count"], reverse=True) and set(read["pass_of"]) == {16}


def test_a_corpus_holds_more_images_than_pyarrow_reads_at_once(tmp_path, monkeypatch):
    "Two gigabytes; PMC-VQA holds several times as many. They are compressed, for this test's disk."
    monkeypatch.setitem(PARQUET_OPTIONS, "compression", "zstd")
    _, decisions = drawn(2200)
    images = (bytes(1_000_000),)
    write_samples((Sample("?", {"A": "Yes", "B": "No"}, "A", "Yes", images=images, dataset_name="toy", dataset_index=index) for index in decisions.dataset_index), tmp_path / "toy.parquet")
    path = curate(tmp_path / "toy.parquet", decisions[-300:], tmp_path, by="tiny")
    assert [sample.images == images for sample in SampleFile(path)] == [True] * (decisions[-300:].decision == "keep").sum()


def test_a_changed_filter_makes_the_file_again(tmp_path):
    samples, decisions = drawn(200)
    write_samples(samples, tmp_path / "toy.parquet")
    act = functools.partial(curate, tmp_path / "toy.parquet", decisions, tmp_path / "out", by="a")
    all_of_them = len(pd.read_parquet(act()))
    victim = int(easy_to_hard(decisions).dataset_index.iloc[0])
    path = act(without={victim}, overlap="pixels")
    assert len(pd.read_parquet(path)) == all_of_them - 1
    manifest = json.loads((path.parent / f"{path.name}.manifest.json").read_text())
    dropped = [json.loads(line) for line in path.with_suffix(".dropped.jsonl").read_text().splitlines()]
    assert manifest["inputs"]["overlap"] == "pixels" and manifest["dropped"]["overlaps a test set"] == 1
    assert [line["dataset_index"] for line in dropped if line["reason"] == "overlaps a test set"] == [[victim]]
    everyone = sorted([index for line in dropped for index in line["dataset_index"]] + pd.read_parquet(path).dataset_index.tolist())
    assert everyone == decisions.dataset_index.tolist(), "each question is kept or dropped, once"


def test_decisions_are_joined_by_set_and_number_and_never_by_position(tmp_path):
    samples, decisions = drawn(100)
    write_samples(samples, tmp_path / "toy.parquet")
    write_samples(samples + samples[:1], tmp_path / "twice.parquet")
    path = curate(tmp_path / "toy.parquet", decisions, tmp_path / "one", by="a")
    turned = decisions[::-1]
    turned.attrs = decisions.attrs
    assert curate(tmp_path / "toy.parquet", turned, tmp_path / "two", by="a").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="holds question 5 twice"):
        curate(tmp_path / "twice.parquet", decisions, tmp_path / "three", by="a")


def begun(**parameters) -> dict:
    "The names of paper/2_difficulty after its first two cells, before anything is asked."
    cells = json.loads((ROOT / "nbs" / "paper" / "2_difficulty.ipynb").read_text(encoding="utf-8"))["cells"]
    parameters_cell, first = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:2]
    names: dict = {}
    exec(parameters_cell, names)
    names |= parameters  # as papermill writes them into the notebook
    exec(first, names)
    return names


def test_a_band_is_checked_before_anything_is_asked():
    assert begun(rollouts=2)["high"] == 1 and begun(rollouts=16)["high"] == 7
    for wrong in ({"rollouts": 1}, {"high": 8}, {"low": 5, "high": 4}):
        with pytest.raises(UserError, match="^A band counts right answers of"):
            begun(**wrong)


def test_only_the_model_whose_counts_recipes_read_is_asked():
    paper = load_profile("paper")
    assert list(begun(profile="paper")["models"]) == [paper.models[0]]
    assert list(begun(profile="paper", every_model=True)["models"]) == list(paper.models)
    read = {data_file(recipe, paper).name for recipe in RECIPES.values() if recipe.method == "RL"}
    assert all(f"-{folder_name(paper.models[0])}-easy_to_hard" in name for name in read)


def act(folder, target, kill_at=0):
    "One curation, as a process of its own; it is killed before that row group is written or that file gets its name, counted together from 1."
    from pyarrow.parquet import ParquetWriter

    done = itertools.count(1)

    def mortal(function):
        def call(*given, **more):
            if next(done) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **more)
        return call

    ParquetWriter.write_table, os.replace = mortal(ParquetWriter.write_table), mortal(os.replace)
    curate(folder / "large.parquet", pd.read_pickle(folder / "decisions.pickle"), target, by="tiny")


def test_six_kills(tmp_path):
    samples, decisions = drawn(2000, 300)
    write_samples(samples, tmp_path / "large.parquet")
    decisions.to_pickle(tmp_path / "decisions.pickle")

    def run(target, kill_at=0):
        given = {"target": act, "args": (tmp_path, target, kill_at)}
        process = multiprocessing.get_context("fork").Process(**given, daemon=True)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it stands still"
        return process.exitcode

    def files(target):
        return {path.name: path.read_bytes() for path in target.glob("*") if "manifest" not in path.name}

    assert run(tmp_path / "whole") == 0
    want = files(tmp_path / "whole")
    assert sorted(want) == [".lock", "large-tiny-easy_to_hard.dropped.jsonl", "large-tiny-easy_to_hard.parquet"]
    for kill_at in range(1, 7):
        target = tmp_path / f"killed-{kill_at}"
        assert run(target, kill_at) == -signal.SIGKILL
        before = {name: data for name, data in files(target).items() if not name.startswith(".")}
        assert before.items() <= want.items() and "large-tiny-easy_to_hard.parquet" not in before, "what has its name is whole"
        assert run(target) == 0
        assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}, "nothing half-written is left"
        assert files(target) == want


FULL = Sampling(n=16, temperature=1.0, max_tokens=64, seed=42)


def answers(rates):
    "An engine whose answers to the question `i` are right at the rate `rates[i]`, each request by its own seed."
    def answer(request):
        right = np.random.default_rng(request.seed).random(request.sampling.n) < rates[request.sample.dataset_index]
        return [Completion(f"<answer> {request.sample.answer_label if each else '?'} </answer>", "stop", 5) for each in right]

    return FunctionEngine(answer)


@pytest.mark.parametrize("per_round", [1, 2])
def test_a_stopping_rule_keeps_its_promise(tmp_path, per_round):
    "The answers of a full rollout are given again, one round after the other, and all is compared with the full decisions; without the pilot, which is asked in full."
    samples = [replace(sample, dataset_index=i) for i, sample in enumerate(drawn(600)[0])]
    rows = generate(samples, answers(np.random.default_rng(5).beta(.3, 1, 600)), FULL, tmp_path / "full", QUIET)
    given = {row["dataset_index"]: iter(row["completions"]) for row in rows}
    engine = FunctionEngine(lambda request: [Completion(**next(given[request.sample.dataset_index])) for _ in range(request.sampling.n)])
    full = keep_band(pass_counts(grade_rollout(samples, rows, ("strict",))))
    decisions = generate_until_decided(samples, engine, FULL, tmp_path, per_round=per_round, pilot=200, show=QUIET)
    assert decisions.dataset_index.tolist() == full.dataset_index.tolist()
    rest = decisions.n.to_numpy() < 16
    agreement = (decisions.decision == full.decision).mean()
    assert agreement >= 0.97 and decisions.n[rest].mean() / 16 <= 0.68, (agreement, decisions.n[rest].mean() / 16)
    assert (decisions.correct <= full.correct).all() and (decisions[~rest].correct == full[~rest].correct).all()


def test_live_sampling_until_decided(tmp_path):
    "Rounds have seeds of their own, and what one has lost is asked again; the corpus is read from the disk."
    samples = [replace(sample, dataset_index=i) for i, sample in enumerate(drawn(60)[0])]
    write_samples(samples, tmp_path / "pmc.parquet")
    engine = answers(np.random.default_rng(6).beta(.5, 1, 60))
    go = functools.partial(generate_until_decided, SampleFile(tmp_path / "pmc.parquet"), engine, FULL,
                           tmp_path / "rounds", per_round=4, pilot=20, show=QUIET)
    decisions = go()
    assert (decisions.n == 16).sum() >= 20 and decisions.n.isin([4, 8, 12, 16]).all()
    first, second = (next((tmp_path / "rounds").glob(f"round-0{n}/*/rollout.jsonl")) for n in (1, 2))
    rows = [map(json.loads, path.read_text().splitlines()) for path in (first, second)]
    one, two = ({row["dataset_index"]: row["completions"] for row in each} for each in rows)
    assert any(one[index] != two[index] for index in two)
    whole = first.read_bytes()
    first.write_bytes(whole[:len(whole) // 2])
    assert go().equals(decisions) and first.read_bytes() == whole
    path = curate(tmp_path / "pmc.parquet", decisions, tmp_path / "curated", by="tiny")
    assert pd.read_parquet(path).pass_of.tolist() == easy_to_hard(decisions).n.tolist()


def test_curation_holds_no_corpus_in_memory(tmp_path):
    "Two hundred megabytes of images are kept; of PMC-VQA it would be seven gigabytes."
    import pyarrow

    samples = drawn(8000)[0]
    write_samples((replace(sample, images=(bytes(25_000),)) for sample in samples), tmp_path / "toy.parquet")
    usual, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        path = curate(tmp_path / "toy.parquet", keep_band(counted(samples, np.full(8000, 3))), tmp_path / "out", by="tiny")
    finally:
        pyarrow.set_memory_pool(usual)
    assert path.stat().st_size > 200e6 > 4 * pool.max_memory(), pool.max_memory()


def test_a_round_is_read_while_it_is_asked(tmp_path):
    "A round of 3,000 questions; a window of the file is in memory, and not the round."
    write_samples((replace(sample, dataset_index=i) for i, sample in enumerate(drawn(3000)[0])), tmp_path / "toy.parquet")
    alive = lambda: sum(isinstance(each, Sample) for each in gc.get_objects())
    plain, seen, before = answers(np.full(3000, .5)).function, [], alive()

    def counting(request):
        if len(seen) < 3 and request.sampling.n < 16:
            seen.append(alive() - before)
        return plain(request)

    generate_until_decided(SampleFile(tmp_path / "toy.parquet"), FunctionEngine(counting), FULL, tmp_path / "rounds", per_round=8, pilot=1, show=QUIET)
    assert seen and max(seen) < 1500, seen


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no disk that is always full")
def test_a_full_disk_is_no_fault_of_the_samples(tmp_path, monkeypatch):
    "The sentence names the file that is written, and nobody is told to delete questions."
    samples, decisions = drawn(400, 1000)
    write_samples(samples, tmp_path / "toy.parquet")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "r+b"))
    with pytest.raises(UserError, match=r"toy-a-easy_to_hard.parquet cannot be written \(No space left on device\)"):
        curate(tmp_path / "toy.parquet", decisions, tmp_path / "out", by="a")
