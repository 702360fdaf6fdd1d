"""What grading promises: the published rules, every text, the cases, two laws, real outputs."""
import hashlib
import json
import os
import random
import re

import medvlthinker.core.grade as module
import pytest
from conftest import ROOT, python
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from medvlthinker.core.grade import RULES, Grade, compute_score, grade
from medvlthinker.data.converters import alternatives

FUZZ = int(os.environ.get("MEDVLTHINKER_FUZZ", "1"))  # multiplies the examples of the two laws

# ------------------------------------------------------------------------------------------------
# The published rules, written down plainly: slow on purpose, and independent of the module.


def plain_block(text: str, flags: int) -> str | None:
    found = re.search(r"<answer>(.*?)</answer>", text, flags)
    return found and found.group(1)


def plain_strict(text: str, flags: int = re.DOTALL) -> str:
    block = plain_block(text, flags)
    return (text if block is None else block).strip()


def plain_reward(text: str) -> str | None:
    form = r"<think>.*?</think>\s*<answer>.*?</answer>"
    return plain_strict(text, 0) if re.fullmatch(form, text, re.DOTALL) else None


def plain_regrade(text: str) -> str:
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if blocks:
        text = re.split(r"[\r\n]", blocks[-1].strip())[0]
    else:
        cues = (r"answer:\s*(.*)", r"answer is:\s*(.*)", r"answer is\s*(.*)", r"is:\s*(.*)")
        for pattern in cues:
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
    said = prediction.strip().lower()
    forms = (f"{label}. {text}".strip().lower(), label.strip().lower(), text.strip().lower())
    return said in forms or substring and text.lower() in said


# ------------------------------------------------------------------------------------------------
# Texts: pieces of what models write, shuffled, and anything at all.

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<answer", "</answer", "answer",
          "Answer:", "the answer is", "ANſWER ıs", "answer is: ", "İs:", " is: ", "A", "B", "b",
          "C.", "(B)", "B. No", "No", "no", "NO.", "normal", "Yes", "I", "a", " ", "\n", "\n\n",
          "\t", "\r", "\v", "\u2028", "\x1c", ",", ".", ":", "**", "and", "or", "not", "because",
          r"\boxed{", "}", "{", '"answer": "', '"', "'", "Question:", "Option ", "x", "Ｂ", "İ", "é",
          "-20", "20", "1.5", "\ud800", "ﷺ", " leading", "A.  leading", "\0", "\x1b[2J", "\x7f",
          *"\u200b\u200f\u202e\u2066\ufeff\u00ad\u2029\udfff\U000e0041\U0010ffffАС𝐁ℬⒷßﬀ٣½", "b̸",
          "<ANSWER>", "< answer >", "<answer/>", "<|im_end|>"]
soup = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
# nearly well-formed, so that the reward's format holds often enough to be tested on both sides
INNER = ["A", "B", "No", " ", "\n", "\r", "<answer>", "</answer>", "<think>", "</think>", "x", "B. No"]
inner = st.lists(st.sampled_from(INNER), max_size=4).map("".join)
formed = st.builds(lambda a, b, c, d, e: f"{d}<think>{a}</think>{e}<answer>{b}</answer>{c}",
                   inner, inner, st.sampled_from(["", "", "", "\n", "B"]),
                   st.sampled_from(["", "", "", " "]),
                   st.sampled_from(["", "\n", " ", "\u2028", "x"]))
texts = st.one_of(soup, formed, st.text(max_size=60))
OPTIONS = [{"A": "Yes", "B": "No"}, {"A": "normal", "B": "abnormal", "C": "not known"},
           {"A": "20", "B": "-20", "C": "1.5", "D": "15"}, {"A": "B", "B": "A"},
           {"A": "", "B": " "}, {"A": "x", "B": "B. No"}, {"A": "slow", "B": "slow"},
           {"A": " leading", "B": "trailing "},
           dict(zip("ABCDEFGHIJ", "one two three I a no 7 <b> ( and".split()))]
questions = st.sampled_from(OPTIONS).flatmap(
    lambda options: st.tuples(st.just(options), st.sampled_from(sorted(options))))


YES_NO = OPTIONS[0], "B"


@settings(max_examples=3000)
@given(texts, questions, st.sampled_from(sorted(PLAIN)))
@example("<answer>" * 3 + "</answer>", YES_NO, "strict")
@example("<think></think><answer></answer>", YES_NO, "reward")
@example("<think></think></answer>", YES_NO, "reward")
@example("<think></think> <answer></think><answer></answer>", YES_NO, "reward")
@example("<answer>A\n</answer>B</answer>", YES_NO, "reward")
@example("answer:\nanswer: B", YES_NO, "regrade")
@example("İs: B", YES_NO, "regrade")
@example("<answer>A\rB</answer>", YES_NO, "regrade")
def test_a_published_rule_reads_and_judges_as_its_plain_expression(text, question, rule):
    options, label = question
    verdict, said = grade(text, options, label, rule), PLAIN[rule](text)
    assert verdict.answer == said
    assert verdict.correct == plain_right(said, label, options[label], rule == "llava")


