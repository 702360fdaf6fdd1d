"""Four ways to the same rows, and SIGKILL of whoever works on them: the driver, vLLM's own process, a worker of Ray."""
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from medvlthinker.data import synthetic
from medvlthinker.generation.request import Sampling
from medvlthinker.difficulty.profile import load_profile
from medvlthinker.generation.engine import answering, engine_version, open_engine
from medvlthinker.generation.rollout import identity, read_shard, generate

pytestmark = pytest.mark.heavy
MOMENTS = int(os.environ.get("MEDVLTHINKER_KILLS", "2"))  # random moments of each kill; CI is short of time, ten take about ten minutes


def need(module: str) -> None:
    if not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed; ./reproduce.sh test all installs it")


def shards(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("shard-*"))}


def texts(folder) -> dict:
    "Question -> text and how it ended, of every shard below a folder."
    return {(row["dataset_name"], row["dataset_index"]): (row["completions"][0]["text"], row["completions"][0]["finish_reason"])
            for path in Path(folder).rglob("shard-*") for row in read_shard(path)[1]}


# --- real processes, quickly ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def processes():
    "Processes that begin with vLLM imported."
    need("vllm")
    need("ray")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker",
                                    "vllm.model_executor.models.qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl", "medvlthinker.generation.rollout"])
    return context


def act(folder, main, *given) -> None:
    "In a process group of its own, a command with its output in `folder`/log; the exit code is that of the command line."
    import medvlthinker.core.commands
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    os.setsid()
    Path(folder).mkdir(parents=True, exist_ok=True)
    log = os.open(Path(folder) / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):  # vLLM's processes begin as copies of this one, so that a start takes seconds, and ten of them are affordable
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    medvlthinker.core.commands.run_main(lambda _: main(folder, *given))


def ask(home, *words: str) -> None:
    "What `python -m medvlthinker.generation.rollout smoke model=tiny WORDS` does, with a home of its own."
    from medvlthinker.generation.rollout import main

    os.environ["MEDVLTHINKER_HOME"] = str(home)
    main(["smoke", *(["model=tiny"] if not any(word.startswith("model=") for word in words) else []), *words])


def ended(process, folder) -> tuple[int, str]:
    "Start a process, wait for it, and return its exit code and log."
    process.start()
    process.join()
    return process.exitcode, (Path(folder) / "log").read_text(errors="replace")


# --- the same rows, whoever answers ---------------------------------------------------------------------------------------

RUNS = {
    "transformers": ["engine=transformers"],
    "vllm": ["engine=vllm"],
    "vllm-copies": ["engine=vllm", "data_parallel=2"],
    "ray-vllm": ["engine=ray", "ray_engine=vllm"],
    "ray-transformers": ["engine=ray", "ray_engine=transformers", "data_parallel=2"],
}


@pytest.fixture(scope="module")
def answered(processes, warm_tiny, tmp_path_factory):
    "What each engine answers to the six miniature benchmarks, 40 questions each, greedy, in float32: name -> folder."
    folders = {}
    for name, words in RUNS.items():
        home = folders[name] = tmp_path_factory.mktemp(name)
        shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
        code, log = ended(processes.Process(target=act, args=(home, ask, "limit=40", *words)), home)
        assert code == 0, (name, log[-3000:])
        assert log.count("40 questions, 40 completions") == 6
    return folders


@pytest.mark.parametrize("other", ["vllm-copies", "ray-vllm"])
def test_vllm_however_it_is_run(answered, other):
    "One process, two copies and a cluster: every greedy answer is the same, row by row."
    assert len(texts(answered["vllm"])) == 240
    assert texts(answered[other]) == texts(answered["vllm"])


def test_a_cluster_of_transformers(answered):
    "Two workers write the same bytes as one process: there a shard is a batch, and a batch is the same everywhere."
    assert shards(answered["ray-transformers"]) == shards(answered["transformers"])


def test_vllm_agrees_with_transformers(answered):
    "Both in float32: at least 99 % of the texts are equal."
    mine, theirs = texts(answered["vllm"]), texts(answered["transformers"])
    different = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
    assert len(different) <= 2, different


# --- killed ---------------------------------------------------------------------------------------------------------------

PROFILE = load_profile("smoke", engine="vllm")


def roll(folder, model: str, profile) -> None:
    "One rollout of 768 questions, greedy."
    samples = [sample for name in ("pmc_vqa", "slake_closed") for sample in synthetic.benchmark(name, 384)]
    who = identity(samples, model, profile, Sampling(max_tokens=40))
    generate(samples, lambda: open_engine(profile, model), Path(folder), who, engine_version(answering(profile)))


def below(pid: int) -> list[int]:
    "The processes that a process has started, and theirs."
    children = [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]
    return [found for child in children for found in (child, *below(child))]


def bystander(pid: int) -> bool:
    "Our own guard, and Python's tracker of shared memory: neither answers questions."
    words = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b"getppid"
    return b"getppid" in words or b"resource_tracker" in words


def end(process) -> None:
    "Kill what is left of a process group, and wait until its shards are free."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join()


@pytest.fixture(scope="module")
def undisturbed(processes, warm_tiny, tmp_path_factory):
    "The bytes of a rollout that nobody killed, and how long it took."
    folder = tmp_path_factory.mktemp("whole")
    processes.Process(target=print).start()  # pays for the imports
    began = time.monotonic()
    code, log = ended(processes.Process(target=act, args=(folder, roll, str(warm_tiny), PROFILE)), folder)
    seconds = time.monotonic() - began
    assert code == 0, log[-3000:]
    assert len(shards(folder)) == 6
    return shards(folder), seconds


