"""What the world may send: completions, rows, images, archives, tables, manifests and settings that were made to break a reader. Each is read, or refused in a sentence, in bounded time and memory."""
import copy
import csv
import datetime
import decimal
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, encoded, python
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from medvlthinker.data import converters
from medvlthinker.core.files import UserError
from medvlthinker.core.grade import RULES, grade
from medvlthinker.results.tables import results_table, to_csv
from medvlthinker.evaluation.evaluate import grade_rollout, store_record
from medvlthinker.generation.engine import FunctionEngine
from medvlthinker.generation.request import Completion, Sampling
from medvlthinker.evaluation.export import read_eval_results, write_eval_results
from medvlthinker.generation.rollout import generate, load_rollout
from medvlthinker.data.sample import InvalidRow, Sample, SampleFile, write_samples
from medvlthinker.data.readers import image_reader, read_rows, samples_from, write_csv
from PIL import Image

FUZZ = int(os.environ.get("MEDVLTHINKER_FUZZ", "1"))  # multiplies the examples
SEED = 20261123


def every(examples: int, *strategies):
    "Runs a property over generated examples, the same each time."
    def run(holds):
        @seed(SEED)
        @settings(max_examples=examples * FUZZ, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.tuples(*strategies))
        def each(drawn):
            holds(*drawn)

        each()

    return run


def contained(work: str, *words, seconds: int, megabytes: int) -> list[str]:
    "The lines that a process prints which may use so much processor time and memory, and no more; it is killed beyond."
    limits = f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))\nresource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20, {megabytes} << 20))\n"
    done = python("-c", limits + work, *words, OPENBLAS_NUM_THREADS=1, ARROW_DEFAULT_MEMORY_POOL="system", PYTHONPATH=f"{ROOT}/tests:{ROOT}/tests/hostile")
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout.splitlines()


def all_done(work: str, *words, seconds: int, megabytes: int) -> list[str]:
    "The lines of a contained process that says first how many things it will do, and then a line for each."
    total, *done = contained(work, *words, seconds=seconds, megabytes=megabytes)
    assert len(done) == int(total) > 0, f"the process ended after {done[-1:]}"
    return done


# ---- completions

LETTERS = {"A": "liver", "B": "spleen", "C": "left lung", "D": "12.5 mg/dL"}

def test_a_letter_that_only_looks_like_one_earns_nothing():
    for label, alike in {"A": "АΑᎪ", "B": "ВΒᏴ", "C": "СϹᏟ", "D": "Ꭰꓓ"}.items():
        for letter, frame, rule in itertools.product(alike, ("{}", "<think>x</think><answer>{}</answer>", "The answer is {}.", "<answer>({})</answer>"), RULES):
            assert not grade(frame.format(letter), LETTERS, label, rule).correct, (letter, frame, rule)


