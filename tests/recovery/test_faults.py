"""The whole run against what machines do: killed at random moments, ended by a scheduler, run twice at once. Each time the same bytes, nothing twice, nothing torn."""
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import SMALL, STEPS, at_work, python
from medvlthinker.data.benchmarks import load_benchmark
from medvlthinker.core.files import UserError, read_json
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.data.corpora import load_corpus
from medvlthinker.generation.rollout import load_rollout

KILLS = int(os.environ.get("MEDVLTHINKER_KILLS", "2"))  # at random moments; CI is short of time, fifty take half an hour


class Run:
    "A run at work in a home, its output in files beside it."

    def __init__(self, project: Path, home: Path):
        self.home, self.out = home, home.with_name(f"{home.name}-{time.monotonic_ns()}.out")
        self.err = self.out.with_suffix(".err")
        variables = {**os.environ, "MEDVLTHINKER_HOME": str(home), "PYTHONPATH": str(project), "BROWSER_PATH": "none"}  # pictures have their own tests
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen([sys.executable, "-m", "medvlthinker.app.cli", "run", *SMALL], cwd=project, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)

    def named(self, word: str = "") -> set[str]:
        "The steps of which the output says so, or that have begun."
        lines = re.findall(r"^step \d+ of \d+  (\S+): (.*)$", self.out.read_text(), re.M)
        return {name for name, said in lines if said.startswith(word)}

    def ended(self) -> int:
        return self.process.wait()

    def sentence(self) -> str:
        "What it said at its end, one line and no traceback."
        lines = [line for line in self.err.read_text().splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("medvlthinker: "), "\n".join(lines[-30:])
        return lines[0]


def on_the_way(path: Path) -> bool:
    "Is it of a rollout that is not finished? Its file has its final name from the first line on."
    return path.name in ("rollout.json", "rollout.jsonl") and "finished" not in read_json(path.with_name("rollout.json"))


def identity(folder: Path) -> bytes:
    "What a rollout's record says beside dates, seconds and memory."
    rollout = load_rollout(folder)
    return json.dumps([dataclasses.asdict(rollout.config), *(rollout.record[key] for key in ("rows", "completions", "failed", "sha256"))]).encode()


def lasting(home: Path) -> dict[str, bytes]:
    "What a run is for: samples, completions, curated sets, weights, tables and figures; without manifests and cards, which have dates, and notes that begin with a dot."
    found = {}
    for place in ("samples", "rollouts", "curated", "results", "figures", "checkpoints/tiny-RL_PMC"):
        for path in (home / "smoke" / place).rglob("*"):
            name = path.relative_to(home).as_posix()
            if path.is_file() and not on_the_way(path) and not name.endswith((".manifest.json", "README.md")) and not any(part.startswith(".") for part in Path(name).parts):
                found[name] = identity(path.parent) if path.name == "rollout.json" else path.read_bytes()
    return found


def litter(home: Path) -> list[str]:
    "What a killed process would leave behind: half-written files, folders put aside, unfinished notebooks."
    return [path.relative_to(home).as_posix() for path in home.rglob("*") if path.name.endswith((".part", ".old", ".spare", ".running.ipynb")) or path.name.startswith("tmp")]


def assert_same(home: Path, reference: dict[str, bytes]) -> None:
    "All that the undisturbed run has, byte by byte; nothing else, nothing half-written."
    mine = lasting(home)
    assert mine.keys() == reference.keys(), mine.keys() ^ reference.keys()
    assert not (differ := [name for name in mine if mine[name] != reference[name]]), differ
    assert not litter(home), litter(home)


def gone(home: Path, seconds: float = 30) -> dict[int, str]:
    "What still runs for a home after a while."
    end = time.monotonic() + seconds
    while (left := at_work(home)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def test_a_run_that_nobody_disturbs_is_whole(small_run):
    home = small_run / "home"
    rows = [(path.parent, row["dataset_name"], row["dataset_index"]) for path in home.rglob("rollout.json") for row in load_rollout(path.parent)]
    assert len(rows) == len(set(rows)) == 40 + 2 * 6, "each question once"
    assert not litter(home), litter(home)


def finished(home: Path) -> int:
    "How many steps are done."
    return len(list((home / "smoke" / "notebooks").glob("*.manifest.json")))


def strike(run: Run, kind: str, rng: random.Random) -> None:
    "SIGKILL to everything at once, as by a power cut; to the runner, as by an impatient user; or to any one process, as by a machine short of memory."
    if kind == "everything":
        while found := at_work(run.home):
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        run.ended()
        return
    prey = [pid for pid, words in at_work(run.home).items() if pid != run.process.pid and "resource_tracker" not in words]
    if kind == "runner" or not prey:
        run.process.kill()
        run.ended()
        return
    try:
        os.kill(rng.choice(prey), signal.SIGKILL)
    except ProcessLookupError:
        pass
    if run.ended():  # 0 where nobody needed it any more
        assert run.process.returncode == 2 and run.sentence(), run.process.returncode


@pytest.mark.heavy
def test_killed_at_random_moments(small_run, warm_tiny, tmp_path):
    "Killed and called again, and again, until the run is through: everything is that of a run that nobody disturbed. In each home SIGTERM comes once too, and two calls at once bring it to its end."
    project, reference, rng, kinds = small_run / "project", lasting(small_run / "home"), random.Random(26), ("everything", "runner", "one process")
    longest = 3 * max(json.loads(path.read_text())["seconds"] for path in (small_run / "home" / "smoke" / "notebooks").glob("*.manifest.json"))  # a step that loads its libraries itself
    met, killed = Counter(), 0
    while killed < KILLS:
        home, through, stuck = tmp_path / f"{killed}", False, (0, 0)
        shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
        while killed < KILLS and not through:
            run = Run(project, home)
            try:
                while stuck[1] > 2 and run.process.poll() is None and finished(home) == stuck[0]:  # three kills at the same place are enough: on a busy machine a long step would never end
                    time.sleep(0.1)
                run.process.wait(rng.uniform(0.5, rng.choice((0.2, 0.9)) * longest))  # half of them soon, where a run finds out what is done
                through = run.process.returncode == 0
                assert through, run.err.read_text()
            except subprocess.TimeoutExpired:
                kind = kinds[killed % 3]
                met.update(run.named() - run.named("done in") or ["between two steps"])
                killed += 1
                strike(run, kind, rng)
                through = run.process.returncode == 0
                stuck = (finished(home), stuck[1] + 1 if finished(home) == stuck[0] else 1)
            assert not (left := gone(home)), f"still at work: {left}"
            said = python("-m", "medvlthinker.app.cli", "status", *SMALL, cwd=project, MEDVLTHINKER_HOME=home, PYTHONPATH=project)
            assert said.returncode == 0 and "7 steps: " in said.stdout, said.stderr
            assert not (torn := [name for name, data in lasting(home).items() if reference.get(name) != data]), torn
        if not through:
            run = Run(project, home)
            time.sleep(rng.uniform(5, 12))
            run.process.terminate()
            assert run.ended() == 130 and "the same command goes on" in run.sentence()
            assert not (left := at_work(home)), left
        two = [Run(project, home) for _ in range(2)]
        assert [run.ended() for run in two] == [0, 0], [run.err.read_text() for run in two]
        assert not two[0].named("done in") & two[1].named("done in"), "each step once"
        assert_same(home, reference)
        shutil.rmtree(home)
    assert KILLS < 50 or met.keys() >= {*STEPS}, f"no kill met {set(STEPS) - met.keys()}"


# --- files that somebody or something has changed ---

FEW = {"limit": 6, "train_limit": 20}
DAMAGES = {
    "its last three bytes gone": lambda data: data[:-3],
    "a page in the middle zeroes": lambda data: data[:len(data) // 2] + bytes(4096) + data[len(data) // 2 + 4096:],
    "a flipped byte in the middle": lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:],
}


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_parquet_file_is_a_sentence_and_is_made_anew(home, harm):
    "The sentence names the file; deleted, as it says, the file is made again with the same bytes."
    profile, workspace = load_profile("smoke", **FEW), Workspace("smoke")
    for load, name in ((load_benchmark, "pmc_vqa-6.parquet"), (load_corpus, "corpus/pmc_vqa-20.parquet")):
        path = workspace.samples / "synthetic" / name
        list(load("pmc_vqa", profile, workspace.samples))
        whole = path.read_bytes()
        path.write_bytes(harm(whole))
        with pytest.raises(UserError, match=f"{path.name} is not a readable parquet file .*; delete it"):
            list(load("pmc_vqa", profile, workspace.samples))
        path.unlink()
        list(load("pmc_vqa", profile, workspace.samples))
        assert path.read_bytes() == whole


def test_what_a_pipeline_launched_ends_with_it(tmp_path):
    "SIGKILL leaves nobody the time to end what was started: a training that goes on unseen would hold its memory and its lock. What a notebook in JupyterLab launched goes on, as its chapter says."
    patient = "import time; from medvlthinker.core.commands import run_main; run_main(lambda words: print('ready', flush=True) or time.sleep(300))"
    launches = f"import sys; from medvlthinker.core.commands import run_logged; run_logged([sys.executable, '-c', {patient!r}], {str(tmp_path / 'log')!r}, lambda line: print(line, flush=True))"

    def left(seconds: float, **environment) -> dict:
        plain = {key: value for key, value in os.environ.items() if key != "MEDVLTHINKER_BATCH"}
        starter = subprocess.Popen([sys.executable, "-c", launches], env={**plain, "MEDVLTHINKER_HOME": str(tmp_path), **environment}, stdout=subprocess.PIPE, text=True)
        assert starter.stdout.readline() == "ready\n" and len(at_work(tmp_path)) == 2
        starter.kill()
        starter.communicate()
        return gone(tmp_path, seconds)

    assert not left(30, MEDVLTHINKER_BATCH="1")
    pid, = left(2)
    os.kill(pid, signal.SIGKILL)