@pytest.mark.parametrize("victim", ["driver", "vllm"])
def test_killed_at_random_moments(processes, undisturbed, warm_tiny, tmp_path, victim, tally):
    "The same rollout is killed again and again, each time at another moment, until it is whole: the bytes are those of one that nobody killed."
    expected, seconds = undisturbed
    rng, kills, met_half, runs = random.Random(7), 0, 0, 0
    with tally("faults", "SIGKILL of the driver of a rollout by vLLM" if victim == "driver" else "SIGKILL of an engine process of vLLM", seed=7) as count:
        while kills < MOMENTS:
            folder, runs = tmp_path / f"{runs}", runs + 1
            while True:  # until one start goes through
                (process := processes.Process(target=act, args=(folder, roll, str(warm_tiny), PROFILE))).start()
                there = len(shards(folder))
                while kills % 2 and kills < MOMENTS and process.is_alive() and len(shards(folder)) == there:  # every other one falls when something has been stored, the others at any time
                    process.join(0.02)
                if kills < MOMENTS:
                    process.join(rng.uniform(0, 1) * (0.5 if kills % 2 else seconds))
                if kills == MOMENTS or not process.is_alive():
                    break
                prey = [process.pid] if victim == "driver" else [each for each in below(process.pid) if not bystander(each)]
                if prey:
                    os.kill(rng.choice(prey), signal.SIGKILL)
                    kills = count.tried = kills + 1
                    met_half += 0 < len(shards(folder)) < len(expected)
                process.join(120)
                assert not process.is_alive(), "whoever loses its engine ends, and does not hang"
                if victim == "vllm" and prey:
                    assert process.exitcode == 2 or shards(folder) == expected, process.exitcode  # killed when all was done, it is missed by nobody
                    assert process.exitcode == 0 or "what is finished is kept" in (log := (folder / "log").read_text()) or "cannot be loaded" in log, log[-2000:]
                end(process)
                assert shards(folder).items() <= expected.items(), "a shard that is there is whole and right"
            process.join()
            assert process.exitcode == 0
            assert shards(folder) == expected
            assert not list(folder.glob(".*.part")), "nothing half-written is left behind"
            count.survived = kills
    print(f"{kills} kills of the {victim}, {met_half} of them with some shards there and some not")


def test_a_worker_of_ray_killed_at_random_moments(processes, warm_tiny, tmp_path, tally):
    "Ray starts a worker again and asks it anew, so that the run goes on by itself: the bytes are those of one process without Ray."
    plain = load_profile("smoke", batch_size=16)
    (process := processes.Process(target=act, args=(tmp_path / "whole", roll, str(warm_tiny), plain))).start()
    process.join()
    expected, rng, kills, runs = shards(tmp_path / "whole"), random.Random(8), 0, 0
    assert len(expected) == 48

    def workers(pid):
        return [each for each in below(pid) if b"_Worker" in Path(f"/proc/{each}/cmdline").read_bytes()]

    with tally("faults", "SIGKILL of a worker of Ray", seed=8) as count:
        while kills < MOMENTS:
            folder, runs = tmp_path / f"{runs}", runs + 1
            (process := processes.Process(target=act, args=(folder, roll, str(warm_tiny), load_profile("smoke", batch_size=16, engine="ray", ray_engine="transformers")))).start()
            there = 0
            while process.is_alive() and kills < MOMENTS:
                if kills % 2 == 0 and len(shards(folder)) == there:  # every other one falls when the worker has given something, the others at any time, most while they start
                    process.join(0.05)
                    continue
                process.join(rng.uniform(0.1, 2 if kills % 2 == 0 else 10))
                if prey := workers(process.pid):
                    os.kill(rng.choice(prey), signal.SIGKILL)
                    kills, there = kills + 1, len(shards(folder))
                    count.tried = kills
            process.join(300)
            assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
            assert shards(folder) == expected
            end(process)
            count.survived = kills


# --- what a user may get wrong --------------------------------------------------------------------------------------------

def test_mistakes_are_sentences(processes, warm_tiny, tmp_path):
    "A folder that is no model, a context too short for the images, weights that do not fit their configuration: a sentence at the end, and exit code 2."
    home = tmp_path / "home"
    shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
    (tmp_path / "empty").mkdir()
    shutil.copytree(warm_tiny, other := tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    for words, part in (([f"model={tmp_path / 'empty'}", "engine=vllm"], "holds no config.json"), (["max_model_len=60", "engine=vllm"], "max_model_len"),
                        (["max_model_len=60", "engine=transformers"], "max_model_len"), ([f"model={other}", "engine=vllm"], "cannot be loaded"),
                        (["engine=ray", "ray_address=127.0.0.1:9"], "There is no Ray cluster at ray_address=127.0.0.1:9")):
        (home / "log").unlink(missing_ok=True)
        code, log = ended(processes.Process(target=act, args=(home, ask, "limit=4", *words)), home)
        ours = [line for line in log.splitlines() if line.startswith("medvlthinker: ")]
        assert code == 2 and len(ours) == 1 and part in ours[0], (words, log[-3000:])