GIANTS = """
from medvlthinker.core.grade import RULES, grade
from medvlthinker.data.converters import mmmu, split_prompt, remove_image_marks
from medvlthinker.data.converters import closed_options
from medvlthinker.evaluation.compare import flip_cause
from medvlthinker.data.sample import InvalidRow, Sample
options, M = {"A": "liver", "B": "spleen", "C": "left lung", "D": "12.5 mg/dL"}, 10_000_000
of = lambda piece, size=M: piece * (size // len(piece))
giants = {"plain text": "x" * M, "blanks": " " * M, "line ends": "\\n" * M, "words": of("spleen and liver, "), "cues": of("the answer is "), "cues with colons": of("Answer: B\\n"), "letters": of("(B) "), "digits": "7" * M,
          "half characters": "\\ud800" * (M // 4), "right-to-left marks": "\\u202e" * (M // 4), "wide letters": "\\uff22" * (M // 4), "ligatures that unfold": "\\ufdfa" * (M // 4), "capital dotted I": "\\u0130" * (M // 4),
          "NUL": "\\0" * M, "opening tags": "<answer>" * 100_000, "closing tags": "</answer>" * 100_000, "thoughts": "<think></think>" * 100_000, "nested answers": "<answer>" * 100_000 + "B" + "</answer>" * 100_000,
          "answers": "<answer>B</answer>" * 100_000, "half tags": of("<answer"), "brackets": "<" * M, "boxes": of("\\\\boxed{"), "braces": "{" * M, "fields": of('"answer": "'), "backslashes": '"answer": "' + "\\\\" * M,
          "blank in a tag": "<answer" + " " * M + ">", "a long thought": "<think>" + "x " * (M // 2) + "</think>\\n<answer> B </answer>"}

def graded(name):
    verdicts = [grade(giants[name], options, "B", rule) for rule in RULES]
    assert all(verdict.correct == (verdict.label == "B") for verdict in verdicts)
    assert name != "a long thought" or all(verdict.correct for verdict in verdicts)

def explained(text):
    flip_cause(text, Sample("?", options, "B", "spleen"), "strict", "lenient")

def refused(error, act, *given):
    try:
        act(*given)
    except error:
        pass

listed = lambda text: refused(InvalidRow, mmmu, {"question": "?", "options": text, "answer": "A", "id": "1"}, "row")
acts = {name: lambda name=name: graded(name) for name in giants} | {f"why {name}": lambda name=name: explained(giants[name][:M // 5]) for name in ("opening tags", "answers", "nested answers", "blank in a tag", "half tags")} | {
    "a prompt of A": lambda: split_prompt("\\nA. " * 500_000), "a prompt of options": lambda: split_prompt("\\nA. x\\nB. y" * 300_000), "a mark after blanks": lambda: remove_image_marks(" " * M + "<image 1"),
    "marks": lambda: remove_image_marks("<image 1> " * 100_000), "a question of or": lambda: refused(ValueError, closed_options, "a or " * 100_000, "b"), "a question of commas": lambda: refused(ValueError, closed_options, "a, " * 100_000 + "or b", "b"),
    "a list of lists": lambda: listed("[" * 90_000), "a list of signs": lambda: listed("[" + "-" * 90_000 + "1]"), "a list of sums": lambda: listed("[" + "1+" * 40_000 + "1]")}
print(len(acts))
for name, act in acts.items():
    act()
    print(name, flush=True)
"""


def test_ten_megabytes_of_anything_are_graded_in_seconds():
    "Every rule, the edits by which a re-grading is explained, and the patterns that questions are read with: about ten seconds of work. A pattern that backtracks would need hours."
    all_done(GIANTS, seconds=90, megabytes=2000)


# ---- images


def saved(picture, kind: str, **how) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, kind: int, lines: bytes, *others: bytes) -> bytes:
    "A PNG from its raw lines; kind 0 is grey, 2 colour, 4 grey with alpha, 6 colour with alpha."
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) + b"".join(others) + chunk(b"IDAT", zlib.compress(lines, 1)) + chunk(b"IEND", b"")


FLAG = Image.new("RGB", (48, 32), "blue")
FLAG.paste("red", (0, 0, 16, 16))


def tiff_in_a_circle() -> bytes:
    "A TIFF whose only directory says that it is followed by itself."
    tags = [(256, 4, 1, 48), (257, 4, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 32), (279, 4, 1, 1536)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 8)
    return (b"II*\0" + struct.pack("<I", 8) + body).ljust(200, b"\0") + bytes(1536)


PLAIN = saved(FLAG, "PNG")


