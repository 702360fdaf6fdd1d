"""Speed and memory, measured: the one place. `./reproduce.sh bench [NAME ...]` runs all measurements, or those named.

Prints value, unit, bound and whether it holds, and appends each as a JSON line, with date, commit and machine, to _runs/bench/bench.jsonl; then draws
the history (nbs/app/76_bench.ipynb). `--list` names the measurements, their bounds and their last values, `--draw` only draws, `--keep` copies the history
beside the chapter. These machines are shared and noisy: what is compared is measured in turns within one run, and the median counts.
Exit code 1 when a bound does not hold. What this machine cannot measure is said, and is no failure.
"""
import contextlib
import datetime
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from medvlthinker.app.bench import add_line, latest, read_lines, write_history
from medvlthinker.core.files import UserError, environment_info, atomic_write
from medvlthinker.core.commands import run_main
from medvlthinker.app.profile import Workspace, load_profile

ROOT = Path(__file__).resolve().parents[2]
import own_cost
import ray_rate
import resume
import transformers_rate
import vllm_rate
from measuring import Bound, NotHere, seconds
from stored import write_questions, write_rollout

BENCHES = {module.__name__: (getattr(module, module.__name__), module.BOUNDS)
           for module in (own_cost, ray_rate, resume, transformers_rate, vllm_rate)}
FOLDER = Workspace("bench").root  # as the command was called: some measurements set a home of their own
LOG, WHOLE = FOLDER / "bench.jsonl", FOLDER / "whole"


def bench(*bounds: Bound):
    "Register a measurement; it yields a value for each of its bounds, in their order, or (value, what) where what was measured differs from what is named."
    def register(function):
        BENCHES[function.__name__] = function, bounds
        return function

    return register


@bench(Bound("import of medvlthinker.core.grade over a bare interpreter", "ms", 50))
def import_time():
    "What `import medvlthinker.core.grade` costs over a bare interpreter: medians of 15 runs each, in turns."
    compiled = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}  # else every start compiles the module

    def start(code):
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=compiled))

    start("import medvlthinker.core.grade")  # compiles the module once
    pairs = [(start("pass"), start("import medvlthinker.core.grade")) for _ in range(15)]
    bare, with_grade = (statistics.median(column) for column in zip(*pairs))
    yield 1000 * (with_grade - bare)


COMPLETION = "<think> The scan shows a dense lesion in the left upper lobe; option {x} fits, the others do not. </think>\n<answer> {x} </answer>"


@bench(Bound("completions graded under all five rules", "per s", 4000, "at least"))
def grading_rate():
    "Completions graded per second on one core, each under all five rules."
    from medvlthinker.core.grade import RULES, grade

    options = dict(zip("ABCD", ("lung", "heart", "liver", "spleen")))
    texts = [COMPLETION.format(x="ABCD"[i % 4]) if i % 3 else f"The answer is ({'ABCD'[i % 4]}), the {options['ABCD'[i % 4]]}." for i in range(3000)]
    taken = seconds(lambda: [grade(text, options, "B", rule) for text in texts for rule in RULES], times=3)
    yield len(texts) / taken


HOSTILE = ["a", " ", "\n", "\r\n", "\t", "(", ")", "((A))", "A ", "A. ", "A B C D ", "(A) (B) ", "<", "<a", "<answer", "<answer>", "<answer>\n", "</answer>", "<answer>A</answer>",
           "<answer> A ", "<ANSWER>", "<think>", "</think>", "</think> ", "<think></think>", "<think></think><answer>", "<think>x</think> <answer>B</answer> ",
           "Answer", "answer is ", "answer: ", "answer:\n", "the answer is (", "final answer ", "is: ", "most likely ", "i choose ", "Option A: ", "\\", "\\boxed{",
           "\\boxed{A}", "\\boxed{{", "{", "}", "**", "**A**", '{"answer": "A", ', '"answer":', '"answer":[', "yes ", "no, ", "normal not ", ".", "0", "é", "ſ",
           "\0", "\u0301\u0323", "\u202e", "\uff21 "]


