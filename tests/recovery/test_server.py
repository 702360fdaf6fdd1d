"""A server that fails in every way: each question ends answered or marked as failed, none twice,
and nothing that was paid for is lost."""
import contextlib
import gzip
import itertools
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT, shared_cases, until
from hypothesis import given, settings
from hypothesis import strategies as st
from medvlthinker.core.files import UserError
from medvlthinker.data.sample import Sample
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import Completion, EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import generate
from medvlthinker.generation.server import (
    ServerEngine, actual_status, drop_refused_parameter, fit_size, read_answer, read_choice)
from servers import Handler, serving

KEY = "sk-test-5f3a91c07e"
ONE = Sampling(seed=42)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def error(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


def answer(content, reason: str = "stop") -> dict:
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}]}


SAID = {  # what a server says, whoever asks
    "busy": (429, error("too many requests")),
    "broken": (500, b"<html>\n<h1>Internal error</h1>\n</html>"),
    "empty": (200, {"choices": []}),
    "null": (200, answer(None)),
    "malformed": (200, b'{"choices": [{"message": {"conte'),
    "filtered": (200, answer(None, "content_filter")),
    "too_long": (400, error("This model's maximum context length is 256 tokens.", code=400)),
    "wrong_key": (401, error(f"Incorrect API key provided: Bearer {KEY}", code="invalid_api_key")),
    "unknown": (404, error("no such model")),
    "broke": (429, error("You exceeded your current quota.", code="insufficient_quota")),
}


