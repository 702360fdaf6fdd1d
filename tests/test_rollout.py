"""A rollout survives SIGKILL: the same bytes as without, no question lost, none asked into two shards."""
import contextlib
import json
import multiprocessing
import random
import time

import pytest
from medvlthinker.data import synthetic
from medvlthinker.core.files import UserError, fingerprint
from medvlthinker.difficulty.profile import load_profile
from medvlthinker.generation.engine import Sampling, engine_version
from medvlthinker.generation.rollout import identity, read_shard, generate

PROFILE = load_profile("smoke", batch_size=8)
SAMPLING = Sampling(n=2, temperature=1.0, max_tokens=24)  # sampled, so that a wrong seed after a restart shows


def act(model: str, samples: list, folder) -> None:
    "One rollout with the real engine, as a process of its own."
    import torch
    from medvlthinker.generation.engine import open_engine

    torch.set_num_threads(1)
    who = identity(samples, model, PROFILE, SAMPLING)
    generate(samples, lambda: open_engine(PROFILE, model), folder, who, engine_version("transformers"), show=lambda line: None)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")  # imports torch once, in the server; each process then starts at once
    context.set_forkserver_preload(["torch", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
                                    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto", "medvlthinker.generation.rollout"])
    return context


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from medvlthinker.generation.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, steps=0))


def shards(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_ten_kills(processes, model, tmp_path, tally):
    samples = synthetic.benchmark("pmc_vqa", 60) + synthetic.benchmark("slake_closed", 20)

    def start(folder):
        process = processes.Process(target=act, args=(model, samples, folder))
        process.start()
        return process

    start(tmp_path / "warm").join()  # pays for the forkserver's imports
    began = time.monotonic()
    (whole := start(tmp_path / "whole")).join()
    seconds = time.monotonic() - began
    assert whole.exitcode == 0
    expected = shards(tmp_path / "whole")
    assert len(expected) == 10

    rng, in_the_middle = random.Random(20), 0
    with tally("faults", "SIGKILL of a rollout", seed=20) as count:
        for trial in range(10):
            folder = tmp_path / f"killed-{trial}"
            count.tried += 1
            process, wanted = start(folder), rng.randrange(1, 9)
            if trial % 2:  # at any moment of the run
                process.join(rng.uniform(0.05, 0.95) * seconds)
            while not trial % 2 and process.is_alive() and len(list(folder.glob("shard-*"))) < wanted:  # in the middle for certain, however fast the machine is today
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.join()
            assert process.exitcode in (-9, 0)
            before = shards(folder)
            in_the_middle += 0 < len(before) < len(expected)
            assert before.items() <= expected.items(), "a shard that is there is whole and right"
            (again := start(folder)).join()
            assert again.exitcode == 0
            assert shards(folder) == expected
            assert not list(folder.glob(".*.part")), "nothing half-written is left behind"
            count.survived += 1
    rows = [row for path in sorted(folder.glob("shard-*")) for row in read_shard(path)[1]]
    assert [(row["dataset_name"], row["dataset_index"]) for row in rows] == [(s.dataset_name, s.dataset_index) for s in samples]
    assert in_the_middle >= 4, f"only {in_the_middle} of ten kills met a half-finished rollout; the test proves little"


def test_two_processes_share_the_work(processes, model, tmp_path, tally):
    "Two at once on one folder: the second waits, and the bytes are those of one."
    samples = synthetic.benchmark("pmc_vqa", 24)
    with tally("faults", "two rollouts at once, one folder") as count:
        both = [processes.Process(target=act, args=(model, samples, tmp_path / "shared")) for _ in range(2)]
        count.tried += 1
        alone = processes.Process(target=act, args=(model, samples, tmp_path / "alone"))
        for process in (*both, alone):
            process.start()
        for process in (*both, alone):
            process.join()
            assert process.exitcode == 0
        assert shards(tmp_path / "shared") == shards(tmp_path / "alone")
        count.survived += 1


DAMAGES = {  # what a disk, a copy that broke off or an editor does to a file
    "a flipped byte": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "a flipped byte in its first line": lambda data: data.replace(b'"seed": 4', b'"seed": 5', 1),
    "cut off in the middle": lambda data: data[:len(data) // 2],
    "its last page zeroes": lambda data: data[:-100] + bytes(100),
    "empty": lambda data: b"",
    "its last line gone": lambda data: data[:data.rindex(b"\n", 0, -1) + 1],
}


def test_damaged_shards_are_noticed_and_made_anew(model, tmp_path, tally):
    samples = synthetic.benchmark("pmc_vqa", 8 * len(DAMAGES))
    act(model, samples, tmp_path)
    expected = shards(tmp_path)
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(tally("faults", f"a shard of completions: {damage}")) for damage in DAMAGES]
        for path, damage, count in zip(sorted(expected), DAMAGES.values(), counts, strict=True):
            count.tried += 1
            (tmp_path / path).write_bytes(damage(expected[path]))
            assert (tmp_path / path).read_bytes() != expected[path] and read_shard(tmp_path / path) is None
        act(model, samples, tmp_path)
        assert shards(tmp_path) == expected
        for count in counts:
            count.survived += 1


def test_another_setting_is_another_rollout(model):
    samples = synthetic.benchmark("pmc_vqa", 4)
    base = identity(samples, model, PROFILE, SAMPLING)
    changed = [identity(samples[:3], model, PROFILE, SAMPLING), identity(samples, model, PROFILE, Sampling(n=3)),
               identity(samples, model, load_profile("smoke", batch_size=9), SAMPLING), identity(samples, model, PROFILE, SAMPLING, "newline"),
               identity(samples, model, load_profile("smoke", batch_size=8, seed=1), SAMPLING)]
    assert len({fingerprint(who) for who in [base, *changed]}) == 6
    assert fingerprint(base) == fingerprint(json.loads(json.dumps(base)))


def test_a_full_disk_keeps_what_was_finished(model, tmp_path, tally):
    "On a file system of 300 kB: one sentence, whole shards kept, and with room again the run goes on."
    import os
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root); the full disk is not tested")
    try:
        with tally("faults", "full disk, a rollout") as count:
            (ballast := disk / "ballast").write_bytes(b"x" * 282_000)  # leaves six pages of 4 kB
            count.tried += 1
            samples = synthetic.benchmark("pmc_vqa", 60)
            with pytest.raises(UserError, match="cannot be written .No space left on device.; what was finished before is kept"):
                act(model, samples, disk / "run")
            kept = shards(disk / "run")
            assert 0 < len(kept) < 8 and all(read_shard(disk / "run" / name) for name in kept)
            ballast.unlink()
            act(model, samples, disk / "run")
            act(model, samples, tmp_path / "elsewhere")
            assert shards(disk / "run") == shards(tmp_path / "elsewhere")
            count.survived += 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
