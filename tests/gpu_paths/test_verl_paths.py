"""What a GPU machine would do with verl, on a CPU: the model that is built, the programs that are found,
the nodes that are asked for, the job that is found again."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT, python, stand_in, succeeded, until
from medvlthinker.core.files import UserError, record_path
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.training import checkpoint, verl
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.sft import plan
from medvlthinker.training.train import _finish, train_here
from medvlthinker.training.verl_cpu import cpu_environment, cpu_overrides

NODE = TrainingSettings(trainer="verl", gpus=8, dtype="bfloat16", tensor_parallel=0)
TEXT, LARGE = get_recipe("3B-RL_m23k"), get_recipe("32B-RL_m23k")
no_verl = pytest.mark.skipif(not importlib.util.find_spec("verl"),
                             reason="verl is not installed; ./reproduce.sh setup full installs it")
no_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"),
                            reason="Ray is not installed; ./reproduce.sh setup full installs it")

# --- the model as verl's engine builds it ----------------------------------------------------------------------------------

BUILD = """
import json, sys
import torch, torch.distributed
from pathlib import Path
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
import verl
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

folder = Path(verl.__file__).parent / "trainer" / "config"
with initialize_config_dir(str(folder), version_base=None):
    parts = compose("ppo_trainer", json.loads(sys.argv[1])).actor_rollout_ref
with open_dict(parts.ref):  # as verl's worker does before it builds the reference
    for key in [key for key in parts.ref if key.startswith("log_prob_")]:
        value = parts.ref.pop(key)
    parts.ref.ppo_mini_batch_size = parts.ref.ppo_micro_batch_size_per_gpu = 1
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model, rollout = (omega_conf_to_dataclass(parts[name]) for name in ("model", "rollout"))
rows = [torch.arange(5, 12), torch.arange(20, 24)]
ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool)
for row, tokens in enumerate(rows):
    ids[row, :len(tokens)], mask[row, :len(tokens)] = tokens, True
places, found = torch.arange(7).expand(4, 2, 7), {"awake": not rollout.free_cache_engine}
found["sleeps"] = rollout.enable_sleep_mode
for name in ("actor", "ref"):
    part = omega_conf_to_dataclass(parts[name])
    engine = FSDPEngineWithLMHead(model, part.engine, part.optim, part.checkpoint)
    module = engine._build_module()
    turns = [each.double().sum().item() for key, each in module.named_buffers() if key.endswith("inv_freq")]
    module = module.float()
    module.gradient_checkpointing_disable()
    with torch.no_grad():
        padded = module(input_ids=ids, attention_mask=mask, position_ids=places).logits[1, :4]
        alone = module(input_ids=rows[1][None], attention_mask=mask[1:, :4],
                       position_ids=places[:, 1:, :4]).logits[0]
    found[name] = {"attention": module.config._attn_implementation,
                   "dtype": part.engine.model_dtype, "computed in": part.engine.mixed_precision["param_dtype"], "padding removed": engine.use_remove_padding,
                   "apart": (padded - alone).abs().max().item(), "turns": turns}
