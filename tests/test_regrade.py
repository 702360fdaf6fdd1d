"""Another rule over stored answers, on one core and on several; and the logs of other tools, read by those tools where they are installed."""
import datetime
import json
import time

import pytest
from conftest import encoded, python, says
from hypothesis import given, settings
from hypothesis import strategies as st
from medvlthinker.data.benchmarks import load_benchmark
from medvlthinker.generation.request import Completion
from medvlthinker.core.files import UserError
from medvlthinker.difficulty.profile import Workspace, load_profile
from medvlthinker.evaluation.evaluate import recount, count, grade_rows, repeated_counts
from medvlthinker.evaluation.exchange import Told, exchange, to_inspect, to_lm_eval
from medvlthinker.core.grade import RULES, grade
from medvlthinker.evaluation.regrade import CAUSES, cells, find_rule, regrade, why
from medvlthinker.generation.rollout import samples_fingerprint, stored_rollout, write_shard
from medvlthinker.data.sample import Sample, SampleFile, write_samples

ODD = ("\0", "\u2028", "\u202e", "\U0001fac0", "é", "e\u0301", '"', "\\", "\r\n", "\ufeff", "<|im_end|>", "\x7f", "\U0010ffff")
SHAPES = ("<think> {odd} </think>\n<answer> {x} </answer>", "<answer>{odd}\n{x}\n</answer>", "{odd} The answer is ({x}).", "<answer> A </answer> no <answer> {x} </answer>", "<answer> {x}{odd}", "{odd}")
MINE = '''from medvlthinker.core.grade import Grade

def first_capital(text, options, label):
    said = next((letter for letter in text if letter in options), None)
    return Grade(said, said, said == label)

def stumbles(text, options, label):
    return {}[text] if "\\U0001fac0" in text else first_capital(text, options, label)

def ends(text, options, label):
    import os
    os._exit(9)
'''


def answers(samples: list[Sample], n: int) -> list[list[Completion]]:
    "Answers of many shapes, with odd characters, the same each time."
    letters = [list(sample.options) for sample in samples]
    return [[Completion(SHAPES[(i + k) % len(SHAPES)].format(odd=ODD[(3 * i + k) % len(ODD)], x=letters[i][(i * k) % len(letters[i])]), "length" if k == 3 else "stop", 9) for k in range(n)]
            for i in range(len(samples))]


def store(folder, samples, n: int, size: int = 16, **who):
    "A finished rollout by hand."
    made, starts = answers(samples, n), range(0, len(samples), size)
    for number, start in enumerate(starts):
        write_shard(folder / f"shard-{number:05}.jsonl", samples[start:start + size], made[start:start + size], {"shard": number, "shards": len(starts), "seed": 42, "engine": "by hand 1"})
    identity = {"samples": samples_fingerprint(samples), "n": n, "temperature": 0.5 * (n > 1), "top_p": 1.0, "max_tokens": 64, "seed": 42, "instruction": "trained", "engine": "openai"}
    (folder / "rollout.json").write_text(json.dumps(identity | who))


