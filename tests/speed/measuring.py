"What the scripts of this folder share; each measures one thing, and bench.py runs it."
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

from medvlthinker.core.files import environment_info

ROOT = Path(__file__).resolve().parents[2]


class Bound(NamedTuple):
    "What a measurement must keep."
    what: str
    unit: str
    bound: float  # 0 where the value is only stated
    side: str = "at most"


class NotHere(Exception):
    "Why this machine cannot measure it."


def seconds(act, times: int = 1) -> float:
    "The median wall time of a call."
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def cpu_seconds(act) -> float:
    "Processor time of a call: of this process, and of those that it has started and seen end."
    began = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    act()
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
               for begin, end in zip(began, ended))


def last_line(*words, **environment: str):
    "What a process that Python starts with these words prints last, read as JSON."
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])


def alternate(ours, rival, turns: int = 5, before=lambda: None) -> list[tuple[float, float]]:
    "Seconds of ours and of the rival, in turns; who comes first changes, and one turn warms up."
    taken = []
    for turn in range(turns + 1):  # what runs later finds a warmer machine
        found = {}
        for act in (rival, ours) if turn % 2 else (ours, rival):
            before()
            found[act] = seconds(act)
        taken.append((found[ours], found[rival]))
    ours_seconds, rival_seconds = (statistics.median(column) for column in zip(*taken[1:]))
    print(f"    {turns} turns: ours {ours_seconds:.3g} s, the rival {rival_seconds:.3g} s",
          flush=True)
    return taken[1:]


def quiet(line: str) -> None:
    "What a rollout shows is not measured."


def report(measure, bounds: tuple[Bound, ...]) -> int:
    "Run one measurement and print its values, each with its spread; how many bounds are missed."
    missed = 0
    print(f"{measure.__name__}: {measure.__doc__}\n    {date.today()}, "
          f"{environment_info()['machine']}, load {os.getloadavg()[0]:.1f}", flush=True)
    try:
        for found, (what, unit, bound, side) in zip(measure(), bounds):
            values = found if isinstance(found, list) else [found]
            value = statistics.median(values)
            kept = not bound or (value <= bound if side == "at most" else value >= bound)
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            missed += not kept
            verdict = f", {side} {bound:g}: {'holds' if kept else 'DOES NOT HOLD'}" * (bound > 0)
            print(f"    {what}: {value:.4g} {unit}{spread}{verdict}", flush=True)
    except NotHere as reason:
        print(f"    Not measured on this machine: {reason}.")
    return missed
