"""What a row of someone else's file may hold, and what an editor may do to the file: read all the same, or refused in plain words."""
import json
import re
import zipfile

import pytest
from conftest import encoded, key_opens, shared_cases
from medvlthinker.data import converters
from medvlthinker.data.readers import image_reader, read_rows, samples_from
from medvlthinker.data.sample import InvalidRow

PHOTO = encoded(90, 60, "JPEG")
ABCD = {"A": "CT", "B": "MRI", "C": "PET", "D": "X-ray"}
ENTRIES = (None, [], ["a.jpg"], {}, {"file": None}, {"file": "a.jpg"}, {"bytes": None, "path": None},
           {"bytes": {"bytes": "x"}}, {"bytes": 5}, 5, 1.5, True, "", "  ")  # in place of one image
FIELDS = ("a.jpg", "", 5, 0, True, {}, {"bytes": "x"})  # in place of the list
CODE_WORDS = re.compile(r"None|Type|Error|argument|iterable|subscript|PathLike|\\b(str|int|dict|bool)\\b")
UNIFIED = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_label": "B"}
CLOSED = {"question": "Is it?", "answer": "yes", "answer_type": "CLOSED"}
WITH_IMAGES = {  # a field with a list of images and fields with one: the converter, its row, the field
    "a set of one's own": (converters.unified, UNIFIED, "images"), "VQA-RAD": (converters.vqa_rad, CLOSED, "image_name"),
    "MedXpertQA": (converters.medxpertqa, {**UNIFIED, "label": "B"}, "images"),
    "PMC-VQA": (converters.adaptllm_pmc, {"input": "Which?", "label": "B", **ABCD}, "image")}


def is_plain(item, field: str) -> bool:
    "Does it say file, row, field and reason, and nothing that only a programmer knows?"
    start, _, reason = str(item).partition(f"line 1, {field}: ")
    return isinstance(item, InvalidRow) and not item.filtered and start == "rows.jsonl " and reason and not CODE_WORDS.search(reason)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_what_stands_in_place_of_an_image_is_said_in_plain_words(tmp_path, name):
    "Null, a list, a number, an object without bytes, nothing: for a file with a folder or a zip of images, and for the hub."
    convert, row, field = WITH_IMAGES[name]
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.jpg", PHOTO)
    values = [*([entry] for entry in ENTRIES), *FIELDS] if field == "images" else ENTRIES
    for value in values:
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, field: value}))
        for images in (image_reader(tmp_path), image_reader(tmp_path / "images.zip"), None):
            item, = samples_from(lambda: read_rows(tmp_path / "rows.jsonl"), convert, "odd", images)
            assert is_plain(item, field), (value, str(item))


def test_the_odd_image_fields_that_others_met(tmp_path):
    for case in shared_cases("image-field-odd"):
        (tmp_path / "rows.jsonl").write_text(json.dumps(case["row"]))
        for images in (image_reader(tmp_path), None):
            item, = samples_from(lambda: read_rows(tmp_path / "rows.jsonl"), converters.unified, "odd", images)
            assert is_plain(item, "images"), str(item)


def test_an_image_is_a_name_or_bytes_wherever_the_set_lies(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    for value in ("a.jpg", PHOTO, {"bytes": PHOTO, "path": "gone.jpg"}, {"bytes": None, "path": "a.jpg"}):
        sample, = samples_from(lambda: [("row 0", {**UNIFIED, "images": [value]})], converters.unified, "set", image_reader(tmp_path))
        assert sample.images == (PHOTO,)
    text, = samples_from(lambda: [("row 0", {**UNIFIED, "images": None})], converters.unified, "set")
    assert text.images == ()


def test_a_blank_choice_is_kept_as_the_paper_keeps_it():
    "From the released CSV, from the paper's copy of the test set, and from the published corpus."
    blank, image = {**ABCD, "A": ""}, {"bytes": PHOTO, "path": None}
    choices = {f"Choice {letter}": f" {letter}:{text} " for letter, text in blank.items()}
    rows = {converters.pmc_vqa: {"Figure_path": "a.jpg", "Question": "Which?", **choices, "Answer": "MRI", "Answer_label": "B"},
            converters.adaptllm_pmc: {"input": "Which?", "label": "B", **blank, "image": image},
            converters.unified: {**UNIFIED, "options": json.dumps(blank), "images": [image]}}
    for convert, row in rows.items():
        sample, = samples_from(lambda: [("row 0", row)], convert, "pmc_vqa", lambda name: PHOTO)
        assert sample.options == blank and key_opens(sample)


def test_a_column_that_is_not_there_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"ask": "Which?", "key": "A"}))
    item, = samples_from(lambda: read_rows(tmp_path / "rows.jsonl"), lambda row, where: {"question": row["question"]}, "own")
    assert "it has no 'question'; it has ask, key" in str(item)
