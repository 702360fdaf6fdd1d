"""Four ways to the same rows, and SIGKILL of whoever works on them: the driver, a worker of vLLM, a
worker of Ray."""
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from medvlthinker.data import synthetic
from medvlthinker.generation import engine as engines
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import Job, from_line, generate_all, load_rollout
from rollout_files import command, contents, descendants, still_there, whole_lines

pytestmark = pytest.mark.heavy
MOMENTS = int(os.environ.get("MEDVLTHINKER_KILLS", "1"))  # CI is short of time; ten take an hour


# ---- real processes, quickly ----


@pytest.fixture(scope="module")
def processes():
    "Processes that begin with vLLM imported."
    for module in ("vllm", "ray"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed; ./reproduce.sh setup full installs it")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.qwen2_5_vl", "medvlthinker.generation.rollout",
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl"])
    return context


def act(folder: Path, main, *given) -> None:
    "A command whose output is `folder`/log; the exit code is that of the command line."
    from medvlthinker.core.commands import run_main

    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OPENAI_API_KEY": "sk-of-nobody"}
    run_main(lambda _: main(folder, *given))


def ask(home: Path, *words: str) -> None:
    "What `medvlthinker rollout smoke WORDS` does, with a home of its own."
    from medvlthinker.app.commands import rollout

    os.environ["MEDVLTHINKER_HOME"] = str(home)
    rollout(["smoke", *words])


def ended(process, folder: Path) -> tuple[int, str]:
    "Start a process, wait for it, and return its exit code and log."
    process.start()
    process.join()
    return process.exitcode, (folder / "log").read_text(errors="replace")


# ---- the same rows, whoever answers ----


RUNS = {
    "transformers": ["engine=transformers"],
    "vllm": ["engine=vllm"],
    "vllm, two copies": ["engine=vllm", "data_parallel=2"],
    "vllm, served": ["engine=openai"],
}


@pytest.fixture(scope="module")
def answered(processes, warm_tiny, vllm_server, tmp_path_factory):
    "What each engine answers to the six miniature sets, 40 questions each, greedy, in float32."
    homes = {}
    for name, words in RUNS.items():
        home = homes[name] = tmp_path_factory.mktemp(name.replace(", ", "-").replace(" ", "-"))
        shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
        words = ["model=tiny", "limit=40", *words]
        words += [f"base_url={vllm_server}"] if name == "vllm, served" else []
        code, log = ended(processes.Process(target=act, args=(home, ask, *words)), home)
        assert code == 0, (name, log[-3000:])
        assert log.count("40 questions, 40 completions") == 6
    return homes


def rows(home: Path) -> dict:
    "Question -> its completions, of every rollout of a home."
    return {(row["dataset_name"], row["dataset_index"]): row["completions"]
            for path in home.rglob("rollout.json") for row in load_rollout(path.parent)}


@pytest.mark.parametrize("other", ["vllm, two copies", "vllm, served"])
def test_vllm_however_it_is_run(answered, other):
    "In this process, as two copies that Ray runs, behind a server: every row is the same."
    assert len(rows(answered["vllm"])) == 240
    assert rows(answered[other]) == rows(answered["vllm"])


def test_vllm_agrees_with_transformers(answered):
    "At least 99 % of the rows are equal."
    mine, theirs = rows(answered["vllm"]), rows(answered["transformers"])
    different = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
    assert mine.keys() == theirs.keys() and len(different) <= 2, different


# ---- killed ----


VICTIMS = {  # settings; who is killed
    "the driver of a rollout by vLLM": ({"engine": "vllm"}, None),
    "a worker of vLLM": ({"engine": "vllm", "tensor_parallel": 2}, "VLLM::Worker"),
    "the driver of a rollout by Ray": ({"engine": "ray"}, None),
    "a worker of Ray": ({"engine": "ray"}, "_Worker"),
}
SAMPLING = Sampling(n=2, temperature=1.0, max_tokens=40, seed=3)


def roll(folder: Path, model: str, keys: dict) -> None:
    "Two rollouts of 200 questions in one stream."
    if keys.get("tensor_parallel"):  # two workers on the CPU, which share the model as GPUs would
        told = engines.vllm_arguments
        engines.vllm_arguments = lambda *given: told(*given) | {"tensor_parallel_size": 2}
    settings = EngineSettings(model=model, batch_size=16, **keys)
    jobs = [Job(synthetic.benchmark(name, 200), SAMPLING, folder / name)
            for name in ("pmc_vqa", "slake_closed")]
    generate_all(jobs, engines.open_engine(settings))


def prey(process, named: str | None) -> list[int]:
    "Whom to kill."
    if named is None:
        return [process.pid]
    return [pid for pid in descendants(process.pid) if named in command(pid)]


def wait_for_the_moment(process, folder: Path, rng, number: int, seconds: float) -> None:
    "Every other kill falls when something more has been stored, the others at any time."
    before = whole_lines(folder).total()
    while number % 2 and process.is_alive() and whole_lines(folder).total() == before:
        process.join(0.02)
    process.join(rng.uniform(0, 0.5 if number % 2 else seconds))


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_at_random_moments(processes, warm_tiny, tmp_path, victim):
    """Killed and called again until it is whole: the bytes are those of a run that nobody killed.
    Ray starts a worker again, and the run goes on by itself."""
    if MOMENTS < 2 and victim not in ("the driver of a rollout by vLLM", "a worker of Ray"):
        pytest.skip("CI is short of time; with MEDVLTHINKER_KILLS=2 or more all four are killed")
    keys, named = VICTIMS[victim]

    def start(folder, keys=keys):
        process = processes.Process(target=act, args=(folder, roll, str(warm_tiny), keys))
        process.start()
        return process

    plain = {"engine": "vllm"} if "Ray" in victim else keys
    for name in ("imports", "whole"):  # the first pays for the imports
        began = time.monotonic()
        (process := start(tmp_path / name, plain)).join()
        assert process.exitcode == 0, (tmp_path / name / "log").read_text()[-3000:]
    seconds, every = time.monotonic() - began, whole_lines(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    rng, half, kills, runs, slowest, agents = random.Random(7), 0, 0, 0, 0.0, []
    while kills < MOMENTS or process.exitcode != 0:
        folder = tmp_path / f"{runs}"
        process = start(folder)
        while kills < MOMENTS and process.is_alive():
            wait_for_the_moment(process, folder, rng, kills, seconds)
            found, family = prey(process, named), descendants(process.pid)
            if not found or not process.is_alive():
                process.join(0.1)
                continue
            os.kill(rng.choice(found), signal.SIGKILL)
            kills += 1
            half += 0 < whole_lines(folder).total() < every.total()
            if victim != "a worker of Ray":
                process.join(120)
                assert not process.is_alive(), "whoever loses its engine ends"
                began = time.monotonic()
                agents += [pid for pid in family if "agent" in command(pid).lower()]
                assert not (left := still_there([*{*family} - {*agents}])), left
                slowest = max(slowest, time.monotonic() - began)
        process.join(300)
        ends = (0,) if victim == "a worker of Ray" else (0, 2, -9)
        assert process.exitcode in ends, (folder / "log").read_text()[-3000:]
        if process.exitcode == 2:
            said = [line for line in (folder / "log").read_text(errors="replace").splitlines()
                    if line.startswith("medvlthinker: ")]
            assert "kept, run again" in said[-1] or "cannot be loaded" in said[-1], said
        assert whole_lines(folder) <= every, "what is there is right, and there once"
        runs += process.exitcode == 0
        if process.exitcode == 0:
            assert contents(folder) == expected and not list(folder.rglob("*.part"))
    assert not (left := still_there(agents, 120)), left  # Ray's agents take a minute
    print(f"{kills} kills of {victim}, {half} with a part of the lines there; what it had started "
          f"was gone after {slowest:.1f} s at most")


def test_vllm_runs_in_this_process(processes, warm_tiny, tmp_path):
    "There is nobody else who could outlive it, or whom one could kill alone."
    given = (tmp_path / "run", roll, str(warm_tiny), {"engine": "vllm"})
    (process := processes.Process(target=act, args=given)).start()
    looks = Counter()  # a program that is asked something, such as lscpu, has gone at the next look
    while process.is_alive():
        looks.update(words for words in map(command, descendants(process.pid)) if words)
        process.join(0.1)
    lived_on = [words for words, times in looks.items() if times > 10]
    assert process.exitcode == 0 and not [each for each in lived_on if "resource_tracker" not in each]


# ---- what a user may get wrong ----


def test_mistakes_are_sentences(processes, warm_tiny, tmp_path):
    "A sentence at the end, and exit code 2."
    home = tmp_path / "home"
    shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
    (tmp_path / "empty").mkdir()
    shutil.copytree(warm_tiny, other := tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    mistakes = (
        ([f"model={tmp_path / 'empty'}", "engine=vllm"], "holds no config.json"),
        (["max_model_len=60", "engine=vllm"], "max_model_len"),
        (["max_model_len=60", "engine=transformers"], "max_model_len"),
        (["max_model_len=60", "engine=ray"], "max_model_len"),
        ([f"model={other}", "engine=vllm"], "do not fit its config.json"),
        (["engine=ray", "ray_address=127.0.0.1:9"],
         "There is no Ray cluster at ray_address=127.0.0.1:9"),
    )
    for words, part in mistakes:
        (home / "log").unlink(missing_ok=True)
        given = (home, ask, "limit=4", *([] if "model=" in words[0] else ["model=tiny"]), *words)
        code, log = ended(processes.Process(target=act, args=given), home)
        ours = [line for line in log.splitlines() if line.startswith("medvlthinker: ")]
        assert code == 2 and len(ours) == 1 and part in ours[0], (words, log[-3000:])


def test_an_engine_answers_on_after_a_mistake(processes, warm_tiny, tmp_path):
    "A question that is too long ends one stream, and the next one is answered."
    for keys in ({"engine": "vllm"}, {"engine": "ray"}):
        folder = tmp_path / keys["engine"]
        process = processes.Process(target=act, args=(folder, twice, warm_tiny, keys))
        code, log = ended(process, folder)
        assert code == 0 and "refused, then 5 answered" in log, log[-3000:]


def twice(folder: Path, model: Path, keys: dict) -> None:
    from dataclasses import replace

    from medvlthinker.core.files import UserError

    engine = engines.open_engine(EngineSettings(model=str(model), max_model_len=300, **keys))
    samples = synthetic.benchmark("pmc_vqa", 5)
    asked = [Request(sample, i, Sampling(max_tokens=8)) for i, sample in enumerate(samples)]
    long = replace(asked[3].sample, question=asked[3].sample.question + " Why?" * 600)
    try:
        list(engine.answer([*asked[:3], replace(asked[3], sample=long), asked[4]]))
    except UserError as error:
        assert "pmc_vqa/" in str(error), error
        print(f"refused, then {len(list(engine.answer(asked)))} answered")


# ---- what generation_config.json brings along ----


def test_vllm_takes_no_sampling_from_a_model(processes, warm_tiny, tmp_path):
    "Whatever it recommends, the texts are the same."
    given = {"no_repeat_ngram_size": 3, "min_new_tokens": 30, "num_beams": 3, "min_p": 0.9,
             "typical_p": 0.1, "penalty_alpha": 0.6, "top_k": 1, "repetition_penalty": 1.9}
    found = []
    for name, settings in (("plain", {}), ("odd", given)):
        shutil.copytree(warm_tiny, model := tmp_path / name / "model")
        known = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps(known | settings))
        keys = {"engine": "vllm"}
        process = processes.Process(target=act, args=(tmp_path / name, roll, str(model), keys))
        code, log = ended(process, tmp_path / name)
        assert code == 0 and log.count("not applied") == (name == "odd"), log[-3000:]
        found.append([from_line(line)["completions"] for data in contents(tmp_path / name).values()
                      for line in data.splitlines(True)])
    assert found[0] == found[1]
