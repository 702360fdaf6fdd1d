"""A row becomes a sample or a sentence; an image is stored as a person sees it."""
import itertools
import struct
import zlib

import numpy as np
import pyarrow.parquet
import pytest
from conftest import encoded
from medvlthinker.core.files import UserError
from medvlthinker.data.converters import unified
from medvlthinker.data.readers import samples_from
from medvlthinker.data.sample import SampleFile, normalize_images, to_rgb

GOOD = {"question": "Is there a nodule?", "options": '{"A": "Yes", "B": "No"}', "answer_label": "B", "answer": "No"}
SENTENCES = [
    ({"question": ""}, "question: '' is not a text"),
    ({"question": "a \ud83d"}, "question: holds half a character"),
    ({"options": "Yes/No"}, "options: not JSON: 'Yes/No'"),
    ({"options": '{"A": "\\ud83d", "B": "No"}'}, "options: holds half a character"),
    ({"answer_label": "C"}, "answer_label: 'C' is not among the letters A, B"),
    ({"answer_label": ["B"]}, "answer_label: ['B'] is not a text"),
    ({"answer": "Maybe"}, "answer: 'Maybe' is not the text of option B, 'No'"),
    ({"images": [encoded(1, 1)]}, "images: 1x1 pixels"),
    ({"hash": 7}, "hash: 7 is not a text"),
    ({"dataset_index": "x"}, "dataset_index: 'x' is no whole number"),
    ({"dataset_index": float("inf")}, "dataset_index: inf is no whole number"),
    ({"dataset_index": 1 << 70}, "dataset_index: 1180591620717411303424 is no whole number of 64 bits"),
    ({"misc": "{"}, "misc: not JSON: '{'"),
    ({"misc": "[7]"}, "misc: a list, not an object"),
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


# ---- greyscale TIFF files that count from white to black

RAMP = np.tile(np.linspace(0, 1, 16), (8, 1))


def tiff(values: np.ndarray, bits: int, white_is_zero: bool, big: bool, deflate: bool) -> bytes:
    "A greyscale TIFF of one strip, made by hand; `values` are its lines as bytes or numbers."
    order, data = "<>"[big], values.astype(values.dtype.newbyteorder("<>"[big])).tobytes()
    data = zlib.compress(data) if deflate else data
    kind = 3 if values.dtype.kind == "f" else 1
    tags = [(256, 4, 16), (257, 4, 8), (258, 3, bits), (259, 3, 8 if deflate else 1), (262, 3, not white_is_zero),
            (273, 4, 134), (277, 3, 1), (278, 4, 8), (279, 4, len(data)), (339, 3, kind)]
    entries = b"".join(struct.pack(order + ("HHIHxx" if size == 3 else "HHII"), tag, size, 1, value) for tag, size, value in tags)
    return (b"MM\0*" if big else b"II*\0") + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + data


def lines(bits: int) -> np.ndarray:
    "The ramp in so many bits, packed where a byte holds several pixels; 32 are floats."
    if bits == 32:
        return RAMP.astype(np.float32)
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint16 if bits == 16 else np.uint8)
    if bits >= 8:
        return values
    planes = np.unpackbits(values[..., None], axis=2)[..., 8 - bits:]
    return np.packbits(planes.reshape(8, -1), axis=1)


READ = [case for case in itertools.product((1, 2, 4, 8, 16, 32), (True, False), (False, True), (False, True))
        if case[:3] != (16, True, True)  # Pillow knows no 16-bit white-is-zero TIFF of big-endian order,
        and (case[0], *case[2:]) != (32, True, True)]  # and reads compressed floats of that order wrongly


@pytest.mark.parametrize(("bits", "white_is_zero", "big", "deflate"), READ)
def test_zero_is_white_where_a_tiff_says_so_and_no_file_is_inverted_twice(bits, white_is_zero, big, deflate):
    data = tiff(lines(bits), bits, white_is_zero, big, deflate)
    grey = np.asarray(to_rgb(data))[:, :, 0].astype(int)
    assert (grey[0, 0], grey[0, -1]) == ((255, 0) if white_is_zero else (0, 255))
    assert (np.diff(grey) * (-1 if white_is_zero else 1) >= 0).all()
    (stored,), _ = normalize_images([data])
    assert to_rgb(stored).tobytes() == to_rgb(data).tobytes(), "and it stays so when it is stored"


@pytest.mark.parametrize("value", [0, 7, 40000, 65535])
def test_an_image_of_one_deep_shade_is_black(value):
    assert to_rgb(tiff(np.full((8, 16), value, np.uint16), 16, False, False, False)).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("values", [[np.nan, 0, 1, 2], [np.inf, 0, 1, 2], [-np.inf, 0, 1, 2], [np.nan] * 4, [np.inf] * 4])
def test_what_is_no_number_does_not_hide_the_other_pixels(values):
    picture = to_rgb(tiff(np.tile(np.array(values, np.float32), (8, 4)), 32, False, False, False))
    shades = [picture.getpixel((x, 0))[0] for x in range(4)]
    assert shades[1:] == [0, 127, 255] if np.isfinite(values[1]) else len(set(shades)) == 1
