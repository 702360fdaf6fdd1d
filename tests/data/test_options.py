"""The options of closed questions: pieces of the question, whatever the answer, and the right letter on real questions."""
import random
import re

import pytest
from medvlthinker.data import converters as o
from medvlthinker.data.readers import read_rows


def wild(seed: int, n: int) -> list[str]:
    "Random sentences of the words that the rule knows and of some that it does not."
    rng = random.Random(seed)
    words = [*sorted(o._SMALL_WORDS | o._LEADS | o._QUESTION_WORDS), "this", "lesion", "mass", "cystic", "pleural", "effusion", "CT", "patient's", "non", "non-contrast", "2", "é", "-", "/"] * 2
    words += ["lesion", "mass", "left", "right", "cystic", "pleural", "CT"] * 30
    joints = [" ", " ", " ", " ", " or ", ", ", ", or ", " vs. ", " OR ", ": ", " (", ") ", "  ", "\n", ",", "? "]
    return ["".join(rng.choice(words) + rng.choice(joints) for _ in range(rng.randrange(1, 14))) for _ in range(n)]


def options_of(question: str, answer: str):
    "The options, or None where there are none."
    try:
        return o.closed_options(question, answer)[0]
    except ValueError:
        return None


def test_alternatives_are_pieces_of_the_question_and_do_not_depend_on_the_answer():
    derived, rng = 0, random.Random(1)
    for question in wild(0, 4_000):
        texts, plain = o.alternatives(question), " ".join(question.split())
        keys = [o._key(text) for text in texts]
        assert len(texts) in (0, 2, 3, 4) and all(keys) and len(set(keys)) == len(texts), question
        assert all(text in plain for text in texts), (question, texts)
        for i, text in enumerate(texts):
            derived += 1
            assert o.closed_options(question, text) == o.closed_options(question, f" The {text.upper()}. ") == (dict(zip("ABCD", texts)), "ABCD"[i]), question
        answers = ["both", "", " ", rng.choice(question.split() or ["x"]), " ".join(rng.sample(plain.split(), min(2, len(plain.split()))))]
        assert all(options_of(question, answer) in (None, dict(zip("ABCD", texts))) or o._key(answer) in ("yes", "no") for answer in answers), question
    assert derived > 400  # the sentences are wild, but the rule must have had something to do


@pytest.mark.parametrize("question, answer, label", [
    ("Is it in the gray or white matter?", "gray matter", "A"), ("Is it in the gray or white matter?", "gray", "A"), ("Is it in the gray or white matter?", "white", "B"),
    ("Is it in the gray or white matter?", "matter", None), ("Is it in the gray or white matter?", "gray white matter", None), ("Is it in the gray or white matter?", "grayish", None),
    ("Is this a contrast or non contrast CT?", "non-contrast", "B"), ("Is this a contrast or non contrast CT?", "contrast", "A"), ("Is this a contrast or non contrast CT?", "no contrast", None),
    ("Is it an effusion or pneumonia?", "not pneumonia", None), ("Which is it, right lung or right kidney?", "right lung", "A"), ("Which is it, right lung or right kidney?", "right", None),
    ("Is it on the left, right, or both sides?", "Both", "C"), ("Is it on the left, right, or both sides?", "left side", None), ("Is it on the left or right side?", "left side", "A"),
])
def test_a_shortened_or_completed_answer_means_one_alternative_or_none(question, answer, label):
    if label:
        assert o.closed_options(question, answer)[1] == label
    else:
        with pytest.raises(ValueError, match="is not one of the alternatives that the question names: "):
            o.closed_options(question, answer)


def right_letter(options: dict, label: str, answer: str) -> bool:
    "Is the answer's most telling word (its first, behind articles) in the option of this letter and in no other?"
    word = re.sub(r"^(in |the )+", "", answer.lower()).replace("-", " ").split()[0]
    return [letter for letter, text in options.items() if text.lower().split()[0] == word] == [label]


@pytest.mark.parametrize("name, closed, named", [("vqa_rad/dev.jsonl", 25, 17), ("vqa_slake/train_dev400.json", 14, 14)])
def test_the_word_questions_of_real_sets(real_data, name, closed, named):
    "Closed questions, in English, whose answer is neither yes nor no."
    rows = [row for _, row in read_rows(real_data / name) if row["answer_type"].strip() == "CLOSED" and row.get("q_lang", "en") == "en"]
    rows = [row for row in rows if row["answer"].strip().lower() not in ("yes", "no")]
    given = [row for row in rows if options_of(row["question"], row["answer"])]
    assert (len(rows), len(given)) == (closed, named)
    assert all(right_letter(*o.closed_options(row["question"], row["answer"]), row["answer"]) for row in given)
