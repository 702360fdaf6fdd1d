"""`./reproduce.sh bench [NAME ...] [--list]`: the measurements of this folder, all or those named.

Each prints value, spread, bound, load, date and machine. What has a rival is measured in turns with
it, for machines are shared. The exit code is 1 where a bound does not hold; what this machine
cannot measure is no failure. `--list` names them and their bounds."""
import importlib
from pathlib import Path

from measuring import report
from medvlthinker.core.commands import run_main
from medvlthinker.core.files import UserError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py")
               if "\nBOUNDS = " in path.read_text(encoding="utf-8"))


def main(words: list[str]) -> int:
    "Run the named measurements, or all, or list them."
    if unknown := [word for word in words if word not in (*NAMES, "--list")]:
        raise UserError(f"No measurement {', '.join(unknown)}; known are {', '.join(NAMES)}.")
    missed = 0
    for name in [word for word in words if word in NAMES] or NAMES:
        module = importlib.import_module(name)
        if "--list" not in words:
            missed += report(getattr(module, name), module.BOUNDS)
            continue
        print(f"{name}: {getattr(module, name).__doc__}")
        for what, unit, bound, side in module.BOUNDS:
            print(f"    {what}: {side} {bound:g} {unit}")
    return int(missed > 0)


if __name__ == "__main__":
    run_main(main)