def test_of_several_wrong_options_the_first_is_noted_and_of_right_ones_the_right():
    options = {"A": "stop", "B": "slow", "C": "slow"}
    assert [grade("slow", options, label, "regrade").label for label in "ABC"] == ["B", "B", "C"]
    assert grade("slow or stop", options, "C", "llava").label == "C"


# ------------------------------------------------------------------------------------------------
# What holds for every rule and every text.


@settings(max_examples=1500)
@given(texts, questions, st.sampled_from(RULES))
def test_every_text_gets_a_verdict_that_is_consistent(text, question, rule):
    options, label = question
    verdict = grade(text, options, label, rule)
    assert verdict.correct == (verdict.label == label)
    assert verdict.label is None or verdict.label in options
    if rule == "lenient":
        assert (verdict.answer is None) == (verdict.label is None)
        assert verdict.answer is None or verdict.answer.strip()
    assert verdict == grade(text, dict(reversed(options.items())), label, rule)


@settings(max_examples=800)
@given(texts, st.sampled_from([options for options in OPTIONS if "slow" not in options.values()]))
@example("A#B", {"A": "B", "B": "A"})
def test_lenient_does_not_know_the_right_answer(text, options):
    "What is read may not depend on what is right, but for options that share one text."
    verdicts = [grade(text, options, label) for label in options]
    assert len({(verdict.answer, verdict.label) for verdict in verdicts}) == 1


@pytest.mark.parametrize("separator", [", ", " ", "\n", "; ", " and ", "/", " or ", "</answer><answer>"])
@pytest.mark.parametrize("form", ["{label}", "{text}", "{label}. {text}", "({label}) {text}",
                                  "**{label}**", r"\boxed{{{label}}}", "Option {label}"])
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "The answer is {}", "Answer: {}",
                                   "<think>x</think>{}"])
def test_naming_several_options_earns_nothing(frame, form, separator):
    options = {"A": "liver", "B": "spleen", "C": "left lung", "D": "right lung"}
    for labels in ("ABCD", "AB", "CA", "DCB"):
        named = [form.format(label=label, text=options[label]) for label in labels]
        text = frame.format(separator.join(named))
        verdicts = {grade(text, options, label) for label in options}
        assert verdicts == {Grade(None, None, False)}, text


@pytest.mark.parametrize("text", ["B. slow", "slow (B)", "slow, so probably B",
                                  "<answer>slow</answer><answer>B</answer>",
                                  "The answer is slow. The answer is B."])
def test_a_letter_tells_apart_what_a_text_cannot(text):
    options = {"A": "stop", "B": "slow", "C": "slow"}
    assert [grade(text, options, label).correct for label in options] == [False, True, False]


# ------------------------------------------------------------------------------------------------
# Kinds of completions that a grader gets wrong: the cases, and made siblings of each kind.


def shared_cases() -> list:
    "Every case and control of ../shared/cases; one skipped entry where they are absent."
    found = []
    for path in sorted((ROOT.parent / "shared" / "cases").glob("grade-*.json")):
        content = json.loads(path.read_text())
        for key in ("cases", "controls_that_pass_and_must_stay"):
            found += [pytest.param(case, id=f"{path.stem}-{key[:4]}-{number}")
                      for number, case in enumerate(content[key])]
    missing = pytest.mark.skip(reason="The cases (../shared/cases) are not on this machine.")
    return found or [pytest.param(None, marks=missing)]


@pytest.mark.parametrize("case", shared_cases())
def test_every_shared_case_and_control_gets_its_value(case):
    verdict = grade(case["completion"], case["options"], case["answer_label"], case["rule"])
    assert {"label": verdict.label, "correct": verdict.correct} == case["expected"]


