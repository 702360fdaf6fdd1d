"""Speed and memory, measured: the one place. `./reproduce.sh bench [NAME ...]` runs all measurements, or those named.

Prints name, value, unit, bound and whether it holds, and appends each as a JSON line, with date and machine, to _runs/bench/bench.jsonl.
These machines are shared and noisy: what is compared is measured in turns within one run, and the median counts.
Exit code 1 when a bound does not hold.
"""
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medvlthinker.config import UserError, Workspace, circumstances, command, load_profile

ROOT = Path(__file__).resolve().parent.parent
BENCHES = {}


def bench(function):
    "Register a measurement; it yields (name, value, unit, bound, which side of the bound is good)."
    BENCHES[function.__name__] = function
    return function


def seconds(act, times: int = 1) -> float:
    "The median wall time of a call."
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@bench
def import_time():
    "What `import medvlthinker.grade` costs over a bare interpreter: medians of 15 runs each, in turns."
    def start(code):
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT))

    start("import medvlthinker.grade")  # compiles the module once
    pairs = [(start("pass"), start("import medvlthinker.grade")) for _ in range(15)]
    bare, with_grade = (statistics.median(column) for column in zip(*pairs))
    yield "import of medvlthinker.grade over a bare interpreter", 1000 * (with_grade - bare), "ms", 50, "at most"


COMPLETION = "<think> The scan shows a dense lesion in the left upper lobe; option {x} fits, the others do not. </think>\n<answer> {x} </answer>"


@bench
def grading_rate():
    "Completions graded per second on one core, each under all five rules."
    from medvlthinker.grade import RULES, grade

    options = dict(zip("ABCD", ("lung", "heart", "liver", "spleen")))
    texts = [COMPLETION.format(x="ABCD"[i % 4]) if i % 3 else f"The answer is ({'ABCD'[i % 4]}), the {options['ABCD'[i % 4]]}." for i in range(3000)]
    taken = seconds(lambda: [grade(text, options, "B", rule) for text in texts for rule in RULES], times=3)
    yield "completions graded under all five rules", len(texts) / taken, "per s", 4000, "at least"


HOSTILE = ["a", " ", "\n", "\r\n", "\t", "(", ")", "((A))", "A ", "A. ", "A B C D ", "(A) (B) ", "<", "<a", "<answer", "<answer>", "<answer>\n", "</answer>", "<answer>A</answer>",
           "<answer> A ", "<ANSWER>", "<think>", "</think>", "</think> ", "<think></think>", "<think></think><answer>", "<think>x</think> <answer>B</answer> ",
           "Answer", "answer is ", "answer: ", "answer:\n", "the answer is (", "final answer ", "is: ", "most likely ", "i choose ", "Option A: ", "\\", "\\boxed{",
           "\\boxed{A}", "\\boxed{{", "{", "}", "**", "**A**", '{"answer": "A", ', '"answer":', '"answer":[', "yes ", "no, ", "normal not ", ".", "0", "é", "ſ",
           "\0", "\u0301\u0323", "\u202e", "\uff21 "]


def least(text: str, rule: str, times: int = 3) -> float:
    "Processor seconds of one grading: the least of a few, for the others were disturbed."
    from medvlthinker.grade import grade

    options, taken = dict(zip("ABCDE", ("yes", "no", "a (b) c", "spleen, or (left) lung", "not"))), []
    for _ in range(times):
        began = time.process_time()
        grade(text, options, "B", rule)
        taken.append(time.process_time() - began)
    return min(taken)


