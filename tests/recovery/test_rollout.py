"""A rollout survives SIGKILL, a second process, damage and a full disk: the same bytes as without,
no question lost, none asked twice."""
import contextlib
import json
import multiprocessing
import random
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from medvlthinker.core.files import UserError
from medvlthinker.data import prompt, synthetic
from medvlthinker.generation.engine import FunctionEngine, TransformersEngine, open_engine
from medvlthinker.generation.request import Completion, EngineSettings, Hardware, Sampling
from medvlthinker.generation.rollout import (
    Job, RolloutConfig, from_line, generate, generate_all, load_rollout, rollout_config, to_line)
from medvlthinker.generation.tiny_model import make_tiny_model
from rollout_files import contents, whole_lines

GREEDY, SAMPLED = Sampling(max_tokens=16), Sampling(n=2, temperature=1.0, max_tokens=16, seed=5)
JOBS = {"pmc_vqa": GREEDY, "slake_closed": SAMPLED}  # of one run
SIZE = 8  # questions in a batch


def sets(limit: int = 16) -> dict:
    return {name: synthetic.benchmark(name, limit) for name in JOBS}


def act(model: str, folder: Path, names: list[str], log: Path) -> None:
    "Rollouts by the real engine, as a process of its own; its log also says what was computed."
    import torch

    torch.set_num_threads(1)
    compute, out = TransformersEngine._answer, open(log, "a", buffering=1)

    def noted(engine, batch):
        print(json.dumps([batch[0].sample.dataset_name, [r.index for r in batch]]), file=out)
        time.sleep(0.1)  # on a fast machine too a kill finds it at work
        return compute(engine, batch)

    TransformersEngine._answer = noted
    jobs = [Job(sets()[name], JOBS[name], folder / name) for name in names]
    engine = open_engine(EngineSettings(model=model, batch_size=SIZE))
    generate_all(jobs, engine, lambda line: print(line, file=out))


def computed(log: Path) -> list:
    "Set and places of each batch that was computed."
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("[")]


@pytest.fixture(scope="module")
def start(blank):
    "Starts `act` in a process that has torch and the model's classes imported already."
    context = multiprocessing.get_context("forkserver")
    qwen, auto = "transformers.models.qwen2_5_vl", "transformers.models.auto"
    context.set_forkserver_preload([
        "torch", f"{qwen}.modeling_qwen2_5_vl", f"{qwen}.processing_qwen2_5_vl",
        f"{auto}.modeling_auto", f"{auto}.processing_auto", "medvlthinker.generation.rollout"])

    def start(folder, names=(*JOBS,), log="log"):
        folder.mkdir(exist_ok=True)
        given = (str(blank), folder, list(names), folder / log)
        process = context.Process(target=act, args=given)
        process.start()
        return process

    return start


def ended(process) -> None:
    process.join(300)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> dict[str, bytes]:
    "Both rollouts of a run that nobody disturbed."
    ended(start(folder := tmp_path_factory.mktemp("whole")))
    return contents(folder)


# ---- killed ----


def test_killed_at_ten_moments(start, whole, tmp_path):
    "A greedy and a sampled set in one stream; what was whole at the kill is not computed again."
    every = Counter(line for data in whole.values() for line in data.splitlines(True))
    rng, half = random.Random(20), 0
    for trial in range(10):
        process = start(folder := tmp_path / f"{trial}")
        wanted = rng.randrange(1, every.total())
        while process.is_alive() and whole_lines(folder).total() < wanted:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.1))  # at any moment from there on
        process.kill()
        process.join()
        before, batches = whole_lines(folder), len(computed(folder / "log"))
        assert before <= every, "what is there is right, and there once"
        half += 0 < before.total() < every.total()
        ended(start(folder))
        assert contents(folder) == whole
        assert not list(folder.rglob("*.part")), "nothing half-written is left"
        stored = {(row["dataset_name"], row["index"]) for row in map(from_line, before)}
        for name, places in computed(folder / "log")[batches:]:
            assert not {(name, i) for i in places} <= stored, "this batch was whole"
    assert half >= 4, f"only {half} of ten kills met a half-finished rollout"


def test_cut_at_any_byte(tmp_path):
    "Whatever length of the file a kill leaves, only what is missing is asked."
    samples, asked = sets(4)["pmc_vqa"], []
    rollout = generate(samples, counting(asked), Sampling(n=2), tmp_path, quiet)
    whole, record = rollout.path.read_bytes(), rollout.folder / "rollout.json"
    unfinished = json.loads(record.read_text())
    del unfinished["finished"]
    for size in range(0, len(whole) + 1, 29):
        rollout.path.write_bytes(whole[:size])
        record.write_text(json.dumps(unfinished))
        asked.clear()
        generate(samples, counting(asked), Sampling(n=2), tmp_path, quiet)
        assert rollout.path.read_bytes() == whole
        assert asked == [*range(whole[:size].count(b"\n"), 4)], size