class Faulty(Handler):
    """Answers question N with the text `answer N seed S`, unless its plan has another act for this
    attempt, or `server.rule` gives a status and a body for the request."""

    def do_GET(self):
        self.server.listed.append(self.path)
        owner = {"owned_by": self.server.owner, "root": self.server.root}
        self.reply(200, {"data": [{"id": "tiny", **owner}, {"id": "other", **owner}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.body())
        text = body["messages"][0]["content"][-1]["text"]
        number = int(re.search(r"Question: Is this number (\d+)\?", text)[1])
        with server.lock:
            attempt = sum(n == number for n, _ in server.asked)
            server.asked.append((number, body))
            server.now += 1
            server.most = max(server.most, server.now)
        plan = server.plan.get(number, [])
        act = "well"
        if plan and (attempt < len(plan) or server.forever):
            act = plan[min(attempt, len(plan) - 1)]
        try:
            with contextlib.suppress(OSError):  # the client has gone
                if ruled := server.rule(body):
                    self.reply(*ruled, Retry_After_Ms=20)
                elif act in SAID:
                    self.reply(*SAID[act], Retry_After_Ms=20)
                else:
                    getattr(self, act)(number, body)
        finally:
            with server.lock:
                server.now -= 1

    def well(self, number, body, n=None):
        time.sleep(self.server.pause(number))
        seed, n = body.get("seed", 0), n or body.get("n", 1)
        texts = [f"answer {number} seed {seed + k}" for k in range(n)]
        choices = [{"index": k, "message": {"content": text}, "finish_reason": "stop"}
                   for k, text in enumerate(texts)]
        usage = {"prompt_tokens": 90, "completion_tokens": 10 * len(texts)}
        self.reply(200, {"choices": choices, "usage": usage})

    def cut(self, number, body):
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"choices": ')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def hang(self, number, body):
        self.server.stopping.wait(30)

    def ignores_n(self, number, body):
        self.well(number, body, n=1)

    def refuses_n(self, number, body):
        if body.get("n", 1) > 1:
            return self.reply(400, {"error": {"message": "n must be 1"}})
        self.well(number, body)


@pytest.fixture
def faulty():
    facts = {"asked": [], "listed": [], "plan": {}, "now": 0, "most": 0, "owner": "us", "root": "", "forever": False,
             "pause": lambda number: 0.01, "rule": lambda body: None, "stopping": threading.Event()}
    with serving(Faulty, **facts) as server:
        server.url += "/v1"
        yield server
        server.stopping.set()


def requests(count: int, sampling: Sampling = ONE) -> list[Request]:
    options = {"A": "Yes", "B": "No"}
    samples = [Sample(f"Is this number {i}?", options, "A", "Yes", dataset_name="toy",
                      dataset_index=i) for i in range(count)]
    return [Request(sample, sample.dataset_index, sampling) for sample in samples]


def engine(url: str, **keys) -> ServerEngine:
    keys = {"concurrency": 8, "request_timeout": 20, "model": "tiny", **keys}
    return ServerEngine(EngineSettings(engine="openai", base_url=url, **keys))


def gather(stream) -> tuple[dict, str]:
    "Question -> its completions, and the sentence that ended the run."
    found = {}
    try:
        for request, completions in stream:
            assert request.index not in found, "no question twice"
            assert len(completions) == request.sampling.n
            found[request.index] = completions
    except UserError as error:
        return found, str(error)
    return found, ""


def right(asked: list[Request], found: dict) -> None:
    "Each question has its own n completions, in order, each with its own seed."
    for request in asked:
        texts = [f"answer {request.index} seed {request.seed + k}" for k in range(request.sampling.n)]
        assert [completion.text for completion in found[request.index]] == texts
        for completion in found[request.index]:
            assert completion == Completion(completion.text, "stop", 10)


PASSING = ("busy", "broken", "cut", "hang", "empty", "null", "malformed", "ignores_n", "refuses_n")


def test_what_passes_is_waited_out(faulty):
    "Two thirds of 48 questions meet one or two faults each, and all end answered with n=2."
    faulty.plan = {i: [PASSING[i % 9], PASSING[(i // 2) % 9]][:1 + i % 2] for i in range(48) if i % 3}
    server, asked = engine(faulty.url, request_timeout=1.5), requests(48, replace(ONE, n=2))
    found, reason = gather(server.answer(asked))
    assert (reason, len(found), server.answered) == ("", 48, 48)
    right(asked, found)
    assert server.budget.requests == len(faulty.asked)


LASTING = {1: ("broken", "500: <html> <h1>Internal error"), 3: ("cut", ""),
           5: ("hang", "no whole answer within 6 s"), 8: ("empty", "502: {'choices': []}"),
           9: ("malformed", "502: "), 12: ("filtered", "content filter"),
           15: ("too_long", "400: This model's maximum context length is 256")}


def test_what_stays_is_marked_and_asked_again_alone(faulty):
    "Seven questions fail for good, each with its own sentence; later they get their own seeds."
    faulty.plan, faulty.forever = {number: [act] for number, (act, _) in LASTING.items()}, True
    found, reason = gather(engine(faulty.url, request_timeout=2).answer(requests(16)))
    failed = {i: each[0] for i, each in found.items() if each[0].finish_reason == "failed"}
    assert reason == "" and sorted(failed) == sorted(LASTING)
    for number, (_, part) in LASTING.items():
        error = failed[number].error
        assert failed[number] == Completion("", "failed", 0, error)
        assert part in error and error and "\n" not in error and len(error) <= 300
    faulty.plan, faulty.asked = {}, []
    again = [replace(requests(16)[number], retry=True) for number in failed]
    more, reason = gather(engine(faulty.url).answer(again))
    assert reason == "" and len(faulty.asked) == 7
    right(requests(16), found | more)


def test_at_most_so_many_at_once(faulty):
    "The bound holds and is reached, requests are taken when they are wanted, and nobody waits for a slow question."
    def pause(number: int) -> float:
        if number == 3:  # it is answered when sixty others have been asked
            until(lambda: len(faulty.asked) > 60, seconds=15)
        return 0.02

    faulty.pause, taken = pause, iter(requests(80))
    order = [request.index for request, _ in engine(faulty.url, concurrency=6).answer(taken)]
    assert faulty.most == 6
    assert sorted(order) == list(range(80)) and order.index(3) > 40


HOPELESS = [("wrong_key", "refuses the key"), ("broke", "has no credit left"),
            ("unknown", "has no model 'tiny' (404: no such model); it has tiny, other")]


@pytest.mark.parametrize("act, part", HOPELESS)
def test_hopeless_ends_the_run_and_keeps_what_was_answered(faulty, act, part, capsys, caplog):
    caplog.set_level(logging.INFO)
    faulty.plan = {20: [act] * 9}
    server = engine(faulty.url, concurrency=2)
    found, reason = gather(server.answer(requests(64)))
    assert part in reason and "\n" not in reason
    right(requests(20), found)
    assert 20 not in found and len(faulty.asked) < 30
    assert sum(number == 20 for number, _ in faulty.asked) == 1, "waiting does not help"
    output = capsys.readouterr()
    said = f"{reason}{found}{output.out}{output.err}{caplog.text}{server!r}{server.budget!r}"
    assert KEY not in said


def test_a_server_that_goes_away(faulty):
    "The run ends after three times `concurrency` failures, and what was answered is there."
    stream = engine(faulty.url, concurrency=2, request_timeout=0.3).answer(requests(160))
    found = dict((request.index, completions) for request, completions in itertools.islice(stream, 16))
    faulty.plan, faulty.forever = {i: ["cut"] for i in range(160)}, True
    faulty.shutdown()
    faulty.server_close()
    rest, reason = gather(stream)
    right(requests(16), found | rest)
    assert "questions in a row were not answered" in reason


LIMITS = [("max_requests", 40, 40), ("max_total_tokens", 4000, 43)]


@pytest.mark.parametrize("name, limit, most", LIMITS)
def test_limits(faulty, name, limit, most):
    "The run says which limit it was, keeps what is in flight, and a following one completes."
    stream = engine(faulty.url, concurrency=4, **{name: limit}).answer(requests(64))
    found, reason = gather(stream)
    assert f"{name}={limit}" in reason and 40 <= len(faulty.asked) <= most
    assert len(found) == len(faulty.asked)
    rest = [request for request in requests(64) if request.index not in found]
    more, reason = gather(engine(faulty.url, max_requests=1 + len(rest)).answer(rest))
    assert reason == ""
    right(requests(64), found | more)


def test_tokens_that_nobody_counts_have_no_limit(faulty):
    uncounted = {"choices": [{"message": {"content": "B"}, "finish_reason": "stop"}]}
    faulty.rule = lambda body: (200, uncounted)
    server = engine(faulty.url, concurrency=1, max_total_tokens=100)
    found, reason = gather(server.answer(requests(8)))
    assert "does not count tokens" in reason and len(found) == 1


# ---- other servers' habits ----


CONDITIONS = {  # when the server of a case answers so
    "always": lambda body: True, "top_p is 1.0": lambda body: body.get("top_p") == 1,
    "temperature and top_p are both in the request": lambda body: {"temperature", "top_p"} <= {*body}}


def asked_three(faulty, given: dict, **sampling) -> tuple[dict, str, ServerEngine]:
    "What comes of three questions, one at a time, to a server that answers as the case says."
    applies = CONDITIONS[given["when"]]
    faulty.asked.clear()
    faulty.rule = lambda body: (given["status"], given["body"]) if applies(body) else None
    server = engine(faulty.url, concurrency=1)
    return *gather(server.answer(requests(3, replace(ONE, **sampling)))), server


def test_case_content_as_a_list_of_parts(faulty):
    for case in shared_cases("server-content-parts"):
        found, reason, _ = asked_three(faulty, case)
        assert reason == "" and len(faulty.asked) == 3
        assert [found[i][0] for i in range(3)] == 3 * [Completion("<answer>B</answer>", "stop", 4)]


def test_case_an_error_inside_200(faulty):
    for case in shared_cases("server-error-in-200"):
        found, reason, _ = asked_three(faulty, case)
        assert "No credits left." in reason and len(faulty.asked) == 1 and not found


def test_case_refused_parameters(faulty):
    for case in shared_cases("server-parameter-names"):
        found, reason, server = asked_three(faulty, case, temperature=0.7)
        assert reason == "" and server.dropped == {"top_p"}
        right(requests(3), found)
        assert ["top_p" in body for _, body in faulty.asked] == [True, False, False, False]


PARTS = [
    ([{"type": "output_text", "text": "B", "annotations": []}, {"type": "image_url"}], "B"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "Clear."}]},
      {"type": "text", "text": "B"}], "<think>Clear.</think>B"),
    ([{"type": "refusal", "refusal": "I cannot."}], "I cannot."), ([{"type": "image_url"}, None], "")]


@pytest.mark.parametrize("content, text", PARTS)
def test_content_parts(content, text):
    "What holds no text is asked again, as after a bad gateway."
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    assert actual_status(200, {"choices": [choice]}) == (200 if text else 502)
    assert not text or read_choice(choice).text == text


CUT = ["length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "token_limit", "model_length",
       "max_new_tokens", "max_completion_tokens", "model_context_window_exceeded"]
WHOLE = ["stop", "STOP", "end_turn", "eos", "eos_token", "stop_sequence", None]
WITHHELD = ["content_filter", "SAFETY", "PROHIBITED_CONTENT", "blocked", "RECITATION"]


@pytest.mark.parametrize("reason", CUT + WHOLE + WITHHELD)
def test_words_for_the_end_of_an_answer(reason):
    content = None if reason in WITHHELD else "B"
    ended = read_choice({"message": {"content": content}, "finish_reason": reason})
    assert ended.finish_reason == ("length" if reason in CUT else "stop" if content else "failed")


FULL = {"max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "seed": 5, "n": 1}


REFUSALS = [
    *(("temperature", f"Unsupported parameter: {mark}temperature{mark} is not supported.")
      for mark in ("'", '"', "`", "")),
    ("seed", "[{'loc': ['body', 'seed'], 'msg': 'Extra inputs are not permitted'}]"),
    ("", "'max_tokens' is too large: 9. This model has at most 4 completion tokens."),
    ("", "We seeded no temperatures."),
]


@pytest.mark.parametrize("name, says", REFUSALS)
def test_what_a_refusal_is_about(name, says):
    assert drop_refused_parameter(FULL, says) == name
    without = {key: value for key, value in FULL.items() if key != name}
    assert drop_refused_parameter(without, says) == ""


@pytest.mark.parametrize("owner", ["vllm", "us"])
def test_vllm_gets_neutral_values_for_what_it_takes_from_the_models_folder(faulty, owner):
    faulty.owner = owner
    gather(engine(faulty.url).answer(requests(1)))
    assert ("repetition_penalty" in faulty.asked[0][1]) == (owner == "vllm")


def test_another_checkpoint_under_the_same_name_takes_no_answers_over(faulty, tmp_path, capsys):
    "Nor are its own lost: with the first one there again, nothing is asked."
    samples, served = [request.sample for request in requests(3)], EngineSettings(
        engine="openai", base_url=faulty.url, model="tiny")
    faulty.root = "/runs/step-100"
    first = generate(samples, open_engine(served), ONE, tmp_path)
    faulty.root = "/runs/step-200"
    with pytest.raises(UserError, match="those of /runs/step-100, and .* serves /runs/step-200"):
        generate(samples, open_engine(served), ONE, tmp_path)
    faulty.root, asked = "/runs/step-100", len(faulty.asked)
    other = replace(served, base_url=faulty.url.replace("127.0.0.1", "localhost"))
    assert generate(samples, open_engine(other), ONE, tmp_path) == first
    assert len(faulty.asked) == asked and "came from http://127.0.0.1" in capsys.readouterr().out


def test_a_server_is_asked_once_what_it_serves(faulty, tmp_path):
    served = EngineSettings(engine="openai", base_url=faulty.url, model="tiny")
    generate([request.sample for request in requests(3)], open_engine(served), ONE, tmp_path)
    assert faulty.listed == ["/v1/models"]


def test_nobody_knows_the_dtype_of_a_server(faulty, tmp_path):
    "Another one of ours is no other rollout."
    samples = [request.sample for request in requests(3)]
    for dtype in ("float32", "bfloat16"):
        served = EngineSettings(engine="openai", base_url=faulty.url, model="tiny", dtype=dtype)
        rollout = generate(samples, open_engine(served), ONE, tmp_path)
    assert rollout.record["dtype"] == "" and len(faulty.asked) == 3


def test_what_was_refused_stays_in_the_record_when_failed_questions_are_asked_again(
        faulty, tmp_path):
    refusal = 400, error("Unsupported value: 'temperature' does not support 0.7.")
    faulty.rule = lambda body: refusal if "temperature" in body else None
    samples, drawn = [request.sample for request in requests(3)], replace(ONE, temperature=0.7)
    served = EngineSettings(engine="openai", base_url=faulty.url, model="tiny", concurrency=1)
    faulty.plan, faulty.forever = {1: ["too_long"]}, True
    rollout = generate(samples, open_engine(served), drawn, tmp_path)
    assert rollout.record["failed"] == 1
    faulty.plan, faulty.rule = {}, lambda body: None
    again = generate(samples, open_engine(served), drawn, tmp_path)
    assert (again.record["failed"], again.record["dropped_parameters"]) == (0, ["temperature"])


def test_a_key_that_is_refused_by_403_is_shown_where_few_questions_are_asked(faulty, capsys):
    faulty.rule = lambda asked: (403, error("Your project may not use this model."))
    found, reason = gather(engine(faulty.url).answer(requests(5)))
    assert reason == "" and len(found) == 5
    assert capsys.readouterr().out.count("not answered: 403: Your project may not use") == 1


class Endless(Handler):
    "Lists models without end, and answers every question with `server.says`."

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b" ")
                self.server.sent += 1

    def do_POST(self):
        self.body()
        status, body, headers = self.server.says
        self.reply(status, body, **headers)


def test_what_does_not_end_and_what_leads_elsewhere():
    "A list, an answer that unfolds to 40 MB, and a redirect: each is left, and nobody else is asked."
    stopping, bomb = threading.Event(), gzip.compress(bytes(40 << 20))
    with serving(Endless, stopping=stopping, sent=0, says=(200, bomb, {"Content_Encoding": "gzip"})) as server:
        ask = engine(f"{server.url}/v1", request_timeout=2, concurrency=2)
        found, reason = gather(ask.answer(requests(2)))
        assert [each.error for [each] in found.values()] == ["the answer is longer than 32 MB"] * 2
        assert reason == "" and server.sent < 200, "of a list: two tries of two seconds, 20 blanks each second"
        server.says = 307, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"}
        found, reason = gather(ask.answer(requests(2)))
        assert not found and "sends requests on to http://127.0.0.1:9/v1/chat" in reason
        stopping.set()


def test_a_question_that_a_moderator_stops_does_not_stop_the_others(faulty):
    "OpenRouter and xAI say 403, as others do for a key that may not do this."
    flagged = error("Your input was flagged.", code=403)
    faulty.rule = lambda asked: (403, flagged) if "number 3?" in str(asked) else None
    found, reason = gather(engine(faulty.url).answer(requests(8)))
    assert reason == "" and len(found) == 8
    assert [completion.finish_reason for completion in found[3]] == ["failed"]


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["choices", "message", "content", "usage", "completion_tokens", "index", "refusal",
         "error", "code", "type", "text", "reasoning", "finish_reason"]), inner), max_leaves=12))
