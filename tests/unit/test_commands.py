"""The command lines of comparison, image ablation and export: what they print and keep, and one sentence for a mistake."""
import functools
import json
import shutil

import pytest
import warm
from conftest import ROOT, ByHand, python, says
from medvlthinker.data.benchmarks import load_benchmark
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.evaluation.compare import TOO_FEW
from medvlthinker.evaluation.evaluate import evaluate, evaluate_repeats
from medvlthinker.generation.request import Sampling
from medvlthinker.generation.rollout import generate
from test_compare import MINE, reply

run = functools.partial(warm.run, "-m", "medvlthinker.app.cli", cwd=ROOT)
call = functools.partial(python, "-m", "medvlthinker.app.cli")
ASKED = ("limit=8", "benchmark=vqa_rad, slake")


@pytest.fixture
def answered(home):
    "Two synthetic test sets, answered by hand and evaluated: greedily, and with four answers to each question."
    profile, workspace = load_profile("smoke", limit=8, benchmark="vqa_rad, slake"), Workspace("smoke")
    for sampling, record in ((Sampling(), evaluate), (Sampling(n=4, temperature=0.5), evaluate_repeats)):
        rolled = {}
        for name in ("slake_closed", "vqa_rad_closed"):
            samples = load_benchmark(name, profile, workspace.samples)
            rolled[name] = samples, generate(samples, ByHand(reply, "tiny"), sampling, workspace.rollouts / "tiny" / name, show=lambda line: None)
        record(rolled, workspace.results / "synthetic")
    (home / "mine.py").write_text(MINE)
    return home


def test_regrade_on_the_command_line(answered):
    done = call("compare", "smoke", *ASKED, "old=strict", "new=lenient")
    assert done.returncode == 0 and "strict -> lenient: " in done.stdout and "of 16 verdicts flipped" in done.stdout, done.stderr
    path = answered / "smoke" / "results" / "synthetic" / "rescore-strict-lenient.json"
    stored, flips = json.loads(path.read_text()), [json.loads(line) for line in path.with_suffix(".jsonl").read_text().split("\n")[:-1]]
    assert [cell["benchmark"] for cell in stored["cells"]] == ["slake_closed", "vqa_rad_closed", "macro average"]
    assert sum(line["answers"] for line in stored["causes"]) == len(flips) > 0 and {line["model"] for line in flips} == {"tiny"}
    assert path.with_name(path.name + ".manifest.json").is_file()
    done = call("compare", "smoke", *ASKED, f"new={answered}/mine.py:first_capital")
    assert done.returncode == 0 and (path.parent / "rescore-strict-mine.first_capital.json").is_file(), done.stderr


def test_mistakes_are_one_sentence(answered):
    for new, part in (("kind", "No rule 'kind'"), (f"{answered}/absent.py:rule", "No Python file"), (f"{answered}/mine.py:rule", "mine.py:rule'; known are"), (f"{answered}/mine.py:stumbles", "failed on")):
        says(call("compare", "smoke", *ASKED, f"new={new}"), part)
    says(call("compare", "smoke", "limit=9", ASKED[1]), "answers other questions than these of slake_closed")
    says(call("export", "smoke", *ASKED, "model=tiny", "to=csv", "folder=x"), "No form 'csv'")
    says(call("export", "smoke", *ASKED, "model=tiny", "to=inspect", f"folder={answered}", "rules=kind"), "No rule kind")
    says(call("compare", "smoke", "model=tiny"), "Say what to compare", "with=NAME")
    assert not list((answered / "smoke" / "results" / "synthetic").glob("rescore-*"))


def test_exchange_on_the_command_line(answered, tmp_path):
    for form, words, files in (("inspect", ["benchmark=vqa_rad", "answers=repeats"], 1), ("eval_results", [ASKED[1]], 2)):
        done = call("export", "smoke", "limit=8", *words, "model=tiny", f"to={form}", f"folder={tmp_path / form}")
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / form).rglob("*.json*"))) == files


def test_look_on_the_command_line(warm_home):
    done = run("ablate", "smoke", "model=tiny", "limit=10", "benchmark=vqa_rad", "conditions=original,blank")
    assert done.returncode == 0, done.stderr
    assert "visual reliance" in done.stdout and "(10 questions)" in done.stdout.splitlines()[-1]
    folder = warm_home / "smoke" / "results" / "synthetic" / "tiny"
    assert json.loads((folder / "image_ablation.json").read_text())["verdict"] == done.stdout.splitlines()[-1]
    assert len((folder / "image_ablation.jsonl").read_text().splitlines()) == 10
    says(run("ablate", "smoke", "model=tiny", "conditions=inverted"), "No condition inverted")
    says(run("ablate", "smoke", "model=tiny", "rule=kind"), "No rule 'kind'")


def test_two_models_on_the_command_line(answered, warm_tiny, tmp_path):
    "Answers by hand against those of the embedded model: a line a set and one for the average."
    copy = tmp_path / "copy"
    shutil.copytree(warm_tiny, copy)
    done = run("evaluate", "smoke", *ASKED, f"model={copy}")
    assert done.returncode == 0 and "macro average" in done.stdout, done.stderr
    done = run("compare", "smoke", *ASKED, "model=tiny", f"with={copy}")
    assert done.returncode == 0 and f"{copy} - tiny, percentage points, rule regrade" in done.stdout, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["slake_closed", "vqa_rad_closed", "macro"]
    says(run("compare", "smoke", *ASKED, "model=tiny", "with=nobody"), "nobody has no stored evaluation", "./reproduce.sh evaluate smoke model=nobody")


def test_parity_on_the_command_line(warm_home):
    words = ["compare", "smoke", "model=tiny", "benchmark=pmc_vqa", "limit=12", "batch_size=12"]
    done = run(*words, "--", "batch_size=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(TOO_FEW) and "12 questions" in done.stdout.splitlines()[-1]
    record = json.loads((warm_home / "smoke" / "results" / "synthetic" / "tiny" / "engine_agreement.json").read_text())
    assert record["unit"] == "token" and record["n"] == 12

    two = warm_home / "smoke" / record["sides"][1]["pmc_vqa"]
    from_disk = run(*words, "--", f"folder={two}")
    assert from_disk.returncode == 0 and from_disk.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    says(run(*words, "--", f"folder={warm_home / 'smoke' / 'rollouts'}"), "holds 2 greedy rollouts", "name one of them")
    says(run(*words, "--", "batch_size=12"), "one and the same rollout")
    says(run(*words, "--", "max_tokens=39"), "give max_tokens once")
    says(run("compare", "smoke", "model=tiny", "benchmark=pmc_vqa", "limit=11", "batch_size=12", "--", f"folder={two}"), "no greedy rollout of these questions")
    says(run(*words), "two settings with -- between them")
    victim = two / "rollout.jsonl"
    victim.write_bytes(victim.read_bytes()[:-9])
    says(run(*words, "--", f"folder={two}"), victim.name, "missing or damaged")


def test_a_recipe_of_ones_own_can_be_merged(home, tmp_path):
    "The file that extend= names is read before the recipe is looked for, as in training."
    own = tmp_path / "mine.py"
    own.write_text("from dataclasses import replace\nfrom medvlthinker.training.recipe import RECIPES\n"
                   "RECIPES['tiny-SFT_mine'] = replace(RECIPES['tiny-SFT_PMC'], name='tiny-SFT_mine')\n")
    says(call("merge", "smoke", "recipe=tiny-SFT_mine"), "No recipe 'tiny-SFT_mine'")
    says(call("merge", "smoke", "recipe=tiny-SFT_mine", f"extend={own}"), "tiny-SFT_mine.training")
