"""Four ways to the same rows, and SIGKILL of whoever works on them: the driver, a worker of vLLM, a
worker of Ray."""
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import python, succeeded
from medvlthinker.core.files import UserError
from medvlthinker.data import synthetic
from medvlthinker.generation import engine as engines
from medvlthinker.generation.request import Completion, EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import Job, generate_all, load_rollout
from rollout_files import command, contents, descendants, still_there, whole_lines
from test_server import KEY, engine, gather

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


def begin(processes, folder: Path, main, *given):
    process = processes.Process(target=act, args=(folder, main, *given))
    process.start()
    return process


def ended(*given) -> tuple[int, str]:
    "Begin a process and wait for it: its exit code, and its log."
    (process := begin(*given)).join()
    return process.exitcode, (given[1] / "log").read_text(errors="replace")


# ---- the same rows, whoever answers ----


RUNS = {
    "transformers": ["engine=transformers"],
    "vllm": ["engine=vllm"],
    "vllm, two copies": ["engine=vllm", "data_parallel=2"],
    "vllm, served": ["engine=openai"],
}


@pytest.fixture(scope="module")
def answered(processes, warm_tiny, vllm_server, tmp_path_factory) -> dict[str, Path]:
    "What each engine answers to the six miniature sets, 20 questions each, greedy, in float32."
    homes = {}
    for name, words in RUNS.items():
        home = homes[name] = tmp_path_factory.mktemp(name.replace(", ", "-").replace(" ", "-"))
        shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
        words = ["model=tiny", "limit=20", *words]
        words += [f"base_url={vllm_server}"] if name == "vllm, served" else []
        code, log = ended(processes, home, ask, *words)
        assert code == 0, (name, log[-3000:])
        assert log.count("20 questions, 20 completions") == 6
    return homes


def rows(home: Path) -> dict:
    "Question -> its completions, of every rollout of a home."
    return {(row["dataset_name"], row["dataset_index"]): row["completions"]
            for path in home.rglob("rollout.json") for row in load_rollout(path.parent)}


@pytest.mark.parametrize("other", ["vllm, two copies", "vllm, served"])
def test_vllm_however_it_is_run(answered, other):
    "In this process, as two copies that Ray runs, behind a server: every row is the same."
    assert len(rows(answered["vllm"])) == 120
    assert rows(answered[other]) == rows(answered["vllm"])


def test_vllm_agrees_with_transformers(answered):
    "At least 99 % of the rows are equal."
    mine, theirs = rows(answered["vllm"]), rows(answered["transformers"])
    different = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
    assert mine.keys() == theirs.keys() and len(different) <= 1, different


LISTENING = """
import psutil
from medvlthinker.generation.engine import start_ray
from medvlthinker.generation.request import EngineSettings
start_ray(EngineSettings(engine="ray"))
for process in psutil.Process().children(recursive=True):
    for line in process.net_connections("inet"):
        if line.status == psutil.CONN_LISTEN:
            print(process.name(), line.laddr.ip.removeprefix("::ffff:"))
"""


def test_a_cluster_that_we_start_listens_here_only():
    "Every process of Ray; the address of another cluster is left alone."
    pytest.importorskip("ray")
    done = succeeded(python("-c", LISTENING, RAY_ADDRESS="127.0.0.1:1"))
    names, addresses = zip(*(line.rsplit(" ", 1) for line in done.stdout.splitlines()))
    assert {"gcs_server", "raylet"} <= {*names}
    assert all(each.startswith("127.") or each == "::1" for each in addresses), done.stdout


def test_ray_that_vllm_has_imported_before_listens_here_only_too(monkeypatch):
    "Ray reads once, when it is imported, whether it may be reached from outside."
    import ray
    from ray._private import ray_constants

    monkeypatch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(ray, "is_initialized", iter([False, True]).__next__)
    monkeypatch.setattr(ray, "init", lambda **given: None)
    engines.start_ray(EngineSettings(engine="ray"))
    assert not ray_constants.ENABLE_RAY_CLUSTER


# ---- a cluster with GPUs, which is not here ----


@pytest.fixture
def cluster(monkeypatch):
    "Two nodes with four GPUs each, and what the workers were made with."
    ray, made = pytest.importorskip("ray"), []
    nodes = [{"Alive": alive, "Resources": {"GPU": 4.0} if alive else {}} for alive in (True, True, False)]
    worker = SimpleNamespace(remote=lambda *given: made.append(given))
    monkeypatch.setattr(engines, "start_ray", lambda settings: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **given: lambda cls: worker)
    return made