@pytest.fixture
def finished(tmp_path):
    "Samples in a file, and a rollout of four answers to each; every second pair shares an image."
    pictures = [encoded() for _ in range(30)]
    samples = [Sample(f"Question {i}?", {"A": "Yes", "B": "No", "C": "Liver", "D": "not seen"}, "ABCD"[i % 4], ("Yes", "No", "Liver", "not seen")[i % 4], (pictures[i // 2],) if i % 3 else (),
                      dataset_name="pmc_vqa", dataset_index=i) for i in range(60)]
    write_samples(samples, tmp_path / "samples.parquet")
    store(tmp_path, samples, 4)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_several_processes_count_as_one(finished):
    samples, rows = SampleFile(finished / "samples.parquet"), stored_rollout(finished)[1]
    alone = repeated_counts(samples, rows)
    assert len({line["image"] for line in alone}) > 30 and len({line["right"] for line in alone}) > 2
    assert recount(samples, rows, workers=2) == recount(samples, rows, workers=1) == recount(list(samples), list(rows), workers=2) == alone


def test_the_diff_is_that_of_the_verdicts_and_the_same_in_several_processes(finished):
    samples, rows = SampleFile(finished / "samples.parquet"), stored_rollout(finished)[1]
    table = grade_rows(samples, rows)
    for old, new in (("strict", "regrade"), ("reward", "lenient"), ("llava", "strict")):
        found = regrade(samples, rows, old, new, workers=2)
        assert found == regrade(samples, rows, old, new, workers=1)
        differ = [line for line in table if (line[f"{old}_label"], line[f"{old}_correct"]) != (line[f"{new}_label"], line[f"{new}_correct"])]
        assert [(line["dataset_index"], line["completion"], line["old"], line["new"]) for line in found["flips"]] == \
               [(line["dataset_index"], line["completion"], line[f"{old}_label"], line[f"{new}_label"]) for line in differ] != []
        percent = cells(found["questions"])[0]
        for side, rule in (("old", old), ("new", new)):
            right, asked = count(table, rule)["pmc_vqa"]
            assert percent[side] == pytest.approx(100 * right / asked)
        kinds = [line["kind"] for line in found["flips"]]
        net = kinds.count("wrong -> right") - kinds.count("right -> wrong")
        assert percent["change"] == pytest.approx(100 * net / len(table)) and percent["low"] <= percent["change"] <= percent["high"]


def test_a_rule_of_ones_own(finished):
    samples, rows = SampleFile(finished / "samples.parquet"), stored_rollout(finished)[1]
    path = f"{finished}/mine.py:first_capital"
    found = regrade(samples, rows, "strict", path, workers=2)
    here = regrade(samples, rows, "strict", find_rule(path), workers=2)
    assert found["flips"] == here["flips"] != [] and here["new"] == "first_capital"
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"The rule .*mine.py:stumbles failed on pmc_vqa \d+, answer \d \(KeyError"):
            regrade(samples, rows, "strict", f"{finished}/mine.py:stumbles", workers)
    with pytest.raises(UserError, match="returned a bool for pmc_vqa 0, answer 0"):
        regrade(samples, rows, "strict", lambda text, options, label: True)
    with pytest.raises(UserError, match="ended from outside"):
        regrade(samples, rows, "strict", f"{finished}/mine.py:ends", 2)
    (finished / "broken.py").write_text("def rule(:\n")
    with pytest.raises(UserError, match=r"broken.py stopped in line \d+ with SyntaxError"):
        find_rule(f"{finished}/broken.py:rule")


def test_a_rollout_that_is_not_whole_is_refused(finished):
    samples = SampleFile(finished / "samples.parquet")
    with pytest.raises(UserError, match="are not those to these questions"):
        recount(samples[1:] + samples[:1], stored_rollout(finished)[1])
    with pytest.raises(UserError, match="more questions than the 60 rows"):
        recount([*samples, samples[0]], stored_rollout(finished)[1])
    shard = finished / "shard-00001.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + b"\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match="shard-00001.jsonl is missing or damaged"):
            recount(samples, stored_rollout(finished)[1], workers=workers)
    shard.unlink()
    with pytest.raises(UserError, match="has 3 of 4 shards"):
        stored_rollout(finished)


texts = st.lists(st.sampled_from(["<answer>", "</answer>", "<Answer>", "< /answer >", "<think>", "</think>", "A", "B", "(B)", "liver", "Lung.", "\n", " ", "the answer is", ":", "or", "é", "\u2028"]),
                 max_size=14).map("".join)
ORGAN = Sample("Which organ?", {"A": "Lung", "B": "Liver", "C": "Spleen"}, "B", "Liver")


@settings(max_examples=600, deadline=None)
@given(texts, st.sampled_from(RULES), st.sampled_from(RULES))
def test_every_flip_has_a_cause_and_the_cause_is_there(text, old, new):
    one, two = (grade(text, ORGAN.options, "B", rule) for rule in (old, new))
    if (one.label, one.correct) == (two.label, two.correct):
        return
    cause = why(text, ORGAN, find_rule(old), find_rule(new))
    assert cause in {*CAUSES, "several of these together", "other"}
    if cause in CAUSES:  # some text without the feature is one on which the two agree, on an option that one of them had read
        without = [edited for letter in {one.label, two.label} - {None} for edited in CAUSES[cause](text, letter, ORGAN.options)]
        pairs = [[grade(edited, ORGAN.options, "B", rule).label for rule in (old, new)] for edited in without]
        assert any(a == b and a in (one.label, two.label) for a, b in pairs)
    if cause == "no answer tag":
        assert "answer>" not in text.replace(" ", "").lower()


