"""The command lines of comparison, image ablation and export: what they print and keep, and one sentence for a mistake."""
import json
import re
import shutil

import pandas as pd
import pytest
from conftest import by_hand, python, says
from medvlthinker.app import cli, runs
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.core.files import UserError
from medvlthinker.data.benchmarks import load_benchmark
from medvlthinker.evaluation.compare import TOO_FEW
from medvlthinker.evaluation.evaluate import evaluate, evaluate_repeats
from medvlthinker.generation.request import Sampling
from medvlthinker.generation.rollout import generate
from test_compare import reply

ASKED = ("limit=8", "benchmark=vqa_rad, slake")


@pytest.fixture
def call(capsys):
    "A command line in this process; what it prints."
    def call(*words: str) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return call


def refuses(words: list, *parts: str) -> None:
    "A command line is refused in one sentence, which holds these parts."
    with pytest.raises(UserError) as said:
        cli.main([str(word) for word in words])
    assert "\n" not in str(said.value) and all(part in str(said.value) for part in parts), said.value


@pytest.fixture
def answered(home):
    "Two synthetic test sets, answered by hand and evaluated: greedily, and with four answers to each question."
    profile, workspace = load_profile("smoke", limit=8, benchmark="vqa_rad, slake"), Workspace("smoke")
    for sampling, record in ((Sampling(), evaluate), (Sampling(n=4, temperature=0.5), evaluate_repeats)):
        rolled = {}
        for name in ("slake_closed", "vqa_rad_closed"):
            samples = load_benchmark(name, profile, workspace.samples)
            rolled[name] = samples, generate(samples, by_hand(reply, "tiny"), sampling, workspace.rollouts / "tiny" / "synthetic" / name, show=lambda line: None)
        record(rolled, workspace.results / "synthetic")
    return home


def test_two_rules_over_stored_answers(answered, call):
    said = call("compare", "smoke", *ASKED, "old=strict", "new=lenient")
    assert "strict -> lenient: " in said
    path = answered / "smoke" / "results" / "synthetic" / "rescore-strict-lenient.csv"
    flips = pd.read_csv(path)
    assert f"{len(flips)} of 16 verdicts flipped" in said and len(flips) > 0 and {*flips.model} == {"tiny"}
    assert said.count("macro average") == 1 and path.with_name(path.name + ".manifest.json").is_file()


def test_stored_answers_to_other_questions_than_the_limit_draws_are_named(answered, call, tmp_path):
    words = ("smoke", ASKED[1], "model=tiny", "to=eval_results", f"folder={tmp_path / 'logs'}")
    assert "other questions" not in call("export", *words, "limit=8")
    assert "other questions than limit=3 draws, and these are taken: 8 of slake_closed, 8 of vqa_rad_closed." in call("export", *words, "limit=3")


def test_one_start_answers_all_sets_and_the_repeats(warm_home, call, monkeypatch):
    "And the rule that is named changes what is printed, not the tables."
    from medvlthinker.generation.engine import Engine

    starts, load = [], Engine._load
    monkeypatch.setattr(Engine, "_load", lambda engine: starts.append(engine.model) or load(engine))
    said = call("evaluate", "smoke", "model=tiny", "limit=2", "benchmark=slake,vqa_rad", "repeats=2", "rule=strict")
    assert len(starts) == 1
    record = json.loads((warm_home / "smoke" / "results" / "synthetic" / "tiny" / "evaluation.json").read_text())
    assert "tiny, rule strict" in said and record["rule"] == "regrade"


def test_sets_that_leave_the_tables_are_named(warm_home, call):
    words = "evaluate", "smoke", "model=tiny", "limit=2"
    call(*words, "benchmark=slake,vqa_rad")
    said = call(*words, "seed=43", "benchmark=vqa_rad")
    assert "has these sets from now on, and no more slake_closed;" in said
    assert "./reproduce.sh evaluate smoke model=tiny limit=2 seed=43 benchmark=slake_closed,vqa_rad_closed brings all back" in said
    assert "from now on" not in call(*words, "benchmark=vqa_rad")
    record = warm_home / "smoke" / "results" / "synthetic" / "tiny" / "evaluation.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | {"counts": found["counts"] | {"chest": [1, 2]}}))
    assert "benchmark=vqa_rad_closed,chest, with the extend= that adds chest, brings all back" in call(*words, "benchmark=vqa_rad")


