"""Every source in its own layout, on the disk and as the hub holds it: expected rows, named damage, keys that grade as right."""
import collections
import csv
import json
import linecache
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import encoded, key_opens, split
from medvlthinker.core.files import UserError
from medvlthinker.data import benchmarks as b
from medvlthinker.data import corpora as c
from medvlthinker.data import converters
from medvlthinker.data.readers import DataSettings, DatasetLayout, copy_fingerprint, find_local_copy, read_rows, samples_from

PHOTO = encoded(90, 60, "JPEG")


def local(name: str, folder: str, sets=b.TEST_SETS, **options):
    "The samples of a local copy, and what became none."
    return b.open_set(sets, name, DataSettings(data_dir=folder)).samples(name, **options)


# ---- the real rows


EXPECTED = {  # set: (rows, samples, left out by rule, broken, {field of a broken row: how many})
    "pmc_vqa": (1, 1, 0, 0), "slake_closed": (400, 0, 324, 76), "vqa_rad_closed": (594, 338, 256, 0), "MMMU-medical": (4, 4, 0, 0)}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_real_layout_yields_the_expected_rows(real_data, name):
    good, others = split(local(name, str(real_data)))
    assert (len(good) + len(others), len(good), sum(bad.filtered for bad in others), sum(not bad.filtered for bad in others)) == EXPECTED[name]
    assert all(map(key_opens, good)) and {sample.dataset_name for sample in good} <= {name}
    assert {bad.field for bad in others if not bad.filtered} <= {"img_name"}  # only the images that the excerpt lacks


def test_the_rows_of_pmc_vqa_that_break_naive_parsing(real_data):
    good, others = split(local("pmc_vqa", str(real_data), c.TRAINING_SETS))
    assert [(s.dataset_index, s.answer) for s in good] == [(0, "Focal uptake pattern")]
    assert [(bad.row.split()[-1], bad.field, bad.filtered) for bad in others] == [
        ("3", "Answer_label", True), ("4", "Figure_path", False), ("5", "Figure_path", False), ("6", "Choice B", True), ("7", "Figure_path", False),
        ("8", "Answer_label", True), ("9", "Choice B", True), ("10", "Answer", True)]
    words = {where: converters.pmc_vqa(row, where) for where, row in read_rows(real_data / "vqa_pmc" / "train.csv") if where.split()[-1] in ("4", "5", "7")}
    assert [(item["options"][item["answer_label"]], item["answer_label"]) for item in words.values()] == [
        ("N/A", "A"), ("Solitary level expression of signal S", "D"), ("The photomicrograph does not provide enough information to determine the type of tumor.", "A")]
    printed = json.loads((real_data / "medvlthinker_peer_facts" / "hf_rows_as_printed.json").read_text())[0]["row"]  # the published row of the one test question
    ours, = split(local("pmc_vqa", str(real_data)))[0]
    assert (ours.question, json.dumps(ours.options), ours.answer_label, ours.answer) == tuple(printed[name] for name in ("question", "options", "answer_label", "answer"))


def test_the_real_rows_of_m23k(real_data):
    good, others = split(local("m23k", str(real_data), c.TRAINING_SETS))
    assert len(good) == 3 and not others and all(map(key_opens, good))
    source = [json.loads(line) for line in (real_data / "m1_m23k_peer_facts" / "rows_as_printed.jsonl").read_text().splitlines()]
    for sample, row in zip(good, source):
        assert (sample.dataset_name, sample.answer, sample.reasoning) == (row["source"], row["answer_string"].strip(), row.get("reasoning"))
        assert row["prompt"] == sample.question + "".join(f"\n{letter}. {text}" for letter, text in sample.options.items())


@pytest.mark.parametrize("name, folder, count", [("MedXpertQA-MM", "vqa_medxpertqa_mm", 80), ("slake_closed", "vqa_slake", None)])
def test_rows_whose_images_the_excerpts_lack(real_data, name, folder, count):
    "With a stand-in for each image every row is a sample or left out by rule."
    layout = next(layout for layout in b.LOCAL[name] if [*(real_data / folder).glob(layout.files)])
    rows = [pair for path in (real_data / folder).glob(layout.files) for pair in read_rows(path)]
    good, others = split(samples_from(lambda: rows, layout.convert, name, lambda image: PHOTO))
    assert good and all(bad.filtered for bad in others) and len(good) == (count or len(good))
    assert all(key_opens(sample, as_text=False) for sample in good) and all(sample.images for sample in good)
    # three rows of MedXpertQA have tables for options, of which the paper's rules read one line, and in two an option's text is another option's letter
    assert [sample.dataset_index for sample in good if not key_opens(sample)] == ([10, 51, 70, 71, 79] if count else [])
    if count:
        assert collections.Counter(len(s.images) for s in good) == {1: 60, 2: 15, 5: 2, 6: 1, 4: 1, 3: 1}
    assert not any("Answer Choices" in sample.question or not count and not sample.question.isascii() for sample in good)


# ---- what the hub holds