@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "< ", "<\n", "<answer", "<answer>A", "<answer>A</answer>", "A ", "(", "<think>", "</think> "])
def test_the_cause_of_a_long_text_is_found_in_time(unit):
    text = unit * (200_000 // len(unit)) + "<answer>\n(B)\n</answer>"
    began = time.process_time()
    why(text, ORGAN, find_rule("reward"), find_rule("lenient"))
    assert time.process_time() - began < 5


@pytest.fixture
def planted(home):
    "Two synthetic test sets, answered by hand, with the records that `evaluate` would have made: greedy answers, and four to each question."
    profile, workspace, places = load_profile("smoke", limit=8, benchmark="vqa_rad, slake"), Workspace("smoke"), {1: {}, 4: {}}
    for n, record in places.items():
        for name in ("slake_closed", "vqa_rad_closed"):
            record[name] = f"rollouts/tiny/synthetic/{name}/{n}"
            store(workspace.root / record[name], list(load_benchmark(name, profile, workspace.samples)), n, size=5)
    (folder := workspace.results / "synthetic" / "tiny").mkdir(parents=True)
    for name, n in (("evaluation", 1), ("repeats", 4)):
        (folder / f"{name}.json").write_text(json.dumps({"model": "tiny", "source": "synthetic", "rollouts": places[n]}))
    (home / "mine.py").write_text(MINE)
    return home


ASKED = ("limit=8", "benchmark=vqa_rad, slake")


def test_a_profile_from_the_command_line(planted):
    done = python("-m", "medvlthinker.evaluation.regrade", "smoke", *ASKED, "old=strict", "new=lenient")
    assert done.returncode == 0 and "strict -> lenient: " in done.stdout and "of 16 verdicts flipped" in done.stdout, done.stderr
    path = planted / "smoke" / "results" / "synthetic" / "regrade-strict-lenient.json"
    stored, flips = json.loads(path.read_text()), [json.loads(line) for line in path.with_suffix(".jsonl").read_text().split("\n")[:-1]]
    assert [cell["dataset_name"] for cell in stored["cells"]] == ["slake_closed", "vqa_rad_closed", "macro average"]
    assert sum(line["answers"] for line in stored["causes"]) == len(flips) > 0 and {line["model"] for line in flips} == {"tiny"}
    assert path.with_name(path.name + ".manifest.json").is_file()
    done = python("-m", "medvlthinker.evaluation.regrade", "smoke", *ASKED, f"new={planted}/mine.py:first_capital")
    assert done.returncode == 0 and (path.parent / "regrade-strict-mine.first_capital.json").is_file(), done.stderr


def test_mistakes_on_the_command_line_are_one_sentence(planted):
    for new, part in (("kind", "No rule 'kind'"), (f"{planted}/absent.py:rule", "No file"), (f"{planted}/mine.py:rule", "has no function 'rule'"), (f"{planted}/mine.py:stumbles", "failed on")):
        says(python("-m", "medvlthinker.evaluation.regrade", "smoke", *ASKED, f"new={new}"), part)
    says(python("-m", "medvlthinker.evaluation.regrade", "smoke", "limit=9", ASKED[1]), "answers other questions than slake_closed")
    says(python("-m", "medvlthinker.evaluation.exchange", "smoke", *ASKED, "model=tiny", "to=csv", "folder=x"), "No form 'csv'")
    says(python("-m", "medvlthinker.evaluation.exchange", "smoke", *ASKED, "model=tiny", "to=inspect", f"folder={planted}", "rules=kind"), "No rule kind")
    assert not list((planted / "smoke" / "results" / "synthetic").glob("regrade-*"))


def test_exchange_from_the_command_line(planted, tmp_path):
    made = {}
    for to, words in (("inspect", ["benchmark=vqa_rad", "answers=repeats"]), ("lm-eval", [ASKED[1]]), ("eval_results", [ASKED[1]])):
        done = python("-m", "medvlthinker.evaluation.exchange", "smoke", "limit=8", *words, "model=tiny", f"to={to}", f"folder={tmp_path / to}")
        assert done.returncode == 0, done.stderr
        made[to] = sorted(path.name for path in (tmp_path / to).rglob("*.json*"))
    assert [len(names) for names in made.values()] == [1, 3, 2]


def told(folder, samples=None) -> Told:
    "The finished rollout, as the adapters want it; its last answer failed."
    samples = samples or list(SampleFile(folder / "samples.parquet"))
    who, rows = stored_rollout(folder)
    rows = [dict(row) for row in rows]
    rows[-1] = {**rows[-1], "completions": [*rows[-1]["completions"][:-1], {"text": "", "finish_reason": "failed", "tokens": 0, "error": "HTTP 500"}]}
    began = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
    return Told("pmc_vqa", "org/a model", samples, rows, who, began, began + datetime.timedelta(seconds=90))


def every_text(one: Told) -> list[str]:
    return [completion["text"] for row in one.rows for completion in row["completions"]]


def test_a_log_for_inspect_holds_every_answer_and_score(finished):
    one = told(finished)
    path = to_inspect(one, finished / "logs", images=True)
    log = json.loads(path.read_text(encoding="utf-8"))
    assert [sample["output"]["completion"] for sample in log["samples"]] == every_text(one)
    assert [(line["right"], line["rule"]) for line in repeated_counts(one.samples, one.rows)] == \
           [(sum(log["samples"][4 * i + k]["scores"][rule]["value"] == "C" for k in range(4)), rule) for i in range(60) for rule in RULES]
    assert to_inspect(one, finished / "again", images=True).read_bytes() == path.read_bytes()
    assert log["results"]["completed_samples"] == 239 and "error" in log["samples"][-1]
    assert log["samples"][4]["input"][0]["content"][0]["image"].startswith("data:image/png;base64,")
    assert len(to_inspect(one, finished / "text").read_bytes()) < len(path.read_bytes()) / 2


def test_half_a_surrogate_pair_does_not_stop_a_log(finished):
    one = told(finished)
    one.rows[0]["completions"] = [{"text": "<answer> A </answer> \ud800", "finish_reason": "unknown", "tokens": 0}] * 4
    log = json.loads(to_inspect(one, finished / "logs").read_text(encoding="utf-8"))
    assert log["samples"][0]["output"]["completion"] == "<answer> A </answer> \ufffd"
    exchange([one], "lm-eval", finished / "logs")


def test_inspect_ai_reads_its_log(finished):
    inspect_log = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed (pip install inspect-ai); the form of its log is tested without it")
    one = told(finished)
    log = inspect_log.read_eval_log(str(to_inspect(one, finished / "logs", images=True)))
    assert (log.status, log.eval.task, log.eval.model, log.eval.config.epochs, len(log.samples)) == ("success", "pmc_vqa", "org/a model", 4, 240)
    assert [sample.output.completion for sample in log.samples] == every_text(one)
    verdicts = [grade(completion["text"], sample.options, sample.answer_label, rule).correct for sample, row in zip(one.samples, one.rows) for completion in row["completions"] for rule in RULES]
    assert [sample.scores[rule].value == "C" for sample in log.samples for rule in RULES] == verdicts
    before = {score.name: [score.metrics[name].value for name in ("accuracy", "stderr")] for score in log.results.scores}
    inspect_log.recompute_metrics(log)  # from the samples' scores, by its own arithmetic
    assert {score.name: [score.metrics[name].value for name in ("accuracy", "stderr")] for score in log.results.scores} == {name: pytest.approx(pair) for name, pair in before.items()}
    inspect_log.write_eval_log(log, str(finished / "again.eval"))
    again = inspect_log.read_eval_log(str(finished / "again.eval")).samples  # in an order of its own
    assert [sample.output.completion for sample in sorted(again, key=lambda sample: (int(sample.id.split("/")[1]), sample.epoch))] == every_text(one)


SAMPLE_KEYS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "exact_match"}  # of lm_eval 0.4.13
RESULT_KEYS = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "git_hash", "date", "task_hashes", "model_source", "model_name",
               "model_name_sanitized", "system_instruction", "system_instruction_sha", "fewshot_as_multiturn", "chat_template", "chat_template_sha", "total_evaluation_time_seconds"}


