"""The harness that measures speed: its books, its exit codes and its page. What it measures is measured by itself, not by tests."""
import json
import re

import bench
import pytest
from conftest import ROOT, python, says
from medvlthinker.app.bench import history_figure, read_lines
from medvlthinker.core.files import UserError, environment_info


@pytest.fixture
def books(tmp_path, monkeypatch):
    "The harness with three measurements that cost nothing, and books of its own."
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(bench, "LOG", tmp_path / "bench" / "bench.jsonl")
    monkeypatch.setattr(bench, "BENCHES", {})
    given = {"time": 5, "rate": 5}

    @bench.bench(bench.Bound("a time", "s", 10), bench.Bound("a rate", "per s", 2, "at least"))
    def both():
        "Two that hold."
        yield given["time"]
        yield given["rate"], "a rate of fewer"

    @bench.bench(bench.Bound("flights", "of them", 0))
    def gpu():
        "One that needs what is not here."
        raise bench.NotHere("there are no wings")
        yield

    return given


def lines() -> list[dict]:
    return [json.loads(line) for line in bench.LOG.read_text().splitlines()]


def test_what_holds_ends_with_0_and_a_miss_with_1(books, capsys):
    assert bench.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("holds\n") == 2 and "gpu: not measured on this machine: there are no wings." in said and f"The history: {bench.FOLDER / 'history.html'}" in said
    here = environment_info()
    assert [(line["name"], line["what"], line["value"], line["bound"], line["side"], line["holds"]) for line in lines()] == [("both", "a time", 5, 10, "at most", True), ("both", "a rate of fewer", 5, 2, "at least", True)]
    assert all(line["machine"] == here["machine"] and line["commit"] == here["commit"] and re.match(r"\d{4}-\d\d-\d\dT", line["date"]) for line in lines())
    for change in ({"time": 10.1}, {"rate": 1.9}, {"rate": float("nan")}):
        books.update({"time": 5, "rate": 5} | change)
        assert bench.main(["both"]) == 1 and capsys.readouterr().out.count("DOES NOT HOLD") == 1
        assert [line["holds"] for line in lines()[-2:]] == ["time" not in change, "rate" not in change]
    assert bench.main(["gpu"]) == 0 and len(lines()) == 8, "what cannot be measured is neither kept nor a failure"


def test_a_line_torn_by_a_kill_is_passed_over_and_costs_no_other(books, capsys):
    bench.main(["both"])
    whole = bench.LOG.read_bytes()
    for cut in range(1, len(whole.splitlines()[1]) + 1):  # within the second line, its end included
        bench.LOG.write_bytes(whole[:-cut - 1])
        assert len(read_lines(bench.LOG, lambda line: None)) in (1, 2)
    bench.LOG.write_bytes(whole[:-20])
    capsys.readouterr()
    assert bench.main(["both"]) == 0
    assert capsys.readouterr().out.count("bench.jsonl: line 2 is torn or no measurement, and is left out.") == 1
    assert len(read_lines(bench.LOG, lambda line: None)) == 3


def test_the_list_names_everything_with_bound_and_last_value(books, capsys):
    bench.main(["both"])
    capsys.readouterr()
    assert bench.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "both: Two that hold." in said and re.search(r"a time: at most 10 s; last 5 on \d{4}-\d\d-\d\d, commit", said) and "flights: at most 0 of them; not measured yet" in said


def test_other_machines_and_misses_are_marked(books):
    bench.main(["both"])
    books["time"] = 20
    bench.main(["both"])
    here = lines()
    other = [line | {"machine": "another, 64 cores", "date": "2030-01-01T00:00:00+00:00"} for line in here[2:]]
    figure = history_figure(here + other, here[0]["machine"])
    assert {trace.name: (trace.marker.symbol, sorted(trace.text)) for trace in figure.data} == {
        "holds": ("square", ["0.40", "0.40", "0.50"]), "missed": ("square", ["<b>2.00!</b>"]), "another machine, holds": ("diamond", ["0.40"]), "another machine, missed": ("diamond", ["<b>2.00!</b>"])}


def test_the_history_is_kept_beside_its_chapter(books, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(UserError, match="holds no measurement"):
        bench.main(["--keep"])
    bench.main(["both"])
    with open(bench.LOG, "a") as file:
        file.write("torn")
    (tmp_path / "nbs" / "assets").mkdir(parents=True)
    assert bench.main(["--keep"]) == 0 and "2 measurements in nbs/assets/bench.jsonl" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "nbs" / "assets" / "bench.jsonl").read_text().splitlines()] == lines_of(bench.LOG)


def lines_of(path) -> list[dict]:
    return read_lines(path, lambda line: None)


def test_the_command(home):
    says(python("tests/speed/bench.py", "grading"), "No measurement grading; known are ", "grading_rate", "--list")
    done = python("tests/speed/bench.py", "--list")
    assert done.returncode == 0 and len(re.findall(r"^\w+: ", done.stdout, re.M)) == len(bench.BENCHES) > 15 and done.stdout.count("not measured yet") + done.stdout.count("; last ") > 25
    done = python("tests/speed/bench.py", "--draw")
    assert done.returncode == 0 and "there is no history to draw" in done.stdout


def test_every_bound_of_the_chapter_stands_in_the_harness():
    "What the stored history was measured against is what the harness holds it to today, and the harness knows everything that was measured."
    for line in read_lines(ROOT / "nbs" / "assets" / "bench.jsonl"):
        assert any((given.bound, given.side, given.unit) == (pytest.approx(line["bound"]), line["side"], line["unit"]) for given in bench.BENCHES[line["name"]][1]), line
