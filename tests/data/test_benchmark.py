"""Test sets from folders and from the hub: what is broken is named, what is good is kept, and every answer grades as right."""
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import encoded, key_opens, python, split
from medvlthinker.data import benchmarks as b
from medvlthinker.core.files import UserError
from medvlthinker.data.readers import DataSettings
from servers import Hub, serving


NUMBER = itertools.count(1)


def row(question="Is there a nodule?", answer="Yes", image="good.png", **changes) -> dict:
    return {"qid": next(NUMBER), "image_name": image, "image_organ": "CHEST", "question": question, "answer": answer, "answer_type": "CLOSED",
            "question_type": "PRES", "phrase_type": "test_freeform", **changes}


PHOTO = encoded(90, 60, "JPEG")
GOOD = [row(), row("Is the lesion on the left or right side?", "Right side"), row()]  # the third asks the first again


def folder(path: Path, rows: list, layout=("dev.jsonl", "images_dev"), **images: bytes) -> Path:
    "A local copy: rows as given (bytes stay bytes), and images by name (`good.png` is always there)."
    path.mkdir(parents=True, exist_ok=True)
    (path / layout[1]).mkdir(exist_ok=True)
    for name, data in {"good.png": encoded(), **images}.items():
        (path / layout[1] / name).write_bytes(data)
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    text = b"\n".join(lines) + b"\n" if layout[0].endswith("jsonl") else b"[" + b",\n".join(lines) + b"]"
    (path / layout[0]).write_bytes(text)
    return path


def rad(path: Path):
    "The samples of a local copy of VQA-RAD, and what became none."
    layouts = (layout._replace(place=path) for layout in b.LOCAL["vqa_rad_closed"])
    return next(layout for layout in layouts if layout.found()).samples("vqa_rad_closed")


# ---- a local folder


BROKEN = {
    "an image that is gone": (row(image="gone.png"), "image_name: gone.png is not in images_dev/"),
    "a missing column": ({key: value for key, value in row().items() if key != "answer_type"},
                         "answer_type: there is no such column; there are qid, image_name,"),
    "a line that is not JSON": (b'{"question": "Is', "JSON: Unterminated string"),
    "a line that is not UTF-8": (json.dumps(row("Schädel?"), ensure_ascii=False).encode("latin-1"),
                                 "question: holds half a character"),
}


