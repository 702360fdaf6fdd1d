"""Properties of grading that a notebook's examples cannot show: the published rules against their plain expressions, every text, every length."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import medvlthinker.core.grade as module
from medvlthinker.core.grade import RULES, Grade, compute_score, extract, grade

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# The published rules, written down as plainly as the paper's programs have them: slow on purpose, and independent of the module.


def plain_block(text: str, flags: int) -> str | None:
    found = re.search(r"<answer>(.*?)</answer>", text, flags)
    return found and found.group(1)


def plain_strict(text: str, flags: int = re.DOTALL) -> str:
    block = plain_block(text, flags)
    return (text if block is None else block).strip()


def plain_reward(text: str) -> str | None:
    return plain_strict(text, 0) if re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) else None


def plain_regrade(text: str) -> str:
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if blocks:
        text = next((line for line in blocks[-1].strip().split("\n") if line.strip()), "")
    else:
        for pattern in (r"answer:\s*(.*)", r"answer is:\s*(.*)", r"answer is\s*(.*)", r"is:\s*(.*)"):
            if found := re.findall(pattern, text, re.IGNORECASE):
                text = found[-1]
                break
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        text = text.replace(tag, "")
    return text.strip()


PLAIN = {"reward": plain_reward, "strict": plain_strict, "regrade": plain_regrade, "llava": plain_regrade}


def plain_right(prediction: str | None, label: str, text: str, substring: bool) -> bool:
    if prediction is None:
        return False
    said, text = prediction.strip().lower(), text.strip().lower()
    return said in (f"{label}. {text}".strip().lower(), label.lower(), text) or substring and text in said


# ---------------------------------------------------------------------------------------------------------------------
# Texts: pieces of what models write, shuffled, and anything at all.

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<answer", "</answer", "answer", "Answer:", "the answer is", "ANſWER ıs", "answer is: ", "İs:", " is: ",
          "A", "B", "b", "C.", "(B)", "B. No", "No", "no", "NO.", "normal", "Yes", "I", "a", " ", "\n", "\n\n", "\t", "\r", "\u2028", "\x1c", ",", ".", ":", "**", "and",
          "or", "not", "because", r"\boxed{", "}", "{", '"answer": "', '"', "'", "Question:", "Option ", "x", "Ｂ", "İ", "é", "-20", "20", "1.5", "\ud800", "ﷺ"]
soup = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
# nearly well-formed, so that the reward's format holds often enough to be tested on both sides
inner = st.lists(st.sampled_from(["A", "B", "No", " ", "\n", "<answer>", "</answer>", "<think>", "</think>", "x", "B. No"]), max_size=4).map("".join)
gap = st.sampled_from(["", "\n", " ", "\u2028", "x"])
formed = st.builds(lambda a, b, c, d, e: f"{d}<think>{a}</think>{e}<answer>{b}</answer>{c}", inner, inner, st.sampled_from(["", "", "", "\n", "B"]),
                   st.sampled_from(["", "", "", " "]), gap)
texts = st.one_of(soup, formed, st.text(max_size=60))
OPTIONS = [{"A": "Yes", "B": "No"}, {"A": "normal", "B": "abnormal", "C": "not known"}, {"A": "20", "B": "-20", "C": "1.5", "D": "15"}, {"A": "B", "B": "A"},
           {"A": "", "B": " "}, {"A": "x", "B": "B. No"}, {"A": "slow", "B": "slow"}, dict(zip("ABCDEFGHIJ", "one two three I a no 7 <b> ( and".split()))]
questions = st.sampled_from(OPTIONS).flatmap(lambda options: st.tuples(st.just(options), st.sampled_from(sorted(options))))


@settings(max_examples=1500, deadline=None)
@given(texts, st.sampled_from(sorted(PLAIN)))
@example("<answer>" * 3 + "</answer>", "strict")
@example("<think></think><answer></answer>", "reward")
@example("<think></think></answer>", "reward")
@example("<think></think> <answer></think><answer></answer>", "reward")
@example("<answer>A\n</answer>B</answer>", "reward")
@example("answer:\nanswer: B", "regrade")
@example("İs: B", "regrade")
def test_extraction_is_that_of_the_plain_expression(text, rule):
    wanted = PLAIN[rule](text)
    assert [said for group, _ in extract(text, rule) for said in group] == ([] if wanted is None else [wanted])


@settings(max_examples=1500, deadline=None)
@given(texts, questions, st.sampled_from(sorted(PLAIN)))
def test_verdict_is_that_of_the_plain_expression(text, question, rule):
    options, label = question
    assert grade(text, options, label, rule).correct == plain_right(PLAIN[rule](text), label, options[label], rule == "llava")


@pytest.mark.parametrize("frame", ["{}", "<think>x</think><answer>{}</answer>", "<think>x</think>\n<answer>\n{}\n</answer>\n", "The answer is {}", "<answer>{}"])
@pytest.mark.parametrize("form", ["{label}", "{text}", "{label}. {text}", "{label}.", "({label})", "{label}: {text}", "{label}.{text}", "{text}.", " {label} "])
def test_verdict_on_every_form_of_every_option(frame, form):
    for options in OPTIONS:
        for named, label in ((named, label) for named in options for label in options):
            for case in (str, str.lower, str.upper):
                text = frame.format(case(form.format(label=named, text=options[named])))
                for rule, plain in PLAIN.items():
                    assert grade(text, options, label, rule).correct == plain_right(plain(text), label, options[label], rule == "llava"), (text, rule)


def test_both_sides_of_the_format_are_generated():
    "The property above would be empty if no generated text passed the reward's format; these are the shapes it is made of."
    assert plain_reward("<think>x\n</think>\n<answer>B</answer>") == "B"
    assert plain_reward("<think></think><answer>\nB\n</answer>") not in (None, "B")
    assert plain_reward("<think></think>x<answer>B</answer>") is None


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every rule and every text.


@settings(max_examples=1500, deadline=None)
@given(texts, questions, st.sampled_from(RULES))
def test_every_text_gets_a_verdict_that_is_consistent(text, question, rule):
    options, label = question
    verdict = grade(text, options, label, rule)
    assert verdict.correct == (verdict.label == label)
    assert verdict.label is None or verdict.label in options
    if rule == "lenient":
        assert (verdict.answer is None) == (verdict.label is None)
        assert verdict.answer is None or verdict.answer.strip()
    assert verdict == grade(text, options, label, rule)   # nothing is drawn


@settings(max_examples=800, deadline=None)
@given(texts, st.sampled_from([options for options in OPTIONS if len(set(options.values())) == len(options)]))
@example("A#B", {"A": "B", "B": "A"})
def test_lenient_does_not_know_the_right_answer(text, options):
    "What is read may not depend on what is right; only options with one text between them are told apart by it."
    assert len({(verdict.answer, verdict.label) for verdict in (grade(text, options, label) for label in options)}) == 1


@settings(max_examples=400, deadline=None)
@given(st.sampled_from("ABCD"), st.text(alphabet="xyz .,\n", max_size=40))
def test_what_training_rewards_every_rule_reads(label, thought):
    options = dict(zip("ABCD", ("liver", "spleen", "left lung", "right lung")))
    text = f"<think>{thought}</think>\n<answer> {label} </answer>"
    assert [grade(text, options, label, rule).correct for rule in RULES] == [True] * len(RULES)
    assert compute_score("any", text, options[label], {"answer_label": label, "answer": options[label], "options": options}) == 1.0


@pytest.mark.parametrize("separator", [", ", " ", "\n", "; ", " and ", "/", "</answer><answer>", " or "])
@pytest.mark.parametrize("form", ["{label}", "{text}", "{label}. {text}", "({label}) {text}", "**{label}**", r"\boxed{{{label}}}", "Option {label}"])
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "The answer is {}", "Answer: {}", "<think>x</think>{}"])
def test_naming_several_options_earns_nothing(frame, form, separator):
    options = {"A": "liver", "B": "spleen", "C": "left lung", "D": "right lung"}
    for labels in ("ABCD", "AB", "CA", "DCB"):
        text = frame.format(separator.join(form.format(label=label, text=options[label]) for label in labels))
        assert {grade(text, options, label) for label in options} == {Grade(None, None, False)}, text


@pytest.mark.parametrize("text", ["B. slow", "slow (B)", "slow, so probably B", "<answer>slow</answer><answer>B</answer>", "The answer is slow. The answer is B."])
def test_a_letter_tells_apart_what_a_text_cannot(text):
    options = {"A": "stop", "B": "slow", "C": "slow"}
    assert [grade(text, options, label).correct for label in options] == [False, True, False]
    assert [grade("slow", options, label).correct for label in options] == [False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Time is measured by tests/bench.py. Here stands only what does not end at all where a rule backtracks.


def test_a_loop_that_the_plain_expression_cannot_survive():
    text = "<answer>" * 100_000   # the plain search takes minutes on it
    assert [grade(text, {"A": "x", "B": "y"}, "A", rule).correct for rule in RULES] == [False] * len(RULES)


@settings(max_examples=50, deadline=None)
@given(soup, soup)
def test_lenient_reads_a_long_text_at_its_ends(start, end):
    start, end = start.ljust(module._REACH, "~"), end.rjust(module._REACH, "~")
    question = {"A": "Yes", "B": "No"}, "B"
    assert grade(start + "~" * 10_000 + end, *question) == grade(start + "~" * 20_000 + end, *question)


# ---------------------------------------------------------------------------------------------------------------------
# As verl loads it, and what an import costs.

BY_PATH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("custom_module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
if sys.argv[2] == "registered": sys.modules["custom_module"] = module
spec.loader.exec_module(module)
info = {"answer_label": "B", "answer": "No", "options": '{"A": "Yes", "B": "No"}', "index": 0}
print(module.compute_score(data_source="d", solution_str="<think>x</think><answer>B</answer>", ground_truth="No", extra_info=info, reward_router_address=None))
assert not any(name.startswith("medvlthinker") for name in sys.modules)
"""