def put(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


IMAGE = {"bytes": PHOTO, "path": None}
ABCD = {"A": "CT", "B": "MRI", "C": "PET", "D": "X-ray"}
MMMU_ROW = {"question": "Refer to the <image 1> below. Which?", "options": "['CT', 'MRI']", "explanation": "", "img_type": "['CT']", "answer": "B", "topic_difficulty": "Easy",
            "question_type": "multiple-choice", "subfield": "Radiology", "image_1": IMAGE, **{f"image_{n}": None for n in range(3, 8)}, "image_2": IMAGE}
HUB = {  # set: rows as on the hub, and what one sample must be
    "pmc_vqa": ([{"image": IMAGE, "input": "Question: What is it?\nThe choices are: A:CT", "label": "B", **ABCD}], ("What is it?", "MRI", 1)),
    "pathvqa_closed": ([{"image": IMAGE, "input": "Is it a nest?", "label": "yes", "answer_type": "CLOSED"}, {"image": IMAGE, "input": "What?", "label": "a nest", "answer_type": "OPEN"}], ("Is it a nest?", "Yes", 1)),
    "slake_closed": ([{"image": IMAGE, "input": "Is this CT or MRI?", "label": "CT", "answer_type": "CLOSED"}], ("Is this CT or MRI?", "CT", 1)),
    "vqa_rad_closed": ([{"image": IMAGE, "input": "Is it old?", "label": "No", "answer_type": "CLOSED"}], ("Is it old?", "No", 1)),
    "MMMU-medical": ([{"id": "validation_X_1", **MMMU_ROW}, {"id": "validation_X_2", **MMMU_ROW, "question_type": "open"}], ("Refer to the below. Which?", "MRI", 2)),
}


@pytest.mark.parametrize("name", HUB)
def test_each_source_as_the_hub_holds_it(tmp_path, name):
    rows, (question, answer, images) = HUB[name]
    source = b.SOURCES[name]._replace(place=tmp_path)
    tables = source.files.split()
    for number, table in enumerate(tables):
        own = [{**row, **({"id": f"{row['id']}_{number}"} if "id" in row else {})} for row in rows]
        put(tmp_path / table.replace("*", "00000-of-00001"), own)
    assert len(copy_fingerprint(source)["questions"]) == len(tables), "a change of each part is noticed"
    good, others = split(source.samples(name))
    assert len(good) == len(tables) and len(others) == len(tables) * (len(rows) - 1) and all(bad.filtered for bad in others), [str(bad) for bad in others]
    assert {(s.question, s.answer, len(s.images)) for s in good} == {(question, answer, images)} and all(map(key_opens, good))
    assert all(data == PHOTO for sample in good for data in sample.images)


def test_a_copy_of_the_hub_that_was_not_whole_is_read_again(tmp_path, home, monkeypatch):
    "A folder of MMMU, a part of PMC-VQA and the bytes of an image come later, under the same commit; nothing is measured before."
    monkeypatch.setattr("medvlthinker.data.readers.download_hub_files", lambda repo, *patterns: tmp_path)
    read = lambda name: len(b.load_benchmark(name, DataSettings("source", limit=200)))
    [row, _], files = HUB["MMMU-medical"][0], b.SOURCES["MMMU-medical"].files.split()
    monkeypatch.setitem(b.BENCHMARKS, "MMMU-medical", len(files))
    *most, last = (tmp_path / file.replace("*", "00000-of-00001") for file in files)
    for number, path in enumerate(most):
        put(path, [{**row, "id": f"validation_{number}"}])
    with pytest.raises(UserError, match="The copy of MMMU/MMMU on this machine holds no .*/dev-"):
        read("MMMU-medical")
    put(last, [{**row, "id": "validation_last"}])
    assert read("MMMU-medical") == len(files)

    [row], folder = HUB["pmc_vqa"][0], tmp_path / "PMC-VQA" / "test"
    monkeypatch.setitem(b.BENCHMARKS, "pmc_vqa", 2)
    put(folder / "0000.parquet", [row])
    with pytest.raises(UserError, match="pmc_vqa has 1 questions here, and the published set 2"):
        read("pmc_vqa")
    put(folder / "0001.parquet", [{**row, "image": {"bytes": PHOTO[:-300], "path": None}}])
    for _ in range(2):
        with pytest.raises(UserError, match="1 rows of pmc_vqa-200-seed42.parquet are broken"):
            read("pmc_vqa")
    put(folder / "0001.parquet", [row])
    assert read("pmc_vqa") == 2


def test_medxpertqa_reads_its_images_from_the_zip(tmp_path):
    folder = tmp_path / "MedXpertQA"
    (folder / "MM").mkdir(parents=True)
    rows = [{"id": f"MM-{n}", "question": "Which?\nAnswer Choices: (A) x (B) y",
             "options": {"A": "x", "B": "y"}, "label": "A", "images": [f"MM-{n}-a.jpeg"], "medical_task": "", "body_system": "",
             "question_type": "Reasoning"} for n in range(2)]
    (folder / "MM" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("images/MM-0-a.jpeg", PHOTO)
    sample, missing = local("MedXpertQA-MM", str(tmp_path))
    assert sample.images == (PHOTO,)
    assert str(missing) == "test.jsonl line 2, images: MM-1-a.jpeg is not in images.zip"


def test_a_converter_typed_into_a_notebook_is_known_by_its_text(tmp_path, monkeypatch):
    monkeypatch.setitem(b.LOCAL, "own", [])
    (tmp_path / "test.json").write_text('[{"question": "Is it?"}]')
    found = []
    for number, label in enumerate("AB"):  # as IPython does it
        cell, name, space = f"def convert(row, where):\n    return {{**row, 'options': {{'A': 'Yes', 'B': 'No'}}, 'answer_label': {label!r}}}\n", f"<cell {number}>", {}
        linecache.cache[name] = len(cell), None, cell.splitlines(True), name
        exec(compile(cell, name, "exec"), space)  # noqa: S102
        b.register_benchmark("own", tmp_path, DatasetLayout("test.json", "", space["convert"]))
        found.append(b.load_benchmark("own", folder=tmp_path / "samples")[0].answer_label)
    assert found == ["A", "B"]


def test_the_published_corpora_as_the_hub_holds_them(tmp_path, home, monkeypatch):
    base = {"question": "Which?", "options": json.dumps(ABCD), "answer_label": "B", "answer": "MRI", "dataset_name": "pmc_vqa", "hash": None, "dataset_index": 0}
    copy = tmp_path / "MedVLThinker-pmc_vqa"
    put(copy / "data" / "train-00000-of-00001.parquet", [{**base, "images": [IMAGE]}, {**base, "images": [{"bytes": PHOTO[:300], "path": None}], "dataset_index": 1}])
    monkeypatch.setitem(c.PUBLISHED, "pmc_vqa", c.PUBLISHED["pmc_vqa"]._replace(place=copy))
    samples = c.load_corpus("pmc_vqa", DataSettings("hub", train_limit=2, max_rejected=1))
    assert [(s.answer, s.images) for s in samples] == [("MRI", (PHOTO,))]
    copy = c.load_corpus("pmc_vqa", DataSettings(data_dir=str(tmp_path), max_rejected=1))  # the same files as a local copy
    assert list(copy) == list(samples)
    assert find_local_copy(tmp_path / "MedVLThinker-pmc_vqa", c.LOCAL["m23k"]) is None  # the same layout, another corpus


# ---- PMC-VQA in bulk


COLUMNS = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]


def pmc(path: Path, n: int, **images: bytes) -> Path:
    "A copy of the corpus with n questions about these images in turn."
    folder, names = path / "PMC-VQA", [*images]
    (folder / "images").mkdir(parents=True)
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    choices = [f" {letter}:{text} " for letter, text in ABCD.items()]
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *([names[i % len(names)], f"What is slice {i}?", "MRI", *choices, "B"] for i in range(n))])
    return path


