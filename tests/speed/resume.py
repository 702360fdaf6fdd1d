"How long a rollout of 100,000 questions takes that is asked for again."
import json
import tempfile
from pathlib import Path

from measuring import Bound, quiet, seconds
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Sampling
from medvlthinker.generation.rollout import generate, samples_fingerprint
from stored import completion, write_questions, write_rollout

BOUNDS = (
    Bound("resuming a finished rollout of 100,000 rows", "s", 3),
    Bound("resuming an unfinished rollout of 100,000 rows, 100 of them missing", "s", 3))


def resume():
    "100,000 questions, an answer of about 1,000 characters each, the fingerprint included."
    asked = []

    def answer(request):
        asked.append(request.index)
        return [completion(request.sample.options)]

    engine = FunctionEngine(answer)
    with tempfile.TemporaryDirectory() as folder:
        samples = write_questions(Path(folder), 100_000)
        anew = seconds(lambda: samples_fingerprint(samples))
        print(f"    {anew:.1f} s for the fingerprint of the samples, which is noted beside them")
        rollout = write_rollout(samples, 1, Path(folder))
        again = lambda: generate(samples, engine, Sampling(), folder, quiet)
        yield seconds(again, times=3)
        assert not asked, "it is finished, and yet something was asked"
        lines = rollout.path.read_bytes().splitlines(True)
        (record := rollout.folder / "rollout.json").write_text(
            json.dumps({**rollout.record, "finished": None}))
        rollout.path.write_bytes(b"".join(lines[100:]))  # in an order of its own, too
        yield seconds(again)
        assert asked == [*range(100)] and json.loads(record.read_text())["finished"]
