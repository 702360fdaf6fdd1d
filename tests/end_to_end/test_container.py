"""The Dockerfile: its steps by reading, and, where a Debian can be made, by executing them in a root of their own."""
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


def instructions(text: str) -> list[tuple[str, str]]:
    "Word and rest of each instruction, without comments and with continued lines joined."
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines()]


STEPS = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def copied(rest: str) -> tuple[list[str], str]:
    "Sources and target of a COPY."
    *sources, target = [word for word in rest.split() if not word.startswith("--")]
    return sources, target


def ignored(path: str) -> bool:
    parts = path.split("/")
    return any(fnmatch.fnmatch(part, rule.removeprefix("**/")) for rule in IGNORED for part in (parts if "**" in rule else parts[:1]))


def test_what_is_copied_exists_and_is_not_left_out():
    sources = [source for word, rest in STEPS if word == "COPY" for source in copied(rest)[0]]
    assert [source for source in sources if not (ROOT / source).exists()] == [] and sources[-1] == "."
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [path for path in tracked if path and ignored(path)] == [], "nothing of the project is left out"
    assert all(map(ignored, (".env", ".venv/bin/python", "_runs/smoke/rollouts", "nbs/paper/.ipynb_checkpoints/a")))


def test_the_first_copies_hold_what_the_environment_is_made_from():
    first = [index for index, (word, rest) in enumerate(STEPS) if word == "RUN" and "./reproduce.sh setup ${SETUP}" in rest][0]
    copies = {source for word, rest in STEPS[:first] if word == "COPY" for source in copied(rest)[0]}
    assert {"reproduce.sh", "pyproject.toml", "locks", "medvlthinker", "README.md", "settings.ini"} <= copies
    assert dict(STEPS)["ENTRYPOINT"] == '["/app/reproduce.sh"]' and dict(STEPS)["USER"] != "root"


# --- executed ---


def local_pip() -> tuple[list[Path], dict[str, str]]:
    "Files, folders and variables that pip needs on this machine to find packages."
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True).stdout
    places = [Path(place) for place in re.findall(r"(?:file://)?(/[\w./-]+)", listed)]
    own = [Path("/etc/pip.conf"), Path("/etc/ssl/certs"), Path("/usr/share/ca-certificates"), Path("/usr/local/share/ca-certificates")]
    names = [name for name in os.environ if re.match(r"(PIP|SSL|REQUESTS|CURL)_|https?_proxy", name, re.I)]
    return [place for place in (*own, *places) if place.exists()], {name: os.environ[name] for name in names}


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    "A Debian with Python, as the base image has it."
    if "MEDVLTHINKER_CONTAINER" not in os.environ:
        pytest.skip("an image takes ten minutes and 3 GB from the registry; MEDVLTHINKER_CONTAINER=1 builds it")
    if not (tool := shutil.which("debootstrap")) or os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("debootstrap, root rights and a mount of its own are wanted; without them nobody builds the image here")
    root = tmp_path_factory.mktemp("debian")
    done = subprocess.run([tool, "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root, MIRROR], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no Debian could be fetched from {MIRROR}: {done.stdout.strip().splitlines()[-1:]}")
    yield root
    shutil.rmtree(root)


def execute(root: Path, command: str, user: str, folder: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    "A RUN line in the root: with /proc, /dev, and this machine's way to packages."
    places, environment = local_pip()
    mounts = [f"mount --rbind {place} {root}{place}" for place in (Path("/dev"), *places)]
    for place in places:
        target = root / str(place).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if place.is_dir() else target.touch()
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    inside = ["chroot", f"--userspec={user}", str(root), "/bin/sh", "-c", f"cd {folder} && {command}"]
    home = {"HOME": "/root" if user == "root" else f"/home/{user}", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", "\n".join(["set -e", *mounts, f"mount -t proc proc {root}/proc", 'exec "$@"']), "sh", *inside],
                          check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**environment, **home, **variables})


def copy(root: Path, rest: str, folder: str, user: str) -> None:
    "A COPY: what git knows of the sources, for a user."
    sources, target = copied(rest)
    for source in sources:
        listed = subprocess.run(["git", "ls-files", "--", source], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
        for path in filter(None, listed):
            inner = path if source == "." or not (ROOT / source).is_dir() else os.path.relpath(path, source)
            there = root / folder.lstrip("/") / target / inner
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            shutil.copy2(ROOT / path, there, follow_symlinks=False)
    subprocess.run(["chroot", str(root), "chown", "-R", user, folder], check=True)


@pytest.mark.heavy
def test_the_image_is_built_and_its_command_answers(debian):
    "Each instruction in turn; then the entry point as the user of the image."
    user, folder, variables = "root", "/", {}
    for word, rest in STEPS:
        if word in ("ARG", "ENV"):
            variables |= dict(pair.split("=", 1) for pair in rest.split())
        elif word == "USER":
            user = rest
        elif word == "WORKDIR":
            folder = rest
        elif word == "COPY":
            copy(debian, rest, folder, user)
        elif word == "RUN":
            done = execute(debian, rest, user, folder, variables)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for words, answer in (("--help", "./reproduce.sh setup"), ("status smoke", "1_data"), ("smoke limit=2 --dry-run", "1_data")):
        done = execute(debian, f"./reproduce.sh {words}", user, folder, variables)
        assert done.returncode == 0 and answer in done.stdout, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (debian / "runs").stat().st_uid == (debian / folder.lstrip("/")).stat().st_uid == 1000
