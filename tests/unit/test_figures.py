"""The figures: tables against the paper's data, drawings against the tables, no text on other text or cut off, and the stored outputs."""

import functools
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("plotly", reason="figures need plotly")

from medvlthinker.core import plots
from medvlthinker.core.files import UserError
from medvlthinker.evaluation.evaluate import repeated_accuracy
from medvlthinker.results import figures as drawing
from medvlthinker.results.published import COLUMNS, published
from medvlthinker.results.tables import SYNTHETIC_NOTE, results_table

ROOT = Path(__file__).resolve().parents[2]
PAPER = published()
RULES = ("reward", "strict", "regrade", "llava", "lenient")
BASES = {f"{size} RL({data})": f"Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B") for data in ("m23k", "PMC")}
MODELS = ("tiny", *(f"tiny-{recipe}" for recipe in ("SFT_m23k", "SFT_PMC", "SFT_m23k-RL_PMC", "RL_m23k", "RL_PMC",
                                                    "RL_m23k-RL_PMC")))


def repeats(model):
    "Invented: of twelve questions of each set, two on an image, 0 to 8 of eight answers are right."
    lines = [{"dataset_name": name, "image": f"{name}{q // 2}", "n": 8, "right": q * 5 % 9,
              "majority": float(q * 5 % 9 > 4)} for name in COLUMNS for q in range(12)]
    found = repeated_accuracy(pd.DataFrame(lines)).to_dict("records")
    return {"model": model, "source": "synthetic", "rules": dict.fromkeys(("strict", "regrade"), found)}


def record(model, right=10):
    rules = {rule: {name: [right + i + at, 40] for at, name in enumerate(COLUMNS)} for i, rule in enumerate(RULES)}
    return {"model": model, "source": "synthetic", "rule": "regrade", "counts": rules["regrade"], "rules": rules}


COUNTED = pd.DataFrame({"model": "tiny", "corpus": "m23k", "right": range(5), "of": 4,
                        "questions": [30, 10, 8, 6, 46], "low": 1, "high": 3})
CLAIMS = pd.DataFrame([("MedVLThinker-7B RL(m23k) - HuatuoGPT-Vision-7B", 0.19, -1.3, 1.7, "Published", 8220, "invented"),
                       ("tiny-RL_m23k - tiny", -0.5, -3.4, 2.4, "This run", 600, "synthetic")],
                      columns="label difference low high group n source".split())


def everything():
    "Every figure's table, published and ours, with the function that draws it."
    several, records = [*map(repeats, MODELS[::3])], [*map(record, MODELS)]
    rules, own = drawing.rules_frame(PAPER), drawing.our_rules_frame(records)
    steps = pd.DataFrame({name: [i % 7 * 10.0**-at for i in range(60)]
                          for at, name in enumerate(("reward", "length", "kl", "loss"))}, index=range(1, 61))
    return {
        "pass_counts": (drawing.pass_frame(PAPER, COUNTED, "synthetic"), drawing.pass_figure),
        "radar_7B": (drawing.radar_frame(PAPER, "7B"), drawing.radar_figure),
        "radar_32B": (drawing.radar_frame(PAPER, "32B"), drawing.radar_figure),
        "repeated": (drawing.repeated_frame(PAPER, several), drawing.repeated_figure),
        "pass_at_k": (drawing.curve_frame(PAPER, several), drawing.curve_figure),
        "rules": (rules, drawing.rules_figure),
        "our_rules": (own[own["dataset_name"] == "average"], drawing.rules_figure),
        "gains": (drawing.gains_frame(rules, BASES), drawing.gains_figure),
        "sizes": (drawing.sizes_frame(dict.fromkeys(COLUMNS, 100), "synthetic"), drawing.sizes_figure),
        "training": (drawing.training_frame(dict.fromkeys(MODELS[1:], steps), "synthetic"), drawing.training_figure),
        "claims": (CLAIMS, drawing.forest_figure),
        "one_group": (CLAIMS.assign(group="Published, as if the models were independent"), drawing.forest_figure),
        "accuracy": (results_table(records), drawing.accuracy_figure),
        "comparison": (results_table(records, "comparison"), drawing.accuracy_figure)}


ALL = everything()


@functools.cache
def figure_of(name):
    frame, draw = ALL[name]
    return draw(frame)


def numbers(figure):
    "Every number that the traces of a figure show."
    values = (getattr(trace, axis, None) for trace in figure.data for axis in ("x", "y", "r"))
    return {round(float(x), 6) for each in values if each is not None for x in each if not isinstance(x, str)}


def one(frame, **where):
    "The only row of a table with these values."
    found = frame.loc[(frame[list(where)] == pd.Series(where)).all(axis=1)]
    assert len(found) == 1, where
    return found.iloc[0]


