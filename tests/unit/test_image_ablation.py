"""Whether a model uses the image: a model that does is told from one that cannot, and a condition changes one thing."""
import random
import shutil
from dataclasses import replace

import pytest
from conftest import by_hand
from medvlthinker.data import synthetic
from medvlthinker.data.prompt import messages
from medvlthinker.data.sample import Sample
from medvlthinker.evaluation.image_ablation import (
    CONDITIONS, ablation_answers, ablation_effects, ablation_table, ablation_verdict, ask_conditions, shuffled)
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import Completion, EngineSettings, Sampling


@pytest.fixture
def blind_tiny(tmp_path, warm_tiny):
    "The embedded model with the last layer of its vision tower's merger set to zero: every image is the same to it."
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(warm_tiny, tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    last = [name for name in weights if ".merger.mlp.2." in name]
    assert len(last) == 2 and all(weights[name].any() for name in last)
    save_file({name: weight * (name not in last) for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_tells_who_uses_the_image_from_who_does_not(tmp_path, warm_tiny, blind_tiny):
    sets = {name: synthetic.benchmark(name, 25) for name in ("pmc_vqa", "pathvqa_closed")}
    found = {}
    for model in (warm_tiny, blind_tiny):
        def ask(show=lambda line: None, model=model):
            return ask_conditions(sets, open_engine(EngineSettings(model=str(model))), Sampling(max_tokens=64), {name: tmp_path / model.name / name for name in sets}, ("blank", "shuffled"), show=show)
        answers = ablation_answers(ask())
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / model.name).rglob("rollout.json*")}
        assert ablation_answers(ask()).equals(answers) and len(files) == 12
        assert files == {path: path.stat().st_mtime_ns for path in files}, "nothing is asked twice"
        found[model.name] = answers, ablation_effects(answers).set_index(["measure", "dataset_name"])
    (sees, sighted), (same, blind) = found["tiny"], found["blind"]

    for measure in ("visual reliance", "image sensitivity"):
        for name in ("macro average", *sets):
            assert sighted.low[measure, name] > 0, (measure, name)
            assert blind.percent[measure, name] == 0 and blind.low[measure, name] < 0 < blind.high[measure, name]
    assert ablation_verdict("tiny", sighted.reset_index()).startswith("tiny uses the image")
    assert ablation_verdict("blind", blind.reset_index()).startswith("It is not shown that blind uses the image")
    for condition in ("blank", "shuffled"):
        assert (same.original_answer == same[f"{condition}_answer"]).all(), "not one answer changes"
        assert (sees.original_answer != sees[f"{condition}_answer"]).sum() > 12
        assert blind.percent[f"unchanged: {condition}", "macro average"] == 100 and sighted.high[f"unchanged: {condition}", "macro average"] < 90
    assert same.original_answer.any(), "it answers, and is not merely silent"


@pytest.mark.parametrize("name", synthetic.BENCHMARKS)
def test_a_condition_changes_one_thing(name):
    samples = synthetic.benchmark(name, 60)
    for condition, change in CONDITIONS.items():
        changed = change(samples, seed=3)
        assert changed == change(samples, seed=3)
        assert [s.dataset_index for s in changed] == [s.dataset_index for s in samples] and all(s.options[s.answer_label] == s.answer for s in changed)
        for old, new in zip(samples, changed):
            differ = {key for key in ("question", "options", "answer_label", "answer", "images") if getattr(old, key) != getattr(new, key)}
            may = {"original": set(), "permuted_options": {"options", "answer_label"}}.get(condition, {"images"})
            assert differ in (may, may - {"answer_label"})
            assert [p.size for p in new.pictures()] == ([] if condition == "no_image" else [p.size for p in old.pictures()])
            messages(new)
    assert samples == synthetic.benchmark(name, 60), "and none changes what it was given"


def test_nobody_gets_an_own_image():
    "And as many images as before, where another question has as many."
    rng = random.Random(1)
    images = [tuple(bytes([k]) for k in rng.sample(range(8), rng.randint(1, 2))) for _ in range(40)]
    samples = [Sample("?", {"A": "1", "B": "2"}, "A", "1", each, dataset_name="toy", dataset_index=i) for i, each in enumerate(images)]
    for old, new in zip(samples, shuffled(samples, seed=7), strict=True):
        assert not {*old.images} & {*new.images} and len(new.images) == len(old.images)


def test_a_question_that_was_left_out_counts_under_the_others():
    samples = [Sample("?", {"A": "cyst", "B": "none of the above" if i else "lesion"}, "A", "cyst", (bytes([i]),), dataset_name="toy", dataset_index=i) for i in range(4)]
    say = lambda samples, letter: [{"dataset_name": "toy", "dataset_index": s.dataset_index, "completions": [{"text": f"<answer>{letter}</answer>", "finish_reason": "stop", "tokens": 1}]} for s in samples]
    moved = CONDITIONS["permuted_options"](samples)
    answers = ablation_answers({"original": {"toy": (samples, say(samples, "A"))}, "permuted_options": {"toy": (moved, say(moved, "A"))}})
    assert answers.original_correct.tolist() == [1] * 4 and answers.permuted_options_correct.isna().tolist() == [False, True, True, True]
    effects = ablation_effects(answers).query("dataset_name == 'toy'").set_index("measure")
    assert effects.n.to_dict() == {"accuracy: original": 4, "accuracy: permuted_options": 1, "order sensitivity": 1, "unchanged: permuted_options": 1}
    assert (effects.percent["order sensitivity"], effects.percent["unchanged: permuted_options"]) == (100, 0)


def test_a_set_of_which_a_condition_leaves_nothing_is_asked_the_others(tmp_path):
    "Where each question ends in 'none of the above' the options cannot change places."
    fixed = [replace(sample, options={"A": "cyst", "B": "none of the above"}, answer_label="A", answer="cyst") for sample in synthetic.benchmark("pmc_vqa", 3)]
    sets, engine = {"chest": fixed, "slake_closed": synthetic.benchmark("slake_closed", 3)}, by_hand(lambda sample, k: Completion("<answer>A</answer>", "stop", 5))
    for names in (sets, {"chest": fixed}):
        asked = ask_conditions({name: sets[name] for name in names}, engine, Sampling(), dict.fromkeys(sets, tmp_path), show=lambda line: None)
        assert "chest" not in asked.get("permuted_options", {}) and all("chest" in asked[name] for name in ("original", "no_image", "blank", "shuffled"))
        table = ablation_table(ablation_effects(ablation_answers(asked)))
        assert "unchanged: blank" in table.index and ("order sensitivity" in table.index) == (len(names) > 1)