# ---- two at once ----


@pytest.mark.parametrize("orders", [(["pmc_vqa"], ["pmc_vqa"]),
                                    (["pmc_vqa", "slake_closed"], ["slake_closed", "pmc_vqa"])])
def test_two_processes_on_the_same_rollouts(start, whole, tmp_path, orders):
    "Each takes what is free and waits holding nothing; nothing is computed twice."
    both = [start(tmp_path, names=names, log=log) for log, names in zip(("one", "two"), orders)]
    [ended(process) for process in both]
    assert contents(tmp_path) == {
        name: data for name, data in whole.items() if name.partition("/")[0] in orders[0]}
    batches = [json.dumps(batch) for log in ("one", "two") for batch in computed(tmp_path / log)]
    assert len(batches) == len({*batches}) == 2 * len(orders[0])
    texts = [(tmp_path / log).read_text() for log in ("one", "two")]
    waits = sum(text.count("Another process is working in") for text in texts)
    assert waits == 1 or len(orders[0]) == 2, "who waits says so in one sentence"


# ---- damaged ----


def quiet(line: str) -> None: ...


def counting(asked: list, **keys) -> FunctionEngine:
    "An engine that answers at once, and notes what it was asked."
    def answer(request):
        asked.append(request.index)
        text = f"<think> {request.seed} </think>\n<answer> B </answer>"
        return [Completion(text, "stop", 9)] * request.sampling.n

    return FunctionEngine(answer, **keys)


@pytest.fixture
def answered(tmp_path):
    "A rollout of eight questions, its record, and what asks for it again: the rollout, and what was asked."
    def ask():
        asked = []
        return generate(sets(8)["pmc_vqa"], counting(asked), GREEDY, tmp_path, quiet), asked

    rollout, _ = ask()
    return rollout, rollout.folder / "rollout.json", ask


DAMAGES = {  # what a disk, a copy that broke off or an editor does to a file; which lines it costs
    "a flipped byte": (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], {7}),
    "a flipped end of a line": (lambda data: data.replace(b"\n", b"\x0b", 1), {0, 1}),
    "a page in the middle zeroes": (lambda data: data[:300] + bytes(90) + data[390:], {1, 2}),
    "gone": (lambda data: None, {*range(8)}),
    "a line twice": (lambda data: data + data[:data.index(b"\n") + 1], {}),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("harm, lost", DAMAGES.values(), ids=DAMAGES)
def test_damaged_lines_are_asked_again(answered, harm, lost, state):
    "Only those, and the bytes are as before."
    rollout, record, ask = answered
    whole = rollout.path.read_bytes()
    rollout.path.unlink()
    if (data := harm(whole)) is not None:
        rollout.path.write_bytes(data)
    if state == "unfinished":
        known = json.loads(record.read_text())
        del known["finished"]
        record.write_text(json.dumps(known))
    assert not lost or reads_wrong(rollout.folder)
    again, asked = ask()
    assert (again.path.read_bytes(), {*asked}) == (whole, {*lost})


def reads_wrong(folder: Path) -> bool:
    "Does whoever reads it get a sentence?"
    with contextlib.suppress(UserError):
        return not list(load_rollout(folder))
    return True


def test_answers_of_another_rollout_are_no_answers(answered):
    "Sound lines, as many and as long as those that were recorded: a number of theirs is never shown."
    rollout, _, _ = answered
    others = []
    for row, sample in zip(rollout, sets(8)["pmc_vqa"], strict=True):
        text = row["completions"][0]["text"].replace(" B ", " A ")
        others.append(to_line(row["index"], sample, [Completion(text, "stop", 9)]))
    assert len(data := b"".join(others)) == rollout.record["bytes"]
    rollout.path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged, or another's"):
        load_rollout(rollout.folder)


@pytest.mark.parametrize("text", ["{", '{"format": 1}'])
def test_a_damaged_record_costs_no_answers(answered, text):
    rollout, record, ask = answered
    record.write_text(text)
    with pytest.raises(UserError, match="rollout.json cannot be read"):
        load_rollout(rollout.folder)
    assert ask() == (rollout, []) and load_rollout(rollout.folder).record["rows"] == 8


# ---- a full disk ----


def test_a_tiny_model_for_which_there_is_no_room_is_a_sentence(small_disk):
    with small_disk("1500k") as disk, pytest.raises(UserError, match="No space"):
        make_tiny_model(disk / "tiny", steps=0, show=quiet)