def test_every_published_bar_point_and_axis_is_a_row_and_none_is_invented():
    name_of = functools.partial(drawing.paper_name, PAPER)
    bars = {(name_of(bar.model), bar.dataset_name, measure): float(value) for bar in PAPER.repeated
            for measure, value in zip(drawing.MEASURES, (bar.average, bar.majority, bar.passed)) if value is not None}
    frame = drawing.repeated_frame(PAPER)
    assert frame.set_index(["model", "dataset_name", "measure"])["percent"].to_dict() == bars
    assert {*frame[frame["label"] != frame["model"]]["model"]} == {"7B RL(m23k)+RL(PMC)@900"}
    points = {(name_of(model), name, k): float(percent)
              for (model, name), curve in PAPER.curves.items() for k, percent in curve.items()}
    curves = drawing.curve_frame(PAPER)
    assert curves.set_index(["model", "dataset_name", "k"])["percent"].to_dict() == points
    for key, models in drawing.RADARS.items():
        rows = [PAPER.row(name) for name in models]
        for row, name in itertools.product(rows, COLUMNS):
            share = 100 * row.scores[name] / max(each.scores[name] for each in rows)
            found = one(drawing.radar_frame(PAPER, key), model=row.model, dataset_name=name)
            assert found.share == pytest.approx(float(share))


def test_rules_are_the_strict_curve_and_the_regraded_average():
    frame, bars = drawing.rules_frame(PAPER), {(bar.model, bar.dataset_name): bar for bar in PAPER.repeated}
    for model in {model for model, _ in PAPER.curves}:
        name_of = drawing.paper_name(PAPER, model)
        for name in COLUMNS:
            strict = one(frame, model=name_of, dataset_name=name, rule="strict")
            assert strict.percent == float(PAPER.curves[model, name][1])
        mean = sum(bars[model, name].average for name in COLUMNS) / 6
        found = one(frame, model=name_of, dataset_name="average", rule="regrade").percent
        assert found == pytest.approx(float(mean))
    base, rl = (PAPER.curves[name, "slake_closed"][1] for name in ("Qwen2.5-VL-3B-Instruct", "3B-RL_m23k"))
    gains = drawing.gains_frame(frame, BASES)
    found = one(gains, model="3B RL(m23k)", dataset_name="slake_closed", rule="strict")
    assert len(gains) == 4 * 7 * 2 and found.difference == pytest.approx(float(rl - base))


def test_our_rules_have_an_average_only_over_all_six():
    missing = record("tiny")
    del missing["rules"]["strict"]["pmc_vqa"]
    averages = drawing.our_rules_frame([missing]).query("dataset_name == 'average'")
    assert {*averages["rule"]} == {*RULES} - {"strict"} and {*averages["n"]} == {240}
    assert drawing.our_rules_frame([missing | {"rules": {"strict": {"my_set": [1, 2]}}}]).empty


def test_pass_counts_are_the_histogram_and_need_their_band():
    assert drawing.pass_frame(replace(PAPER, histogram=(17, *PAPER.histogram[1:])))["questions"][0] == 17
    with pytest.raises(UserError, match="name no band; run paper/2_difficulty again"):
        drawing.pass_frame(PAPER, COUNTED.drop(columns="low"), "synthetic")


@pytest.mark.parametrize("name", ALL)
def test_a_figure_draws_its_table_with_source_n_intervals_and_the_warning(name):
    frame, figure = ALL[name][0], figure_of(name)
    value = next((column for column in ("percent", "difference") if column in frame), None)
    if value and not name.startswith("radar"):
        kept = frame[frame["origin"] != "difference"] if "origin" in frame else frame
        assert {round(x, 6) for x in kept[value]} <= numbers(figure)
    text = figure.layout.title.text.replace("<br>", " ")
    ours = frame[frame["origin"] == "ours"] if "origin" in frame else frame
    assert (SYNTHETIC_NOTE in text) == bool((ours["source"] == "synthetic").any())
    assert "Paper:" in text or "Ours:" in text
    assert "n" not in frame or re.search(r"\bn( of ours)?: ", text)
    if "low" in frame and frame["low"].notna().any():
        bars = [trace.error_x.array is not None or trace.error_y.array is not None for trace in figure.data]
        assert "95 % intervals" in text and any(bars)
    codes = {trace.name: trace.marker.pattern.shape if trace.type == "bar" else (trace.marker.symbol, trace.line.dash)
             for trace in figure.data}
    assert len({*codes.values()}) == len(codes), "colour is never the only code"
    assert figure.layout.height <= 1.6 * 900, "no strips"


def test_names_from_outside_stay_text():
    evil = "<img src=x onerror=alert(1)>"
    curves = drawing.curve_frame(PAPER, [repeats(evil)]).query("origin == 'ours'")
    for figure in (drawing.rules_figure(drawing.our_rules_frame([record(evil)])), drawing.curve_figure(curves),
                   drawing.accuracy_figure(results_table([record(evil)]))):
        assert evil not in figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")