print("FOUND", json.dumps(found))
"""


@no_verl
@pytest.mark.heavy
def test_actor_and_reference_are_built_and_see_text(blank):
    "With what the lock installs; a row gives the same scores beside a longer one as alone, and both turn their positions by the same frequencies."
    words = verl.verl_overrides(TEXT, NODE, str(blank), "data.parquet", "folder")
    done = succeeded(python("-c", BUILD, json.dumps(words)))
    found = json.loads(done.stdout.rpartition("FOUND ")[2])
    kind = {"attention": "sdpa", "padding removed": False, "apart": pytest.approx(0, abs=1e-5), "dtype": "fp32", "computed in": "bf16", "turns": found["actor"]["turns"]}
    assert found == {"awake": False, "sleeps": True, "actor": kind, "ref": kind} and kind["turns"]


def test_a_broken_flash_attention_counts_as_none(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("flash_attn") and not verl.has_flash_attention()


def pretend_checkpoint(step: Path, gpus: int) -> None:
    "A complete checkpoint of verl's from so many GPUs, without weights."
    (step / "actor" / "huggingface").mkdir(parents=True)
    (step / "actor" / "huggingface" / "config.json").write_text("{}")
    (step / "actor" / "fsdp_config.json").write_text(json.dumps({"world_size": gpus}))
    parts = [f"actor/{kind}_world_size_{gpus}_rank_{rank}.pt" for kind in ("model", "optim", "extra_state") for rank in range(gpus)]
    for name in ("data.pt", *parts):
        zipfile.ZipFile(step / name, "w").close()


def test_a_run_ends_with_the_model_of_its_last_checkpoint(monkeypatch, tmp_path, blank):
    "From the plan to the folder that an engine loads; only verl itself, and its merger, are played."
    started = []

    def play(words, variables, show, job):
        given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
        pretend_checkpoint(Path(given["trainer.default_local_dir"]) / "global_step_2", 1)
        started.append((given["data.train_files"], given["trainer.total_training_steps"]))

    monkeypatch.setattr(verl, "run_verl", play)
    monkeypatch.setattr(verl, "require_package", lambda *names, instead: None)
    monkeypatch.setattr(checkpoint, "_gather_verl", lambda place, folder, log: shutil.copytree(blank, folder, dirs_exist_ok=True) and None)
    write_samples(synthetic.corpus("pmc_vqa", 16), tmp_path / "pmc_vqa.parquet")
    settings = TrainingSettings(base=str(blank), trainer="verl", max_steps=2)
    train = lambda: train_here(get_recipe("tiny-RL_PMC"), settings, tmp_path / "pmc_vqa.parquet", tmp_path, tmp_path / "logs", lambda line: None)
    final = train()
    assert (final / "model.safetensors").is_file() and json.loads(record_path(final).read_text())["merge"]["layout"] == "verl"
    assert train() == final and started == [(str(tmp_path / "verl" / "pmc_vqa-512.parquet"), "2")]


# --- one node --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("address", ["", "http://127.0.0.1:1", "auto"])
def test_a_recipe_for_one_node_does_not_look_at_a_clusters_address(monkeypatch, tmp_path, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    verl.refuse_missing_nodes([TEXT], NODE)
    words = verl.verl_overrides(TEXT, NODE, "model", "data.parquet", tmp_path)
    assert "+ray_kwargs.ray_init.address=local" in words
    show = "import os; print(repr(os.environ['RAY_ADDRESS']), os.environ['PATH'])"
    verl.run_verl([sys.executable, "-c", show], verl.environment(tmp_path))
    told = (tmp_path / "verl-001.log").read_text()
    assert told.startswith(f"'' {Path(sys.executable).parent}:")
    assert verl.command(words, {})[0] == sys.executable


# --- several nodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["", "head:6379"])
def test_several_nodes_want_an_http_address(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="32B-RL_m23k wants 4 nodes.*http://HEAD:8265"):
        verl.refuse_missing_nodes([TEXT, LARGE], NODE)
    verl.refuse_missing_nodes([TEXT, LARGE], replace(NODE, nodes=1))
    verl.refuse_missing_nodes([LARGE], replace(NODE, trainer="trl"))
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(verl, "_count_nodes", lambda address, gpus: 3)
    with pytest.raises(UserError, match="32B-RL_m23k wants 4 nodes with 8 GPUs, and Ray has 3"):
        verl.refuse_missing_nodes([LARGE], NODE)


def test_the_whole_run_asks_for_its_nodes_first(home, monkeypatch):
    "Before a notebook runs, and not when the step of the 32B model comes, days later."
    pytest.importorskip("papermill")
    from medvlthinker.app import workflow
    from medvlthinker.app.profile import load_profile

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(workflow, "snakemake", lambda *given: pytest.fail("it began"))
    with pytest.raises(UserError, match="32B-RL_m23k wants 4 nodes"):
        workflow.run_workflow(load_profile("paper"))


def test_a_whole_run_on_one_node_is_told_first_that_the_32b_does_not_fit(home, monkeypatch):
    "Whatever its rows; not when its step comes. A login node without GPUs says nothing of those that train."
    pytest.importorskip("papermill")
    from medvlthinker.app import workflow
    from medvlthinker.app.profile import load_profile

    monkeypatch.setattr(workflow, "snakemake", lambda *given: pytest.fail("it began"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**14))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: SimpleNamespace(total_memory=79.6 * 2**30))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2e12))
    with pytest.raises(UserError, match="32B-RL_m23k needs 96.0 GiB with micro_batch=1 .* row of 6,144 tokens"):
        workflow.run_workflow(load_profile("paper", nodes=1))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=256e9))
    with pytest.raises(UserError, match="7B-SFT_m23k on 8 GPUs .* 265 GB in all; this machine has 256 GB"):
        workflow.run_workflow(load_profile("paper", recipes="7B"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    workflow._refuse(["32B-RL_m23k", "7B-SFT_m23k"], load_profile("paper", nodes=1))


def test_what_is_not_asked_for_is_not_refused(home, monkeypatch):
    "On a login node the data of the whole paper is fetched without the nodes of the 32B."
    pytest.importorskip("papermill")
    from medvlthinker.app import workflow
    from medvlthinker.app.profile import load_profile

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    begun, really = [], workflow.snakemake
    monkeypatch.setattr(workflow, "snakemake", lambda *given, dry=False: really(*given, dry=True) if dry else begun.append(given) or [])
    workflow.run_workflow(load_profile("paper"), "-j", "1", "notebooks/1_data.ipynb")
    assert [given[1:] for given in begun] == [("-j", "1", "notebooks/1_data.ipynb")]


def test_programs_of_a_job_have_whole_paths(tmp_path):
    given = verl.environment(tmp_path, nodes=4)
    words = verl.command(["a=1"], given, 4, "http://head:8265", verl.job_id(tmp_path, 1))
    folder, told = Path(sys.executable).parent, words[words.index("--runtime-env-json") + 1]
    assert words[0] == str(folder / "ray")
    assert words[-3:] == ["bash", "-c", f"{sys.executable} -m verl.trainer.main_ppo a=1"]
    assert json.loads(told) == {"env_vars": given | {"PATH": f"{folder}:${{PATH}}"}}
    assert "RAY_ADDRESS" not in given


STAND_IN = """
import os, sys, time
print(sys.argv[1:], os.environ.get("SAYS", ""), flush=True)
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    for step in (1, 2):
        line = '{"step": %d, "data": {"critic/score/mean": 0.5}}' % step
        print(line, file=file, flush=True)
        time.sleep(1)