@pytest.mark.parametrize("room", [24_000, 40_000], ids=["for some lines", "for all lines, once"])
def test_a_full_disk_keeps_what_was_finished(small_disk, tmp_path, room):
    "One sentence; whole lines stay, and with room again only the others are asked."
    samples, asked = synthetic.benchmark("pmc_vqa", 200), []
    with small_disk("300k") as disk:
        (ballast := disk / "ballast").write_bytes(b"x" * (300_000 - room))
        with pytest.raises(UserError, match=f"^{disk / 'run'}.* cannot be written .No space left on "
                                            "device.; what was finished before is kept"):
            generate(samples, counting(asked), GREEDY, disk / "run", quiet)
        kept = whole_lines(disk / "run")
        assert 50 < kept.total() <= 200
        ballast.unlink()
        asked.clear()
        generate(samples, counting(asked), GREEDY, disk / "run", quiet)
        assert len(asked) == 200 - kept.total()
        generate(samples, counting([]), GREEDY, tmp_path / "elsewhere", quiet)
        assert contents(disk / "run") == contents(tmp_path / "elsewhere")


# ---- another rollout ----


def test_every_key_that_differs_is_another_rollout():
    config = rollout_config(sets(4)["pmc_vqa"], counting([]), GREEDY)
    changed = [replace(config, **{field.name: 7 if field.type in (int, float, "int", "float")
                                  else "other"}) for field in fields(RolloutConfig)]
    assert len({each.fingerprint for each in (config, *changed)}) == 1 + len(fields(RolloutConfig))


def test_an_edited_instruction_of_ones_own_is_asked_again(tmp_path, monkeypatch):
    for text in ("Answer with a letter.", "Answer with a word."):
        monkeypatch.setitem(prompt.INSTRUCTIONS, "mine", text)
        (engine := counting(asked := [])).instruction = "mine"
        generate(sets(4)["pmc_vqa"], engine, GREEDY, tmp_path, quiet)
        assert len(asked) == 4, text


SETTINGS = {"batch_size": 9, "dtype": "bfloat16", "max_model_len": 100, "max_pixels": 5000,
            "instruction": "newline"}
OTHERWISE = {"gpus", "nodes", "tensor_parallel", "data_parallel", "gpu_memory_utilization",
             "base_url", "concurrency", "request_timeout", "max_requests", "max_total_tokens",
             "ray_address"}  # where and how fast, not what


def test_what_an_engine_is_told_is_in_the_config(blank):
    "Each setting either makes another rollout, or is known to decide nothing."
    plain = EngineSettings(model=str(blank))
    samples = sets(2)["pmc_vqa"]
    config = rollout_config(samples, open_engine(plain), GREEDY)
    for key, value in SETTINGS.items():
        other = open_engine(replace(plain, **{key: value}))
        assert rollout_config(samples, other, GREEDY) != config, key
    assert {field.name for field in fields(Hardware)} == SETTINGS.keys() | OTHERWISE | {"engine"}
    ray, vllm = (open_engine(replace(plain, engine=name)) for name in ("ray", "vllm"))
    assert rollout_config(samples, ray, GREEDY) == rollout_config(samples, vllm, GREEDY) != config


# ---- questions that failed ----


def test_what_failed_is_asked_again_and_alone(tmp_path):
    "A question that a server failed on has its seed again, and its engine is told so."
    samples, seen, broken = sets(6)["pmc_vqa"], [], {2, 4}

    def answer(request):
        seen.append((request.index, request.retry, request.seed))
        if request.index in broken:
            return [Completion("", "failed", 0, "error 500")]
        return [Completion(f"{request.seed}", "stop", 1)]

    first = generate(samples, FunctionEngine(answer), GREEDY, tmp_path, quiet)
    assert first.record["failed"] == 2 and first[2]["completions"][0]["error"] == "error 500"
    seeds = {index: seed for index, _, seed in seen}
    seen.clear()
    broken.clear()
    again = generate(samples, FunctionEngine(answer), GREEDY, tmp_path, quiet)
    assert seen == [(2, True, seeds[2]), (4, True, seeds[4])]
    assert again.record["failed"] == 0 and len(again) == 6


def test_a_set_is_finished_with_its_last_answer(tmp_path):
    "A kill in the third set finds the first two finished."
    names = {name: Job(synthetic.benchmark(name, 3), GREEDY, tmp_path / name)
             for name in ("pmc_vqa", "slake_closed", "vqa_rad_closed")}

    def answer(request):
        if request.rollout == 2 and request.index:
            raise KeyboardInterrupt
        return [Completion("B", "stop", 1)]

    with pytest.raises(KeyboardInterrupt):
        generate_all(names.values(), FunctionEngine(answer), quiet)
    done = [len(load_rollout(path.parent)) for name in [*names][:2]
            for path in (tmp_path / name).glob("*/rollout.json")]
    assert done == [3, 3] and whole_lines(tmp_path / "vqa_rad_closed").total() == 1