def junk() -> dict[str, bytes]:
    "What is nobody's picture."
    return {
        "nothing": b"", "zeros": bytes(4096), "SVG with a script": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'><script>alert(1)</script></svg>",
        "SVG that reads a file": b"<!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><svg><text>&x;</text></svg>", "HTML called .png": b"<!DOCTYPE html><html><body><img src=x onerror=alert(1)></body></html>",
        "PDF that is a JPEG too": b"%PDF-1.4\n1 0 obj << /Length 4000 >> stream\n" + saved(FLAG, "JPEG"), "zip called .png": b"PK\x03\x04" + bytes(400), "zip with a PNG behind it": b"PK\x03\x04" + bytes(26) + PLAIN,
        "PostScript, which starts another program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(%pipe%touch never) (w) file\nshowpage\n", "Photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 64, 64, 8, 3) + bytes(99),
        "Windows metafile": b"\xd7\xcd\xc6\x9a" + bytes(200), "icon": saved(FLAG, "ICO"), "pixmap": saved(FLAG, "PPM"), "JPEG 2000": saved(FLAG, "JPEG2000"), "a text": "Befund: unauffällig".encode("utf-16"),
        "PNG of 4 billion pixels a side": png(0x7FFFFFFF, 0x7FFFFFFF, 8, 0, b""), "PNG of 70 million pixels": png(8400, 8400, 8, 0, bytes(99)), "GIF of 65,535 pixels a side": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + PLAIN,
        "JPEG of 65,500 pixels a side": re.sub(rb"(\xff\xc0\x00\x11\x08)....", lambda found: found[1] + b"\xff\xdc" * 2, saved(FLAG, "JPEG"), flags=re.S), "WebP of 16,383 pixels a side": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0\xfe\x3f\0\xfe\x3f\0",
        "BMP of 2 billion lines": saved(FLAG, "BMP")[:18] + struct.pack("<ii", 48, 0x7FFFFFFF) + saved(FLAG, "BMP")[26:], "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"), "a line": saved(Image.new("L", (900, 1)), "PNG"),
        "PNG with a text of 100 MB": png(48, 32, 8, 0, bytes(33 * 49), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))), "PNG with a profile of 100 MB": png(48, 32, 8, 0, bytes(33 * 49), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))),
        "PNG that unfolds to 100 MB": png(48, 32, 8, 0, bytes(100_000_000)), "PNG with half its pixels": png(48, 32, 8, 0, bytes(49 * 16)), "PNG without pixels": png(48, 32, 8, 0, b""), "PNG of no kind": png(48, 32, 8, 9, bytes(49 * 32)),
        "TIFF in a circle": tiff_in_a_circle(), "TIFF with 65,535 entries": b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(600), "APNG that promises a billion frames": png(48, 32, 8, 0, b"\0" * (49 * 32), chunk(b"acTL", struct.pack(">II", 10**9, 0))),
    }


PICTURES = """
import sys
from test_hostile import junk, png
from medvlthinker.data.converters import unified
from medvlthinker.data.sample import InvalidRow, Sample, normalize_images, to_rgb
from medvlthinker.data.readers import samples_from
found = junk()
print(len(found) + 2)
for name, data in found.items():
    row = {"question": "What is it?", "options": {"A": "x", "B": "y"}, "answer_label": "A", "images": [{"bytes": data, "path": "a.png"}]}
    item, = samples_from(lambda: [("row 0", row)], unified, "odd")
    if isinstance(item, Sample):
        assert item.pictures()[0].mode == "RGB"
    else:
        assert type(item) is InvalidRow and not item.filtered and str(item).startswith("row 0, images: ") and len(str(item)) < 500 and str(item).isprintable(), str(item)
    print(name, "|", item.misc if isinstance(item, Sample) else item.reason, flush=True)
for name, data in {"64 million pixels of 16 bits": png(8000, 8000, 16, 0, bytes(8000 * 16001)), "64 million see-through pixels": png(8000, 8000, 8, 6, bytes(8000 * 32001))}.items():
    assert normalize_images([data])[0] and to_rgb(data).size == (8000, 8000)
    print(name, "| large", flush=True)
"""


def test_what_is_no_picture_is_a_broken_row_in_bounded_memory():
    "A picture has 64 million pixels at most, and its header says so before a pixel is decoded; 3 GB hold the largest."
    done = all_done(PICTURES, seconds=60, megabytes=3000)
    print(*done, sep="\n")
    said = dict(line.split(" | ", 1) for line in done)
    sound = {name for name, words in said.items() if words.startswith(("None", "{"))}  # as far as anything can tell: what is missing of them is black
    assert sound == {"PNG that unfolds to 100 MB", "PNG with half its pixels", "APNG that promises a billion frames", "TIFF in a circle"}, sound


# ---- rows of every known layout, with one thing wrong