def test_two_models_on_the_command_line(answered, warm_tiny, tmp_path, call):
    "Answers by hand against those of the embedded model: a line a set and one for the average."
    copy = tmp_path / "copy"
    shutil.copytree(warm_tiny, copy)
    assert "macro average" in call("evaluate", "smoke", *ASKED, f"model={copy}")
    first, *lines = call("compare", "smoke", *ASKED, "model=tiny", f"with={copy}").splitlines()
    assert re.fullmatch(rf"tiny -> {copy}: [1-9]\d* of \d+ verdicts flipped \((right -> wrong|wrong -> right|other answer) .+\)", first)
    assert re.match(r"  (another option|no option read): \d+ \((right -> wrong|wrong -> right|other answer) ", lines[0]), "and why"
    assert f"{copy} - tiny, percentage points, rule regrade" in lines
    assert [line.split()[0] for line in lines[-3:]] == ["slake_closed", "vqa_rad_closed", "macro"]
    assert all(re.fullmatch(r"[01]\.\d{3}|<0\.001", text) for line in lines[-3:-1] for text in line.split()[7:9]), "p and holm"
    assert "They were asked in different ways, max_tokens (4096 and 40): the difference is not of the models alone." in lines
    call("evaluate", "smoke", *ASKED, f"model={copy}", "max_tokens=4096")
    assert "Both were asked in the same way, so the numbers may be compared.\n" in call("compare", "smoke", *ASKED, "model=tiny", f"with={copy}")
    refuses(["compare", "smoke", *ASKED, "model=tiny", "with=./tiny"], "holds the results of tiny, and those of ./tiny would lie there too")
    refuses(["compare", "smoke", *ASKED, "model=tiny", "with=nobody"], "nobody has no stored greedy answers", "./reproduce.sh evaluate smoke model=nobody 'benchmark=vqa_rad, slake' limit=8 makes them")
    with open(copy / "generation_config.json", "a") as file:
        file.write("\n")  # as after another training
    said = call("compare", "smoke", *ASKED, "model=tiny", f"with={copy}")
    assert f"{copy} was evaluated with other weights than {copy} holds by now; ./reproduce.sh evaluate smoke model={copy} " in said


def test_questions_of_ones_own_are_no_drawn_scans(home, call):
    (folder := home / "smoke" / "results" / "synthetic" / "tiny").mkdir(parents=True)
    for name, drawn in (("chest", False), ("pmc_vqa", True)):
        record = {"model": "tiny", "source": "synthetic", "rollouts": {}, "counts": {name: [1, 2]}}
        (folder / "evaluation.json").write_text(json.dumps(record))
        assert ("Drawn scans" in call("check-paper", "smoke")) == drawn


def test_parity_of_a_model_that_cannot_be_had_is_a_sentence(home):
    "What the engine says of it, and not what transformers says of its tokenizer."
    keys = ("model=someone/nothing", "benchmark=pmc_vqa", "limit=2")
    refuses(["compare", "smoke", *keys, "--", "batch_size=5"], "No model someone/nothing")


def test_parity_on_the_command_line(warm_home, call, monkeypatch):
    "Each side is asked in a process of its own; here in this one, which has torch loaded."
    words, launched = ["compare", "smoke", "model=tiny", "benchmark=pmc_vqa", "limit=12", "batch_size=12"], []
    monkeypatch.setattr(runs, "launch_rollout", lambda profile, model: launched.append((profile.batch_size, model)))
    last = call(*words, "--", "batch_size=5").splitlines()[-1]
    assert last.startswith(TOO_FEW) and "12 questions" in last
    assert len(pd.read_csv(warm_home / "smoke" / "results" / "synthetic" / "tiny" / "engine_agreement.csv")) == 12
    assert launched == [(12, "tiny"), (5, "tiny")]
    refuses([*words, "--", "gpus=0"], "Both sides are one and the same rollout")
    refuses([*words, "--", "model=other", "benchmark=slake"], "Give benchmark, model before the --")
    refuses([*words], "Say what to compare", "with=NAME", "two settings with -- between them")


def test_a_recipe_of_ones_own_can_be_merged(home, tmp_path):
    "The file that extend= names is read before the recipe is looked for, as in training."
    own = tmp_path / "mine.py"
    own.write_text("from dataclasses import replace\nfrom medvlthinker.training.recipe import RECIPES\n"
                   "RECIPES['tiny-SFT_mine'] = replace(RECIPES['tiny-SFT_PMC'], name='tiny-SFT_mine')\n")
    cli_of = ("-m", "medvlthinker.app.cli", "merge", "smoke", "recipe=tiny-SFT_mine")  # a process: the recipe stays
    says(python(*cli_of), "Unknown recipe tiny-SFT_mine")
    says(python(*cli_of, f"extend={own}"), "tiny-SFT_mine.training")
