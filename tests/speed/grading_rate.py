"How many completions are graded in a second, on one core."
from measuring import Bound, report, seconds
from medvlthinker.core.grade import RULES, grade

BOUNDS = (Bound("completions graded under all five rules", "per s", 4000, "at least"),)
THINKING = ("<think> The scan shows a dense lesion in the left upper lobe; option {x} fits, the "
            "others do not. </think>\n<answer> {x} </answer>")


def grading_rate():
    "3,000 completions in two forms, each under all rules, three times."
    options = dict(zip("ABCD", ("lung", "heart", "liver", "spleen")))
    texts = [THINKING.format(x="ABCD"[i % 4]) for i in range(3000)]
    texts[::3] = [f"The answer is ({x}), the {options[x]}." for x in "ABCD" * 250]

    def grade_all():
        for text in texts:
            for rule in RULES:
                grade(text, options, "B", rule)

    yield [len(texts) / seconds(grade_all) for _ in range(3)]


if __name__ == "__main__":
    report(grading_rate, BOUNDS)