PIXELS = {"bytes": encoded(20, 16), "path": None}
ABCD = {"A": "CT", "B": "MRI", "C": "PET", "D": "X-ray"}
LAYOUTS = {  # of each layout one row that becomes a sample
    "PMC-VQA": (converters.pmc_vqa, {"Figure_path": "a.png", "Question": "What is it?", "Answer": "MRI", **{f"Choice {letter}": f" {letter}:{text} " for letter, text in ABCD.items()}, "Answer_label": "B"}),
    "PMC-VQA, the paper's copy": (converters.adaptllm_pmc, {"image": PIXELS, "input": "Question: What is it?\nThe choices are: A:CT", "label": "B", **ABCD}),
    "VQA-RAD": (converters.vqa_rad, {"qid": 1, "image_name": "a.png", "image_organ": "CHEST", "question": "Is it old?", "answer": "No", "answer_type": "CLOSED", "question_type": "PRES", "phrase_type": "freeform"}),
    "VQA-RAD, the public file": (converters.vqa_rad_release, {"qid": 1, "image_name": "a.png", "image_organ": "HEAD", "question": "Is it old?", "answer": "No", "answer_type": "CLOSED", "question_type": "AGE", "phrase_type": "test_para"}),
    "SLAKE": (converters.slake, {"qid": 1, "img_name": "a.png", "location": "Lung", "modality": "CT", "content_type": "Organ", "question": "Is this CT or MRI?", "answer": "CT", "answer_type": "CLOSED", "q_lang": "en"}),
    "PathVQA": (converters.path_vqa, {"image": PIXELS, "question": "Is it a nest?", "answer": "yes"}),
    "closed sets, the paper's copy": (converters.adaptllm, {"image": PIXELS, "input": "Is it old?", "label": "No", "answer_type": "CLOSED"}),
    "MMMU": (converters.mmmu, {"id": "X_1", "question": "Refer to <image 1>. Which?", "options": "['CT', 'MRI']", "explanation": "", "img_type": "['CT']", "answer": "B", "topic_difficulty": "Easy",
                                                       "question_type": "multiple-choice", "subfield": "Radiology", "image_1": PIXELS, "image_2": None}),
    "MedXpertQA": (converters.medxpertqa, {"id": "MM-1", "question": "Which?\nAnswer Choices: (A) x", "options": {"A": "x", "B": "y"}, "label": "B", "images": ["a.png"], "medical_task": "", "body_system": "", "question_type": "R"}),
    "MedXpertQA, options as a list": (converters.medxpertqa, {"id": "MM-1", "question": "Which?", "options": [{"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}], "label": ["B"], "images": [{"image_path": "a.png"}]}),
    "m23k": (converters.m23k, {"prompt": "Which?\nA. x\nB. y", "answer_letter": "B", "answer_string": "y", "reasoning": "So.", "source": "medqa"}),
    "the published sets": (converters.unified, {"images": [PIXELS], "question": "Which?", "options": '{"A": "x", "B": "y"}', "answer_label": "B", "answer": "y", "reasoning": None, "dataset_name": "pmc_vqa", "dataset_index": 7, "hash": "0" * 16, "misc": '{"a": 1}'}),
}
IDS = ("id", "qid")
NESTED: list = []
for _ in range(600):
    NESTED = [NESTED]
WRONG = ["", " ", "\0", "a\nb", "\ud800", "\u202eabc", "x" * 20_000, "../../etc/passwd", "/etc/hostname", "=1+1", "<image>", "<image 99999999999999999999>", "['a'", "{", "null", "nan", "İ", "ſ",
         None, True, False, 0, -1, 10**30, 1 << 63, -5, 2.5, math.nan, math.inf, -math.inf, [], {}, [[]], [None], [{}], ["a", "b"], {"A": None}, {"A": "x", "C": "y"}, {"a": {"b": [1]}}, {"bytes": b"x"}, {"bytes": "x"}, {"path": "/etc/hostname"},
         NESTED, b"", b"bytes", bytearray(b"x"), datetime.datetime(2026, 1, 1), datetime.timedelta(1), decimal.Decimal("1.5"), {1: 2}, (1, 2), ["A"], [["A"]], {"l": "A"}, "CLOSED", "OPEN", "A", "B", "Z", "yes", "no", 1, 2, 3]
KEYS = ["", "image_field", "images", "dataset_index", "dataset_name", "id", "misc", "hash", "answer", "A", "\ud800", "image_8"]


def changed(value, rng: random.Random):
    "The value with one thing wrong, at any depth."
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        act = rng.random()
        rest = {name: each for name, each in value.items() if name != key}
        if act < 0.1:
            return rest
        if act < 0.2:
            return {**value, rng.choice(KEYS): rng.choice(WRONG)}
        if act < 0.25:
            return {**rest, rng.choice(KEYS): value[key]}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], *([changed(value[place], rng)] if rng.random() < 0.8 else []), *value[place + 1:]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        cut, other = sorted(rng.randrange(len(value) + 1) for _ in range(2)), rng.choice(WRONG[:18])
        return value[:cut[0]] + other + value[cut[1]:]
    return rng.choice(WRONG)


def refusals(items) -> int:
    "How many became no sample; each says which row it is, what is wrong and in which field, on one line that a terminal can show."
    bad = [item for item in items if not isinstance(item, Sample)]
    for item in bad:
        assert type(item) is InvalidRow and item.reason and str(item).isprintable() and len(str(item)) < 700, repr(item)
        json.dumps(vars(item)).encode()
    return len(bad)


def test_a_row_with_one_thing_wrong_is_a_sample_or_a_broken_row(tmp_path):
    "In every layout: nothing else comes out, no row is lost, and what counts as a sample can be stored and read again as it was."
    rng = random.Random(SEED)
    files = {"a.png": PIXELS["bytes"], "a.jpg": PIXELS["bytes"], "Images/a.png": PIXELS["bytes"]}

    def image(name):
        if isinstance(name, dict | bytes):
            return name
        if name not in files:  # a list cannot be looked up: TypeError, as with a folder
            raise ValueError(f"{name} is not in images/")
        return files[name]

    for name, (convert, row) in LAYOUTS.items():
        rows = []
        for number in range(160 * FUZZ):
            own = copy.deepcopy(row) | {key: f"{row[key]}-{number}" for key in IDS if key in row}
            rows.append((f"row {number}", own if number % 40 == 0 else changed(own, rng)))
        rows = [(where, each) for where, each in rows if isinstance(each, dict)]  # what is none is refused by `read_rows`
        items = list(samples_from(lambda rows=rows: rows, convert, "set", image))
        assert len(items) == len(rows) and all(isinstance(item, Sample) for item, (where, _) in zip(items, rows) if int(where[4:]) % 40 == 0), name
        broken, good = refusals(items), [item for item in items if isinstance(item, Sample)]
        assert 0 < broken < len(rows), (name, broken)
        write_samples(good, tmp_path / "good.parquet")
        told = lambda samples: [{**vars(sample), "misc": json.dumps(sample.misc)} for sample in samples]  # as JSON has it, in which a key is a text and nan is nan
        assert told(list(SampleFile(tmp_path / "good.parquet"))) == told(good), name
        drawn = [item for item in samples_from(lambda rows=rows: rows, convert, "set", image, limit=9) if isinstance(item, Sample)]
        assert 0 < len(drawn) <= 9 and all(item in good for item in drawn), name


# ---- files: torn, of another kind, and those that unfold


def write_all(folder: Path) -> dict[Path, tuple]:
    "A small file of each kind that is read, with the reader of its rows."
    rows = [{"question": f"Which of {number}?", "options": {"A": "x", "B": "y"}, "answer_label": "B"} for number in range(6)]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["input", "A", "B", "C", "D", "label", "image"], *([f"Which, of\n{number}?", "w", 'x "x"', "y", "z", "C", ""] for number in range(6))])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"images/{number}.png", PIXELS["bytes"])
    write_samples([Sample(f"Which of {number}?", {"A": "x", "B": "y"}, "B", "y", (PIXELS["bytes"],), misc={"a": 1}) for number in range(6)], folder / "samples.parquet")
    (folder / "eval_results.jsonl").write_text("\n".join(json.dumps({"dataset_name": "pmc_vqa", "dataset_index": number, "answer_label": "B", "parsed_outputs": [{"output_text": "<answer>B</answer>"}]}) for number in range(6)))
    from_zip = lambda path: [item if isinstance(item, bytes) else str(item) for item in map(asked(image_reader(path)), ("0.png", "images/1.png", "2.png"))]
    read = lambda path: refusals(samples_from(lambda: read_rows(path), converters.adaptllm_pmc if path.suffix == ".csv" else converters.unified, "set"))
    return {folder / name: how for name, how in (("rows.jsonl", read), ("rows.json", read), ("rows.csv", read), ("rows.parquet", read), ("images.zip", from_zip), ("samples.parquet", lambda path: list(SampleFile(path))),
                                                 ("eval_results.jsonl", lambda path: [grade(each["text"], LETTERS, "B") for row in read_eval_results(path) for each in row["completions"]]))}


