"What the tests of this folder read of a rollout's files and of the processes that write them."
import time
from collections import Counter
from pathlib import Path

from medvlthinker.generation.rollout import from_line


def contents(folder: Path, name: str = "rollout.jsonl") -> dict[str, bytes]:
    "The bytes of the files below a folder."
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(name)}


def whole_lines(folder: Path) -> Counter:
    "Whole lines below a folder; each should be there once."
    files = contents(folder).values()
    return Counter(line for data in files for line in data.splitlines(True) if from_line(line))


def descendants(pid: int) -> list[int]:
    "The processes that a process has started, and theirs."
    found = []
    for place in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, place.read_text().split()):
            found += [child, *descendants(child)]
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def still_there(pids: list[int], seconds: float = 30) -> dict[int, str]:
    "Which of these processes live on, after so many seconds at most."
    end = time.monotonic() + seconds
    while (left := {pid: words for pid in pids if (words := command(pid))}):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left