SALTS = dict(zip("ABCD", ("Hypocalcemia", "Hypomagnesemia", "Hyponatremia", "Hypokalemia")))
ALL_SALTS = "".join(f"{label}) {text}\n" for label, text in SALTS.items())
TISSUE = dict(zip("ABC", ("Fetal steroids", "Vascular dementia", "Smooth muscle")))
FINDINGS = dict(zip("ABC", ("a bicuspid valve", "a lung mass", "a rib fracture")))
DOSES = dict(zip("ABC", ("5 mg", "10 mg", "20 mg")))
CHEST = dict(zip("ABCD", ("肺炎", "气胸", "胸腔积液", "正常")))
PICTURES = dict(zip("ABC", ("<image 1>", "<image 2>", "<image 3>")))
CAUSES = dict(zip("ABCD", ("Hyperparathyroidism", "Sarcoidosis", "Thiazides", "Hypothyroidism")))
IONS = dict(zip("ABCD", ("Na+ efflux", "Na+ influx", "K+ efflux", "K+ influx")))
BONDS = dict(zip("ABC", ("C=C bond, heated above 700°C", "C≡C bond, heated above 700°C", "C-C bond")))
TRAITS = dict(zip("ABC", ("Dominant.", "Recessive.", "Codominant.")))
HOURS = dict(zip("ABC", ("24 hours", "12-24 hours", "48 hours")))
BLEED = dict(zip("ABC", ("Acute", "Subacute", "Chronic")))
SCANS = dict(zip("ABCD", ("CT", "MRI", "X-ray", "Ultrasound")))
POWERS = dict(zip("ABC", ("5 x 10^5", "5 x 10^6", "1000 mL")))
TEN = dict(zip("ABCDEFGHIJ", "one two three four five six seven eight nine ten".split()))
SIBLINGS = [  # kind, options, what it must read, completions
    ("a letter that is denied", SALTS, None, [
        "B cannot be correct.", "I would rule out (B).", "This excludes option B.", "Not B.",
        "(B) is incorrect, (C) is incorrect.", "Hypomagnesemia (B) is not supported.",
        "It is unlikely to be B.", "We can eliminate A and B.", "Neither A nor B fits.", "B? No.",
        "The answer isn't B.", "Answer: not B", "<answer>not B</answer>", "B is a distractor.",
        r"\boxed{\text{not B}}", '{"answer": "not B"}', "Option B would be wrong.", "B: no",
        "I don't think the answer is B.", "The wrong answer is B.", "Incorrect answer: B",
        "B\n\nB is wrong.", "A. It is B\n\nOption (B) is not correct.", "B (incorrect)", "B (no)",
        "B. Hypomagnesemia (wrong)", "B. Incorrect.", "B, which is wrong.", "B ❌", "B: ✗", "❌ B",
        "B is hardly likely.", "B is tempting but wrong.", "B is a poor choice.", "B is mistaken.",
        "B is anything but correct.", "The worst option is B.", "B does not fit. It is low (B)"]),
    ("a text that is denied", TISSUE, None, [
        "There is no vascular dementia.", "Vascular dementia is ruled out.", "Is it smooth muscle?",
        "This patient does not have vascular dementia.", "It may be vascular dementia.",
        "Image shows vascular dementia and smooth muscle."]),
    ("a denial in Chinese", CHEST, None, ["B不正确。", "答案不是B", "不选B", "选项B是错误的", "B（错误）", "B：错误"]),
    ("a denial beside the answer", SALTS, "C", [
        "The answer cannot be B, so it must be C.", "The answer is C rather than B.",
        "The answer is C, since B is wrong.", "It's not A, it's not B. The answer is C.",
        "Answer: C (B is wrong)", "C is correct and not B", "The answer is C instead of D.",
        "Answer: A ✗ C ✓", "❌ A\n✅ C", "C. Incorrect: A, B, D.", "C, commonly mistaken for B"]),
    ("a list that was cut off", SALTS, None, [
        "a) Hypocalcemia: no.\nb) Hypomagnesemia: no.\nc) Hyponatremia", "A) no B) no C",
        "- Hypocalcemia: no\n- Hypomagnesemia: plausible\n- Hyponatremia",
        "**A.** no\n**B.** no\n**C", "Option A: no.\nOption B: maybe.\nOption C",
        "1) A. no\n2) B. no\n3) C. Hyponatremia", "A: low\nB: normal\nC: ",
        "A) Hypocalcemia\nLow.\nB) Hypomagnesemia\nPlausible.\nC) Hyponatremia",
        "C) Hyponatremia: no.\nA) Hypocalcemia: no.\nB) Hypomagnesemia",
        *(f"{ALL_SALTS}Option A suggests a spasm.\nOption B suggests a fit.\n{last}" for last in ("Option C", "C"))]),
    ("a list with an answer", SALTS, "B", [
        "B. Hypomagnesemia", "B\n\nA: no.\nC: no.", "A: no.\nB: yes.\nC: no.\nD: no.\n\nB",
        "A) Hypocalcemia: no.\nB) Hypomagnesemia: yes.\n\nThe answer is B.",
        *(f"{ALL_SALTS}{ALL_SALTS}{last}" for last in ("Option B", "B")), f"{ALL_SALTS}So:\nOption B",
        f"{ALL_SALTS}C) is wrong.\nOption B"]),
    ("an article that was cut off", FINDINGS, None, [
        "The answer is a", "It must be a", "I would choose a", "So I think it is a",
        "The answer is an", "Final answer: a lung"]),
    ("an article before a text", FINDINGS, "B", [
        "The answer is a lung mass", "A lung mass", "<answer>A lung mass</answer>", "Lung mass"]),
    ("other marks of thought", SALTS, "B", [
        "<thought>A?</thought>B", "<seed:think>The answer is A</seed:think>B",
        "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>B",
        "<unused94>thought\nThe answer is A.<unused95>B", "<answer=B</answer>",
        "<|begin_of_thought|>The answer is A<|end_of_thought|>\n\nThe answer is B",
        "<reasoning>The answer is A.</reasoning><final_answer>B</final_answer>"]),
    ("the last line declares", SALTS, "B", [
        "(A) (B) (C)\nAnswer: B", "The answer is A.\nWait.\nThe answer is B.",
        r"x = \boxed{4}. So the answer is (B).", "low after that. **Answer: B**",
        "so the final answer: B", "Answer: B\nConfidence: 90%", "A\n\nThe answer is B."]),
    ("a letter on a line, a text on the next", SALTS, None, [
        "Answer: A\nHypomagnesemia", "Answer: C\nHypomagnesemia"]),
    ("two letters and a full stop", SALTS, None, ["B.a", "B.c"]),
    ("small letters behind not", {"A": "No", "B": "Yes"}, None, [
        ": no. seems to be  not b the correct option is A"]),
    ("usual forms", SALTS, "B", [
        "Ans: B", '{"answer_idx": "B"}', '{"answers": ["B"]}',
        "I believe the answer is B.", "I'd go with B.", "My answer is B", "Selected answer: B",
        "Selected option: (B)", "Prediction: Hypomagnesemia", "This points to (B).", "Answer (B)",
        "The findings are consistent with option B.", '{"result": {"answer": "B"}}', "{answer: B}",
        '{"selectedOption": "B"}', '{"answer": {"id": "B"}}', r"\fbox{\text{B}}",
        '{"answer": {"option": "B"}, "options": {"A": "x", "B": "y"}}']),
    ("usual forms in Chinese", CHEST, "B", [
        "故选：B。", "答案为B项", "【答案】 B【解析】气体", "因此，正确选项是B", "本题答案为B。", "我选择B",
        "答案应该是B", "应选择 B。", "答案：气胸", "最终答案是：B"]),
    ("numbers with units", DOSES, "B", [
        "10mg", "The answer is 10 mg.", "The dose is 10mg.", r"\boxed{10\,\text{mg}}", "10-mg"]),
    ("other numbers", DOSES, None, ["100 mg", "1 0 mg", "10 g", "110 mg"]),
    ("pictures", PICTURES, "B", ["Answer: image 2", "The answer is <image 2>", "B. <image 2>"]),
    ("next questions and loops", SALTS, "B", [
        "Answer: B\n\nProblem: Which?\nAnswer: C", "Answer: B\n\nCase 2: Which?\nAnswer: C",
        "Answer: B<|endoftext|>Question: Which?\nAnswer: C", "Answer: B</s>Human: And?\nAnswer: C",
        "Answer: B\n\n**Next question**: Which?\nAnswer: C",
        "B<|im_end|>\n<|im_start|>user\nWhich?\nAnswer: C", "答案：B\n\n问题：哪个？\n答案：C",
        "Answer: B\n\n[Question 2]\nAnswer: C", "Answer: B\n\nUser: Which?\nAssistant: C",
        "\\boxed{B}\n\\boxed{B}\n\\boxed{", '{"answer":"B"}\n{"answer":"C']),
    ("a pronoun", TEN, None, ["I cannot say.", "I do not know."]),
    ("option I", TEN, "I", ["I", "I think I", "Answer: I", "(I)"]),
    ("the heading of a review", SALTS, None, [
        "Let's evaluate each answer choice:\n\nA) Hypocalcemia: no spasm.\n\nB) Hypomagnesemia: the level is"]),
    ("a review of texts with letters", SALTS, None, [
        "* **Hypocalcemia (A):** no spasm.\n* **Hypomagnesemia (B):** While the level may be low, it is",
        "Option A suggests a spasm.\nOption B", "Hypocalcemia (tetany): no.\nHypomagnesemia (B)"]),
    ("a choice that was cut off", SALTS, None, [
        "The most likely cause is either hypocalcemia or", "The answer is A or"]),
    ("a possessive", SALTS, "B", [
        "Therefore, the most likely cause of the patient's weakness is hypomagnesemia.\n\n```json",
        "She is weak.\nThe most likely diagnosis for this woman's cramps is hypomagnesemia."]),
    ("a curly apostrophe", SALTS, "B", ["I’d choose B.", "The answer’s B."]),
    ("a curly apostrophe in a doubt", SALTS, None, [
        "I don’t believe the correct answer is A. The level is low.", "It doesn’t follow that the answer is A."]),
    ("another case", SALTS, "B", [
        "The answer is B.\nIf the patient were pregnant, the answer would be C.",
        "Answer: B\n\nIn children, the answer would be C.", "Final answer: B\n\nOtherwise, I would choose C.",
        "The answer is B. Had the level been high, the answer would be A."]),
    ("what others say", SALTS, "B", [
        "It might seem that the correct answer is A, but it is B.",
        "A naive reading suggests the answer is A, but it is B."]),
    ("an answer that is taken back", SALTS, None, [
        "Answer: B. Actually, C.", "Answer: B... no, C.", "The answer is A. Hmm, actually it's C.",
        "Answer: A. Sorry, I meant C.", "B\n\nWait. On second thought, C."]),
    ("an answer that is corrected", SALTS, "B", [
        "Answer: C\n\nCorrection: B", "Answer: C. Correction: B."]),
    ("a number of something else", HOURS, None, [
        "Answer: between 5 and 24 hours", "Answer: over 24 hours", "The answer is <24 hours.",
        "1.5 times 24 hours"]),
    ("a range in words", HOURS, "B", ["It takes 12 to 24 hours.", "Answer: 12 to 24 hours"]),
    ("a word behind a prefix", BLEED, None, ["The bleed is sub-acute.", "This is a sub‑acute clot."]),
    ("a list behind the answer", SALTS, "B", [
        "**Final Answer:** B\nA) Hypocalcemia\nB) Hypomagnesemia\nC) Hyponatremia\nD) Hypokalemia",
        "The correct answer is B. Hypomagnesemia.\nA. Hypocalcemia would show a spasm.\nC. Hyponatremia would not."]),
    ("a review beside the answer", SALTS, "B", [
        "B. Hypomagnesemia\n\nExplanation:\nA. Hypocalcemia: no spasm.\nC. Hyponatremia: no fits.",
        "A) Hypocalcemia: no.\nB) Hypomagnesemia: yes, it is low.\nC) Hyponatremia: no.\n\n**B) Hypomagnesemia**"]),
    ("why it is the exception", CAUSES, "D", [
        "The answer is D. Hypothyroidism is not a cause of hypercalcemia.",
        "The answer is D because D is not a cause of hypercalcemia.",
        "Answer: D (hypothyroidism does not cause hypercalcemia)",
        "<answer>D. Hypothyroidism is not a cause of hypercalcemia</answer>",
        "The answer is D. D is not a cause of hypercalcemia.", "Hypothyroidism does not cause hypercalcemia.\n\nD"]),
    ("a denied text that ends in a full stop", TRAITS, None, [
        "Recessive. is unlikely.", "B. Recessive. is not the right answer.", "**B. Recessive.** can be ruled out."]),
    ("a denied text with a full stop beside the answer", TRAITS, "C", [
        "Recessive. is unlikely. The answer is C.", "The answer is (C).\nB. Recessive. is not the right answer.", "C. Codominant.",
        "Recessive. is unlikely.\nC"]),
    ("a doubt of something else", SALTS, "B", [
        "If forced to choose I would pick B.", "I can't see the strip clearly but the most likely answer is B.",
        "Because the reflexes are not brisk the correct answer is B.",
        "She has no fever and does not shake so the answer is B.", "If I had to guess, I'd say B."]),
    ("more usual forms", SALTS, "B", [
        "A, C and D can be ruled out, which leaves B.", "By process of elimination: B.", "Select option **B**.",
        "I'm leaning toward option B.", "That makes B the correct answer."]),
    ("more forms in Chinese", CHEST, "B", [
        "因此，正确答案是选项 **B**。", "因此B是正确答案。", "最佳答案是B选项。", "最可能的是B。",
        "答案为B（气胸），而不是A（肺炎）。", "有人认为答案是A，其实应为B。"]),
    ("signs within a text", IONS, "B", [
        "The answer is Na+ influx, because it depolarises.", "It is caused by Na+ influx.", "Na + influx"]),
    ("a sign that is missing", IONS, None, ["The answer is Na influx.", "Na- influx"]),
    ("a denied text with a sign", IONS, None, ["B. Na+ influx is not the right answer.", "Na+ influx is unlikely."]),
    ("signs that are not words", BONDS, "B", [
        "The answer is a C≡C bond, heated above 700°C, as it is short.", "B. C≡C bond, heated above 700 °C is right"]),
    ("formulas", POWERS, "B", [r"\boxed{5 \times 10^{6}}", "5×10⁶"]),
    ("capitals in a sentence", SCANS, "A", ["The image is a CT."]),
]


