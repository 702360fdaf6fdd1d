"What each call of the command line, and each step of a run, takes before its work begins."
import resource
import subprocess
import sys

from measuring import ROOT, Bound, report

HELP = ["-m", "medvlthinker.app.cli", "--help"]
STEP = ["-c", "from medvlthinker.core.plots import skip_uri_grammar; skip_uri_grammar()\n"
        "import medvlthinker.app.cli, medvlthinker.app.workflow, nbformat, papermill"]
BOUNDS = (Bound("medvlthinker --help over a bare interpreter", "CPU s", 0.3),
          Bound("a step up to its kernel over a bare interpreter", "CPU s", 1.0))


def cpu_seconds(words: list[str]) -> float:
    "User and system time of a process that Python starts with these words."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=False, cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command_start():
    "Processes of each kind and bare ones in turns, 7 each; CPU time, for machines are shared."
    for words in (HELP, STEP):
        yield [cpu_seconds(words) - cpu_seconds(["-c", "pass"]) for _ in range(7)]


if __name__ == "__main__":
    report(command_start, BOUNDS)
