"What a rollout costs beside the model: an engine that answers at once."
import tempfile
import time
from pathlib import Path

from measuring import Bound
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Sampling
from stored import ask_all, completion, write_questions

BOUNDS = (
    Bound("our own cost a sample, 100,000 text questions, n=1", "ms", 1),
    Bound("our own cost a sample, 100,000 text questions, n=4", "ms", 1),
    Bound("our own cost a sample, image decoded, 2,000 questions, n=4", "ms", 1))


def cost(samples, n: int) -> float:
    "Milliseconds of processor time a sample: read, made into messages, stored."
    options = dict(zip("ABCD", ("lung", "heart", "liver", "spleen")))
    ready = [completion(options) for _ in range(n)]

    def answer(request):
        request.chat()
        return ready

    began, wall = time.process_time(), time.perf_counter()
    ask_all(samples, FunctionEngine(answer), Sampling(n=n))
    spent, wall = time.process_time() - began, time.perf_counter() - wall
    print(f"    {len(samples):,} questions, n={n}: {wall:.1f} s on the clock", flush=True)
    return 1000 * spent / len(samples)


def own_cost():
    "Questions from their file to a finished rollout, by an engine that answers at once."
    with tempfile.TemporaryDirectory() as folder:
        samples = write_questions(Path(folder), 100_000)
        yield cost(samples, 1)
        yield cost(samples, 4)
    images = synthetic.benchmark("pmc_vqa", 2000)
    yield [cost(images, 4) for _ in range(3)]