@pytest.mark.parametrize("options, label, text", [
    pytest.param(options, label, text, id=f"{kind}: {text!r:.40}")
    for kind, options, label, completions in SIBLINGS for text in completions])
def test_every_made_sibling_gets_its_value(options, label, text):
    assert grade(text, options, label or "B").label == label


# ------------------------------------------------------------------------------------------------
# Two laws. A completion is a list of pieces: prose as it stands, or a name of an option.

QUESTIONS = [
    ("lung mass", "normal heart", "pleural effusion", "rib fracture"), ("Yes", "No"),
    ("a bicuspid valve", "a lung mass", "the left lung", "an ulcer"),
    ("10 mg", "5 mg", "20 mg", "1.5 mg"), ("20", "-20", "1.5", "60-70%"),
    ("Hepatitis B", "Vitamin C", "Vitamin B12", "E. coli", "Klebsiella"),
    ("Not known", "No fracture", "Fracture of the rib", "None of the above"),
    ("<image 1>", "<image 2>", "<image 3>"), ("肺炎", "气胸", "胸腔积液", "正常"),
    tuple(TEN.values())]
PROSE = [
    "The answer is", " ", "Answer:", ". A scan shows this", " I think so", " I think", "\n", "\n\n",
    ". ", ", ", ".", " because the lobe is dense", " is correct", " is wrong", " not ", " or ",
    " and ", "(", ")", "**", "<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}",
    '{"answer": "', '"}', "Final answer:", "So", " most likely", "the correct option is", "选",
    "答案是", "corresponds to", "Option ", " option ", "Conclusion: ", ": no.",
    " can be ruled out", "but ", "rather than ", ". A biopsy is due.", "I cannot tell", "It is",
    " seems to be ", "?", "If", "1. ", "- ", " - ", "the "]