def asked(read):
    "The image, or the sentence on why there is none."
    def ask(name):
        try:
            return read(name)
        except ValueError as error:
            return error
    return ask


def torn(data: bytes, rng: random.Random) -> bytes:
    "The bytes with some of them flipped, cut out, doubled, or replaced."
    act, place = rng.randrange(6), rng.randrange(len(data))
    if act == 0:
        return data[:place]
    if act == 1:
        return data[:place] + data[place + rng.randrange(1, 40):]
    if act == 2:
        return data[:place] + data[max(0, place - rng.randrange(1, 200)):]
    if act == 3:
        return data[:place] + rng.choice([b"\0", b"\xff\xfe", b'"', b"\n", b"[" * 3000, b"{}", b"\xed\xa0\x80", b",,,,", b"9" * 5000, b"NaN", b"1e999", "\u2028".encode()]) + data[place + rng.randrange(4):]
    return bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < (0.003, 0.03)[act % 2] or at == place else byte for at, byte in enumerate(data))


TORN = """
import random, sys
from pathlib import Path
from test_hostile import SEED, torn, write_all
from medvlthinker.core.files import UserError
rng, folder = random.Random(SEED), Path(sys.argv[1])
for path, read in write_all(folder).items():
    whole, good = path.read_bytes(), 0
    other = path.with_name(f"torn-{path.name}")
    for number in range(int(sys.argv[2])):
        other.write_bytes(torn(whole, rng))
        try:
            read(other)
            good += 1
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 2500, error
        print(path.name, flush=True)
    read(path)
"""