"""
RAY = """echo "$*" >> $STATE/calls
wait_for() { while [ ! -e $STATE/$1.code ]; do sleep 0.1; done; cat $STATE/$1.log; }
case $2 in
    submit)
        while [[ $1 != -- ]]; do [[ $1 != --submission-id ]] || id=$2; shift; done; shift
        [ ! -e $STATE/$id.log ] || { echo "Job $id already exists"; exit 1; }
        setsid bash -c '"$@" > $0.log 2>&1; echo $? > $0.code' $STATE/$id "$@" &
        until [ -e $STATE/$id.log ]; do sleep 0.01; done  # a kill of this client comes too late now
        [ -z "${LOSES_SIGHT:-}" ] || exit 0
        wait_for $id; exit $(cat $STATE/$id.code) ;;
    status)
        [ -e $STATE/$5.log ] || { echo "RuntimeError: Job $5 does not exist"; exit 1; }
        [ -e $STATE/$5.code ] && echo "Job '$5' SUCCEEDED" || echo "Status for job '$5': RUNNING" ;;
    logs) wait_for $6 ;;
esac"""
QUOTED = ["a='7'", "c=[console,file]", "d='it\\'s $HOME'"]


def write_stand_in(folder: Path) -> Path:
    "A package `verl` that writes two steps."
    (folder / "verl" / "trainer").mkdir(parents=True)
    (folder / "verl" / "__init__.py").touch()
    (folder / "verl" / "trainer" / "__init__.py").touch()
    (folder / "verl" / "trainer" / "main_ppo.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "An environment whose `ray` keeps jobs in files, and runs a stand-in for verl."
    stand_in(tmp_path / "bin", ray=RAY, python=f'exec {sys.executable} "$@"')
    for folder in ("state", "logs", "run"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PYTHONPATH", str(write_stand_in(tmp_path / "stand-in")))
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    return tmp_path


def start(folder: Path, shown: list) -> None:
    run = SimpleNamespace(recipe=LARGE, settings=NODE, folder=folder / "run", logs=folder / "logs", steps=100)
    verl._start(run, QUOTED, {}, shown.append)


def actions(folder: Path) -> list[str]:
    return [line.split()[1] for line in (folder / "state" / "calls").read_text().splitlines()]


STEPS = ["step 1 reward 0.5", "step 2 reward 0.5"]


def test_a_job_shows_its_steps_and_gets_its_words_with_their_quotes(cluster):
    start(cluster, shown := [])
    assert shown[1:] == STEPS and actions(cluster) == ["submit", "status"]
    assert (cluster / "logs" / "verl-001.log").read_text().strip() == str(QUOTED)
    assert not verl.is_at_work(verl.job_id(cluster / "run", 1))
    start(cluster, again := [])  # as after a job that ended too early
    assert again[1:] == STEPS and actions(cluster)[3:] == ["status", "submit", "status"]
    assert (cluster / "logs" / "verl-002.jsonl").exists()


def test_a_checkpoint_of_other_gpus_is_refused_before_verl_starts(tmp_path):
    "verl would load the model for minutes, and then miss a file."
    pretend_checkpoint(tmp_path / "run" / "global_step_50", 8)
    run = SimpleNamespace(recipe=get_recipe("7B-RL_PMC"), settings=replace(NODE, gpus=4), folder=tmp_path / "run", logs=tmp_path / "logs", steps=100)
    with pytest.raises(UserError, match="global_step_50 was written by 8 GPUs, and only as many go on from it; this run has 4. Set gpus"):
        verl._start(run, [], {}, print)
    assert (tmp_path / "run" / "global_step_50" / "data.pt").exists() and not (tmp_path / "logs").exists()


def test_the_job_of_a_killed_client_is_found_and_followed(cluster):
    "Though its process may be seen on this machine; and nothing is touched that it is just writing, however torn it looks."
    job = verl.job_id(cluster / "run", 1)
    given = verl.environment(cluster / "logs", 1, 4)
    words = verl.command([f"trainer.default_local_dir={cluster / 'run'}"], given, 4, job=job)
    (cluster / "logs" / "verl-001.sh").write_text(verl.command_text(words))
    client = subprocess.Popen(words, env={**os.environ, **given})
    until(lambda: verl.is_at_work(job), client)
    client.kill()
    client.wait()
    (cluster / "run" / "global_step_50" / "actor").mkdir(parents=True)
    start(cluster, shown := [])
    assert shown == [f"Ray is still at work on 32B-RL_m23k (job {job}); following it.", *STEPS]
    assert actions(cluster).count("submit") == 1 and actions(cluster)[-2:] == ["logs", "status"]
    assert (cluster / "run" / "global_step_50" / "actor").is_dir()


def test_a_client_that_loses_sight_of_its_job_is_not_the_end_of_it(cluster, monkeypatch):
    "Ray's client then ends without an error, and what the job is just writing would be removed as torn."
    monkeypatch.setenv("LOSES_SIGHT", "1")
    start(cluster, shown := [])
    assert shown[-2:] == STEPS and actions(cluster) == ["submit", "status", "logs", "status"]


def test_a_job_that_loses_an_answer_is_ended(cluster, monkeypatch):
    "verl would go on with the answers that are left."
    monkeypatch.setenv("SAYS", verl.LOST[0])
    with pytest.raises(UserError, match="lost an answer"):
        start(cluster, [])
    assert actions(cluster) == ["submit", "stop"]


WAITS = """
import os, time
for number in range(12):
    print(f"(TaskRunner pid=7) INFO:2026-12-01:pending: 0, running: 9, finished: {COUNT}, failure: 0", flush=True)
    time.sleep(0.3)
    if STEPS:
        with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
            print('{"step": %d, "data": {"critic/score/mean": 0.5}}' % number, file=file)