def test_training_curves_are_means_over_a_twentieth():
    frame = ALL["training"][0].query("model == 'tiny-SFT_m23k' and measure == 'reward'")
    reward, own = drawing.training_figure(frame).data[0], frame["value"].tolist()
    assert [*reward.x] == [*range(1, 61)] and reward.y[29] == pytest.approx(sum(own[28:31]) / 3)


@pytest.mark.parametrize("named", ["", "missing", "/bin/false"])
def test_without_a_browser_the_rest_is_written_and_one_sentence_said(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("BROWSER_PATH", named)
    plots.find_browser.cache_clear()
    drawing._print_once.cache_clear()
    for name in ("claims", "again"):
        paths = drawing.write_figure_files(name, CLAIMS, figure_of("claims"), tmp_path / "figures")
        assert [path.name for path in paths if path.stat().st_size] == [f"{name}.html", f"{name}.csv"]
    said = capsys.readouterr().out.splitlines()
    plots.find_browser.cache_clear()
    assert len(said) == 1 and said[0].startswith("No png of the figures: "), said


@pytest.fixture(scope="module")
def browser():
    try:
        return plots.find_browser()
    except UserError as error:
        pytest.skip(f"no picture can be drawn: {error}")


@pytest.mark.heavy
def test_files_are_the_same_twice(tmp_path, browser):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    frame, figure = ALL["repeated"][0], figure_of("repeated")
    first, again = ([path.read_bytes() for path in drawing.write_figure_files("repeated", frame, figure, tmp_path)]
                    for _ in range(2))
    assert first == again and first[2].startswith(b"\x89PNG")
    assert len(pd.read_csv(tmp_path / "repeated.csv")) == len(frame)


# Outputs that are stored in the repository

STORED = [ROOT / "nbs" / "paper" / "5_results.ipynb", ROOT / "nbs" / "paper" / "6_audit.ipynb"]


def outputs(nb):
    "What a notebook shows, without its pictures."
    cells = json.loads(json.dumps([cell["outputs"] for cell in nb["cells"] if cell["cell_type"] == "code"]))
    for output in itertools.chain.from_iterable(cells):
        output.get("data", {}).pop("image/png", None)
    return [[(output.get("name"), output.get("text"), output.get("data")) for output in each] for each in cells]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_belong_to_the_code_as_it_is(path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are not installed")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and not re.search(r"/(tmp|root|home|Users)/", text) and str(ROOT) not in text
    pictures = [len(picture) for picture in re.findall(r'"image/png": "(.*)"', text)]
    assert pictures and max(pictures) < 200_000  # base64 of 150 kB
    stored, now = outputs(nbformat.read(path, 4)), outputs(plots.with_outputs(path, draw=lambda figure: b""))
    assert stored == now, "store it anew: python -m medvlthinker.app.cli docs --outputs"


# What a reader sees

TEXTS = """() => {
  const plot = document.querySelector('.js-plotly-plot'), frame = plot.getBoundingClientRect(), texts = [];
  for (const text of plot.querySelectorAll('.main-svg text')) {
    const box = text.getBoundingClientRect(), style = getComputedStyle(text);
    if (!text.textContent.trim() || !box.width || style.visibility === 'hidden' || style.opacity === '0') continue;
    texts.push({text: text.textContent.slice(0, 60), size: parseFloat(style.fontSize),
                left: box.left - frame.left, top: box.top - frame.top,
                right: box.right - frame.left, bottom: box.bottom - frame.top});
  }
  return {texts, width: frame.width, height: frame.height};
}"""


def wrong_texts(seen):
    "Texts that leave the figure, and pairs that lie on each other by more than two pixels each way."
    for t in seen["texts"]:
        if min(t["left"], t["top"]) < -1 or t["right"] > seen["width"] + 1 or t["bottom"] > seen["height"] + 1:
            yield f"{t['text']!r} leaves the figure"
    for a, b in itertools.combinations(seen["texts"], 2):
        across = min(a["right"], b["right"]) - max(a["left"], b["left"])
        down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
        if across > 2 and down > 2:
            yield f"{a['text']!r} lies on {b['text']!r} ({across:.0f} x {down:.0f})"


@pytest.mark.heavy
def test_no_text_overlaps_or_is_cut_on_a_phone_or_a_wide_page(tmp_path, chromium):
    page, wrong = chromium.new_page(), []
    for name, width in itertools.product(ALL, (400, 1200)):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(plots.write_figure(name, figure_of(name), tmp_path).as_uri())
        page.add_style_tag(content="body {margin: 0}")
        page.evaluate("() => Plotly.Plots.resize(document.querySelector('.js-plotly-plot'))")
        page.wait_for_timeout(100)
        seen = page.evaluate(TEXTS)
        assert len(seen["texts"]) >= 8 and seen["width"] == width, name
        assert min(text["size"] for text in seen["texts"]) >= 10, name
        wrong += [f"{name} at {width}: {each}" for each in wrong_texts(seen)]
    page.close()
    assert wrong == []
