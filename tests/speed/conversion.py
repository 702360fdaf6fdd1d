"How fast PMC-VQA becomes stored samples."
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measuring import ROOT, Bound, report
from PIL import Image

BOUNDS = (
    Bound("conversion of 177,000 rows with 600x598 JPEGs", "rows/s", 1500, "at least"),
    Bound("conversion of 177,000 rows, peak memory", "GiB", 1.5e9 / 2**30),
    Bound("conversion, seconds for ten times the rows", "x", 11))
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


def figures(number: int = 64) -> list[bytes]:
    "JPEGs of about 60 kB: large smooth shapes and a little grain, as in a photograph of a slide."
    rng, made = np.random.default_rng(0), []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((600, 598), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 2.2, (598, 600, 1))).clip(0, 255).astype(np.uint8)
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


def conversion():
    "CSV and JPEGs to parquet, each image decoded: 17,700 rows, then 177,000 (10 GB of figures)."
    free, pictures, taken = shutil.disk_usage(tempfile.gettempdir()).free, figures(), []
    small = 17_700 if free > 14e9 else 1_770
    if small < 17_700:
        print(f"    a tenth of the rows only: {free / 1e9:.0f} GB of disk are free, all take 14")
    for rows in (small, 10 * small):
        with tempfile.TemporaryDirectory() as folder:
            source = make_copy(Path(folder) / "data", rows, pictures)
            done = subprocess.run(
                [sys.executable, "-c", CONVERT, str(source)], cwd=ROOT, check=True, text=True,
                stdout=subprocess.PIPE, env={**os.environ, "MEDVLTHINKER_HOME": f"{folder}/home"})
            count, time, memory = json.loads(done.stdout.splitlines()[-1])
            assert count == rows
            taken.append(time)
    yield 10 * small / taken[1]
    yield memory
    yield taken[1] / taken[0]


if __name__ == "__main__":
    report(conversion, BOUNDS)
