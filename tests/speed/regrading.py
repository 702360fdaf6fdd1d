"What it costs to grade 526,080 stored completions under all five rules."
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, Bound, report
from stored import write_questions, write_rollout

BOUNDS = (
    Bound("526,080 stored completions re-graded, five rules, all processes", "CPU s", 40),
    Bound("the same, by the clock", "s", 40),
    Bound("re-grading, peak memory of all processes together", "GiB", 1.5e9 / 2**30))
REGRADE = """
import json, resource, sys, time
from medvlthinker.core.grade import RULES
from medvlthinker.evaluation.evaluate import cores, grade_rollout, question_scores
from medvlthinker.generation.rollout import load_rollout
from medvlthinker.data.sample import SampleFile
if __name__ == "__main__":
    began = time.perf_counter()
    grades = grade_rollout(SampleFile(sys.argv[1]), load_rollout(sys.argv[2]))
    lines = sum(len(question_scores(grades, rule)) for rule in RULES)
    taken = time.perf_counter() - began
    own, others = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(use.ru_utime + use.ru_stime for use in (own, others))
    memory = (own.ru_maxrss + cores() * others.ru_maxrss) / 2**20
    print(json.dumps([lines, cpu, taken, memory]))
"""


def regrading():
    "8,220 questions with an image of 50 kB, 64 answers of about 1,000 characters to each."
    with tempfile.TemporaryDirectory() as folder:
        samples = write_questions(Path(folder), 8220, os.urandom(50_000))
        rollout = write_rollout(samples, 64, Path(folder))
        (script := Path(folder) / "regrade.py").write_text(REGRADE)
        done = subprocess.run(
            [sys.executable, str(script), str(samples.path), str(rollout.folder)], check=True,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines, *values = json.loads(done.stdout.splitlines()[-1])
    assert lines == 8220 * 5
    yield from values


if __name__ == "__main__":
    report(regrading, BOUNDS)