@pytest.mark.parametrize("bad, sentence", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_named_and_the_others_are_kept(tmp_path, bad, sentence):
    good, broken = split(rad(folder(tmp_path / "vqa_rad", [*GOOD[:2], bad, GOOD[2]])))
    assert [sample.question for sample in good] == [item["question"] for item in GOOD]
    assert [sample.dataset_index for sample in good] == [0, 1, 3]  # a row's place, whatever stands before it
    assert len(broken) == 1 and not broken[0].filtered
    assert str(broken[0]).startswith(f"dev.jsonl line 3, {sentence}") and "\n" not in str(broken[0])


def test_the_three_layouts_give_the_same_samples(tmp_path):
    same = {"good.png": PHOTO}
    plain, _ = split(rad(folder(tmp_path / "a", GOOD, **same)))
    assert len(plain) == 3 and plain[0].images == (PHOTO,)
    assert plain[0].hash == hashlib.sha256(b"Is there a nodule?Yes").hexdigest()[:16]  # as the paper's
    assert list(rad(folder(tmp_path / "b", GOOD, ("testset.json", "images"), **same))) == plain
    release = folder(tmp_path / "c", [row("Is it old?", phrase_type="freeform"), *GOOD], ("VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"), **same)
    good, left_out = split(rad(release))
    assert [dataclasses.replace(sample, dataset_index=sample.dataset_index - 1) for sample in good] == plain
    assert str(left_out[0]) == "VQA_RAD Dataset Public.json row 0, phrase_type: freeform, which is training text" and left_out[0].filtered
    (tmp_path / "b" / "trainset.json").write_text("not JSON, and never read")
    assert len(list(rad(tmp_path / "b"))) == 3


# ---- the hub's layout


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    "A folder as the published combined set is laid out; three rows are broken."
    path, picture = tmp_path_factory.mktemp("hub"), PHOTO
    base = {"images": [{"bytes": picture, "path": "a.jpg"}], "question": "Is there a nodule?", "options": '{"A": "Yes", "B": "No"}', "answer_label": "B",
            "answer": "No", "reasoning": None, "dataset_name": "vqa_rad_closed", "hash": "0123456789abcdef", "misc": None}
    changes = [{"dataset_name": "pmc_vqa", "hash": None, "options": '{"A": "CT", "B": "MRI", "C": "PET", "D": "X-ray"}', "answer": "MRI"}, {},
               {"options": "{'A': 'Yes', 'B': 'No'}"}, {"answer": "Maybe"}, {"question": "Is it large?", "answer_label": "A", "answer": "Yes"},
               {"images": [{"bytes": picture[:-300], "path": None}]},
               {"dataset_name": "MMMU-medical", "images": base["images"] * 2, "hash": None, "misc": '{"subfield": "Pharmacy"}'}]
    rows = [{**base, **change, "dataset_index": 5778 + i} for i, change in enumerate(changes)]
    (path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "data" / "test-00000-of-00001.parquet")
    return path


def published(name: str, place) -> b.DatasetLayout:
    return b.PUBLISHED[name]._replace(place=place)


def test_hub_rows_are_filtered_kept_to_the_byte_and_the_broken_are_named(hub):
    good, broken = split(published("vqa_rad_closed", hub).samples("vqa_rad_closed", 5))
    assert [(sample.dataset_index, sample.answer) for sample in good] == [(5779, "No"), (5782, "Yes")]
    assert all(sample.images == (PHOTO,) for sample in good)
    starts = ["data/test-00000-of-00001.parquet row 2, options: not JSON", "data/test-00000-of-00001.parquet row 3, answer: 'Maybe' is not the text of option B", "data/test-00000-of-00001.parquet row 5, images: no usable image (image file is truncated"]
    assert len(broken) == 3 and not any(bad.filtered for bad in broken)
    assert all(str(bad).startswith(start) for bad, start in zip(broken, starts)), broken
    pair, = published("MMMU-medical", hub).samples("MMMU-medical", 1)
    assert len(pair.images) == 2 and pair.misc == {"subfield": "Pharmacy"}
    assert all(map(key_opens, [*good, pair, *published("pmc_vqa", hub).samples("pmc_vqa", 1)]))


def test_a_table_without_a_column_or_a_set_says_so(hub, home, tmp_path, monkeypatch):
    monkeypatch.setitem(b.PUBLISHED, "slake_closed", published("slake_closed", hub))
    with pytest.raises(UserError, match="slake_closed-1-seed42.parquet holds no sample: 0 rows were left out by rule"):
        b.load_benchmark("slake", DataSettings("hub", limit=1))
    table = pyarrow.parquet.read_table(hub / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "data").mkdir()
    part = tmp_path / "data" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table.drop_columns(["answer_label"]), part)
    broken = split(published("vqa_rad_closed", tmp_path).samples("vqa_rad_closed"))[1]
    assert str(broken[0]) == f"data/{part.name} row 1, answer_label: None is not among the letters A, B"


READ = """
import sys
from medvlthinker.core.files import UserError, read_json, record_path
from medvlthinker.data import benchmarks
from medvlthinker.data.readers import DataSettings
sets, one = benchmarks.TEST_SETS, DataSettings("hub", limit=1)
sets.published["slake_closed"] = sets.published["slake_closed"]._replace(place="nobody/none")
for name in sys.argv[1:]:
    try:
        print([row.dataset_index for row in benchmarks.load_benchmark(name, one)], end=" ")
        print(read_json(record_path(benchmarks.sample_file(sets, name, one)))["inputs"]["revision"])
    except UserError as error:
        print(error)
"""