CUT_OFF = ["", "", "", " The defect is a", " The most likely defect is a", " It is an"]
named_piece = st.tuples(st.sampled_from(["letter", "letter", "letter", "bracket", "small letter",
                                         "text", "text", "small text", "article"]),
                        st.integers(0, 9))
completions = st.lists(st.one_of(st.sampled_from(PROSE), st.sampled_from(PROSE), named_piece),
                       min_size=1, max_size=14)


def name_of(kind: str, letter: str, text: str) -> str:
    article = "a " + text.removeprefix("a ")
    return {"letter": letter, "small letter": letter.lower(), "bracket": f"({letter})",
            "text": text, "small text": text.lower(), "article": article}[kind]


def write(pieces: list, letters: str, option_texts: tuple) -> str:
    "The completion with these letters; words that would touch get a blank between them."
    written = ""
    for piece in pieces:
        if not isinstance(piece, str):
            kind, i = piece[0], piece[1] % len(option_texts)
            piece = name_of(kind, letters[i], option_texts[i])
        written += " " * (written[-1:].isalnum() and piece[:1].isalnum()) + piece
    return written


def law(function):
    "400 examples, the same each time; MEDVLTHINKER_FUZZ=50 makes them 20,000."
    return seed(20261128)(settings(max_examples=400 * FUZZ, database=None)(function))


