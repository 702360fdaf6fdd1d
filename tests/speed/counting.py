"What it costs to count the right ones of 3.2 million answers."
import time
from dataclasses import replace

import stored
from measuring import Bound
from medvlthinker.difficulty.pass_counts import keep_band, pass_counts
from medvlthinker.evaluation.evaluate import grade_rollout

BOUNDS = (Bound("pass counts of 200,000 x 16 answers", "CPU s", 50),)
QUESTIONS = [stored.question(place) for place in range(500)]


class Rows(list):
    "Rows of a rollout, repeated; none is held twice."

    def __len__(self) -> int:
        return 200_000

    def __iter__(self):
        return (self[place % 500] for place in range(len(self)))


def row(sample) -> dict:
    "Sixteen answers of about 1,000 characters."
    answers = [stored.completion(sample.options) for _ in range(16)]
    return {"completions": [{"text": answer.text, "finish_reason": answer.finish_reason,
                             "tokens": answer.tokens} for answer in answers]}


def counting():
    "200,000 questions, 16 answers of about 1,000 characters to each, graded by `strict`."
    rows = Rows(map(row, QUESTIONS))
    samples = (replace(QUESTIONS[place % 500], dataset_index=place) for place in range(len(rows)))
    began = time.process_time()
    kept = keep_band(pass_counts(grade_rollout(samples, rows, ("strict",))))
    assert len(kept) == 200_000
    yield time.process_time() - began
