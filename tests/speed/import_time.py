"What the import of the grader costs over a bare interpreter."
import os
import subprocess
import sys

from measuring import ROOT, Bound, alternate

BOUNDS = (Bound("import of medvlthinker.core.grade over a bare interpreter", "ms", 50),)


def import_time():
    "`import medvlthinker.core.grade` and `pass` in turns, 15 each."
    compiled = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}

    def start(code):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=compiled)

    turns = alternate(lambda: start("import medvlthinker.core.grade"), lambda: start("pass"), 15)
    yield [1000 * (ours - bare) for ours, bare in turns]