@pytest.mark.parametrize("keys, room", [({"nodes": 3}, 8), ({"nodes": 2, "tensor_parallel": 2}, None),
                                        ({"gpus": 8, "tensor_parallel": 8}, 0), ({"nodes": 2}, None)])
def test_more_gpus_than_a_cluster_has_are_a_sentence(cluster, monkeypatch, tmp_path, keys, room):
    "Ray would wait for them without an end; a copy needs all its GPUs on one node."
    monkeypatch.setattr(engines, "tensor_parallel_size", lambda folder, settings: settings.tensor_parallel)
    settings = EngineSettings(**{"engine": "ray", "gpus": 4, **keys})
    if room is not None:
        with pytest.raises(UserError, match=f"Ray has room for {room} .GPUs of its nodes: 4, 4"):
            engines.RayEngine(settings, str(tmp_path))
        return
    engines.RayEngine(settings, str(tmp_path))
    assert len(cluster) == 8 // settings.tensor_parallel


# ---- asked over HTTP ----


@pytest.fixture(autouse=True)
def account(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def drawn_scans(count: int, sampling: Sampling) -> list[Request]:
    "Text and image questions of several sets."
    names = ("pmc_vqa", "slake_closed", "MMMU-medical")
    samples = [sample for name in names for sample in synthetic.benchmark(name, count // 3, 7)]
    return [Request(sample, index, sampling) for index, sample in enumerate(samples)]


def answers(url: str, asked: list[Request], **keys) -> list[list[Completion]]:
    found, reason = gather(engine(url, **keys).answer(asked))
    assert reason == ""
    return [found[request.index] for request in asked]


def test_served_completions_are_drawn_by_their_seeds(vllm_server):
    "n at once, as vLLM draws it, equals n=1 asked n times: completion k has its seed plus k."
    asked = drawn_scans(6, Sampling(n=4, temperature=1.0, max_tokens=48, seed=42))
    at_once, one_by_one = answers(vllm_server, asked), engine(vllm_server)
    one_by_one.refused = frozenset({"n"})
    again, _ = gather(one_by_one.answer(asked))
    assert [[c.text for c in row] for row in at_once] == [
        [c.text for c in again[request.index]] for request in asked]
    assert any(len({c.text for c in row}) > 1 for row in at_once)


def test_served_greedy_with_n(vllm_server):
    "vLLM refuses n > 1 for greedy answers; the engine asks one by one, and learns it once."
    server = engine(vllm_server, concurrency=1)
    found, reason = gather(server.answer(drawn_scans(3, Sampling(n=2, max_tokens=48))))
    assert (reason, server.refused, server.dropped) == ("", {"n"}, set())
    assert server.budget.requests == 1 + 3 * 2
    assert all(row[0].text == row[1].text and not row[0].error for row in found.values())


# ---- killed ----


@pytest.fixture(scope="module")
def undisturbed(processes, warm_tiny, tmp_path_factory):
    "A rollout by vLLM that nobody killed."
    folder = tmp_path_factory.mktemp("undisturbed")
    code, log = ended(processes, folder, roll, str(warm_tiny), {"engine": "vllm"})
    assert code == 0, log[-3000:]
    return folder


VICTIMS = {  # settings; who is killed
    "the driver of a rollout by vLLM": ({"engine": "vllm"}, None),
    "a worker of vLLM": ({"engine": "vllm", "tensor_parallel": 2}, "VLLM::Worker"),
    "the driver of a rollout by Ray": ({"engine": "ray"}, None),
    "a worker of Ray": ({"engine": "ray"}, "_Worker"),
}
SAMPLING = Sampling(n=2, temperature=1.0, max_tokens=40, seed=3)


def roll(folder: Path, model: str, keys: dict) -> None:
    "Two rollouts of 100 questions in one stream."
    if keys.get("tensor_parallel"):  # two workers on the CPU, which share the model as GPUs would
        told = engines.vllm_arguments
        engines.vllm_arguments = lambda *given: told(*given) | {"tensor_parallel_size": 2}
    settings = EngineSettings(model=model, batch_size=16, **keys)
    jobs = [Job(synthetic.benchmark(name, 100), SAMPLING, folder / name)
            for name in ("pmc_vqa", "slake_closed")]
    generate_all(jobs, engines.open_engine(settings))


def prey(process, named: str | None) -> list[int]:
    "Whom to kill."
    if named is None:
        return [process.pid]
    return [pid for pid in descendants(process.pid) if named in command(pid)]


def wait_for_the_moment(process, folder: Path, rng, number: int) -> None:
    "Every other kill falls when something more has been stored, the others at any time."
    before = whole_lines(folder).total()
    while not number % 2 and process.is_alive() and whole_lines(folder).total() == before:
        process.join(0.02)
    process.join(rng.uniform(0, 20 if number % 2 else 0.5))


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_at_random_moments(processes, undisturbed, warm_tiny, tmp_path, victim):
    """Killed and called again until it is whole: the bytes are those of a run that nobody killed.
    Ray starts a worker again, and the run goes on by itself."""
    if MOMENTS < 2 and victim not in ("the driver of a rollout by vLLM", "a worker of Ray"):
        pytest.skip("CI is short of time; with MEDVLTHINKER_KILLS=2 or more all four are killed")
    keys, named = VICTIMS[victim]
    if keys.get("tensor_parallel"):
        code, log = ended(processes, tmp_path / "whole", roll, str(warm_tiny), keys)
        assert code == 0, log[-3000:]
    whole = tmp_path / "whole" if keys.get("tensor_parallel") else undisturbed
    every, expected = whole_lines(whole), contents(whole)
    rng, kills, runs, agents, process = random.Random(7), 0, 0, [], None
    while kills < MOMENTS or process.exitcode != 0:
        folder = tmp_path / f"{runs}"
        process = begin(processes, folder, roll, str(warm_tiny), keys)
        while kills < MOMENTS and process.is_alive():
            wait_for_the_moment(process, folder, rng, kills)
            found, family = prey(process, named), descendants(process.pid)
            if not found or not process.is_alive():
                process.join(0.1)
                continue
            os.kill(rng.choice(found), signal.SIGKILL)
            kills += 1
            if victim != "a worker of Ray":
                process.join(120)
                assert not process.is_alive(), "whoever loses its engine ends"
                agents += [pid for pid in family if "agent" in command(pid).lower()]
                assert not (left := still_there([*{*family} - {*agents}])), left
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
        ([f"model={other}", "engine=vllm"], "do not fit its config.json"),
        (["engine=ray", "ray_address=127.0.0.1:9"],
         "There is no Ray cluster at ray_address=127.0.0.1:9"),
    )
    for words, part in mistakes:
        (home / "log").unlink(missing_ok=True)
        model = [] if "model=" in words[0] else ["model=tiny"]
        code, log = ended(processes, home, ask, "limit=4", *model, *words)
        ours = [line for line in log.splitlines() if line.startswith("medvlthinker: ")]
        assert code == 2 and len(ours) == 1 and part in ours[0], (words, log[-3000:])


def test_an_engine_answers_on_after_a_mistake(processes, warm_tiny, tmp_path):
    "A question that is too long ends one stream, and the next one is answered."
    for keys in ({"engine": "vllm"}, {"engine": "ray"}):
        code, log = ended(processes, tmp_path / keys["engine"], twice, warm_tiny, keys)
        assert code == 0 and "refused, then 5 answered" in log, log[-3000:]


def twice(folder: Path, model: Path, keys: dict) -> None:
    from medvlthinker.core.files import UserError

    engine = engines.open_engine(EngineSettings(model=str(model), max_model_len=300, **keys))
    samples = synthetic.benchmark("pmc_vqa", 5)
    if keys["engine"] == "ray":  # what a worker refuses comes back as a sentence
        with pytest.raises(UserError, match="^.*max_model_len.*$"):
            short = engines.open_engine(EngineSettings(model=str(model), max_model_len=60, **keys))
            list(short.answer([Request(samples[0], 0, Sampling(max_tokens=8))]))
    asked = [Request(sample, i, Sampling(max_tokens=8)) for i, sample in enumerate(samples)]
    long = replace(asked[3].sample, question=asked[3].sample.question + " Why?" * 600)
    try:
        list(engine.answer([*asked[:3], replace(asked[3], sample=long), asked[4]]))
    except UserError as error:
        assert "pmc_vqa/" in str(error), error
        print(f"refused, then {len(list(engine.answer(asked)))} answered")


# ---- what generation_config.json brings along ----


def test_vllm_takes_no_sampling_from_a_model(processes, undisturbed, warm_tiny, tmp_path):
    "Whatever it recommends, the rows are those of a model that recommends nothing."
    given = {"no_repeat_ngram_size": 3, "min_new_tokens": 30, "num_beams": 3, "min_p": 0.9,
             "typical_p": 0.1, "penalty_alpha": 0.6, "top_k": 1, "repetition_penalty": 1.9}
    shutil.copytree(warm_tiny, model := tmp_path / "model")
    known = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(known | given))
    code, log = ended(processes, folder := tmp_path / "odd", roll, str(model), {"engine": "vllm"})
    assert code == 0 and log.count("not applied") == 1, log[-3000:]
    assert "not applied" not in (undisturbed / "log").read_text()
    assert whole_lines(folder) == whole_lines(undisturbed)