@settings(max_examples=300)
def test_any_json_is_an_answer_or_is_not(body):
    if (status := actual_status(200, body)) == 200:
        assert all(isinstance(each, Completion) and isinstance(each.text, str) for each in read_answer(body))
    assert status == 200 or 400 <= status < 600


# ---- images ----


SIZES = [(640, 480), (1999, 1999), (29, 900), (56, 57), (2000, 40)]


@pytest.mark.parametrize("max_pixels", [3136, 50_000, 1_000_000])
def test_a_scaled_image_has_the_size_that_qwen_gives_it(max_pixels):
    "Sent at that size, Qwen's processor on the server leaves it, and counts the same tokens."
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for width, height in SIZES:
        wide, high = fit_size(width, height, max_pixels)
        ours = smart_resize(high, wide, max_pixels=1 << 40, min_pixels=0)
        assert ours == smart_resize(height, width, max_pixels=max_pixels, min_pixels=0)


# ---- whole programs ----


PROGRAM = """
import sys
from medvlthinker.core.commands import run_main
from medvlthinker.data.sample import Sample
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Sampling
from medvlthinker.generation.rollout import generate

def main(words):
    options = {"A": "Yes", "B": "No"}
    samples = [Sample(f"Is this number {i}?", options, "A", "Yes", dataset_name="toy",
                      dataset_index=i) for i in range(100)]
    settings = EngineSettings(model="tiny", engine="openai", base_url=words[0],
                              concurrency=4, request_timeout=2)
    rollout = generate(samples, open_engine(settings), Sampling(n=2, seed=42), words[1])
    print(rollout.record["failed"], "failed")

run_main(main)
"""


