"What a rollout by transformers costs over bare generate."
import sys
import tempfile

from measuring import Bound, alternate, quiet, report
from medvlthinker.data import synthetic
from medvlthinker.app.profile import Workspace
from medvlthinker.generation.engine import batches, open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import generate

BOUNDS = (
    Bound("rollout over bare generate (tiny model, inputs prepared beforehand)", "x", 1.6),
    Bound("rollout, our own cost per question (decode, template, processor, files)", "ms", 10))


def transformers_rate(model: str = "tiny"):
    "A rollout over `generate` on inputs prepared beforehand: 200 questions, five turns each."
    import torch

    torch.set_num_threads(1)
    checkpoints = str(Workspace("smoke").checkpoints)
    engine = open_engine(EngineSettings(model=model, checkpoints=checkpoints))
    samples, sampling = synthetic.benchmark("pmc_vqa", 200), Sampling(max_tokens=64)
    asked = [Request(sample, i, sampling) for i, sample in enumerate(samples)]
    list(engine.answer(asked[:1]))  # loads
    loaded, prepared = engine._loaded, []
    for batch in batches(asked, engine.batch_size):
        texts, images = zip(*map(loaded._inputs, batch))
        prepared.append(loaded.processor(text=list(texts), images=sum(images, []), padding=True,
                                         return_tensors="pt"))

    def bare():
        with torch.inference_mode():
            for inputs in prepared:
                loaded.model.generate(**inputs, max_new_tokens=64, do_sample=False)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            generate(samples, engine, sampling, folder, quiet)

    turns = alternate(ours, bare)
    yield [whole / alone for whole, alone in turns]
    yield [1000 * (whole - alone) / len(samples) for whole, alone in turns]


if __name__ == "__main__":
    report(lambda: transformers_rate(*sys.argv[1:2]), BOUNDS)
