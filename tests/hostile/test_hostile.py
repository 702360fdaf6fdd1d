"""What the world may send: completions, rows, images, archives, tables and manifests that were made to break
a reader. Each is read, or refused in a sentence, in bounded time and memory."""
import contextlib
import copy
import csv
import datetime
import decimal
import functools
import io
import itertools
import json
import math
import os
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, encoded, python
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from medvlthinker.core.grade import RULES, grade
from medvlthinker.data import converters
from medvlthinker.data.readers import image_reader, read_rows, samples_from, write_csv
from medvlthinker.data.sample import InvalidRow, Sample, SampleFile, normalize_images, to_rgb, write_samples
from medvlthinker.evaluation.compare import flip_cause
from PIL import Image

FUZZ = int(os.environ.get("MEDVLTHINKER_FUZZ", "1"))  # multiplies the examples
SEED = 20261123


def do_all(acts: dict) -> None:
    "Say how many things will be done, and then a line for each: its name, and what came of it."
    print(len(acts))
    for name, act in acts.items():
        print(name, act(), sep=" | ", flush=True)


def all_done(work, *words, seconds: int, megabytes: int) -> dict[str, str]:
    """What came of each thing that a function of this file did, in a process that is killed if it takes more
    time or memory."""
    limits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": megabytes << 20}
    code = f"""
import resource, sys
for name, most in {limits}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
import test_hostile
test_hostile.{work.__name__}(*sys.argv[1:])
"""
    done = python("-c", code, *words, OPENBLAS_NUM_THREADS=1, ARROW_DEFAULT_MEMORY_POOL="system",
                  PYTHONPATH=f"{ROOT}/tests:{ROOT}/tests/hostile")
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    total, *lines = done.stdout.splitlines()
    assert len(lines) == int(total) > 0, f"the process ended after {lines[-1:]}"
    return dict(line.split(" | ", 1) for line in lines)


# ---- completions

LETTERS = {"A": "liver", "B": "spleen", "C": "left lung", "D": "12.5 mg/dL"}


def test_a_letter_that_only_looks_like_one_earns_nothing():
    frames = "{}", "<think>x</think><answer>{}</answer>", "The answer is {}.", "<answer>({})</answer>"
    for label, alike in {"A": "АΑᎪ", "B": "ВΒᏴ", "C": "СϹᏟ", "D": "Ꭰꓓ"}.items():
        for letter, frame, rule in itertools.product(alike, frames, RULES):
            assert not grade(frame.format(letter), LETTERS, label, rule).correct, (letter, frame, rule)