@pytest.fixture
def words(faulty, tmp_path) -> list[str]:
    "What starts a rollout of a hundred questions to this server."
    return [sys.executable, "-c", PROGRAM, faulty.url, str(tmp_path)]


def test_interrupt(faulty, words):
    "Ctrl-C while the server hangs: over at once, one line."
    faulty.plan, faulty.forever = {number: ["hang"] for number in range(100)}, True
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: len(faulty.asked) >= 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=15)[1]  # the server would hang for 30 s
    assert process.returncode == 130
    assert said.strip().splitlines() == [
        "medvlthinker: interrupted; the same command goes on where this one stopped."]


def stored(folder) -> dict:
    "Question -> completions, of the one rollout below a folder."
    [path] = folder.rglob("rollout.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["dataset_index"]: row["completions"] for row in rows}


def test_a_hundred_questions_with_faults_and_a_kill(faulty, words, tmp_path):
    "Killed in the middle and begun again: each question has its own two answers, none paid twice."
    faulty.plan = {i: [PASSING[i % 9]] for i in range(100) if i % 4 == 0}
    faulty.pause = lambda number: 0.02
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, **quiet) as process:
        while len(faulty.asked) < 60 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    asked = len(faulty.asked)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stderr[-2000:]
    asked_for = requests(100, replace(ONE, n=2))
    right(asked_for, {number: [Completion(**row) for row in completions]
                      for number, completions in stored(tmp_path).items()})
    again = {number for number, _ in faulty.asked[asked:]}
    assert len(again) < 90, "what was finished before the kill is not asked again"
