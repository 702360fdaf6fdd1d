"""A server that fails in every way: each question ends answered or marked as failed, in order, none twice, and nothing paid for is lost."""
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, python, says
from hypothesis import given, settings
from hypothesis import strategies as st
from medvlthinker.data import synthetic
from medvlthinker.generation.request import Completion, Sampling, Shard
from medvlthinker.core.files import UserError
from medvlthinker.difficulty.profile import Profile
from medvlthinker.generation.rollout import read_shard
from medvlthinker.data.sample import Sample
from medvlthinker.generation.server import ServerEngine, read_answer

KEY = "sk-test-5f3a91c07e"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Faulty(BaseHTTPRequestHandler):
    "Answers question N with the text `answer N seed S`, unless its plan has another act for this attempt."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": "tiny"}, {"id": "other"}]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int(re.search(r"Question: Is this number (\d+)\?", body["messages"][0]["content"][-1]["text"])[1])
        with server.lock:
            attempt = sum(n == number for n, _ in server.asked)
            server.asked.append((number, body))
            server.now += 1
            server.most = max(server.most, server.now)
        plan = server.plan.get(number, [])
        try:
            with contextlib.suppress(OSError):  # the client has gone
                getattr(self, plan[min(attempt, len(plan) - 1)] if plan and (attempt < len(plan) or server.forever) else "well")(number, body)
        finally:
            with server.lock:
                server.now -= 1

    def well(self, number, body, n=None):
        time.sleep(self.server.pause(number))
        choices = [{"index": k, "message": {"content": f"answer {number} seed {body['seed'] + k}"}, "finish_reason": "stop"} for k in range(n or body.get("n", 1))]
        self.reply(200, {"choices": choices, "usage": {"prompt_tokens": 90, "completion_tokens": 10 * len(choices), "total_tokens": 90 + 10 * len(choices)}})

    def busy(self, number, body):
        self.server.waits[number] = time.monotonic()
        self.reply(429, {"error": {"message": "too many requests"}}, Retry_After=1)

    def broken(self, number, body):
        self.reply(500, b"<html>\n<h1>Internal error</h1>\n</html>", Retry_After_Ms=20, Content_Type="text/html")

    def cut(self, number, body):
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"choices": ')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def hang(self, number, body):
        self.server.stopping.wait(30)

    def empty(self, number, body):
        self.reply(200, {"choices": []})

    def null(self, number, body):
        self.reply(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]})

    def malformed(self, number, body):
        self.reply(200, b'{"choices": [{"message": {"conte')

    def ignores_n(self, number, body):
        self.well(number, body, n=1)

    def refuses_n(self, number, body):
        if body.get("n", 1) > 1:
            return self.reply(400, {"error": {"message": "n must be 1"}})
        self.well(number, body)

    def filtered(self, number, body):
        self.reply(200, {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]})

    def too_long(self, number, body):
        self.reply(400, {"error": {"message": "This model's maximum context length is 256 tokens.", "code": 400}})

    def wrong_key(self, number, body):
        self.reply(401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}", "code": "invalid_api_key"}})

    def echoes_key(self, number, body):
        self.reply(400, {"error": {"message": f"Bad request with\n{self.headers['Authorization']}"}})

    def unknown(self, number, body):
        self.reply(404, {"error": {"message": "no such model"}})

    def broke(self, number, body):
        self.reply(429, {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}, Retry_After_Ms=5)

    def reply(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", "Content_Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words): ...


class Quiet(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, request, address): ...  # lines are cut on purpose


@pytest.fixture
def faulty():
    server = Quiet(("127.0.0.1", 0), Faulty)
    server.lock, server.stopping, server.asked, server.waits, server.plan = threading.Lock(), threading.Event(), [], {}, {}
    server.now = server.most = 0
    server.forever, server.pause = False, lambda number: 0.01
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()


def questions(count: int, first: int = 0) -> list[Sample]:
    return [Sample(f"Is this number {first + i}?", {"A": "Yes", "B": "No"}, "A", "Yes", dataset_name="toy", dataset_index=first + i) for i in range(count)]


def shards(count: int, size: int = 16) -> list[Shard]:
    return [Shard(i, questions(size, i * size), seed=42 + i) for i in range(count)]