@pytest.mark.parametrize("registered", ["registered", "alone"])
def test_verl_can_load_the_file_by_its_path(registered, tmp_path):
    "In a bare interpreter (-I -S: no site packages, no current folder): the file stands alone."
    done = subprocess.run([sys.executable, "-I", "-S", "-c", BY_PATH, module.__file__, registered], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("1.0", 0), done.stderr


def test_import_loads_the_standard_library_alone():
    code = ("import sys; before = set(sys.modules); import medvlthinker.core.grade; new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
            "print(sorted(new - set(sys.stdlib_module_names) - {'medvlthinker'}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_imports_the_standard_library_alone():
    spec = importlib.util.find_spec("medvlthinker.core.grade")
    imports = re.findall(r"^(?:from|import) +([\w., ]+?)(?: import|$)", Path(spec.origin).read_text(), re.M)
    names = {name.strip().partition(".")[0] for line in imports for name in line.split(",")}
    assert names and names <= set(sys.stdlib_module_names)


# ---------------------------------------------------------------------------------------------------------------------
# compute_score meets whatever verl hands over.


@pytest.mark.parametrize("info", [None, {}, {"answer_label": "B"}, {"answer_label": "B", "answer": "Yes"}])
def test_a_gold_answer_that_stands_twice_and_differs_stops_the_run(info):
    with pytest.raises(ValueError, match="ground_truth"):
        compute_score("d", "B", "No", info)


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(RULES), st.booleans())
def test_the_reward_is_the_verdict(text, rule, as_json):
    options = {"A": "Yes", "B": "No"}
    info = {"answer_label": "B", "answer": "No", "options": '{"A": "Yes", "B": "No"}' if as_json else {**options, "C": None}}
    assert compute_score("d", text, "No", info, rule=rule, step=1) == float(grade(text, options, "B", rule).correct)


def test_letters_that_only_other_rows_have_are_not_options():
    "Parquet gives every row of a struct column the letters of all rows, with None for those it lacks."
    info = {"answer_label": "A", "answer": "Some", "options": {"A": "Some", "B": "Few", "C": None}}
    assert compute_score("d", "A. None", "Some", info, rule="lenient") == 1.0   # no option is called None, so the letter stands alone