"""


@pytest.mark.parametrize("count, steps", [("247", False), ("number", False), ("247", True)])
def test_a_run_in_which_nobody_answers_any_more_is_ended(tmp_path, monkeypatch, count, steps):
    "verl would wait for ever; counts that change, and those that are the same in each step, are a run at work."
    monkeypatch.setattr(verl, "_PATIENCE", 2)
    words = [sys.executable, "-c", WAITS.replace("COUNT", count).replace("STEPS", str(steps))]
    stuck = pytest.raises(UserError, match="wait for ever") if (count, steps) == ("247", False) else contextlib.nullcontext()
    with stuck:
        verl.run_verl(words, verl.environment(tmp_path), lambda line: None)


ENDS = """
import os, ray
from types import SimpleNamespace
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
os.environ |= {"RANK": "0", "RAY_LOCAL_WORLD_SIZE": "1", "VERL_RAY_JOB_ID": ray.get_runtime_context().get_job_id()}
import verl
import medvlthinker.training.verl_text
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter
config = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, data_parallel_size=1, layered_summon=False)
receiver = SimpleNamespace(model_runner=None, local_rank=0)
print("ENDS", ServerAdapter(config, None, None).zmq_handle, vLLMColocateWorkerExtension._get_zmq_handle(receiver))
"""


@no_verl
@pytest.mark.heavy
def test_two_runs_on_a_machine_have_sockets_of_their_own():
    "By which weights go from training to vLLM: both ends of a run have one name, and that of another run is another."
    names = []
    for _ in range(2):
        for _ in range(3):  # Ray gives its own processes 30 s, whatever else the machine does
            done = python("-c", ENDS, **cpu_environment())
            if "timed out during startup" not in done.stderr:
                break
        else:
            pytest.skip("Ray's own processes did not start; this machine is too busy")
        lines = succeeded(done).stdout.splitlines()
        names += [line.split()[1:] for line in lines if line.startswith("ENDS")]
    (sender, receiver), (other, _) = names
    assert sender == receiver != other
    assert all("rl-colocate-zmq-01000000-" in name for name in (sender, other))


def stop(process: subprocess.Popen) -> None:
    "End a process that leads a group, and its group."
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(20)


def nodes_at(address: str, gpus: int) -> int:
    "How many nodes with so many GPUs a head of Ray has; 0 while it does not answer."
    with contextlib.suppress(UserError):
        return verl._count_nodes(address, gpus)
    return 0


@pytest.fixture(scope="module")
def real_ray(request):
    "A head of Ray with eight GPUs that nobody uses, started by the whole path of `ray`."
    folder = Path(tempfile.mkdtemp(prefix="r"))  # the name of a socket has 107 bytes
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "RAY_AUTH_MODE": "disabled",
                 "RAY_USAGE_STATS_ENABLED": "0",
                 "PYTHONPATH": str(write_stand_in(folder / "stand-in"))}
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-gpus=8",
             "--num-cpus=2", "--port=24679", "--dashboard-port=24680", "--dashboard-agent-listen-port=24681",
             "--ray-client-server-port=24682", f"--temp-dir={folder}/ray", "--object-store-memory=100000000"]

    def start() -> subprocess.Popen:
        with open(folder / "log", "a") as log:
            return subprocess.Popen(words, env=variables, stdout=log, stderr=log,
                                    start_new_session=True)

    address, process, begun, end = "http://127.0.0.1:24680", start(), 1, time.monotonic() + 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        try:
            while not nodes_at(address, 8):
                assert time.monotonic() < end, (folder / "log").read_text()[-2000:]
                if process.poll() is not None:  # it gives its own processes 15 s, whatever else runs
                    assert begun < 4, (folder / "log").read_text()[-2000:]
                    stop(process)
                    process, begun = start(), begun + 1
                time.sleep(1)
            yield
        finally:
            stop(process)


@no_ray
@pytest.mark.heavy
def test_a_real_head_counts_its_nodes_and_keeps_a_job(real_ray, tmp_path, monkeypatch):
    verl.refuse_missing_nodes([LARGE], replace(NODE, nodes=1))
    with pytest.raises(UserError, match="wants 4 nodes with 8 GPUs, and Ray has 1"):
        verl.refuse_missing_nodes([LARGE], NODE)
    (logs := tmp_path / "logs").mkdir()
    job, given = verl.job_id(tmp_path, 1), verl.environment(logs, 1, 4)
    assert not verl.is_at_work(job)
    words = verl.command(QUOTED, given, 4, job=job)
    client, end = subprocess.Popen(words), time.monotonic() + 300
    while client.poll() != 0 and not verl.is_at_work(job) and time.monotonic() < end:
        if client.poll():  # the head is there, and on a busy machine its agent not yet
            client = subprocess.Popen(words)
        time.sleep(0.5)
    client.kill()
    client.wait()
    verl.run_verl([*verl._ray_job("logs"), "--follow", job], given, (shown := []).append)
    assert shown == STEPS and not verl.is_at_work(job)
    assert str(QUOTED) in (logs / "verl-001.log").read_text()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="32B-RL_m23k wants 4 nodes. Ray does not answer at http"):
        verl.refuse_missing_nodes([LARGE], NODE)


@no_verl
@pytest.mark.heavy
@pytest.mark.skipif("MEDVLTHINKER_NODES" not in os.environ,
                    reason="CI is short of time; MEDVLTHINKER_NODES=2 trains on two nodes of Ray")
def test_two_nodes_of_ray_train_two_steps(tmp_path, warm_tiny, monkeypatch):
    "As a 32B model is trained, but two raylets on this machine are the nodes, and each has one process on the CPU."
    folder = Path(tempfile.mkdtemp(prefix="r"))  # the name of a socket has 107 bytes
    address, processes = "http://127.0.0.1:25680", []
    for name, value in (cpu_environment() | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)

    def start(*words: str) -> None:
        words = ("start", "--block", "--num-gpus=1", "--num-cpus=32", "--object-store-memory=400000000", *words)
        with open(folder / "log", "a") as log:
            processes.append(subprocess.Popen([Path(sys.executable).with_name("ray"), *words], stdout=log,
                                              stderr=log, start_new_session=True))
        until(lambda: nodes_at(address, 1) == len(processes), processes[-1], folder / "log")

    try:
        start("--head", "--port=25679", "--dashboard-port=25680", "--dashboard-agent-listen-port=25681",
              "--ray-client-server-port=25682", f"--temp-dir={folder}/ray")
        start("--address=127.0.0.1:25679", "--dashboard-agent-listen-port=25683")
        write_samples(synthetic.corpus("pmc_vqa", 40, 3), tmp_path / "pmc_vqa.parquet")
        recipe = get_recipe("tiny-RL_PMC")
        recipe = replace(recipe, config=replace(recipe.config, warmup_steps=0, save_every=1))
        settings = TrainingSettings(base=str(warm_tiny), trainer="verl", max_steps=2, nodes=2)
        run = plan(recipe, settings, tmp_path / "pmc_vqa.parquet", tmp_path / "checkpoints", tmp_path / "logs")
        more = [word for word in cpu_overrides() if "ray_init" not in word and "trainer.nnodes" not in word]
        taken = verl.train_verl(run, more, cpu_environment())
    finally:
        for process in processes:
            stop(process)
        shutil.rmtree(folder, ignore_errors=True)
    assert taken == run.folder / "global_step_2" / "actor"
    assert json.loads((taken / "fsdp_config.json").read_text())["world_size"] == 2
    assert [line["step"] for line in verl.merge_curves(run.logs)] == [1, 2]
    model = _finish(run, taken, tmp_path / "checkpoints")
    assert (model / "model.safetensors").is_file()


# --- the script for Slurm --------------------------------------------------------------------------------------------------

SCRIPT = ROOT / "nbs" / "assets" / "cluster.sh"
FAKES = {
    "scontrol": 'echo "scontrol $*" >> $CALLS; printf "n%d\\n" 1 2 3 4',
    "hostname": "echo 127.0.1.1 10.0.0.1",
    "srun": """echo "srun $*" >> $CALLS
