"How long it takes to look for test items in a corpus of PMC-VQA's size."
import io
import random

import numpy as np
from measuring import Bound, cpu_seconds, seconds
from medvlthinker.data import overlap as module
from medvlthinker.data import synthetic
from medvlthinker.data.sample import Sample
from PIL import Image

BOUNDS = (
    Bound("overlap of 400 and 600 drawn items, which all look alike", "CPU s", 8),
    Bound("preparing 8,220 test items", "CPU s", 20),
    Bound("overlap of 200,000 training and 8,220 test items, in full", "s", 300),
    Bound("planted crops found among them", "of 100", 95, "at least"))
RNG, LETTERS = np.random.default_rng(0), random.Random(0)
GRAIN = RNG.integers(-14, 15, (1198, 1200, 3))


def word() -> str:
    pairs = range(LETTERS.randint(1, 5))
    return "".join(LETTERS.choice("bcdfghlmnprstvxz") + LETTERS.choice("aeiouy") for _ in pairs)


WORDS = [word() for _ in range(20_000)]


def as_jpeg(picture: Image.Image) -> bytes:
    picture.save(file := io.BytesIO(), "JPEG", quality=80)
    return file.getvalue()


def drawn(width: int, height: int) -> bytes:
    "Blotches under grain; about 60 kB at 600 x 598."
    coarse = Image.fromarray(RNG.integers(0, 256, (10, 10, 3), np.uint8))
    blotches = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    y, x = RNG.integers(0, 598), RNG.integers(0, 600)
    pixels = np.clip(blotches + GRAIN[y:y + height, x:x + width], 0, 255)
    return as_jpeg(Image.fromarray(pixels.astype(np.uint8)))


def item(name: str, number: int, data: bytes) -> Sample:
    question = " ".join(random.Random(f"{name}{number}").choices(WORDS, k=15))
    return Sample(question, {"A": "yes", "B": "no"}, "A", "yes", (data,), dataset_name=name,
                  dataset_index=number)


def overlap():
    "Drawn scans; then questions of 15 words, each with an image: from bytes to pairs, two threads."
    corpora = {name: synthetic.corpus(name, 200) for name in synthetic.CORPORA}
    drawings = [s for name in synthetic.BENCHMARKS for s in synthetic.benchmark(name, 100)]
    yield cpu_seconds(lambda: module.overlap(corpora, drawings))
    test = [item("test", number, drawn(300, 300)) for number in range(8220)]
    yield cpu_seconds(lambda: module.SampleIndex(test))
    pool = [drawn(600, 598) for _ in range(2000)]
    planted = {}
    for number, sample in enumerate(test[:100]):
        crop = Image.open(io.BytesIO(sample.images[0])).crop((20, 10, 290, 280))
        planted[1999 * number] = as_jpeg(crop.resize((600, 598)))

    def train():  # bytes after the end of a JPEG make another file of the same picture
        for number in range(200_000):
            picture = pool[number % 2000] + number.to_bytes(4, "big")
            yield item("train", number, planted.get(number) or picture)

    pairs = []
    yield seconds(lambda: pairs.append(module.overlap({"train": train()}, test)))
    images = pairs[0][pairs[0].level == "image"]
    found = {*zip(images.train_index, images.test_index)}
    hits = len(found & {(1999 * number, number) for number in range(100)})
    print(f"    other pairs at an image level: {len(found) - hits}")
    yield hits
