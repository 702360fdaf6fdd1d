"Questions and completions as they are stored, in any number, and rollouts of them."
import random
import tempfile
from pathlib import Path

from measuring import quiet
from medvlthinker.app.profile import Workspace
from medvlthinker.data.sample import Sample, SampleFile, write_samples
from medvlthinker.generation.engine import FunctionEngine, open_engine
from medvlthinker.generation.request import Completion, EngineSettings, Sampling
from medvlthinker.generation.rollout import Rollout, generate

SENTENCES = (
    "The {a} shows a {b} {c} in the {d} {e}.",
    "There is no {c} of the {e}, and the {d} margin is {b}.",
    "Option {x} would need a {b} {c}, which is not seen here.",
    "On this view the {e} is {b}, so a {c} is the most likely finding.",
    "A {c} of the {d} {e} is {b} in most patients, but the {a} alone cannot prove it.",
    "First, consider {x}: the {a} would then show a {b} {e}.",
    "This rules out ({x}), since the {d} {e} has no {c}.")
FILL = {
    "a": ("radiograph", "axial CT image", "T2 weighted MRI", "slide", "photograph", "ultrasound"),
    "b": ("dense", "faint", "round", "calcified", "well defined", "irregular"),
    "c": ("lesion", "effusion", "nodule", "fracture", "haemorrhage", "thickening"),
    "d": ("left", "right", "upper", "lower", "medial", "posterior"),
    "e": ("lobe", "ventricle", "cortex", "kidney", "artery", "pleura"), "x": "ABCD"}
ENDINGS = (  # shapes in which models write, of a hundred; the last was cut off
    ("<think> {text} </think>\n<answer> {x} </answer>", 70),
    ("<think> {text} </think>\n<answer> {x}. {words} </answer>", 10),
    ("<think> {text} </think>\n<answer>\n{words}\n</answer>", 5),
    ("{text}\n\nThe correct answer is ({x}).", 5), ("{text}\n\n**Answer: {x}**", 5),
    ("<think> {text}", 5))
RNG = random.Random(0)
WRITTEN = [RNG.choice(SENTENCES).format(**{key: RNG.choice(words) for key, words in FILL.items()})
           for _ in range(5000)]
FINDINGS = [f"{b} {c}" for b in FILL["b"] for c in FILL["c"]]


def question(place: int, image: bytes = b"") -> Sample:
    "A question with four options; its image, if any, is one of its own."
    options = dict(zip("ABCD", RNG.sample(FINDINGS, 4)))
    label = RNG.choice("ABCD")
    images = (image + place.to_bytes(4, "big"),) if image else ()
    return Sample(RNG.choice(WRITTEN), options, label, options[label], images,
                  dataset_name="pmc_vqa", dataset_index=place)


def completion(options: dict) -> Completion:
    "A completion of about 1,000 characters that no other repeats."
    shape = RNG.choices([shape for shape, _ in ENDINGS], [share for _, share in ENDINGS])[0]
    label = RNG.choice("ABCD")
    text = " ".join(RNG.choices(WRITTEN, k=15))
    return Completion(shape.format(text=text, x=label, words=options[label]), "stop", 250)


def write_questions(folder: Path, number: int, image: bytes = b"") -> SampleFile:
    "The file of so many questions."
    path = folder / "samples.parquet"
    write_samples([question(place, image) for place in range(number)], path)
    return SampleFile(path)


def tiny_engine(**settings):
    "The embedded model of the profile smoke."
    checkpoints = str(Workspace("smoke").checkpoints)
    return open_engine(EngineSettings(model="tiny", checkpoints=checkpoints, **settings))


def ask_all(samples, engine, sampling: Sampling) -> None:
    "A rollout, written to the end and removed."
    with tempfile.TemporaryDirectory() as folder:
        generate(samples, engine, sampling, folder, quiet)


def write_rollout(samples: SampleFile, n: int, folder: Path) -> Rollout:
    "A finished rollout with n distinct completions a question."
    engine = FunctionEngine(lambda request: [completion(request.sample.options) for _ in range(n)])
    rollout = generate(samples, engine, Sampling(n=n), folder, quiet)
    print(f"    {len(samples) * n:,} completions, {rollout.record['bytes'] / 1e6:.0f} MB")
    return rollout
