"How fast PMC-VQA becomes stored samples."
import io
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import Bound, last_line
from medvlthinker.data.corpora import load_corpus
from medvlthinker.data.readers import DataSettings
from PIL import Image

BOUNDS = (
    Bound("conversion of 177,000 rows with 600x598 JPEGs", "rows/s", 1500, "at least"),
    Bound("conversion of 177,000 rows, peak memory", "GiB", 1.5e9 / 2**30),
    Bound("conversion, seconds for ten times the rows", "x", 11),
    Bound("conversion of 1600 x 1200 to 1024 x 768, by decode, resize and PNG", "x", 1.15),
    Bound("the same, a row", "CPU ms", 0))
CONVERT = """
import json, resource, sys, time
from medvlthinker.data.corpora import load_corpus
from medvlthinker.data.readers import DataSettings
began = time.perf_counter()
samples = load_corpus("pmc_vqa", DataSettings(data_dir=sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([len(samples), time.perf_counter() - began, peak]))
"""
HEAD = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
ROW = ("{n}.jpg, What does the arrow in panel {n} point at? ,a nodule, A:a vessel , B:a nodule , "
       "C:an artefact , D:the heart ,B\n")


def figures(number: int = 64, size: tuple[int, int] = (600, 598)) -> list[bytes]:
    "JPEGs, of about 60 kB at this size: large smooth shapes and a little grain, as in a photograph of a slide."
    rng, made = np.random.default_rng(0), []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 2.2, (*size[::-1], 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=85)
        made.append(file.getvalue())
    return made


def make_copy(folder: Path, rows: int, pictures: list[bytes]) -> Path:
    "A local copy of PMC-VQA with so many rows, each with a figure file of its own name."
    images = folder / "PMC-VQA" / "images"
    images.mkdir(parents=True)
    for number, data in enumerate(pictures):
        (images / f"figure{number}.jpg").write_bytes(data)
    for n in range(rows):
        os.link(images / f"figure{n % len(pictures)}.jpg", images / f"{n}.jpg")
    with open(folder / "PMC-VQA" / "train.csv", "w", encoding="utf-8") as file:
        file.write(HEAD)
        file.writelines(ROW.format(n=n) for n in range(rows))
    return folder


def resize_plainly(pictures: list[bytes]) -> None:
    for data in pictures:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        small = picture.resize((1024, 768), Image.Resampling.BILINEAR)
        small.save(io.BytesIO(), "PNG", compress_level=1)


def resized(rows: int = 48, turns: int = 5) -> tuple[list[float], list[float]]:
    "CPU seconds of a corpus of large figures by those of a plain loop, in turns; CPU ms a row."
    pictures, ratios, each = figures(rows, (1600, 1200)), [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = DataSettings(data_dir=str(make_copy(Path(folder) / "data", rows, pictures)))
        for turn in range(turns + 1):
            began = time.process_time()
            load_corpus("pmc_vqa", settings, Path(folder) / f"samples{turn}")
            between = time.process_time()
            resize_plainly(pictures)
            ratios.append((between - began) / (time.process_time() - between))
            each.append((between - began) / rows * 1000)
    return ratios[1:], each[1:]  # the first turn imports


def conversion():
    "CSV and JPEGs to parquet, each image decoded: 17,700 rows, then 177,000 (10 GB of figures)."
    free, pictures, taken = shutil.disk_usage(tempfile.gettempdir()).free, figures(), []
    small = 17_700 if free > 14e9 else 1_770
    if small < 17_700:
        print(f"    a tenth of the rows only: {free / 1e9:.0f} GB of disk are free, all take 14")
    for rows in (small, 10 * small):
        with tempfile.TemporaryDirectory() as folder:
            source = make_copy(Path(folder) / "data", rows, pictures)
            count, spent, memory = last_line(
                "-c", CONVERT, source, MEDVLTHINKER_HOME=f"{folder}/home")
            assert count == rows
            taken.append(spent)
    yield 10 * small / taken[1]
    yield memory
    yield taken[1] / taken[0]
    yield from resized()
