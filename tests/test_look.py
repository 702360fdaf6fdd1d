"""Whether a model looks, and whether two runs may be compared: planted models and planted flips are told apart."""
import functools
import json
import random
import shutil

import pytest
import warm
from conftest import ROOT, says
from medvlthinker.evaluation import look, parity
from medvlthinker.data import synthetic
from medvlthinker.core.files import UserError
from medvlthinker.difficulty.profile import load_profile
from medvlthinker.data.prompt import messages
from medvlthinker.data.sample import Sample


command = functools.partial(warm.run, cwd=ROOT)


@pytest.fixture
def blind_tiny(warm_home):
    "The embedded model with the last layer of its vision tower's merger set to zero: every image is the same to it."
    from safetensors.torch import load_file, save_file

    folder = warm_home / "smoke" / "checkpoints" / "blind"
    shutil.copytree(warm_home / "smoke" / "checkpoints" / "tiny", folder)
    weights = load_file(folder / "model.safetensors")
    last = [name for name in weights if ".merger.mlp.2." in name]
    assert len(last) == 2 and all(weights[name].any() for name in last)
    save_file({name: weight * (name not in last) for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return "blind"


def test_it_tells_who_reads_from_who_does_not(warm_home, blind_tiny):
    profile = load_profile("smoke", limit=40, benchmark="pmc_vqa, pathvqa")
    reads, blind = (look.looks(profile, model, ("blank", "other"), show=lambda line: None) for model in ("tiny", blind_tiny))

    assert reads["verdict"].startswith("tiny reads the image")
    for measure in ("visual reliance", "image sensitivity"):
        for name in ("macro", "pmc_vqa", "pathvqa_closed"):
            assert reads["measures"][measure][name][1] > 0, (measure, name)
            value, low, high = blind["measures"][measure][name]
            assert value == 0 and low < 0 < high
    assert "is not shown" in blind["verdict"]

    lines = {model: [json.loads(line) for line in (look.results_folder(profile, model) / "look.jsonl").open()] for model in ("tiny", "blind")}
    for view in ("blank", "other"):
        assert all(line["real_answer"] == line[f"{view}_answer"] for line in lines["blind"]), "not one answer changes"
        assert sum(line["real_answer"] != line[f"{view}_answer"] for line in lines["tiny"]) > 20
        assert blind["measures"][f"unchanged: {view}"]["macro"][0] == 1 and reads["measures"][f"unchanged: {view}"]["macro"][2] < 0.9
    assert any(line["real_answer"] for line in lines["blind"]), "it answers, and is not merely silent"

    done = {path: path.stat().st_mtime_ns for path in warm_home.glob("smoke/rollouts/**/shard-*")}
    again = look.looks(profile, "tiny", ("blank", "other"), show=lambda line: None)
    assert again == reads and done == {path: path.stat().st_mtime_ns for path in warm_home.glob("smoke/rollouts/**/shard-*")}, "nothing is asked twice"


@pytest.mark.parametrize("name", synthetic.BENCHMARKS)
def test_views_change_one_thing(name):
    samples = synthetic.benchmark(name, 60)
    for view, change in look.VIEWS.items():
        changed = change(samples, seed=3)
        assert changed == change(samples, seed=3)
        assert [s.dataset_index for s in changed] == [s.dataset_index for s in samples] and all(s.options[s.answer_label] == s.answer for s in changed)
        for old, new in zip(samples, changed):
            same = {key for key in ("question", "options", "answer_label", "answer", "images") if getattr(old, key) == getattr(new, key)}
            wanted = {"real": set(), "permuted": {"options", "answer_label"}}.get(view, {"images"})
            assert {"question", "options", "answer_label", "answer", "images"} - same in (wanted, wanted - {"answer_label"})
            assert [p.size for p in new.pictures()] == ([] if view == "none" else [p.size for p in old.pictures()])
            messages(new)
    assert samples == synthetic.benchmark(name, 60), "and none changes what it was given"


def test_nobody_gets_a_picture_of_the_own_family():
    for seed in range(300):
        rng = random.Random(seed)
        pool = [bytes([i]) for i in range(rng.randint(2, 9))]
        samples = [Sample("?", {"A": "1", "B": "2"}, "A", "1", tuple(rng.sample(pool, rng.randint(1, 2))), dataset_name="toy", dataset_index=i) for i in range(rng.randint(2, 25))]
        try:
            changed = look.other(samples, seed)
        except UserError:
            assert len(set(look._families(samples))) == 1
            continue
        assert len(changed) == len(samples)
        assert not any(set(old.images) & set(new.images) for old, new in zip(samples, changed))
        sizes = {n: [i for i, s in enumerate(samples) if len(s.images) == n] for n in (1, 2)}
        family = look._families(samples)
        if all(2 * max(map([family[i] for i in row].count, [family[i] for i in row])) <= len(row) for row in sizes.values() if row):
            assert sorted(s.images for s in changed) == sorted(s.images for s in samples), "each picture is shown as often as before"


def test_look_on_the_command_line(warm_home):
    done = command("-m", "medvlthinker.evaluation.look", "smoke", "model=tiny", "limit=10", "benchmark=vqa_rad", "views=real,blank")
    assert done.returncode == 0, done.stderr
    assert "visual reliance" in done.stdout and "10 questions" in done.stdout.splitlines()[-1]
    says(command("-m", "medvlthinker.evaluation.look", "smoke", "model=tiny", "views=inverted"), "No view inverted")
    says(command("-m", "medvlthinker.evaluation.look", "smoke", "model=tiny", "rule=kind"), "No rule 'kind'")


def rows(texts):
    return [{"dataset_name": "toy", "dataset_index": i, "completions": [{"text": text, "finish_reason": "stop", "tokens": 5}]} for i, text in enumerate(texts)]


def planted(n, lost=0.0, gained=0.0):
    "A record of n questions of which shares flip from right to wrong and back."
    samples = [Sample(f"Question {i}", {"A": "left", "B": "right"}, "A", "left", dataset_name="toy", dataset_index=i) for i in range(n)]
    first = ["<answer>A</answer>" if i % 2 else "<answer>B</answer>" for i in range(n)]
    flipping = {*range(1, 2 * round(lost * n), 2), *range(0, 2 * round(gained * n), 2)}
    second = [("<answer>B</answer>" if i % 2 else "<answer>A</answer>") if i in flipping else text for i, text in enumerate(first)]
    return parity.parity(samples, rows(first), rows(second))[0]


@pytest.mark.parametrize("n, lost, gained, verdict", [
    (600, 0, 0, parity.SAFE), (2000, 0.015, 0.015, parity.SAFE), (1000, 0.03, 0, parity.UNSAFE), (1000, 0, 0.03, parity.UNSAFE),
    (2000, 0.05, 0.05, parity.UNSAFE), (10, 0, 0, parity.TOO_FEW), (10, 0.1, 0, parity.TOO_FEW), (2000, 0.01, 0, parity.TOO_FEW)])
def test_verdicts_on_planted_flips(n, lost, gained, verdict):
    record = planted(n, lost, gained)
    assert record["verdict"] == verdict, record["sentence"]
    assert record["flips"][0] == pytest.approx(lost + gained) and record["difference"][0] == pytest.approx(lost - gained)
    for value, low, high in (record["flips"], record["difference"], record["equal texts"]):
        assert low <= value <= high and high > low


def test_questions_of_one_image_count_less():
    "Flips that come in heaps, all questions of an image at once, leave more doubt."
    lines = [{"first_correct": True, "second_correct": i >= 20, "first_label": "A", "second_label": "A" if i >= 20 else "B", "equal": i >= 20, "at": None if i >= 20 else 0} for i in range(1000)]
    alone, heaped = (parity.counted([line | {"image": str(i // size)} for i, line in enumerate(lines)]) for size in (1, 10))
    for name in ("flips", "difference"):
        assert heaped[name][2] - heaped[name][1] > 1.5 * (alone[name][2] - alone[name][1])


def test_parity_on_the_command_line(warm_home):
    words = ["-m", "medvlthinker.evaluation.parity", "smoke", "model=tiny", "benchmark=pmc_vqa", "limit=12", "batch_size=12"]
    done = command(*words, "--", "batch_size=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(parity.TOO_FEW) and "12 questions" in done.stdout.splitlines()[-1]
    record = json.loads((warm_home / "smoke" / "results" / "synthetic" / "tiny" / "parity.json").read_text())
    assert record["unit"] == "token" and record["n"] == 12

    two = warm_home / "smoke" / record["sides"][1][0]
    from_disk = command(*words, "--", f"folder={two}")
    assert from_disk.returncode == 0 and from_disk.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    says(command(*words, "--", f"folder={warm_home / 'smoke' / 'rollouts'}"), "holds 2 greedy rollouts", "name one of them")
    says(command(*words, "--", "batch_size=12"), "one and the same rollout")
    says(command(*words, "--", "max_tokens=39"), "give max_tokens once")
    says(command(*words[:-2], "limit=11", "batch_size=12", "--", f"folder={two}"), "no greedy rollout of these questions")
    says(command(*words), "parted by one --")
    victim = next(two.glob("shard-*"))
    victim.write_bytes(victim.read_bytes()[:-9])
    says(command(*words, "--", f"folder={two}"), victim.name, "missing or damaged")