def grade_giants() -> None:
    M = 10_000_000

    def of(piece: str) -> str:
        return piece * (M // len(piece))

    giants = {
        "plain text": "x" * M, "blanks": " " * M, "line ends": "\n" * M, "words": of("spleen and liver, "),
        "cues": of("the answer is "), "cues with colons": of("Answer: B\n"), "letters": of("(B) "),
        "digits": "7" * M, "half characters": "\ud800" * (M // 4), "right-to-left marks": "\u202e" * (M // 4),
        "wide letters": "\uff22" * (M // 4), "ligatures that unfold": "\ufdfa" * (M // 4),
        "capital dotted I": "\u0130" * (M // 4), "NUL": "\0" * M, "opening tags": "<answer>" * 100_000,
        "closing tags": "</answer>" * 100_000, "thoughts": "<think></think>" * 100_000,
        "nested answers": "<answer>" * 100_000 + "B" + "</answer>" * 100_000,
        "answers": "<answer>B</answer>" * 100_000, "half tags": of("<answer"), "brackets": "<" * M,
        "boxes": of("\\boxed{"), "braces": "{" * M, "fields": of('"answer": "'),
        "backslashes": '"answer": "' + "\\" * M, "blank in a tag": "<answer" + " " * M + ">",
        "a long thought": "<think>" + "x " * (M // 2) + "</think>\n<answer> B </answer>"}

    def graded(name: str) -> None:
        verdicts = [grade(giants[name], LETTERS, "B", rule) for rule in RULES]
        assert all(verdict.correct == (verdict.label == "B") for verdict in verdicts)
        assert name != "a long thought" or all(verdict.correct for verdict in verdicts)

    def explained(name: str) -> None:
        flip_cause(giants[name][:M // 5], Sample("?", LETTERS, "B", "spleen"), "strict", "lenient")

    def perhaps(act, *words) -> None:
        with contextlib.suppress(ValueError, InvalidRow):
            act(*words)

    def listed(text: str) -> None:
        perhaps(converters.mmmu, {"question": "?", "options": text, "answer": "A", "id": "1"}, "row")

    tags = "opening tags", "answers", "nested answers", "blank in a tag", "half tags"
    do_all({
        **{name: functools.partial(graded, name) for name in giants},
        **{f"why {name}": functools.partial(explained, name) for name in tags},
        "a prompt of A": lambda: perhaps(converters.split_prompt, "\nA. " * 500_000),
        "a prompt of options": lambda: perhaps(converters.split_prompt, "\nA. x\nB. y" * 300_000),
        "a mark after blanks": lambda: perhaps(converters.remove_image_marks, " " * M + "<image 1"),
        "marks": lambda: perhaps(converters.remove_image_marks, "<image 1> " * 100_000),
        "a question of or": lambda: perhaps(converters.closed_options, "a or " * 100_000, "b"),
        "a question of commas": lambda: perhaps(converters.closed_options, "a, " * 100_000 + "or b", "b"),
        "a list of lists": lambda: listed("[" * 90_000),
        "a list of signs": lambda: listed("[" + "-" * 90_000 + "1]"),
        "a list of sums": lambda: listed("[" + "1+" * 40_000 + "1]")})


def test_ten_megabytes_of_anything_are_graded_in_seconds():
    """Every rule, the edits that explain a re-grading, and the patterns that questions are read with: about
    ten seconds of work. A pattern that backtracks would need hours."""
    all_done(grade_giants, seconds=90, megabytes=2500)


# ---- images


def saved(picture, kind: str, **how) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, kind: int, lines: bytes, *others: bytes) -> bytes:
    "A PNG from its raw lines; kind 0 is grey, 2 colour, 4 grey with alpha, 6 colour with alpha."
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(lines, 1))
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *others, data, chunk(b"IEND", b"")))


FLAG = Image.new("RGB", (48, 32), "blue")
FLAG.paste("red", (0, 0, 16, 16))


def junk() -> dict[str, bytes]:
    "What is nobody's picture."
    bmp, long = saved(FLAG, "BMP"), bytes(100_000_000)
    lines, unfolds = bytes(33 * 49), b"a\0\0" + zlib.compress(long, 1)
    return {
        "nothing": b"",
        "SVG with a script": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "SVG that reads a file":
            b"<!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><svg><text>&x;</text></svg>",
        "PDF that is a JPEG too": b"%PDF-1.4\n1 0 obj << /Length 4000 >> stream\n" + saved(FLAG, "JPEG"),
        "PostScript, which starts another program":
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch never) (w) file\n",
        "icon": saved(FLAG, "ICO"), "JPEG 2000": saved(FLAG, "JPEG2000"),
        "PNG of 4 billion pixels a side": png(0x7FFFFFFF, 0x7FFFFFFF, 8, 0, b""),
        "PNG of 70 million pixels": png(8400, 8400, 8, 0, bytes(99)),
        "WebP of 16,383 pixels a side":
            b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + b"\0\0\0\0\xfe\x3f\0\xfe\x3f\0",
        "BMP of 2 billion lines": bmp[:18] + struct.pack("<ii", 48, 0x7FFFFFFF) + bmp[26:],
        "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"), "a line": saved(Image.new("L", (900, 1)), "PNG"),
        "PNG with a text of 100 MB": png(48, 32, 8, 0, lines, chunk(b"zTXt", unfolds)),
        "PNG with a profile of 100 MB": png(48, 32, 8, 0, lines, chunk(b"iCCP", unfolds)),
        "PNG that unfolds to 100 MB": png(48, 32, 8, 0, long),
        "PNG with half its pixels": png(48, 32, 8, 0, bytes(49 * 16)),
        "PNG without pixels": png(48, 32, 8, 0, b""), "PNG of no kind": png(48, 32, 8, 9, bytes(49 * 32)),
        "TIFF with 65,535 entries": b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(600),
        "APNG that promises a billion frames":
            png(48, 32, 8, 0, bytes(49 * 32), chunk(b"acTL", struct.pack(">II", 10**9, 0))),
    }


def read_junk() -> None:
    def row_of(data: bytes) -> str:
        row = {"question": "What is it?", "options": {"A": "x", "B": "y"}, "answer_label": "A",
               "images": [{"bytes": data, "path": "a.png"}]}
        item, = samples_from(lambda: [("row 0", row)], converters.unified, "odd")
        if isinstance(item, Sample):
            assert item.pictures()[0].mode == "RGB"
            return "a sample"
        assert not item.filtered and str(item).startswith("row 0, images: ")
        return f"refused: {refusals([item])}"

    def large(depth: int, kind: int, width: int) -> str:
        data = png(8000, 8000, depth, kind, bytes(8000 * width))
        assert normalize_images([data])[0] and to_rgb(data).size == (8000, 8000)
        return "large"

    do_all({**{name: functools.partial(row_of, data) for name, data in junk().items()},
            "64 million pixels of 16 bits": functools.partial(large, 16, 0, 16001),
            "64 million see-through pixels": functools.partial(large, 8, 6, 32001)})


def test_what_is_no_picture_is_a_broken_row_in_bounded_memory():
    """A picture has 64 million pixels at most, and its header says so before a pixel is decoded; 3 GB hold
    the largest. What is a sample is sound as far as anything can tell: what is missing of it is black."""
    done = all_done(read_junk, seconds=60, megabytes=3000)
    assert {name for name, words in done.items() if words == "a sample"} == {
        "PNG that unfolds to 100 MB", "PNG with half its pixels", "APNG that promises a billion frames"}, done


# ---- rows of every known layout, with one thing wrong

PIXELS = {"bytes": encoded(20, 16), "path": None}
ABCD = {"A": "CT", "B": "MRI", "C": "PET", "D": "X-ray"}
AB = {"A": "x", "B": "y"}
RADIOGRAPH = {"qid": 1, "image_name": "a.png", "question": "Is it old?", "answer": "No",
              "answer_type": "CLOSED"}
LAYOUTS = {  # of each layout one row that becomes a sample
    "PMC-VQA": (converters.pmc_vqa, {
        "Figure_path": "a.png", "Question": "What is it?", "Answer": "MRI", "Answer_label": "B",
        **{f"Choice {letter}": f" {letter}:{text} " for letter, text in ABCD.items()}}),
    "PMC-VQA, the paper's copy": (converters.adaptllm_pmc, {
        "image": PIXELS, "input": "Question: What is it?\nThe choices are: A:CT", "label": "B", **ABCD}),
    "VQA-RAD": (converters.vqa_rad, {
        **RADIOGRAPH, "image_organ": "CHEST", "question_type": "PRES", "phrase_type": "freeform"}),
    "VQA-RAD, the public file": (converters.vqa_rad_release, {
        **RADIOGRAPH, "image_organ": "HEAD", "question_type": "AGE", "phrase_type": "test_para"}),
    "SLAKE": (converters.slake, {
        "qid": 1, "img_name": "a.png", "location": "Lung", "modality": "CT", "content_type": "Organ",
        "question": "Is this CT or MRI?", "answer": "CT", "answer_type": "CLOSED", "q_lang": "en"}),
    "PathVQA": (converters.path_vqa, {"image": PIXELS, "question": "Is it a nest?", "answer": "yes"}),
    "closed sets, the paper's copy": (converters.adaptllm, {
        "image": PIXELS, "input": "Is it old?", "label": "No", "answer_type": "CLOSED"}),
    "MMMU": (converters.mmmu, {
        "id": "X_1", "question": "Refer to <image 1>. Which?", "options": "['CT', 'MRI']", "explanation": "",
        "img_type": "['CT']", "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice",
        "subfield": "Radiology", "image_1": PIXELS, "image_2": None}),
    "MedXpertQA": (converters.medxpertqa, {
        "id": "MM-1", "question": "Which?\nAnswer Choices: (A) x", "options": AB, "label": "B",
        "images": ["a.png"], "medical_task": "", "body_system": "", "question_type": "R"}),
    "MedXpertQA, options as a list": (converters.medxpertqa, {
        "id": "MM-1", "question": "Which?", "label": ["B"], "images": [{"image_path": "a.png"}],
        "options": [{"letter": letter, "content": text} for letter, text in AB.items()]}),
    "m23k": (converters.m23k, {
        "prompt": "Which?\nA. x\nB. y", "answer_letter": "B", "answer_string": "y", "reasoning": "So.",
        "source": "medqa"}),
    "the published sets": (converters.unified, {
        "images": [PIXELS], "question": "Which?", "options": '{"A": "x", "B": "y"}', "answer_label": "B",
        "answer": "y", "reasoning": None, "dataset_name": "pmc_vqa", "dataset_index": 7, "hash": "0" * 16,
        "misc": '{"a": 1}'}),
}
IDS = ("id", "qid")
NESTED: list = []
for _ in range(600):
    NESTED = [NESTED]
TEXTS = ["", " ", "\0", "a\nb", "\ud800", "\u202eabc", "x" * 20_000, "../../etc/passwd", "/etc/hostname",
         "=1+1", "<image>", "<image 99999999999999999999>", "['a'", "{", "null", "nan", "İ", "ſ"]
WRONG = [*TEXTS, None, True, False, 0, -1, 10**30, 1 << 63, -5, 2.5, math.nan, math.inf, -math.inf, [],
         {}, [[]], [None], [{}], ["a", "b"], {"A": None}, {"A": "x", "C": "y"}, {"a": {"b": [1]}},
         {"bytes": b"x"}, {"bytes": "x"}, {"path": "/etc/hostname"}, NESTED, b"", b"bytes", bytearray(b"x"),
         datetime.datetime(2026, 1, 1), datetime.timedelta(1), decimal.Decimal("1.5"), {1: 2}, (1, 2), ["A"],
         [["A"]], {"l": "A"}, "CLOSED", "OPEN", "A", "B", "Z", "yes", "no", 1, 2, 3]
KEYS = ["", "image_field", "images", "dataset_index", "dataset_name", "id", "misc", "hash", "answer", "A",
        "\ud800", "image_8"]


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
        instead = [changed(value[place], rng)] if rng.random() < 0.8 else []
        return [*value[:place], *instead, *value[place + 1:]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        start, end = sorted(rng.randrange(len(value) + 1) for _ in range(2))
        return value[:start] + rng.choice(TEXTS) + value[end:]
    return rng.choice(WRONG)


def refusals(items) -> int:
    "How many became no sample; each says row, field and what is wrong, on one line that a terminal can show."
    bad = [item for item in items if not isinstance(item, Sample)]
    for item in bad:
        assert type(item) is InvalidRow and item.reason, repr(item)
        assert str(item).isprintable() and len(str(item)) < 700, repr(item)
        json.dumps(vars(item)).encode()
    return len(bad)


def image_of(name):
    "The one image of a folder, under its three names."
    if isinstance(name, dict | bytes):
        return name
    if name not in {"a.png", "a.jpg", "Images/a.png"}:  # of a list: TypeError, as with a folder
        raise ValueError(f"{name} is not in images/")
    return PIXELS["bytes"]


def as_json(samples) -> list[dict]:
    "With `misc` as JSON has it, in which a key is a text and nan is nan."
    return [{**vars(sample), "misc": json.dumps(sample.misc)} for sample in samples]


@pytest.mark.parametrize("convert, row", LAYOUTS.values(), ids=LAYOUTS)
def test_a_row_with_one_thing_wrong_is_a_sample_or_a_broken_row(tmp_path, convert, row):
    "Nothing else comes out, no row is lost, and what is a sample can be stored and read again as it was."
    rng, rows = random.Random(SEED), []
    for number in range(160 * FUZZ):
        own = copy.deepcopy(row) | {key: f"{row[key]}-{number}" for key in IDS if key in row}
        own = own if number % 40 == 0 else changed(own, rng)
        if isinstance(own, dict):  # what is none is refused by `read_rows`
            rows.append((number, own))

    def source():
        return [(f"row {number}", own) for number, own in rows]

    items = list(samples_from(source, convert, "set", image_of))
    assert len(items) == len(rows)
    assert all(isinstance(item, Sample) for item, (number, _) in zip(items, rows) if number % 40 == 0)
    good = [item for item in items if isinstance(item, Sample)]
    assert 0 < refusals(items) < len(rows)
    write_samples(good, tmp_path / "good.parquet")
    assert as_json(SampleFile(tmp_path / "good.parquet")) == as_json(good)
    some = samples_from(source, convert, "set", image_of, limit=40)
    drawn = [item for item in some if isinstance(item, Sample)]
    assert 0 < len(drawn) <= 40 and all(item in good for item in drawn)


# ---- files that unfold, and names that lead elsewhere


def unfold_all(place: str) -> None:
    folder, M = Path(place), 1 << 20

    def packed(name: str, size: int) -> Path:
        "An archive of one image with so many megabytes of zeros."
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("a.png", "w") as member:
                for _ in range(size):
                    member.write(bytes(M))
        return folder / name

    def lying(path: Path) -> Path:
        "The archive with members that say to be small, and are not."
        data = bytearray(path.read_bytes())
        for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
            start = data.index(mark)
            data[start + at:start + at + 4] = (5000).to_bytes(4, "little")
        path.write_bytes(data)
        return path

    def refused(path: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            image_reader(path)("a.png")

    def one_value() -> None:
        "A column of forty gigabytes, which is one text twenty million times."
        column = pyarrow.DictionaryArray.from_arrays(np.zeros(20_000_000, np.int8), ["x" * 2000])
        pyarrow.parquet.write_table(pyarrow.table({"question": column}), folder / "long.parquet")
        for _ in itertools.islice(read_rows(folder / "long.parquet"), 2000):
            pass

    do_all({"a zip": lambda: refused(packed("bomb.zip", 300), "more than an image has"),
            "a zip that lies": lambda: refused(lying(packed("liar.zip", 200)), "cannot be read from"),
            "a column of one value": one_value})


def test_what_unfolds_to_gigabytes_is_refused_in_little_memory(tmp_path):
    "The process may take one and a half, most of which are its libraries' address space."
    all_done(unfold_all, tmp_path, seconds=60, megabytes=1500)


def test_names_and_members_that_leave_their_folder(tmp_path):
    """By name, by link and in a zip: nothing outside is read that is no picture, and nothing is written
    anywhere."""
    folder, secret = tmp_path / "data" / "images", tmp_path / "secret.png"
    folder.mkdir(parents=True)
    secret.write_bytes(b"not for you")
    (folder / "a.png").write_bytes(PIXELS["bytes"])
    names = ["../../secret.png", str(secret), "a.png/../../../secret.png", "./../../secret.png", "..", ".",
             "", "/", "//etc/hostname", "a\0.png", "\ud800.png", "x" * 5000, "~/secret.png",
             "file:///etc/hostname", "..\\..\\secret.png", "pipe", "link.png", "circle"]
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to(secret)
    (folder / "circle").symlink_to("circle")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("../../escaped.png", "/escaped.png", "a.png"):
            archive.writestr(name, PIXELS["bytes"])
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    rows = [(name, {"question": "Which?", "options": AB, "answer_label": "A", "images": [name]})
            for name in ("a.png", *names)]
    for place in (folder, tmp_path / "images.zip"):
        good, *bad = samples_from(lambda: rows, converters.unified, "set", image_reader(place))
        assert isinstance(good, Sample) and refusals(bad) == len(names)
        assert not any("not for you" in str(item) for item in bad)
    # inside the archive a name is one like any other: read, and never unpacked
    assert image_reader(tmp_path / "images.zip")("../../escaped.png") == PIXELS["bytes"]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


# ---- tables for a spreadsheet

FORMULAS = ["=1+1", "+1", "-3.1", "-x", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "'=1", "''=1", "'", "＝1",
            '=HYPERLINK("http://x","y")', "=cmd|' /C calc'!A0", "-", "+2e5", "a,b", 'a"b']
CELLS = st.one_of(st.sampled_from(FORMULAS), st.text(max_size=8))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def is_formula(cell: str) -> bool:
    "Would a spreadsheet calculate it? A number is no formula."
    try:
        float(cell)
        return False
    except ValueError:
        return bool(re.match(r"[\s]*[=+\-@\t\r\n＝＋－＠]", cell))


@seed(SEED)
@settings(max_examples=40 * FUZZ, database=None)
@given(st.lists(st.tuples(CELLS, NUMBERS), min_size=1, max_size=24), CELLS)
def test_no_cell_of_a_table_is_a_formula(tmp_path, rows, name):
    "Texts that begin like a formula are marked, numbers stay numbers."
    texts, numbers = zip(*rows)
    frame = pd.DataFrame({name or "x": texts, "-change ": numbers})
    write_csv(frame, tmp_path / "table.csv")
    text = (tmp_path / "table.csv").read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text, newline="")))
    assert len(lines) == len(rows) + 1 and not any(map(is_formula, itertools.chain(*lines))), lines
    again = pd.read_csv(tmp_path / "table.csv")
    assert np.allclose(again.iloc[:, 1].astype(float), numbers, rtol=1e-6)
