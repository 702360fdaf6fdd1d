"""Planted questions, two threads, odd input: what a notebook is too small for."""
import dataclasses
import io
import json
import random
import weakref

import numpy as np
import pytest
from PIL import Image

from conftest import python
from medvlthinker.data import overlap as module
from medvlthinker.data import synthetic
from medvlthinker.data.overlap import (
    IMAGE_LEVELS, SAME_QUESTION, ImageIndex, align_windows, normalize_question, overlap, question_similarity)
from medvlthinker.data.sample import Sample
from medvlthinker.core.stats import wilson

def one_each(images, question="What is shown?", name="set") -> list[Sample]:
    return [Sample(question, {"A": "yes", "B": "no"}, "A", "yes", (data,), dataset_name=name, dataset_index=number) for number, data in enumerate(images)]


def exam_questions(folder) -> list[str]:
    rows = (json.loads(line) for name in ("medqa", "medmcqa", "headqa", "mmlu_med", "medxpertqa") for line in open(folder / f"text_{name}" / "dev.jsonl", encoding="utf-8"))
    return list({normalize_question(text): text for row in rows if (text := row.get("question") or row.get("qtext"))}.values())


def edited(text: str, rng: random.Random) -> str:
    "Another case, other punctuation, and one letter typed twice."
    place = rng.randrange(len(text))
    return rng.choice((str.upper, str.lower, str.title))(text[:place + 1] + text[place] + text[place + 1:]).replace(" ", rng.choice((" ", "  ", "\u00a0"))) + rng.choice(("", "?", " ."))


def test_planted_questions(real_data):
    "Edited, with options in another order, among real exam questions; then the three-word ones of VQA-RAD."
    rng, texts = random.Random(0), exam_questions(real_data)
    test = [Sample(text, {"A": "one", "B": "two"}, "A", "one", dataset_name="exam", dataset_index=n) for n, text in enumerate(texts[::2])]
    train = [dataclasses.replace(s, question=edited(s.question, rng), options={"A": "two", "B": "one"}, answer_label="B") for s in test]
    others = [dataclasses.replace(test[0], question=text, dataset_index=10_000 + n) for n, text in enumerate(texts[1::2])]
    pairs = overlap({"train": [*train, *others]}, test)
    hit = (pairs.train_index == pairs.test_index).sum()
    false, negatives = len(pairs) - hit, len(test) * (len(train) + len(others)) - len(test)
    assert set(pairs.level) == {"question"} and hit >= 0.95 * len(test) and wilson(int(false), negatives)[1] < 0.01
    short = {normalize_question(text): text for text in (json.loads(line)["question"] for line in open(real_data / "vqa_rad" / "dev.jsonl", encoding="utf-8"))}
    short = [text for words, text in short.items() if len(words.split()) <= 4]
    alike = [question_similarity(normalize_question(text), normalize_question(edited(text, rng))) >= SAME_QUESTION for text in short]
    assert len(alike) >= 30 and sum(alike) >= 0.95 * len(alike)


def test_the_order_of_pairs_does_not_depend_on_the_hash_seed():
    "The search of questions answers in the order of a set of strings."
    code = ("from medvlthinker.data import synthetic; from medvlthinker.data.overlap import overlap; "
            "print(overlap({'m23k': synthetic.corpus('m23k', 40)}, synthetic.corpus('m23k', 40)).to_csv())")
    first, second = (python("-c", code, PYTHONHASHSEED=seed).stdout for seed in (1, 2))
    assert first.count("question") > 50 and first == second


class Token:
    "What a sample takes with it when it goes."


def test_a_corpus_is_never_held():
    "A few batches of training samples are alive at a time."
    living, alive = weakref.WeakSet(), []

    def train():
        for number in range(1000):
            living.add(token := Token())
            alive.append(len(living))
            yield Sample(f"question {number}", {"A": "x", "B": "y"}, "A", "x", dataset_name="t",
                         dataset_index=number, misc={"token": token})

    overlap({"t": train()}, one_each([synthetic.benchmark("pmc_vqa", 1)[0].images[0]]))
    assert len(alive) == 1000 and max(alive) <= 257


def test_the_images_that_are_aligned_are_bounded(monkeypatch):
    "However many look alike: of 120 drawings of one body, 48 are aligned with each window, and the copy is among them."
    body, aligned = synthetic.Scene("MRI", "none", "none", "none", "absent"), []
    monkeypatch.setattr(module, "align_windows", lambda target, thumbs, starts: aligned.append(len(thumbs)) or align_windows(target, thumbs, starts))
    scans = [synthetic.png(synthetic.draw(body, random.Random(seed), "test")) for seed in range(120)]
    Image.open(io.BytesIO(scans[50])).save(copy := io.BytesIO(), "JPEG")
    assert 50 in ImageIndex(scans).search(copy.getvalue())
    assert max(aligned) == module.MOST_ALIGNED


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0broken", synthetic.png(np.full((40, 40, 3), 90, np.uint8))])
def test_an_image_without_a_picture_matches_by_its_file_only(data):
    scans = [sample.images[0] for sample in synthetic.benchmark("slake_closed", 3)]
    pairs = overlap({"train": one_each([data, scans[0]])}, one_each([*scans, data], name="test"))
    assert {(row.train_index, row.test_index, row.level) for row in pairs[pairs.level.isin(IMAGE_LEVELS)].itertuples()} == {(0, 3, "image bytes"), (1, 0, "image bytes")}


@pytest.mark.parametrize("size", [(600, 9), (9, 600), (8, 8), (1000, 750)])
def test_odd_sizes_and_modes_match_themselves(size):
    noise = Image.blend(Image.radial_gradient("L").resize(size), Image.effect_noise(size, 60), 0.4)
    for mode, form in (("L", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("I;16", "PNG"), ("LA", "PNG")):
        picture = noise if mode == "I;16" else noise.convert(mode)
        (picture.convert("I").point(lambda v: v * 200).convert("I;16") if mode == "I;16" else picture).save(file := io.BytesIO(), form)
        pairs = overlap({"train": one_each([file.getvalue() + b"\0"])}, one_each([file.getvalue()], name="test"))
        assert "image" in set(pairs.level), (mode, form)


def test_questions_of_any_text():
    texts = ["", " ", "?", "a", "ab", "是否有积液?", "Ist Flüssigkeit zu sehen?", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "x" * 100_000, "\0\u202e"]
    test = [Sample(text, {"A": "x", "B": "y"}, "A", "x", dataset_name="t", dataset_index=n) for n, text in enumerate(texts)]
    pairs = overlap({"t": test}, test)
    same = set(pairs[pairs.train_index == pairs.test_index].test_index)
    assert same == {n for n, text in enumerate(texts) if normalize_question(text)} and {3, 4, 5, 6, 8} <= same