@law
@given(completions, st.sampled_from(QUESTIONS), st.data(), st.integers(0, 9), st.sampled_from(CUT_OFF))
def test_renaming_letters_and_reordering_options_never_changes_the_verdict(
        pieces, option_texts, data, gold, end):
    verdicts = []
    for _ in range(2):
        letters = "".join(data.draw(st.permutations("ABCDEFGHIJ"[:len(option_texts)])))
        order = data.draw(st.permutations(range(len(option_texts))))
        options = {letters[i]: option_texts[i] for i in order}
        text = write([*pieces, end], letters, option_texts)
        verdict = grade(text, options, letters[gold % len(option_texts)])
        label = verdict.label and letters.index(verdict.label)
        verdicts.append((verdict.correct, label, text, options))
    assert verdicts[0][:2] == verdicts[1][:2], verdicts


DENIALS = [
    "Option ({L}) is not correct.", "Option {L} is incorrect.", "{L} is wrong.", "{L} is out.",
    "{L} can be ruled out.", "It is not {L}.", "I can exclude ({L}).", "({L}) is unlikely.",
    "The answer is not {L}.", "This rules out {L}.", "{L} does not fit.", "{L} isn't right.",
    "{T} ({L}) is less likely because the level is normal.", "{L}. {T} is not the right answer.",
    "{T} is unlikely.", "It is not {T}.", "We can eliminate option {L}.", "{L}: wrong.", "Not {L}.",
    "Therefore, option ({L}) is not the correct answer.", "The correct answer cannot be {L}.",
    "I do not think it is {L}.", "{L} has been excluded.", "There is no {T}.",
    "{L}, however, is incorrect.", "答案不是{L}。", "排除{L}。", "{L}是错误的。", "{L}不正确。", "不选{L}。"]