@bench
def grading_worst_case():
    "The slowest of many hostile inputs of one megabyte, over all rules, and how the time grows when the text does."
    from medvlthinker.grade import RULES

    frames = (("", ""), ("<think>x</think><answer>", "</answer>"), ("", "</think>\n<answer> B </answer>"))
    def text(frame, unit, size):
        return frame[0] + unit * (size // len(unit)) + frame[1]

    cases = [(least(text(frame, unit, 1_000_000), rule, 1), rule, unit, frame) for unit in HOSTILE for frame in frames for rule in RULES]
    slow = sorted(cases, key=lambda case: -case[0])[:40]
    worst = max((least(text(frame, unit, 1_000_000), rule), rule, unit) for _, rule, unit, frame in slow)
    print(f"    slowest: {worst[1]} on 1 MB of {worst[2]!r}")
    yield f"slowest of {len(cases)} hostile gradings of 1 MB", 1000 * worst[0], "ms", 100, "at most"
    growth = max((least(text(frame, unit, 1_000_000), rule) / least(text(frame, unit, 125_000), rule), rule, unit) for _, rule, unit, frame in slow)
    print(f"    fastest growing: {growth[1]} on {growth[2]!r}")
    yield "time for 8 times the text, over the time for the text (40 slowest; 64 would be quadratic)", growth[0], "x", 16, "at most"


@bench
def rollout_overhead():
    "A rollout's wall time over that of bare `generate` on inputs prepared beforehand: tiny model, 200 questions, five turns each."
    import torch
    from medvlthinker import phantom
    from medvlthinker.engine import Sampling, engine_version, open_engine, resolve_model
    from medvlthinker.prompt import messages
    from medvlthinker.rollout import identity, roll_out

    profile = load_profile("smoke")
    torch.set_num_threads(1)
    model = resolve_model("tiny", Workspace(profile.name))
    engine, sampling, samples = open_engine(profile, model), Sampling(max_tokens=64), phantom.benchmark("pmc_vqa", 200)
    who, size = identity(samples, model, profile, sampling), profile.batch_size
    prepared = []
    for start in range(0, len(samples), size):
        chats = [messages(sample) for sample in samples[start:start + size]]
        texts = [engine.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        images = [part["image"] for chat in chats for part in chat[0]["content"] if part["type"] == "image"]
        prepared.append(engine.processor(text=texts, images=images, padding=True, return_tensors="pt"))

    def bare():
        with torch.inference_mode():
            for batch in prepared:
                engine.model.generate(**batch, max_new_tokens=64, do_sample=False)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            roll_out(samples, lambda: engine, Path(folder), who, engine_version("transformers"), show=lambda line: None)

    bare()
    turns = [(seconds(bare), seconds(ours)) for _ in range(5)]
    alone, whole = (statistics.median(column) for column in zip(*turns))
    yield "rollout over bare generate (tiny model, inputs prepared beforehand)", whole / alone, "x", 1.6, "at most"
    yield "rollout, our own cost per question (decode, template, processor, files)", 1000 * (whole - alone) / len(samples), "ms", 10, "at most"


@bench
def second_run():
    "./reproduce.sh smoke when everything is done already."
    def call():
        subprocess.run(["./reproduce.sh", "smoke"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    call()  # does whatever is missing
    yield "second ./reproduce.sh", seconds(call, times=3), "s", 10, "at most"


def main(words: list[str]) -> int:
    "Run the named measurements, or all."
    if unknown := [word for word in words if word not in BENCHES]:
        raise UserError(f"No measurement {', '.join(unknown)}; known are {', '.join(BENCHES)}.")
    folder = Workspace("bench").root
    folder.mkdir(parents=True, exist_ok=True)
    here = circumstances()
    base = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "machine": here["machine"], "load": round(os.getloadavg()[0], 1),
            "commit": here["commit"], "clean": here["clean"]}
    missed = 0
    for name in words or BENCHES:
        for what, value, unit, bound, side in BENCHES[name]():
            holds = value <= bound if side == "at most" else value >= bound
            missed += not holds
            print(f"{what:92}{value:12.4g} {unit:7}{side} {bound:<7g}{'holds' if holds else 'DOES NOT HOLD'}", flush=True)
            with open(folder / "bench.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({"name": name, "what": what, "value": value, "unit": unit, "bound": bound, "side": side, "holds": holds, **base}) + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    command(main)