def test_torn_files_of_every_kind_are_rows_or_one_sentence(tmp_path):
    "Flipped bits, cuts and insertions in JSON, CSV, parquet, zip, stored samples and results; in a process of its own, for a reader may end with it."
    each = 60 * FUZZ
    done = contained(TORN, tmp_path, each, seconds=60 + 30 * FUZZ, megabytes=1500)
    assert len(done) == 7 * each


BOMBS = """
import io, itertools, sys, zipfile
from pathlib import Path
from medvlthinker.core.files import UserError
from medvlthinker.data.readers import image_reader, read_rows
folder, M = Path(sys.argv[1]), 1 << 20

def refused(error, words, act):
    try:
        act()
    except error as reason:
        assert words in str(reason), reason
    else:
        raise AssertionError("it was read")

def hollow(place):
    "The archive with members that say to be small, and are not."
    data = bytearray(place.read_bytes())
    for mark, at in ((b"PK\\3\\4", 22), (b"PK\\1\\2", 24)):
        start = data.index(mark)
        data[start + at:start + at + 4] = (5000).to_bytes(4, "little")
    place.write_bytes(data)
    return place

def packed(name, size):
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.png", "w", force_zip64=False) as member:
            for _ in range(size):
                member.write(bytes(M))
    return folder / name

def parquet():
    import numpy, pyarrow, pyarrow.parquet
    column = pyarrow.DictionaryArray.from_arrays(numpy.zeros(20_000_000, numpy.int8), ["x" * 2000])
    pyarrow.parquet.write_table(pyarrow.table({"question": column}), folder / "long.parquet")
    for _ in itertools.islice(read_rows(folder / "long.parquet"), 2000):
        pass

acts = {
    "a zip": lambda: refused(ValueError, "more than an image has", lambda: image_reader(packed("bomb.zip", 300))("a.png")),
    "a zip that lies": lambda: refused(ValueError, "cannot be read from", lambda: image_reader(hollow(packed("liar.zip", 200)))("a.png")),
    "a column of one value": parquet,
}
print(len(acts))
for name, act in acts.items():
    act()
    print(name, flush=True)
"""


