"What the scripts of this folder share; each measures one thing, alone or through tests/speed/bench.py."
import statistics
import time
from datetime import date
from typing import NamedTuple

from medvlthinker.core.files import environment_info


class Bound(NamedTuple):
    "What a measurement is held to."
    what: str
    unit: str
    bound: float  # 0 where the value is stated only
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


def quiet(line: str) -> None:
    "What a rollout shows is not measured."


def report(measure, bounds: tuple[Bound, ...]) -> None:
    "Run one measurement and print its values, with date and machine."
    what = f": {measure.__doc__}" if measure.__doc__ else ""
    print(f"{date.today()}, {environment_info()['machine']}{what}")
    try:
        for value, given in zip(measure(), bounds):
            print(f"{given.what}: {value:.4g} {given.unit} ({given.side} {given.bound:g})")
    except NotHere as reason:
        print(f"Not measured on this machine: {reason}.")