@law
@given(completions, st.sampled_from(QUESTIONS[:-1]), st.integers(0, 9), st.sampled_from(DENIALS),
       st.sampled_from(["\n", "\n\n", ". "]), st.booleans())
def test_adding_a_denial_of_an_option_never_turns_a_wrong_answer_into_it(
        pieces, option_texts, number, denial, between, before):
    letters = "ABCDEFGHIJ"[:len(option_texts)]
    number %= len(option_texts)
    options, label = dict(zip(letters, option_texts)), letters[number]
    text = write(pieces, letters, option_texts)
    denial = denial.format(L=label, T=option_texts[number])
    longer = denial + between + text if before else text + between + denial
    if not grade(text, options, label).correct:
        assert not grade(longer, options, label).correct, (longer, options, label)


def test_a_denial_beside_a_real_output_is_never_the_answer(real_data):
    "The second law, on what models wrote and with options as exams have them."
    rng, tried = random.Random(1), 0
    for path in sorted(real_data.glob("raw_*/dev.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            options, text = row.get("options", {}), row["output_text"]
            wrong = [label for label in options if not grade(text, options, label).correct]
            if len({*options.values()}) < len(options):
                continue  # two options of one text
            for label in wrong:
                denial = rng.choice(DENIALS).format(L=label, T=options[label])
                longer = rng.choice((f"{denial}\n{text}", f"{text}\n\n{denial}"))
                assert not grade(longer, options, label).correct, (longer, options, label)
                tried += 1
    assert tried > 4_000


# ------------------------------------------------------------------------------------------------
# Real outputs. The rows on which the peer's verdict is another than ours, as judged by a reader, each
# by the SHA-256 of its id: first those where the peer is wrong, then those where we are.

PEER_WRONG = {*"""
0df3eed5 15b26604 19a642a5 1e4de8a2 24417b15 2d4e1b33 2ec2a6d5 31e19ed6 3b0b7ceb 3be779e2
47d16c72 565e2201 5d7d7854 6b9f4b4a 723c2d4b 76bd12cf 7af47ef7 843df778 872dcf9a 8c2780e7
9a8fc534 a3c13541 aa6c57a4 b02cbf5b b396e107 b5bf0917 bcda15c5 c9154fd2 cbbfbb2e d1a969ca
d5362c7b db1df57c e3d5c485 ea9028d4 ebe43781 ee20fddc f17484f5 f380c46a f77531c5 f8e68a25
fa0e9a96 fd4a455e
""".split()}
OURS_WRONG = {*"0ef8a434 6fa84fd4 7da79ad6 b47c43bc c11f7589 d0b07e48 f16fcd7a".split()}


def test_the_disagreements_on_real_outputs_are_those_that_were_judged(real_data):
    "And without the rows whose verdict is wrong at least 97 % agree, in every set and both halves."
    seen, counts = set(), {}
    for path in sorted(real_data.glob("raw_*/dev.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            peer, options = row.get("peer"), row.get("options", dict.fromkeys("ABCDE", ""))
            ours = grade(row["output_text"], options, row.get("gold_label", "A"))
            verdict = peer and bool(peer.get("is_correct", peer.get("accuracy")))
            same = ours.correct == verdict if peer else ours.label is None  # m1's hold no answer
            key = hashlib.sha256(row["id"].replace(" ", "_").encode()).hexdigest()[:8]
            seen |= set() if same else {key}
            half = hashlib.sha256(row["id"].encode()).digest()[0] % 2
            for part in (path.parent.name, half):
                rows, agreed = counts.get(part, (0, 0))
                counts[part] = rows + (key not in PEER_WRONG), agreed + same
    assert seen == PEER_WRONG | OURS_WRONG
    assert all(agreed >= 0.97 * rows for rows, agreed in counts.values()), counts


@pytest.mark.parametrize("start, end", [("The answer is B", "lveolitis."), ("pneumoni", "b.\nWe go on."), ("B", "é")])
def test_a_word_that_the_cut_of_a_long_text_tears_is_no_answer(start, end):
    head, tail = start.rjust(module._REACH), end.ljust(module._REACH)
    gap = "x" * 99
    assert grade(head + gap + tail, {"A": "Yes", "B": "No"}, "B") == Grade(None, None, False)
    assert grade(f"{head[1:]} {gap} {tail[:-1]}", {"A": "Yes", "B": "No"}, "B").label == "B"


@settings(max_examples=50)
@given(soup, soup)
def test_lenient_reads_a_long_text_at_its_ends(start, end):
    start, end = start.ljust(module._REACH, "~"), end.rjust(module._REACH, "~")
    short, long = (grade(start + "~" * gap + end, {"A": "Yes", "B": "No"}, "B") for gap in (10_000, 20_000))
    assert short == long


# ------------------------------------------------------------------------------------------------
# As verl loads it.

BY_PATH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("custom_module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
if sys.argv[2] == "registered": sys.modules["custom_module"] = module
spec.loader.exec_module(module)
info = {"answer_label": "B", "answer": "No", "options": '{"A": "Yes", "B": "No"}', "index": 0}
text = "<think>x</think><answer>B</answer>"
print(module.compute_score(data_source="d", solution_str=text, ground_truth="No", extra_info=info,
                           reward_router_address=None))
assert not any(name.startswith("medvlthinker") for name in sys.modules)
"""


@pytest.mark.parametrize("registered", ["registered", "alone"])
def test_verl_can_load_the_file_by_its_path(registered, tmp_path):
    "In a bare interpreter (-I -S: no site packages, no current folder): the file stands alone."
    done = python("-I", "-S", "-c", BY_PATH, module.__file__, registered, cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("1.0", 0), done.stderr


# ------------------------------------------------------------------------------------------------
# compute_score meets whatever verl hands over.


@settings(max_examples=300)
@given(texts, st.sampled_from(RULES), st.booleans())
def test_the_reward_is_the_verdict(text, rule, as_json):
    options = {"A": "Yes", "B": "No"}
    stored = '{"A": "Yes", "B": "No"}' if as_json else {**options, "C": None}
    info = {"answer_label": "B", "answer": "No", "options": stored}
    score = compute_score("d", text, "No", info, rule=rule, step=1)
    assert score == float(grade(text, options, "B", rule).correct)


# ---------------------------------------------------------------------------------------------------------------------
# A data set proves its key: what is an option's text as a whole is that option, whatever signs and words it holds.

ODD = [["Na+ efflux", "Na+ influx", "K+ efflux", "K+ influx"], ["Carboxyl group", "C=C double bond", "NH3 + 2 ATP --> carbamoyl phosphate", "C-C bond"],
       ["46,XX,der(14;21)(q10;q10)pat+21", "47,XY,+13", "45,XX,rob,(14;21)(q10;q10)", "46,XY,t(2;3)(q21;q12)"],
       ["Can be safely heated above 700°C", "Not pneumonia", "None of the above", "Cannot be determined"], ["A is wrong", "B", "Yes, but not A", "In the interval E0 / n."]]
WAYS = ["{}", "<answer> {} </answer>", "<think> . </think>\n<answer>{}</answer>", "Answer: {}", "\\boxed{{{}}}", "**{}**"]


def own_texts_are_read(options: dict, ways=WAYS) -> None:
    for label, text in options.items():
        for way in ways:
            assert grade(way.format(text), options, label).label == label, (way, text)


@pytest.mark.parametrize("texts", ODD, ids=lambda texts: texts[0])
def test_a_text_of_an_option_is_that_option(texts):
    own_texts_are_read(dict(zip("ABCD", texts)))


def real_options(folder):
    "The options of each real question: exam questions of five text sets, and radiographs."
    for name in ("medqa", "medmcqa", "headqa", "mmlu_med", "medxpertqa"):
        for row in map(json.loads, open(folder / f"text_{name}" / "dev.jsonl", encoding="utf-8")):
            texts = [row.get(key) for key in ("A", "B", "C", "D", "opa", "opb", "opc", "opd")]
            texts += [answer["atext"] for answer in row.get("answers", ())]
            given = row.get("options") or dict(zip("ABCDE", (str(text).strip() for text in texts if text is not None)))
            yield {each["letter"]: each["content"] for each in given} if isinstance(given, list) else given
    for row in map(json.loads, open(folder / "vqa_rad" / "dev.jsonl", encoding="utf-8")):
        yield dict(zip("ABCD", alternatives(row["question"])))


SENTENCES = ["The answer is {}, because it fits.", "Therefore, the most likely answer is {}.", "I would choose {}."]


def test_every_key_of_the_real_questions_is_read(real_data):
    found = [options for options in real_options(real_data) if options and len({text.strip().lower() for text in options.values()}) == len(options)]
    assert len(found) > 600
    for options in found:
        own_texts_are_read(options, WAYS[1:3])
        if not {text.strip().lower() for text in options.values()} & set("abcdefghij"):  # a letter is that option
            own_texts_are_read(options, SENTENCES)