def engine(url: str, model: str = "tiny", **keys) -> ServerEngine:
    return ServerEngine(model, Profile(engine="openai", base_url=url, **{"concurrency": 8, "request_timeout": 20, **keys}))


def gather(stream) -> tuple[dict, str]:
    "Shard number -> its answers, and the sentence that ended the run."
    found = {}
    try:
        for shard, answers in stream:
            assert shard.number not in found, "no shard twice"
            assert len(answers) == len(shard.samples)
            found[shard.number] = answers
    except UserError as error:
        return found, str(error)
    return found, ""


def right(shard: Shard, answers: list, n: int = 1) -> None:
    "Each question has its own n answers, in order, each with its own seed."
    for sample, seed, completions in zip(shard.samples, shard.seeds(), answers, strict=True):
        assert [c.text for c in completions] == [f"answer {sample.dataset_index} seed {seed + k}" for k in range(n)]
        assert all(c.finish_reason == "stop" and c.tokens == 10 and not c.error for c in completions)


PASSING = ("busy", "broken", "cut", "hang", "empty", "null", "malformed", "ignores_n", "refuses_n")


def test_what_passes_is_waited_out(faulty):
    "Two thirds of 48 questions meet one or two faults each, and all end answered with n=2."
    faulty.plan = {i: [PASSING[i % 9], PASSING[(i // 2) % 9]][:1 + i % 2] for i in range(48) if i % 3}
    server = engine(faulty.url, request_timeout=1.5)
    found, reason = gather(server.stream(shards(3), Sampling(n=2, temperature=1.0)))
    assert (reason, sorted(found), server.account.answered) == ("", [0, 1, 2], 48)
    for shard in shards(3):
        right(shard, found[shard.number], n=2)
    assert server.account.requests == len(faulty.asked)


def test_retry_after_is_obeyed(faulty):
    faulty.plan = {0: ["busy"]}
    found, _ = gather(engine(faulty.url).stream([Shard(0, questions(1), 42)], Sampling()))
    assert 1 <= time.monotonic() - faulty.waits[0] < 4
    right(Shard(0, questions(1), 42), found[0])


def test_what_stays_is_marked_and_asked_again_alone(faulty):
    "Seven questions fail for good, each with its own sentence; a following run asks these alone, with the seeds that they had, and completes."
    bad = dict(zip((1, 3, 5, 8, 9, 12, 15), ("broken", "cut", "hang", "empty", "malformed", "filtered", "too_long")))
    faulty.plan, faulty.forever = {number: [act] for number, act in bad.items()}, True
    whole = shards(1)[0]
    found, reason = gather(engine(faulty.url, request_timeout=2).stream([whole], Sampling()))
    assert reason == ""
    failed = {place: answer[0] for place, answer in enumerate(found[0]) if answer[0].finish_reason == "failed"}
    assert sorted(failed) == sorted(bad)
    assert all(c == Completion("", "failed", 0, c.error) and c.error and "\n" not in c.error and len(c.error) <= 300 for c in failed.values())
    for place, part in ((1, "Internal error"), (5, "no whole answer within 6 s"), (8, "holds no choices"), (12, "content filter"), (15, "maximum context length is 256")):
        assert part in failed[place].error
    faulty.plan, faulty.asked = {}, []
    again = dataclasses.replace(whole, samples=[whole.samples[place] for place in failed], places=tuple(failed))
    patched, reason = gather(engine(faulty.url).stream([again], Sampling()))
    assert reason == "" and len(faulty.asked) == 7
    rest = iter(patched[0])
    right(whole, [next(rest) if place in failed else answer for place, answer in enumerate(found[0])])


def test_a_part_of_n_is_kept(faulty):
    "One of three completions came before the server refused: it is kept, the others are marked."
    faulty.plan = {0: ["ignores_n", "too_long", "too_long"]}
    found, _ = gather(engine(faulty.url).stream([Shard(0, questions(1), 42)], Sampling(n=3, temperature=1.0)))
    assert [c.finish_reason for c in found[0][0]] == ["stop", "failed", "failed"] and len(faulty.asked) == 3


def test_at_most_so_many_at_once(faulty):
    "The bound holds and is reached, and a slow question of the first shard does not hold up the next shards."
    faulty.pause = lambda number: 1.0 if number == 3 else 0.02
    order, taken = [], []

    def lazily():
        for shard in shards(5):
            taken.append((shard.number, len(order)))
            yield shard

    for shard, answers in engine(faulty.url, concurrency=6).stream(lazily(), Sampling()):
        right(shard, answers)
        order.append(shard.number)
    assert faulty.most == 6
    assert sorted(order) == list(range(5)) and order.index(0) > 0
    assert dict(taken)[4] >= 2, "the last shard is taken only when there is room for it"


def test_an_unread_stream_ends(faulty):
    "Whoever stops reading leaves no thread and no question behind."
    before = threading.active_count()
    stream = engine(faulty.url).stream(shards(4), Sampling())
    next(stream)
    stream.close()
    time.sleep(0.1)
    asked = len(faulty.asked)
    time.sleep(0.3)
    assert len(faulty.asked) == asked < 64
    assert sum(thread.name.startswith(("asyncio", "Thread-")) and "process_request" not in thread.name for thread in threading.enumerate()) <= before


@pytest.mark.parametrize("act, part", [("wrong_key", "refuses the key"), ("unknown", "has no model 'tiny'; it has tiny, other"), ("broke", "has no credit left")])
def test_hopeless_ends_the_run_and_keeps_what_was_answered(faulty, act, part, capsys, caplog):
    caplog.set_level(logging.INFO)
    faulty.plan = {20: [act] * 9}
    server = engine(faulty.url, concurrency=2)
    found, reason = gather(server.stream(shards(4), Sampling()))
    assert part in reason and "\n" not in reason
    right(shards(1)[0], found[0])
    assert sorted(found) == [0, 1]
    states = [answer[0].finish_reason for answer in found[1]]
    assert states[:4] == ["stop"] * 4 and states[4] == "failed" and len({number for number, _ in faulty.asked}) < 30
    assert all(answer[0].error.startswith("stopped: ") for answer in found[1] if answer[0].finish_reason == "failed")
    output = capsys.readouterr()
    assert KEY not in f"{reason}{found}{output.out}{output.err}{caplog.text}{server!r}{server.account!r}"


def test_a_server_that_repeats_the_key(faulty):
    faulty.plan = {0: ["echoes_key"]}
    found, _ = gather(engine(faulty.url).stream([Shard(0, questions(2), 42)], Sampling()))
    assert found[0][0][0].error == "400: Bad request with Bearer ***"


def test_refused_from_the_start(faulty):
    "The first answers are all refusals: one sentence, and the rest is not asked."
    faulty.plan, faulty.forever = {i: ["too_long"] for i in range(160)}, True
    found, reason = gather(engine(faulty.url).stream(shards(10), Sampling()))
    assert "refused the first" in reason and "maximum context length is 256 tokens" in reason
    assert len(faulty.asked) <= 16 and all(answer[0].finish_reason == "failed" for answers in found.values() for answer in answers)


def test_a_server_that_goes_away(faulty):
    "After the first shard nobody answers: the run ends after three times `concurrency` failures, and the first shard is there."
    stream = engine(faulty.url, concurrency=2, request_timeout=0.3).stream(shards(10), Sampling())
    first, answers = next(stream)
    faulty.plan, faulty.forever = {i: ["cut"] for i in range(16, 160)}, True
    faulty.shutdown()
    faulty.server_close()
    reason = gather(stream)[1]
    right(first, answers)
    assert re.search(r"^[678] questions in a row were not answered", reason)


@pytest.mark.parametrize("caps, part", [({"max_requests": 40}, "max_requests=40"), ({"max_spend": 4000}, "max_spend=4000")])
def test_caps(faulty, caps, part):
    "What is in flight is kept, the run says which cap it was, and a following one completes."
    server = engine(faulty.url, concurrency=4, **caps)
    found, reason = gather(server.stream(shards(4), Sampling()))
    assert part in reason and 40 <= len(faulty.asked) < 44
    answered = [place for place, answer in enumerate(found[2]) if answer[0].finish_reason == "stop"]
    assert sum(len(answers) for number, answers in found.items() if number < 2) + len(answered) == len(faulty.asked)
    rest = [place for place in range(16) if place not in answered]
    more = [dataclasses.replace(shards(3)[2], samples=[shards(3)[2].samples[place] for place in rest], places=tuple(rest)), shards(4)[3]]
    again, reason = gather(engine(faulty.url, max_requests=1 + len(rest) + 16).stream(more, Sampling()))
    assert reason == "" and len(again[2]) == len(rest) and all(answer[0].finish_reason == "stop" for answers in again.values() for answer in answers)


def test_a_cap_that_is_just_enough(faulty):
    found, reason = gather(engine(faulty.url, max_requests=32).stream(shards(2), Sampling()))
    assert (reason, len(found)) == ("", 2)


def test_raw_dialects_are_refused(faulty):
    found, reason = gather(engine(faulty.url).stream([dataclasses.replace(shards(1)[0], dialect="plain")], Sampling()))
    assert "dialect plain cannot be asked there" in reason and not found and not faulty.asked


@given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "completion_tokens", "index", "refusal"]), inner), max_leaves=12))
@settings(max_examples=200, deadline=None)
def test_any_json_is_an_answer_or_is_not(body):
    try:
        assert all(isinstance(completion, Completion) and isinstance(completion.text, str) for completion in read_answer(body))
    except ValueError:
        pass


