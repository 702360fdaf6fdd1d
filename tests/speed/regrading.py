"What it costs to grade 526,080 stored completions under all five rules."
import os
import tempfile
from pathlib import Path

from measuring import Bound, last_line
from stored import write_questions, write_rollout

BOUNDS = (
    Bound("526,080 stored completions re-graded, five rules", "CPU s", 40),
    Bound("re-grading, peak memory", "GiB", 1.5e9 / 2**30))
REGRADE = """
import json, resource, sys
from medvlthinker.core.grade import RULES
from medvlthinker.evaluation.evaluate import grade_rollout, question_scores
from medvlthinker.generation.rollout import load_rollout
from medvlthinker.data.sample import SampleFile
grades = grade_rollout(SampleFile(sys.argv[1]), load_rollout(sys.argv[2]))
lines = sum(len(question_scores(grades, rule)) for rule in RULES)
use = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([lines, use.ru_utime + use.ru_stime, use.ru_maxrss / 2**20]))
"""


def regrading():
    "8,220 questions with an image of 50 kB, 64 answers of about 1,000 characters to each."
    with tempfile.TemporaryDirectory() as folder:
        samples = write_questions(Path(folder), 8220, os.urandom(50_000))
        rollout = write_rollout(samples, 64, Path(folder))
        lines, *values = last_line("-c", REGRADE, samples.path, rollout.folder)
    assert lines == 8220 * 5
    yield from values