while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || export NODE=${1#*=}; shift; done
exec "$@" """,
    "ray": """echo "ray $NODE $*" >> $CALLS
case $1 in
    start) [ "$NODE" != "${BROKEN:-}" ] || exit 1
           trap 'rm $STATE/$NODE; kill $!; exit 143' TERM
           touch $STATE/$NODE; env > $CALLS.$NODE; sleep 100 & wait $! ;;
    list) for node in $STATE/*; do [ ! -e $node ] || echo '{"node_id": 1}'; done ;;
esac""",
}


@pytest.fixture
def slurm(tmp_path):
    "An allocation of four nodes: programs that record their calls and run them."
    programs = stand_in(tmp_path / "bin", **FAKES)
    (tmp_path / "state").mkdir()
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "CLUSTER_PYTHON": str(programs / "python"),
                 "CALLS": str(tmp_path / "calls"), "STATE": str(tmp_path / "state"),
                 "MEDVLTHINKER_HOME": str(tmp_path / "home"), "SLURM_JOB_ID": "70123",
                 "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_GPUS_ON_NODE": "8"}
    begin = lambda *words, **more: subprocess.Popen(
        ["/usr/bin/env", "bash", SCRIPT, *words], env=variables | more, text=True, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return SimpleNamespace(begin=begin, folder=tmp_path, calls=tmp_path / "calls")


def left_over(slurm) -> list[Path]:
    "What a job must not leave: a node at work, a token."
    return [*(slurm.folder / "state").iterdir(), *(slurm.folder / "home").glob(".ray-token*")]


def test_the_command_runs_when_all_nodes_are_there_and_ends_them(slurm):
    seen = ('echo "$RAY_ADDRESS $RAY_AUTH_MODE"; wc -c < "$RAY_AUTH_TOKEN_PATH"; ls "$STATE"; '
            'stat -c %a "$RAY_AUTH_TOKEN_PATH"; exit 7')
    run = slurm.begin("bash", "-c", seen)
    told, errors = run.communicate(timeout=60)
    assert run.returncode == 7, errors
    assert told.split() == ["cluster.sh:", "Ray", "has", "4", "nodes", "at", "http://10.0.0.1:24123",
                            "http://10.0.0.1:24123", "token", "64", "n1", "n2", "n3", "n4", "600"]
    calls = slurm.calls.read_text().splitlines()
    starts = [call for call in calls if call.startswith("ray n") and " start " in call]
    assert "--head --block --node-ip-address=10.0.0.1 --port=21123" in starts[0]
    assert [call.split()[1] for call in starts[1:]] == ["n2", "n3", "n4"] or len(starts) == 4
    assert all("--address=10.0.0.1:21123 " in call and call.endswith("--num-gpus=8") for call in starts[1:])
    assert all("--dashboard-agent-listen-port=30123 " in call for call in starts)  # by default that of any other head on the node: such a one takes no jobs
    assert left_over(slurm) == []


def test_ray_has_a_folder_of_its_own_the_keys_of_the_project_and_no_proxy(slurm):
    "In /tmp/ray there may be a file of somebody else's that `ray start` cannot replace; a proxy would be handed the jobs."
    (slurm.folder / "locks").symlink_to(ROOT / "locks")
    (slurm.folder / ".env").write_text("WANDB_API_KEY=from-the-file\nHTTP_PROXY=http://file\n")
    run = slurm.begin("true", HTTP_PROXY="http://proxy:3128", NO_PROXY="localhost", TMPDIR="/a/long/path")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    head, = [call for call in slurm.calls.read_text().splitlines() if call.startswith("ray ") and "--head" in call]
    assert "--temp-dir=/tmp/ray-70123 " in head
    for node in ("n1", "n4"):
        seen = Path(f"{slurm.calls}.{node}").read_text().splitlines()
        assert {"WANDB_API_KEY=from-the-file", "HTTP_PROXY=http://proxy:3128", "NO_PROXY=localhost,10.0.0.1", "no_proxy=localhost,10.0.0.1"} <= {*seen}


def test_a_signal_to_the_job_ends_everything(slurm):
    waits = "trap 'echo ended; kill $!; exit' TERM; sleep 60 & echo begun; wait"
    run = slurm.begin("bash", "-c", waits)
    until(lambda: "begun" in run.stdout.readline(), run)
    run.send_signal(signal.SIGTERM)
    told, _ = run.communicate(timeout=30)
    assert run.returncode == 143 and "ended" in told and left_over(slurm) == []


def test_a_node_that_does_not_come_stops_the_job(slurm):
    run = slurm.begin("echo", "ran", BROKEN="n3")
    told, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "ran" not in told and "Ray ended on one of n1 n2 n3 n4" in errors
    assert left_over(slurm) == []


def test_outside_of_slurm_and_without_a_command_it_says_what_it_wants(slurm):
    for words, more, said in (((), {}, "which command"), (("ls",), {"SLURM_JOB_ID": ""}, "sbatch"),
                              (("ls",), {"CLUSTER_PYTHON": "/none/python"}, "./reproduce.sh setup gpu")):
        run = slurm.begin(*words, **more)
        assert said in run.communicate(timeout=30)[1] and run.returncode == 2
