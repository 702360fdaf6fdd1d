"The default profile from nothing to tables, and the test suite."
import contextlib
import os
import subprocess
import tempfile
import threading
import time

import psutil
from measuring import ROOT, Bound
from medvlthinker.core.files import UserError

BOUNDS = (
    Bound("./reproduce.sh, the whole of smoke, set up before", "s", 420),
    Bound("of that, the processor's time", "CPU s", 900),
    Bound("of that, until the first accuracy stands on the screen", "s", 120),
    Bound("of that, peak memory of all processes together", "GiB", 4e9 / 2**30),
    Bound("second ./reproduce.sh", "s", 10),
    Bound("./reproduce.sh results, after a run", "s", 60),
    Bound("./reproduce.sh test", "s", 360))


def memory(process) -> int:
    "Bytes of a process; what several share counts once."
    try:
        return process.memory_full_info().pss
    except (psutil.Error, AttributeError):  # it has ended, or the system does not say
        return 0


def run(home: str, *words: str) -> tuple[float, float, float, float]:
    "Seconds, CPU seconds, seconds until an accuracy is shown, peak GiB of ./reproduce.sh."
    began, before, first, most, done = time.perf_counter(), os.times(), 0.0, [0], threading.Event()
    process = psutil.Popen(["./reproduce.sh", *words], cwd=ROOT, stdin=subprocess.DEVNULL, text=True,
                           stdout=subprocess.PIPE, env={**os.environ, "MEDVLTHINKER_HOME": home})

    def watch():
        while not done.wait(1):
            with contextlib.suppress(psutil.Error):
                most.append(sum(map(memory, [process, *process.children(recursive=True)])))

    (watcher := threading.Thread(target=watch)).start()
    for line in process.stdout:
        first = first or ("% right on average" in line) * (time.perf_counter() - began)
    code, taken, after = process.wait(), time.perf_counter() - began, os.times()
    done.set()
    watcher.join()
    if code:
        raise UserError(f"./reproduce.sh {' '.join(words)} ended with exit code {code}; what it "
                        "took says nothing. Run it by itself.")
    used = sum(after[2:4]) - sum(before[2:4])  # of the processes that were waited for
    return taken, used, first or taken, max(most) / 2**30


def whole():
    "Data, curation, six recipes, evaluation, results and audit; again; and the tests."
    with tempfile.TemporaryDirectory() as home:
        yield from run(home, "smoke")
        yield [run(home, "smoke")[0] for _ in range(3)]
        yield run(home, "results", "smoke")[0]
        yield run(home, "test")[0]