def least(text: str, rule: str, times: int = 3) -> float:
    "Processor seconds of one grading: the least of a few, for the others were disturbed."
    from medvlthinker.core.grade import grade

    options, taken = dict(zip("ABCDE", ("yes", "no", "a (b) c", "spleen, or (left) lung", "not"))), []
    for _ in range(times):
        began = time.process_time()
        grade(text, options, "B", rule)
        taken.append(time.process_time() - began)
    return min(taken)


@bench(Bound("slowest of 885 hostile gradings of 1 MB", "ms", 100),
       Bound("time for 8 times the text, over the time for the text (40 slowest; 64 would be quadratic)", "x", 16))
def grading_worst_case():
    "The slowest of many hostile inputs of one megabyte, over all rules, and how the time grows when the text does."
    from medvlthinker.core.grade import RULES

    frames = (("", ""), ("<think>x</think><answer>", "</answer>"), ("", "</think>\n<answer> B </answer>"))
    def text(frame, unit, size):
        return frame[0] + unit * (size // len(unit)) + frame[1]

    cases = [(least(text(frame, unit, 1_000_000), rule, 1), rule, unit, frame) for unit in HOSTILE for frame in frames for rule in RULES]
    slow = sorted(cases, key=lambda case: -case[0])[:40]
    worst = max((least(text(frame, unit, 1_000_000), rule), rule, unit) for _, rule, unit, frame in slow)
    print(f"    slowest: {worst[1]} on 1 MB of {worst[2]!r}")
    yield 1000 * worst[0], f"slowest of {len(cases)} hostile gradings of 1 MB"
    growth = max((least(text(frame, unit, 1_000_000), rule) / least(text(frame, unit, 125_000), rule), rule, unit) for _, rule, unit, frame in slow)
    print(f"    fastest growing: {growth[1]} on {growth[2]!r}")
    yield growth[0]


CONVERT = """
import json, resource, sys, time
from medvlthinker.data.corpora import load_corpus
from medvlthinker.data.readers import DataSettings
began = time.perf_counter()
samples = load_corpus("pmc_vqa", DataSettings(data_dir=sys.argv[1]))
print(json.dumps([len(samples), time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


def pmc_copy(folder: Path, rows: int, figures: list[bytes]) -> Path:
    "A local copy of PMC-VQA with so many rows, each with a figure file of its own name."
    images = folder / "PMC-VQA" / "images"
    images.mkdir(parents=True)
    for number, data in enumerate(figures):
        (images / f"figure{number}.jpg").write_bytes(data)
    with open(folder / "PMC-VQA" / "train.csv", "w", encoding="utf-8") as file:
        file.write("Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n")
        for n in range(rows):
            os.link(images / f"figure{n % len(figures)}.jpg", images / f"{n}.jpg")
            file.write(f"{n}.jpg, What does the arrow in panel {n} point at? ,a nodule, A:a vessel , B:a nodule , C:an artefact , D:the heart ,B\n")
    return folder


@bench(Bound("conversion of 177,000 rows with 600x598 JPEGs", "rows/s", 1500, "at least"),
       Bound("conversion of 177,000 rows, peak memory", "GiB", 1.5e9 / 2**30),
       Bound("conversion, seconds for ten times the rows", "x", 11))
def conversion():
    "PMC-VQA from a CSV and 600x598 JPEGs of about 60 kB to stored samples, each image looked at: 17,700 rows, then 177,000 (10 GB)."
    import io

    import numpy as np
    from PIL import Image

    rng, figures = np.random.default_rng(0), []
    for _ in range(64):  # large smooth shapes and a little grain, as in a photograph of a slide
        smooth = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((600, 598), Image.Resampling.BICUBIC)
        grain, file = rng.normal(0, 2.2, (598, 600, 1)), io.BytesIO()
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        figures.append(file.getvalue())
    print(f"    figures of {sum(map(len, figures)) / len(figures) / 1000:.0f} kB")
    room = shutil.disk_usage(tempfile.gettempdir()).free
    sizes = (17_700, 177_000) if room > 14e9 else (1_770, 17_700)
    if sizes[1] < 177_000:
        print(f"    a tenth of the rows only: {room / 1e9:.0f} GB of disk are free, and all take 14")
    taken = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = pmc_copy(Path(folder) / "data", rows, figures)
            done = subprocess.run([sys.executable, "-c", CONVERT, str(source)], cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "MEDVLTHINKER_HOME": f"{folder}/home"})
            count, taken[rows], memory = json.loads(done.stdout.splitlines()[-1])
            assert count == rows
    yield sizes[1] / taken[sizes[1]], f"conversion of {sizes[1]:,} rows with 600x598 JPEGs"
    yield memory, f"conversion of {sizes[1]:,} rows, peak memory"
    yield taken[sizes[1]] / taken[sizes[0]]


def whole(*words: str) -> tuple[float, float]:
    "Seconds and peak memory in GiB, all processes together, of a command of `./reproduce.sh` in a home of its own, which stays for the next one."
    import psutil

    process = psutil.Popen(["./reproduce.sh", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "MEDVLTHINKER_HOME": str(WHOLE)})
    most, done = [0], threading.Event()

    def held(each) -> int:  # what several processes share counts once
        try:
            return each.memory_full_info().pss
        except (psutil.Error, AttributeError):  # it has ended; or the system does not tell
            return 0

    def watch():
        while not done.wait(1):
            with contextlib.suppress(psutil.Error):
                most.append(sum(map(held, [process, *process.children(recursive=True)])))

    (watcher := threading.Thread(target=watch)).start()
    began = time.perf_counter()
    code, taken = process.wait(), time.perf_counter() - began
    done.set()
    watcher.join()
    if code:
        raise UserError(f"./reproduce.sh {' '.join(words)} ended with exit code {code}; what it took says nothing. Its files are in {WHOLE}.")
    return taken, max(most) / 2**30


@bench(Bound("./reproduce.sh, the whole of smoke, set up before", "s", 720), Bound("./reproduce.sh smoke, peak memory of all processes together", "GiB", 4e9 / 2**30))
def smoke():
    "The default profile from nothing to tables: data, curation, six recipes, evaluation, results, audit. The two next measure in the home that it leaves."
    shutil.rmtree(WHOLE, ignore_errors=True)
    taken, memory = whole("smoke")
    yield taken
    if memory:
        yield memory
    else:
        print("    the memory is not measured: this system does not tell what processes share")


@bench(Bound("second ./reproduce.sh", "s", 10))
def second_run():
    "./reproduce.sh smoke when everything is done already."
    whole("smoke")  # does whatever is missing
    yield statistics.median(whole("smoke")[0] for _ in range(3))


@bench(Bound("./reproduce.sh results, after a run", "s", 60))
def results():
    "Every table and figure drawn anew from the run that there is."
    whole("smoke")
    yield whole("results", "smoke")[0]


@bench(Bound("overlap of 200,000 training and 8,220 test items, in full", "s", 300),
       Bound("planted crops found among them", "of 100", 95, "at least"))
def overlap():
    "200,000 training items against 8,220 test items, each with a question of 15 words and an image, all of it: decoding, hashing, matching."
    import io
    import random
    from itertools import islice

    import numpy as np
    from PIL import Image
    from medvlthinker.data import overlap as module
    from medvlthinker.data.sample import Sample

    rng, letters = np.random.default_rng(0), random.Random(0)
    words = ["".join(letters.choice("bcdfghlmnprstvxz") + letters.choice("aeiouy") for _ in range(letters.randint(1, 5))) for _ in range(20_000)]
    grain = rng.integers(-14, 15, (1198, 1200, 3))

    def drawn(width, height):  # blotches under grain; about 60 kB at 600 x 598
        blotches = Image.fromarray(rng.integers(0, 256, (10, 10, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        y, x = rng.integers(0, 598), rng.integers(0, 600)
        picture = Image.fromarray(np.clip(np.asarray(blotches) + grain[y:y + height, x:x + width], 0, 255).astype(np.uint8))
        picture.save(file := io.BytesIO(), "JPEG", quality=80)
        return file.getvalue()

    def item(name, number, data):
        question = " ".join(random.Random(f"{name}{number}").choices(words, k=15))
        return Sample(question, {"A": "yes", "B": "no"}, "A", "yes", (data,), dataset_name=name, dataset_index=number)

    test = [item("test", number, drawn(300, 300)) for number in range(8220)]
    pool = [drawn(600, 598) for _ in range(2000)]
    copies = [Image.open(io.BytesIO(sample.images[0])).crop((20, 10, 290, 280)).resize((600, 598)) for sample in test[:100]]
    planted = {}
    for number, copy in enumerate(copies):
        copy.save(file := io.BytesIO(), "JPEG", quality=80)
        planted[1999 * number] = file.getvalue()

    def train():  # bytes after the end of a JPEG make another file of the same picture, which is decoded all the same
        return (item("train", number, planted.get(number) or pool[number % 2000] + number.to_bytes(4, "big")) for number in range(200_000))

    print(f"    {statistics.mean(map(len, pool)) / 1000:.0f} kB an image, {len(set(words))} words; two threads")
    indexes, some = [], list(islice(train(), 1, 501))
    print(f"    the test side alone: {seconds(lambda: indexes.append(module.SampleIndex(test))):.0f} s")
    thumbs = [module.thumbnail(sample.images[0]) for sample in some]
    for part, act in (("decoding", lambda: [module.thumbnail(sample.images[0]) for sample in some]),
                      ("describing two windows", lambda: [module.spectra(thumb, (module.WHOLE, module.MIDDLE)) for thumb in thumbs]),
                      ("all of it, with 139,740 comparisons of each window", lambda: [list(indexes[0].search(sample)) for sample in some])):
        print(f"    {part}, one thread: {1000 * seconds(act) / len(some):.2f} ms an item")
    pairs = []
    taken = seconds(lambda: pairs.append(module.overlap({"train": train()}, test)))
    found = {(row.train_index, row.test_index) for row in pairs[0].itertuples() if row.level == "image"}
    hit = len(found & {(1999 * number, number) for number in range(100)})
    print(f"    planted crops found: {hit} of 100; other pairs at an image level: {len(found) - hit}")
    yield taken
    yield hit


PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}  # dense bfloat16 operations a second, from the makers' data sheets


def random_model(folder: Path, shape) -> Path:
    "A model with the shape of another one's text config and random weights, under the embedded tokenizer and processor."
    import torch
    from medvlthinker.generation.tiny_model import tiny_config, tiny_processor
    from transformers import Qwen2_5_VLForConditionalGeneration

    cut = tiny_processor()
    config = tiny_config(cut.tokenizer)
    half = shape.hidden_size // shape.num_attention_heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "layer_types")
    text = {**{key: getattr(shape, key) for key in same},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}
    config.text_config.update(text)
    config.tie_word_embeddings, config.vision_config.out_hidden_size = shape.tie_word_embeddings, shape.hidden_size
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    net.save_pretrained(folder)
    cut.save_pretrained(folder)
    return folder


def training_rates(shape, gpus: int, rows: int = 64, chain: int = 900, answer: int = 512):
    "Tokens a second of SFT, of GRPO and of the engine alone, for a shape; yields (what, tokens a second, operations a token and parameter)."
    from dataclasses import replace

    from medvlthinker.data import synthetic
    from medvlthinker.app.runs import engine_settings, training_places
    from medvlthinker.generation.engine import open_engine
    from medvlthinker.generation.request import Request, Sampling
    from medvlthinker.training.grpo import train_grpo
    from medvlthinker.training.recipe import find
    from medvlthinker.data.sample import write_samples
    from medvlthinker.training.sft import plan, train_sft
    from medvlthinker.training.train import curves

    with tempfile.TemporaryDirectory() as home:
        os.environ["MEDVLTHINKER_HOME"] = home
        workspace, folder = Workspace("smoke"), random_model(Path(home) / "model", shape)
        profile = load_profile("smoke", gpus=gpus, dtype="bfloat16" if gpus else "float32", max_steps=8, max_tokens=answer)
        drawn = synthetic.corpus("m23k", rows)
        write_samples([replace(sample, reasoning=(sample.reasoning + " ") * (chain // 12)) for sample in drawn], workspace.samples / "synthetic" / "corpus" / "m23k-distilled.parquet")
        write_samples(drawn, workspace.curated / "synthetic" / "m23k-200-tiny-easy_to_hard.parquet")
        for name, change, act, work in (("3B-SFT_m23k", {}, train_sft, 6), ("3B-RL_m23k", {"batch": 8, "mini_batch": 8, "max_response_length": answer, "kl_coef": 0.0}, train_grpo, 8)):
            recipe = find(name)
            places = training_places(recipe, profile)
            act(plan(replace(recipe, init=str(folder), gpus=gpus, how=replace(recipe.how, **change)), profile, *places))
            late = curves(places[-1]).iloc[3:]  # the first steps warm up
            yield name, (late.tokens.iloc[-1] - late.tokens.iloc[0]) / (late.seconds.iloc[-1] - late.seconds.iloc[0]), work
        engine = open_engine(engine_settings(replace(profile, gpus=gpus), str(folder)))
        sampling = Sampling(n=8, temperature=1.0, max_tokens=answer)
        asked, made = [Request(sample, i, sampling) for i, sample in enumerate(drawn)], []
        taken = seconds(lambda: made.extend(each for _, answers in engine.answer(asked) for each in answers))
        yield f"the engine alone ({profile.engine}), answers", sum(completion.tokens for completion in made) / taken, 2


@bench(*(Bound(f"{what}: tokens a second on one GPU", "1/s", 0, "at least") for what in ("3B-SFT_m23k", "3B-RL_m23k", "the engine alone")))
def gpu_training():
    "Tokens a second, and the share of the GPU's arithmetic, in SFT and GRPO of a model of the shape of Qwen2.5-VL-3B with random weights; measured where there is a GPU."
    import torch
    from medvlthinker.training.memory import count_parameters, model_config

    if not torch.cuda.is_available():
        raise NotHere("there is no GPU; it would be tokens a second and FLOP/s utilisation of training")
    name, shape = torch.cuda.get_device_name(), model_config("3B").text_config
    weights = shape.num_hidden_layers * count_parameters("3B").layer
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    for what, rate, work in training_rates(shape, 1):
        used = f", {100 * work * weights * rate / peak:.1f} % of its bfloat16 arithmetic" if peak else ""
        print(f"    {what} on one {name}: {rate:,.0f} tokens/s{used}")
        yield rate, f"{what}: tokens a second on one {name}"


@bench(*(Bound(f"{name} above its base, over three seeds", "standard errors", 3, "at least") for name in ("tiny-SFT_PMC", "tiny-RL_PMC")))
def three_seeds():
    "What SFT and RL on images add to the embedded model: three seeds of everything (weights, lessons, samples, order), 200 questions a set that were used for nothing else."
    import numpy as np
    from medvlthinker.generation.tiny_model import make_tiny_model
    from medvlthinker.app.profile import overrides
    from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
    from medvlthinker.evaluation.evaluate import grade_rollout
    from medvlthinker.generation.request import Sampling
    from medvlthinker.core.grade import grade
    from medvlthinker.app.runs import rollouts

    def right(profile, model):  # by test set, in the sets' order
        rolled = rollouts(profile, model, Sampling(max_tokens=profile.max_tokens), show=lambda line: None)
        return [np.array([grade(row["completions"][0]["text"], s.options, s.answer_label, "regrade").correct for s, row in zip(samples, rows)], float)
                for samples, rows in rolled.values()]

    gains = {"tiny-SFT_PMC": [], "tiny-RL_PMC": []}
    os.environ["MEDVLTHINKER_HOME"] = str(Workspace("bench").root / "three_seeds")
    for seed in range(3):
        workspace = Workspace("smoke")
        shutil.rmtree(workspace.root, ignore_errors=True)  # a recipe's name stands for one seed at a time
        base = make_tiny_model(workspace.home / f"seed-{seed}", seed=seed, show=lambda line: None)
        profile = load_profile("smoke", seed=seed, limit=200, models=str(base), corpus="pmc_vqa")
        samples, rows = rollouts(profile, str(base), Sampling(n=8, temperature=1.0, max_tokens=profile.max_tokens), kind="corpus", show=lambda line: None)["pmc_vqa"]
        curate(samples.path, keep_band(pass_counts(grade_rollout(samples, rows, ("strict",)))), workspace.curated / "synthetic", by=str(base))
        before = right(profile, str(base))
        for name, found in gains.items():
            words = [f"{key}={value}" for key, value in overrides(profile).items()]
            subprocess.run([sys.executable, "-m", "medvlthinker.app.cli", "train", "smoke", f"recipe={name}", f"init={base}", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            after = right(profile, name)
            differences = [new - old for new, old in zip(after, before)]
            error = sum(each.var(ddof=1) / len(each) for each in differences) ** 0.5 / len(differences)
            found.append((np.mean([each.mean() for each in differences]), error))
            macro = [100 * np.mean([each.mean() for each in sets]) for sets in (before, after)]
            print(f"    seed {seed}, {name}: {macro[0]:.1f} -> {macro[1]:.1f} %, paired difference {100 * found[-1][0]:+.1f}, standard error {100 * error:.1f} points, n={sum(map(len, after))}", flush=True)
    for name, found in gains.items():
        mean, error = np.mean([gain for gain, _ in found]), sum(error**2 for _, error in found) ** 0.5 / len(found)
        print(f"    {name}: {100 * mean:+.1f} points over three seeds, standard error of the questions {100 * error:.1f}, spread over seeds {100 * np.std([gain for gain, _ in found], ddof=1):.1f}")
        yield mean / error


REGRADE = """
import json, resource, sys, time
from medvlthinker.core.grade import RULES
from medvlthinker.evaluation.evaluate import cores, grade_rollout, question_scores
from medvlthinker.generation.rollout import load_rollout
from medvlthinker.data.sample import SampleFile
if __name__ == "__main__":
    began = time.perf_counter()
    grades = grade_rollout(SampleFile(sys.argv[1], look=False), load_rollout(sys.argv[2]))
    lines = [score for rule in RULES for score in question_scores(grades, rule).itertuples()]
    taken = time.perf_counter() - began
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    busy = sum(each.ru_utime + each.ru_stime for each in (own, others))
    print(json.dumps([len(lines), taken, (own.ru_maxrss + cores() * others.ru_maxrss) / 2**20, cores(), busy]))
"""


@bench(Bound("526,080 stored completions re-graded under all five rules", "s", 60),
       Bound("re-grading, peak memory of all processes together", "GiB", 1.5e9 / 2**30))
def regrading():
    "8,220 questions with an image of 50 kB, 64 distinct answers to each, about 1,000 characters long: read from disk, checked, graded under all five rules, counted."
    with tempfile.TemporaryDirectory() as folder:
        samples = write_questions(Path(folder), 8220, os.urandom(50_000))
        rollout = write_rollout(samples, 64, Path(folder))
        (script := Path(folder) / "regrade.py").write_text(REGRADE)
        done = subprocess.run([sys.executable, str(script), str(samples.path), str(rollout.folder)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines, taken, memory, workers, busy = json.loads(done.stdout.splitlines()[-1])
    assert lines == 8220 * 5
    print(f"    {workers} cores, {8220 * 64 / taken:,.0f} completions a second; {busy:.0f} s of processor time, start of the processes included")
    yield taken
    yield memory


@bench(Bound("verifying 2 GiB of weights, over hashlib on the same files, one after the other", "x", 1.2))
def verify():
    "Every file of a run read again and compared with its record, over the hashing that this needs; eight files of 256 MiB, in turns."
    import hashlib

    from medvlthinker.core.files import write_record
    from medvlthinker.app.verify import findings

    def bare():
        for path in paths:
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256")

    with tempfile.TemporaryDirectory() as folder:
        root, block = Path(folder), os.urandom(2**28)
        model = root / "checkpoints" / "model"
        model.mkdir(parents=True)
        paths = [model / f"model-{number}.safetensors" for number in range(8)]
        with write_record(model, {}):
            for number, path in enumerate(paths):
                path.write_bytes(number.to_bytes(8, "big") + block)
        found = findings(root)
        assert {finding.state for finding in found} == {"fits"} and len(found) == 9, found
        turns = [(seconds(bare), seconds(lambda: findings(root))) for _ in range(3)]
    alone, ours = (statistics.median(column) for column in zip(*turns))
    print(f"    {2048 / alone:.0f} MiB/s bare, {2048 / ours:.0f} MiB/s verified, on {os.cpu_count()} cores")
    yield ours / alone


@bench(Bound("notebooks that do not get through Run All", "of them", 0),
       Bound("slowest Run All of a library notebook", "s", 60))
def notebooks():
    "Run All of every library notebook in a fresh kernel, one thread, start of the kernel included; nothing was run before."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    taken, failed = {}, []
    for path in sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("[!p]*/*.ipynb")]):
        client = NotebookClient(nbformat.read(path, 4), kernel_name="python3", resources={"metadata": {"path": path.parent}})
        with tempfile.TemporaryDirectory() as home:
            try:
                taken[path.stem] = seconds(functools.partial(client.execute, env={**os.environ, "MEDVLTHINKER_HOME": home, "OMP_NUM_THREADS": "1"}))
            except CellExecutionError as error:
                failed.append(path.stem)
                print(f"    {path.stem} stops: {error.ename}: {error.evalue}", flush=True)
    slowest = sorted(taken, key=taken.get, reverse=True)
    print(f"    {len(taken)} notebooks in {sum(taken.values()):.0f} s; the slowest: {', '.join(f'{name} {taken[name]:.0f} s' for name in slowest[:5])}")
    yield len(failed)
    yield taken[slowest[0]]


@bench(Bound("./reproduce.sh test", "s", 900))
def tests():
    "Every notebook and every test but the heavy ones, as CI runs them."
    began = time.perf_counter()
    if subprocess.run(["./reproduce.sh", "test"], cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode:
        raise UserError("./reproduce.sh test failed; what it took says nothing. Run it by itself.")
    yield time.perf_counter() - began


# --- what was measured is kept, listed and drawn ----------------------------------------------------------------------------


def measure(names: list[str]) -> int:
    "Run measurements and keep what they yield; the number of bounds that do not hold."
    here, missed = environment_info(), 0
    base = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": here["machine"], "load": round(os.getloadavg()[0], 1), "commit": here["commit"], "clean": here["clean"]}
    for name in names:
        function, bounds = BENCHES[name]
        try:
            for each, given in zip(function(), bounds):
                value, what = each if isinstance(each, tuple) else (each, given.what)
                holds = value <= given.bound if given.side == "at most" else value >= given.bound
                missed += not holds
                print(f"{what:92}{value:12.4g} {given.unit:7}{given.side} {given.bound:<7g}{'holds' if holds else 'DOES NOT HOLD'}", flush=True)
                add_line(LOG, {"name": name, **given._asdict(), "what": what, "value": float(value), "holds": bool(holds), **base})
        except NotHere as reason:
            print(f"{name}: not measured on this machine: {reason}.", flush=True)
    return missed


def listed() -> None:
    "Print every measurement, its bounds and its last value."
    last = latest(read_lines(LOG))
    for name, (function, bounds) in BENCHES.items():
        print(f"{name}: {function.__doc__}")
        for given in bounds:
            line = last.get(given.what)
            found = f"last {line['value']:.4g} on {line['date'][:10]}, commit {(line.get('commit') or 'unknown')[:7]}, {line['machine']}" if line else "not measured yet"
            print(f"    {given.what}: {f'{given.side} {given.bound:.4g} {given.unit}' if given.bound or given.side == 'at most' else 'stated only'}; {found}")


def drawn() -> None:
    "Draw the history and say where."
    if lines := read_lines(LOG):
        print(f"The history: {write_history(lines, FOLDER, environment_info()['machine'])}")
    else:
        print("Nothing was measured yet; there is no history to draw.")


def kept() -> None:
    "Copy the history beside its chapter."
    lines, place = read_lines(LOG), ROOT / "nbs" / "assets" / "bench.jsonl"
    if not lines:
        raise UserError(f"{LOG} holds no measurement; measure first: ./reproduce.sh bench.")
    with atomic_write(place) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"{len(lines)} measurements in {place.relative_to(ROOT)}; run nbs/app/76_bench.ipynb again, which shows them.")


def main(words: list[str]) -> int:
    "Run the named measurements, or all; or list, draw or keep."
    only = {"--list": listed, "--draw": drawn, "--keep": kept}
    if len(words) == 1 and words[0] in only:
        only[words[0]]()
        return 0
    if unknown := [word for word in words if word not in BENCHES]:
        raise UserError(f"No measurement {', '.join(unknown)}; known are {', '.join(BENCHES)}, and alone {', '.join(only)}.")
    missed = measure(words or list(BENCHES))
    drawn()
    return int(missed > 0)


if __name__ == "__main__":
    run_main(main)