def test_over_http_and_afterwards_without_a_network(hub, tmp_path):
    """The hub's id through the libraries' own clients: read once, then again from what was downloaded,
    though nobody answers any more. The commit stands in the record."""
    commit, repo = "a" * 40, "UCSC-VLAA/MedVLThinker-Eval"
    nobody = "The data set nobody/none cannot be read ("
    here = {"HF_HOME": tmp_path, "HF_DATASETS_CACHE": tmp_path / "datasets", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "MEDVLTHINKER_HOME": tmp_path / "runs"}
    with serving(Hub, repo=repo, folder=hub, commit=commit, asked=[]) as server:
        here["HF_ENDPOINT"] = server.url
        online = python("-c", READ, "pmc_vqa", "slake", **here).stdout.splitlines()
    assert online == [f"[5778] {commit}", f"{nobody}the hub knows no such id); "
                      "without a network, name a folder with local copies by data_dir=."]
    offline = python("-c", READ, "pmc_vqa", "MMMU-medical", "slake", **here).stdout.splitlines()
    assert offline[0] == f"[5778] {commit}"  # stored, so nobody is asked
    assert offline[1] == f"[5784] {commit}"  # from what was downloaded
    assert offline[2].startswith(nobody) and offline[2].endswith("by data_dir=.")


def test_samples_are_made_again_when_the_copy_changes_and_only_then(tmp_path, home, monkeypatch):
    copy, profile = folder(tmp_path / "vqa_rad", GOOD), DataSettings(data_dir=str(tmp_path), limit=0)
    first = b.load_benchmark("vqa_rad", profile)
    stored = home / "samples" / "local" / "vqa_rad_closed.parquet"
    before = stored.read_bytes()

    def fails(*_, **__):
        raise AssertionError("the copy was read again")

    with monkeypatch.context() as patched:
        patched.setattr(b.DatasetLayout, "samples", fails)
        assert b.load_benchmark("vqa_rad", profile) == first
    folder(tmp_path / "vqa_rad", [*GOOD, row("Is it round?", "no")], **{"good.png": first[0].images[0]})
    assert [sample.answer for sample in b.load_benchmark("vqa_rad", profile)] == ["Yes", "right side", "Yes", "No"]
    folder(tmp_path / "vqa_rad", GOOD, **{"good.png": first[0].images[0]})
    assert b.load_benchmark("vqa_rad", profile) == first and stored.read_bytes() == before
    (copy / "images_dev" / "good.png").write_bytes(encoded(64, 64))
    assert b.load_benchmark("vqa_rad", profile)[0].images != first[0].images


def test_a_limit_draws_samples_keeps_their_order_and_reports_the_damage_that_it_met(tmp_path, home):
    rows = [row(f"Is there a nodule in slice {i}?", ["Yes", "No"][i % 2], image="gone.png" if i == 7 else "good.png") for i in range(40)]
    folder(tmp_path / "vqa_rad", rows)
    draws = {}
    for limit in (5, 20, 39, 99):
        profile = DataSettings(data_dir=str(tmp_path), limit=limit, max_rejected=1)
        draws[limit] = [sample.dataset_index for sample in b.load_benchmark("vqa_rad", profile)]
        assert draws[limit] == sorted(draws[limit]) and len(draws[limit]) == min(limit, 39)
    assert set(draws[5]) < set(draws[20]) < set(draws[39]) and draws[39] == draws[99]
    assert draws[5] != draws[39][:5]
    other = DataSettings(data_dir=str(tmp_path), limit=5, max_rejected=1, seed=1)
    assert [sample.dataset_index for sample in b.load_benchmark("vqa_rad", other)] != draws[5]
    with pytest.raises(UserError, match="1 rows of vqa_rad_closed-40-seed42.parquet are broken, first dev.jsonl line 8, image_name: gone.png"):
        b.load_benchmark("vqa_rad", DataSettings(data_dir=str(tmp_path), limit=40))  # so many that the broken one is drawn