def test_files_for_lm_eval_hold_every_answer_and_score(finished):
    one = told(finished)
    path = to_lm_eval([one], finished / "logs", ("strict", "lenient"))
    results = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent.name == "org__a model" and results.keys() == RESULT_KEYS
    lines = [json.loads(line) for line in next(path.parent.glob("samples_pmc_vqa_*.jsonl")).read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(lines) == 120 and all(line.keys() == SAMPLE_KEYS for line in lines)
    assert [text for line in lines[:60] for text in line["resps"][0]] == every_text(one)
    for rule in ("strict", "lenient"):
        right = [line["exact_match"] for line in lines if line["filter"] == rule]
        assert results["results"]["pmc_vqa"][f"exact_match,{rule}"] == pytest.approx(sum(right) / 60)


def test_lm_eval_reads_its_files(finished):
    utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed (pip install lm-eval); the form of its files is tested without it")
    from lm_eval.result_schema import EvalResults, SampleResult

    path = to_lm_eval([told(finished)], finished / "logs", ("strict", "lenient"))
    results, samples = json.loads(path.read_text(encoding="utf-8")), next(path.parent.glob("samples_*"))
    assert results.keys() <= EvalResults.__annotations__.keys() | {"system_instruction_sha", "chat_template_sha"}
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n")[:-1]]
    assert lines[0].keys() == SampleResult.__annotations__.keys() | {"exact_match"}
    assert "pmc_vqa" in utils.make_table(results) and "lenient" in utils.make_table(results)
    assert utils.get_results_filenames([str(path)]) and utils.get_sample_results_filenames([str(samples)])
    assert utils.get_file_task_name(samples.name) == "pmc_vqa" and utils.get_file_datetime(samples.name) in path.name
    assert utils.sanitize_model_name("org/a model") == path.parent.name
    dumped = json.dumps(lines[0]["doc"], indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
    assert (utils.hash_string(dumped), utils.hash_string(lines[0]["arguments"]["gen_args_0"]["arg_0"])) == (lines[0]["doc_hash"], lines[0]["prompt_hash"])
    assert utils.hash_string("".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)) == results["task_hashes"]["pmc_vqa"]