def test_the_rule_for_sizes_is_part_of_what_a_corpus_is(tmp_path, home):
    profile = DataSettings(data_dir=str(pmc(tmp_path, 1, **{"large.png": encoded(1500, 900)})))
    sizes = [c.load_corpus("pmc_vqa", profile, fit=fit)[0].pictures()[0].size for fit in (c.training_size, None)]
    assert sizes == [(1024, 614), (1500, 900)]


# ---- SIGKILL


CONVERT = """
import sys
from medvlthinker.data import corpora
from medvlthinker.data.readers import DataSettings
corpora.load_corpus("pmc_vqa", DataSettings(data_dir=sys.argv[1]))
"""


def test_a_killed_conversion_starts_again_and_gives_the_same_bytes(tmp_path):
    source = pmc(tmp_path / "data", 1500, **{f"{n}.jpg": encoded(300, 200, "JPEG") for n in range(40)})

    def start(home):
        return subprocess.Popen([sys.executable, "-c", CONVERT, str(source)], env={**os.environ, "MEDVLTHINKER_HOME": str(home)})

    assert start(tmp_path / "whole").wait() == 0
    stored, rng, halfway = "samples/local/corpus/pmc_vqa", random.Random(0), 0
    manifest = tmp_path / "killed" / f"{stored}.parquet.manifest.json"
    for _ in range(4):
        manifest.unlink(missing_ok=True)  # should the last one have come to its end
        process = start(tmp_path / "killed")
        while process.poll() is None and not list((tmp_path / "killed").rglob("*.part")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        halfway += bool(list((tmp_path / "killed").rglob("*.part")))
        assert not manifest.exists() or (tmp_path / "killed" / f"{stored}.parquet").exists()
    assert start(tmp_path / "killed").wait() == 0
    assert halfway, "no kill met a half-written file"
    for name in (".parquet", ".rejected.jsonl"):
        assert (tmp_path / "killed" / f"{stored}{name}").read_bytes() == (tmp_path / "whole" / f"{stored}{name}").read_bytes()
    assert not list((tmp_path / "killed").rglob("*.part"))
