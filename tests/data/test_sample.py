"""A row becomes a sample or a sentence; an image is stored as a person sees it."""
import io

import numpy as np
import pyarrow.parquet
import pytest
from conftest import encoded
from medvlthinker.core.files import UserError
from medvlthinker.data.converters import unified
from medvlthinker.data.readers import samples_from
from medvlthinker.data.sample import SampleFile, to_rgb
from PIL import Image

GOOD = {"question": "Is there a nodule?", "options": '{"A": "Yes", "B": "No"}', "answer_label": "B", "answer": "No"}
SENTENCES = [
    ({"question": ""}, "question: '' is no text"),
    ({"question": "a \ud83d"}, "question: holds half a character"),
    ({"options": "Yes/No"}, "options: not JSON: 'Yes/No'"),
    ({"options": '{"A": "\\ud83d", "B": "No"}'}, "options: holds half a character"),
    ({"answer_label": "C"}, "answer_label: 'C' is not among the letters A, B"),
    ({"answer_label": ["B"]}, "answer_label: ['B'] is no text"),
    ({"answer": "Maybe"}, "answer: 'Maybe' is not the text of option B, 'No'"),
    ({"images": [encoded(1, 1)]}, "images: no usable image (1x1 pixels"),
    ({"hash": 7}, "hash: 7 is no text"),
    ({"dataset_index": "x"}, "dataset_index: invalid literal for int"),
    ({"dataset_index": float("inf")}, "dataset_index: cannot convert float infinity"),
    ({"dataset_index": 1 << 70}, "dataset_index: int too big to convert"),
    ({"misc": "{"}, "misc: not JSON: '{'"),
    ({"misc": "[7]"}, "misc: [7] is no object"),
    ({"misc": {"seen": b"x"}}, "misc: Object of type bytes is not JSON"),
    ({"misc": {"half": "\ud83d"}}, "misc: holds half a character"),
]


@pytest.mark.parametrize(("change", "sentence"), SENTENCES, ids=[sentence[:40] for _, sentence in SENTENCES])
def test_a_broken_row_says_which_row_which_field_and_why(change, sentence):
    item, = samples_from(lambda: [("dev.jsonl line 3", GOOD | change)], unified, "set")
    assert str(item).startswith(f"dev.jsonl line 3, {sentence}")


def test_a_name_where_a_parquet_file_should_hold_bytes_is_not_followed(tmp_path):
    row = GOOD | {"images": [{"bytes": __file__, "path": None}]}  # bytes of the type string
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "names.parquet")
    with pytest.raises(UserError, match="names.parquet row 0, images: .* which is not followed"):
        list(SampleFile(tmp_path / "names.parquet"))


# ---- greyscale images of more than 8 bits


def grey(values: np.ndarray) -> bytes:
    Image.fromarray(values).save(file := io.BytesIO(), "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("value", [0, 7, 40000, 65535])
def test_an_image_of_one_deep_shade_is_black(value):
    assert to_rgb(grey(np.full((8, 16), value, np.uint16))).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("values", [[np.nan, 0, 1, 2], [np.inf, 0, 1, 2], [-np.inf, 0, 1, 2], [np.nan] * 4, [np.inf] * 4])
def test_what_is_no_number_does_not_hide_the_other_pixels(values):
    picture = to_rgb(grey(np.tile(np.array(values, np.float32), (8, 4))))
    shades = [picture.getpixel((x, 0))[0] for x in range(4)]
    assert shades[1:] == [0, 127, 255] if np.isfinite(values[1]) else len(set(shades)) == 1