def test_what_unfolds_to_gigabytes_is_refused_in_little_memory(tmp_path):
    "Each unfolds to gigabytes; the process may take one and a half, most of which are its libraries' address space."
    all_done(BOMBS, tmp_path, seconds=60, megabytes=1500)


def test_names_and_members_that_leave_their_folder(tmp_path):
    "By name, by link, in a zip and from a tar that somebody unpacked: nothing outside is read that is no picture, and nothing is written anywhere."
    folder, secret = tmp_path / "data" / "images", tmp_path / "secret.png"
    folder.mkdir(parents=True)
    secret.write_bytes(b"not for you")
    (folder / "a.png").write_bytes(PIXELS["bytes"])
    names = ["../../secret.png", str(secret), "a.png/../../../secret.png", "./../../secret.png", "..", ".", "", "/", "//etc/hostname", "a\0.png", "\ud800.png", "x" * 5000, "~/secret.png", "file:///etc/hostname", "..\\..\\secret.png", "pipe", "link.png", "circle"]
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to(secret)
    (folder / "circle").symlink_to("circle")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("../../escaped.png", "/escaped.png", "a.png"):
            archive.writestr(name, PIXELS["bytes"])
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in ("../escaped.png", "/escaped.png"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    row = lambda name: {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_label": "A", "images": [name]}
    for place in (folder, tmp_path / "images.zip"):
        items = list(samples_from(lambda: [(f"row {number}", row(name)) for number, name in enumerate(["a.png", *names])], converters.unified, "set", image_reader(place)))
        assert isinstance(items[0], Sample) and refusals(items[1:]) == len(names) and not any("not for you" in str(item) for item in items)
    for name in ("../../escaped.png", "/escaped.png"):  # inside the archive these are names like any other: read, and never unpacked
        assert image_reader(tmp_path / "images.zip")(name) == PIXELS["bytes"] if name[0] != "/" else True
    with pytest.raises(UserError, match="is no readable zip file"):
        image_reader(tmp_path / "images.tar")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


# ---- rollouts

ASKED = [Sample(f"Is it {number}?", {"A": "Yes", "B": "No"}, "B", "No", dataset_name="pmc_vqa", dataset_index=number) for number in range(3)]


def ask(folder: Path, asked: list | None = None):
    "The rollout of three questions, by a function that notes what it is asked."
    def answer(request):
        (asked if asked is not None else []).append(request.index)
        return [Completion(f"<answer> {request.sample.answer_label} </answer>", "stop", 5)]

    return generate(ASKED, FunctionEngine(answer), Sampling(), folder, lambda line: None)


def sealed(row) -> bytes:
    "What somebody calls the line of a rollout, with a checksum that is right."
    body = row if isinstance(row, bytes) else json.dumps(row, default=str, skipkeys=True).encode()[:-1]
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def read_everything(folder: Path) -> None:
    "All that is done with a finished rollout."
    rollout = load_rollout(folder)
    assert list(rollout) == rollout[:] and rollout[-1] == rollout[len(rollout) - 1] and rollout.config.fingerprint
    grade_rollout(ASKED, rollout, workers=1)


ROW = {"index": 1, "dataset_name": "pmc_vqa", "dataset_index": 1, "completions": [{"text": "B", "finish_reason": "stop", "tokens": 1}]}
LINES = {"no object": b"[", "no JSON": b"{]", "nothing": b"", "nested deeply": b'{"index": ' + b"[" * 100_000, "a megabyte of brackets": b"{" * 1_000_000, "a number of 5,000 digits": b'{"index": ' + b"9" * 5000, "no UTF-8": b'{"index": "\xff"',
         **{f"no {key}": {name: value for name, value in ROW.items() if name != key} for key in ROW}, **{f"index {index!r}": ROW | {"index": index} for index in (3, -1, 10**30, "1", None, 1.0, [1], {}, math.nan)},
         "an object for completions": ROW | {"completions": {}}, "a text for a completion": ROW | {"completions": ["B"]}, **{f"a completion without {key}": ROW | {"completions": [{name: "B" for name in ROW["completions"][0] if name != key}]} for key in ROW["completions"][0]},
         "a list for a text": ROW | {"completions": [{"text": ["B"], "finish_reason": "stop", "tokens": 1}]}, "a number for a name": ROW | {"dataset_name": 7}, "a text of a megabyte for an index": ROW | {"index": "x" * 1_000_000}}


def test_a_line_that_is_no_row_of_a_rollout_is_one_sentence_and_is_asked_again(tmp_path):
    "Its checksum is right, and so is that of the file: whoever wrote it meant it. Where the rollout is not finished, its question is owed."
    whole = ask(tmp_path)
    first, second, third = whole.path.read_bytes().splitlines(True)
    for name, row in LINES.items():
        data = first + sealed(row) + third
        whole.path.write_bytes(data)
        record = whole.record | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (whole.folder / "rollout.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"rollout.jsonl, line 2 is damaged; run the rollout again"):
            read_everything(whole.folder)
        del record["finished"]
        (whole.folder / "rollout.json").write_text(json.dumps(record))
        assert ask(tmp_path, asked := []) == whole and asked == [1], (name, asked)
        assert whole.path.read_bytes() == first + second + third, name


def test_half_a_character_survives_the_way_to_the_disk_and_back(tmp_path):
    "A server may send one, and so may a file of results: it is kept, graded, and written as JSON can hold it. So may the name of a model's folder."
    samples = ASKED[:1]
    for text in ("\ud800 <answer>B</answer>", "<answer>B</answer>\udfff", "<answer>\udc80</answer>", "\ud83d\ude00 <answer> B </answer>"):
        engine = FunctionEngine(lambda request, text=text: [Completion(text, "stop", 1)], f"models/{text}")
        rows = generate(samples, engine, Sampling(), tmp_path, lambda line: None)
        same = json.loads(json.dumps(text))
        assert rows[0]["completions"][0]["text"] == same
        write_eval_results(samples, rows, tmp_path / "eval_results.jsonl")
        again, = read_eval_results(tmp_path / "eval_results.jsonl")
        assert again["completions"][0]["text"] == same
        store_record(tmp_path / "record.json", {"text": same}, grade_rollout(samples, [again]), {})
        assert json.loads((tmp_path / "record.json").read_text())["text"] == same


# ---- tables for a spreadsheet

CELLS = st.one_of(st.sampled_from(["=1+1", "+1", "-3.1", "-x", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "'=1", "''=1", "'", "＝1", "=HYPERLINK(\"http://x\",\"y\")", "=cmd|' /C calc'!A0", "-", "+2e5", "a,b", 'a"b']), st.text(max_size=8))
STARTS = re.compile(r"[\s]*[=+\-@\t\r\n＝＋－＠]")


def is_formula(cell: str) -> bool:
    "Would a spreadsheet calculate it? A number is no formula."
    try:
        float(cell)
        return False
    except ValueError:
        return bool(STARTS.match(cell))


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    "In every CSV that is written: texts that begin like a formula are marked, numbers stay numbers."
    @every(40, st.lists(st.tuples(CELLS, st.floats(allow_nan=False, allow_infinity=False, width=32)), min_size=1, max_size=24), CELLS)
    def holds(rows, name):
        frame = pd.DataFrame({name or "x": [text for text, _ in rows], "-change ": [number for _, number in rows]})
        write_csv(frame, tmp_path / "table.csv")
        lines = list(csv.reader(io.StringIO((tmp_path / "table.csv").read_text(encoding="utf-8"), newline="")))
        assert len(lines) == len(rows) + 1 and not any(map(is_formula, itertools.chain.from_iterable(lines))), lines
        again = pd.read_csv(tmp_path / "table.csv")
        assert np.allclose(again.iloc[:, 1].astype(float), [number for _, number in rows], rtol=1e-6)

    evil = {"model": "=1+1", "source": "hub", "rule": "regrade", "rules": {}, "counts": {"pmc_vqa": (1, 2)}, "instruction": "trained"}
    table = list(csv.reader(io.StringIO(to_csv(results_table(evil)))))
    assert any("'=1+1" in line for line in table) and not any(map(is_formula, itertools.chain.from_iterable(table)))