RUN = """
import sys
from medvlthinker.generation.request import Sampling, Shard
from medvlthinker.core.commands import run_main
from medvlthinker.difficulty.profile import Profile
from medvlthinker.generation.rollout import read_shard
from medvlthinker.data.sample import Sample
from medvlthinker.generation.server import ServerEngine

def main(words):
    samples = [Sample(f"Is this number {i}?", {"A": "Yes", "B": "No"}, "A", "Yes") for i in range(4)]
    for shard, answers in ServerEngine("tiny", Profile(engine="openai", base_url=words[0], concurrency=2)).stream([Shard(0, samples, 42)], Sampling()):
        print([answer[0].finish_reason for answer in answers])

run_main(main)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_from_the_command_line(faulty):
    "Nobody there, no address, a wrong key: one sentence each, a non-zero exit, and the key nowhere."
    done = python("-c", RUN, f"http://127.0.0.1:{free_port()}/v1")
    says(done, "No server answers at http://127.0.0.1:", "Connection refused")
    says(python("-c", RUN, "127.0.0.1:8000/v1"), "base_url wants an address such as")
    faulty.plan = {number: ["wrong_key"] for number in range(4)}
    done = python("-c", RUN, faulty.url, OPENAI_LOG="debug")
    assert KEY not in done.stdout + done.stderr and "Building HTTP request" in done.stderr, "the client's own log is on, and leaves the key out"
    assert done.returncode == 2 and "refuses the key (401)" in done.stderr and "Traceback" not in done.stderr


def test_interrupt(faulty):
    "Ctrl-C while the server hangs: over in two seconds, one line."
    faulty.plan = {number: ["hang"] for number in range(4)}
    process = subprocess.Popen([sys.executable, "-c", RUN, faulty.url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(faulty.asked) < 2:
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and time.monotonic() - start < 2
    assert said.strip().splitlines() == ["medvlthinker: interrupted; the same command goes on where this one stopped."]


# ---- a real server ----


@pytest.fixture(scope="session")
def vllm_server(warm_tiny, tmp_path_factory):
    "`vllm serve` on the CPU with the embedded model, whose generation_config asks for what nobody should take over."
    pytest.importorskip("vllm", reason="vllm is not installed; ./reproduce.sh test all installs it")
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(warm_tiny, folder / "tiny")
    config = folder / "tiny" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "repetition_penalty": 1.5, "top_k": 1}))
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "embedded", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
             "--limit-mm-per-prompt", json.dumps({"image": 8, "video": 0}),
             "--no-enable-chunked-prefill"]  # vLLM 0.27.1 on a CPU dies of a seeded request whose prompt it reads in pieces: "CPU Generator does not use offset"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "tiny"), *words], stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL, env={**os.environ, **environment}, start_new_session=True)
        try:
            for _ in range(600):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def drawn_scans(count: int) -> list[Sample]:
    "Text and image questions of several sets."
    names = ("pmc_vqa", "slake_closed", "MMMU-medical")
    return [sample for name in names for sample in synthetic.benchmark(name, count // 3, 7)]


def texts(folder) -> dict:
    "Question -> text, how it ended and its tokens, of every shard below a folder."
    return {(row["dataset_name"], row["dataset_index"]): row["completions"] for path in folder.rglob("shard-*") for row in read_shard(path)[1]}


@pytest.mark.heavy
def test_the_six_benchmarks_through_a_server(vllm_server, warm_home, tmp_path):
    "40 questions of each, greedy, both in float32: every text, ending and count of tokens is that of transformers, whatever the served model's generation_config says."
    for home, words in ((warm_home, ["model=tiny"]), (tmp_path / "served", ["model=embedded", "engine=openai", f"base_url={vllm_server}"])):
        done = python("-m", "medvlthinker.generation.rollout", "smoke", "limit=40", *words, MEDVLTHINKER_HOME=home)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("40 questions, 40 completions") == 6 and done.stdout.count(" 0 failed") == 6
        assert KEY not in done.stdout + done.stderr + "".join(path.read_text() for path in home.rglob("*.json*") if path.stat().st_size < 1e6)
    ours, served = texts(warm_home), texts(tmp_path / "served")
    assert len(ours) == 240 and ours.keys() == served.keys()
    assert [key for key in ours if ours[key] != served[key]] == []


@pytest.mark.heavy
def test_served_completions_are_drawn_by_their_seeds(vllm_server):
    "n at once, as vLLM draws it, equals n=1 asked n times: completion k has the seed of its question plus k."
    samples, how = drawn_scans(6), Sampling(n=4, temperature=1.0, max_tokens=48)
    found, reason = gather(engine(vllm_server).stream([Shard(0, samples, 42)], how))
    one_by_one = engine(vllm_server)
    one_by_one.without = frozenset({"n"})
    again, _ = gather(one_by_one.stream([Shard(0, samples, 42)], how))
    assert reason == "" and [[c.text for c in row] for row in found[0]] == [[c.text for c in row] for row in again[0]]
    assert any(len({c.text for c in row}) > 1 for row in found[0])


@pytest.mark.heavy
def test_served_greedy_with_n(vllm_server):
    "vLLM refuses n > 1 without dice; the engine asks one by one, and learns it once."
    server = engine(vllm_server, concurrency=1)
    found, reason = gather(server.stream([Shard(0, drawn_scans(3), 42)], Sampling(n=2, max_tokens=48)))
    assert reason == "" and server.without == {"n"} and server.account.requests == 1 + 3 * 2
    assert all(row[0].text == row[1].text and row[0].finish_reason != "failed" for row in found[0])


@pytest.mark.heavy
def test_served_question_that_is_too_long(vllm_server):
    "One prompt exceeds the server's context: it has failed with a sentence, its neighbours are answered."
    samples = drawn_scans(6)
    samples[2] = dataclasses.replace(samples[2], question=samples[2].question + " Why?" * 600)
    found, reason = gather(engine(vllm_server).stream([Shard(0, samples, 42)], Sampling(max_tokens=48)))
    assert reason == "" and [row[0].finish_reason == "failed" for row in found[0]] == [False, False, True, False, False, False]
    assert "512" in (error := found[0][2][0].error) and error.startswith("400") and "\n" not in error


@pytest.mark.heavy
@pytest.mark.parametrize("limit", (500, 4096))
def test_served_limit_beyond_the_context(vllm_server, limit):
    "A limit that does not fit beside the prompt, or not at all: the answer may go as far as the context, as with the other engines."
    samples = drawn_scans(6)
    wide, _ = gather(engine(vllm_server).stream([Shard(0, samples, 42)], Sampling(max_tokens=limit)))
    short, _ = gather(engine(vllm_server).stream([Shard(0, samples, 42)], Sampling(max_tokens=64)))
    assert [row[0].finish_reason for row in short[0]] == ["stop"] * 6 and wide == short


@pytest.mark.heavy
def test_served_wrong_model(vllm_server):
    found, reason = gather(engine(vllm_server, model="gpt-5").stream([Shard(0, drawn_scans(3), 42)], Sampling(max_tokens=48)))
    assert reason.endswith("has no model 'gpt-5'; it has tiny, embedded.") and not found
