"How many completions are graded in a second of processor time."
import time

import stored
from measuring import Bound
from medvlthinker.core.grade import RULES, grade

BOUNDS = (
    Bound("completions graded by lenient", "per s", 25_000, "at least"),
    Bound("completions graded under all five rules", "per s", 11_000, "at least"),
    Bound("long completions, no two alike, graded by lenient", "per s", 8_000, "at least"))
THINKING = ("<think> The scan shows a dense lesion in the left upper lobe; option {x} fits, the "
            "others do not. </think>\n<answer> {x} </answer>")


def rate(cases: list[tuple], rules: tuple[str, ...]) -> float:
    "How many completions a second."
    began = time.process_time()
    for completion, options in cases:
        for rule in rules:
            grade(completion, options, "B", rule)
    return len(cases) / (time.process_time() - began)


def grading_rate():
    "3,000 completions in two forms; 3,840 of 1,000 characters to 60 questions; three times each."
    options = dict(zip("ABCD", ("lung", "heart", "liver", "spleen")))
    texts = [THINKING.format(x="ABCD"[i % 4]) for i in range(3000)]
    texts[::3] = [f"The answer is ({x}), the {options[x]}." for x in "ABCD" * 250]
    short = [(text, options) for text in texts]
    questions = [stored.question(place).options for place in range(60)]
    long = [(stored.completion(options).text, options) for options in questions for _ in range(64)]
    for cases, rules in ((short, ("lenient",)), (short, RULES), (long, ("lenient",))):
        yield [rate(cases, rules) for _ in range(3)]
