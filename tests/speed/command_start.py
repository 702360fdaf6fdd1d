"What each call of the command line, and each step of a run, takes before its work begins."
import subprocess
import sys

from measuring import ROOT, Bound, cpu_seconds

HELP = ["-m", "medvlthinker.app.cli", "--help"]
STEP = ["-c", "from medvlthinker.core.plots import skip_uri_grammar; skip_uri_grammar()\n"
        "import medvlthinker.app.cli, medvlthinker.app.workflow, nbformat, papermill"]
BOUNDS = (Bound("medvlthinker --help over a bare interpreter", "CPU s", 0.3),
          Bound("a step up to its kernel over a bare interpreter", "CPU s", 1.0))


def start(words: list[str]) -> float:
    "CPU seconds of a process that Python starts with these words."
    return cpu_seconds(lambda: subprocess.run([sys.executable, *words], check=False, cwd=ROOT,
                                              capture_output=True))


def command_start():
    "Processes of each kind and bare ones in turns, 7 each; CPU time, for machines are shared."
    for words in (HELP, STEP):
        yield [start(words) - start(["-c", "pass"]) for _ in range(7)]
