"The slowest of many hostile inputs of one megabyte, and how the time grows with the text."
import time

from measuring import Bound
from medvlthinker.core.grade import RULES, grade

BOUNDS = (
    Bound("slowest of the hostile gradings of 1 MB", "ms", 100),
    Bound("time for 8 times the text, over the time for the text (40 slowest; 64 would be "
          "quadratic)", "x", 16))
UNITS = [
    "a", " ", "\n", "\r\n", "\t", "(", ")", "((A))", "A ", "A. ", "A B C D ", "(A) (B) ", "<", "<a",
    "<answer", "<answer>", "<answer>\n", "</answer>", "<answer>A</answer>", "<answer> A ",
    "<ANSWER>", "<think>", "</think>", "</think> ", "<think></think>", "<think></think><answer>",
    "<think>x</think> <answer>B</answer> ", "Answer", "answer is ", "answer: ", "answer:\n",
    "the answer is (", "final answer ", "is: ", "most likely ", "i choose ", "Option A: ", "\\",
    "\\boxed{", "\\boxed{A}", "\\boxed{{", "{", "}", "**", "**A**", '{"answer": "A", ',
    '"answer":', '"answer":[', "yes ", "no, ", "normal not ", ".", "0", "é", "ſ", "\0",
    "\u0301\u0323", "\u202e", "\uff21 "]
FRAMES = (("", ""), ("<think>x</think><answer>", "</answer>"),
          ("", "</think>\n<answer> B </answer>"))
OPTIONS = dict(zip("ABCDE", ("yes", "no", "a (b) c", "spleen, or (left) lung", "not")))


def least(case: tuple, size: int = 1_000_000, times: int = 3) -> float:
    "Processor seconds of one grading: the least of a few, for the others were disturbed."
    rule, unit, (head, tail) = case
    text, taken = head + unit * (size // len(unit)) + tail, []
    for _ in range(times):
        began = time.process_time()
        grade(text, OPTIONS, "B", rule)
        taken.append(time.process_time() - began)
    return min(taken)


def grading_worst_case():
    "885 gradings: 59 units, three frames, five rules."
    cases = [(rule, unit, frame) for unit in UNITS for frame in FRAMES for rule in RULES]
    slow = sorted(cases, key=lambda case: -least(case, times=1))[:40]
    worst = max(slow, key=least)
    print(f"    slowest: {worst[0]} on 1 MB of {worst[1]!r}")
    yield 1000 * least(worst)
    yield max(least(case) / least(case, 125_000) for case in slow)
