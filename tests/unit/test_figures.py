"""The figures: tables against the paper's data, drawings against the tables, no text on other text or cut off, and the stored outputs."""

import dataclasses
import itertools
import json
import re
from decimal import Decimal
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
MODELS = ("tiny", *(f"tiny-{recipe}" for recipe in ("SFT_m23k", "SFT_PMC", "SFT_m23k-RL_PMC", "RL_m23k", "RL_PMC", "RL_m23k-RL_PMC")))


def repeats(model):
    "Invented: of twelve questions of each set, two on an image, 0 to 8 of eight answers are right."
    lines = [{"dataset_name": name, "image": f"{name}{q // 2}", "n": 8, "right": q * 5 % 9, "majority": float(q * 5 % 9 > 4)} for name in COLUMNS for q in range(12)]
    return {"model": model, "source": "synthetic", "rules": dict.fromkeys(("strict", "regrade"), repeated_accuracy(pd.DataFrame(lines)).to_dict("records"))}


def record(model, right=10):
    rules = {rule: {name: [right + i + at, 40] for at, name in enumerate(COLUMNS)} for i, rule in enumerate(RULES)}
    return {"model": model, "source": "synthetic", "rule": "regrade", "counts": rules["regrade"], "rules": rules}


def everything(paper):
    "Every figure's table, published and ours, with the function that draws it."
    several, records = [repeats(model) for model in MODELS[::3]], [record(model) for model in MODELS]
    rules, own = drawing.rules_frame(paper), drawing.our_rules_frame(records)
    counted = pd.DataFrame({"model": "tiny", "corpus": "m23k", "right": range(5), "of": 4, "questions": [30, 10, 8, 6, 46], "low": 1, "high": 3})
    steps = pd.DataFrame({name: [i % 7 * 10.0**-at for i in range(60)] for at, name in enumerate(("reward", "length", "kl", "loss"))}, index=pd.RangeIndex(1, 61, name="step"))
    claims = pd.DataFrame([("MedVLThinker-7B RL(m23k) - HuatuoGPT-Vision-7B", 0.19, -1.3, 1.7, "Published", 8220, "invented"), ("tiny-RL_m23k - tiny", -0.5, -3.4, 2.4, "This run", 600, "synthetic")],
                          columns="label difference low high group n source".split())
    return {
        "pass_counts": (drawing.pass_frame(paper, counted, "synthetic"), drawing.pass_figure),
        "radar_7B": (drawing.radar_frame(paper, "7B"), drawing.radar_figure),
        "radar_32B": (drawing.radar_frame(paper, "32B"), drawing.radar_figure),
        "repeated": (drawing.repeated_frame(paper, several), drawing.repeated_figure),
        "pass_at_k": (drawing.curve_frame(paper, several), drawing.curve_figure),
        "rules": (rules, drawing.rules_figure),
        "our_rules": (own[own["dataset_name"] == "average"], drawing.rules_figure),
        "gains": (drawing.gains_frame(rules, BASES), drawing.gains_figure),
        "sizes": (drawing.sizes_frame({name: 100 for name in COLUMNS}, "synthetic"), drawing.sizes_figure),
        "training": (drawing.training_frame(dict.fromkeys(MODELS[1:], steps), "synthetic"), drawing.training_figure),
        "claims": (claims, drawing.forest_figure),
        "one_group": (claims.assign(group="Published, as if the models were independent"), drawing.forest_figure),
        "accuracy": (results_table(records), drawing.accuracy_figure),
        "comparison": (results_table(records, "comparison"), drawing.accuracy_figure),
    }


ALL = everything(PAPER)


def numbers(figure):
    "Every number that the traces of a figure show."
    values = (getattr(trace, axis, None) for trace in figure.data for axis in ("x", "y", "r"))
    return {round(float(x), 6) for each in values if each is not None for x in each if not isinstance(x, str)}


def one(frame, **where):
    "The only row of a table with these values."
    found = frame.loc[(frame[list(where)] == pd.Series(where)).all(axis=1)]
    assert len(found) == 1, where
    return found.iloc[0]


def notes(figure):
    return figure.layout.title.text.replace("<br>", " ")


def test_every_published_bar_point_and_axis_is_a_row_and_none_is_invented():
    frame = drawing.repeated_frame(PAPER)
    for bar in PAPER.repeated:
        rows = frame[(frame["dataset_name"] == bar.dataset_name) & (frame["model"] == drawing.paper_name(PAPER, bar.model))]
        values = zip(drawing.MEASURES, (bar.average, bar.majority, bar.passed))
        assert dict(zip(rows["measure"], rows["percent"])) == {measure: float(x) for measure, x in values if x is not None}
    assert set(frame[frame["label"] != frame["model"]]["model"]) == {"7B RL(m23k)+RL(PMC)@900"}
    curves = drawing.curve_frame(PAPER)
    assert len(curves) == sum(map(len, PAPER.curves.values()))
    for (model, name), curve in PAPER.curves.items():
        for k, percent in curve.items():
            assert one(curves, model=drawing.paper_name(PAPER, model), dataset_name=name, k=k).percent == float(percent)
    for key, models in drawing.RADARS.items():
        rows = [PAPER.row(name) for name in models]
        for row, name in itertools.product(rows, COLUMNS):
            share = 100 * row.scores[name] / max(each.scores[name] for each in rows)
            assert one(drawing.radar_frame(PAPER, key), model=row.model, dataset_name=name).share == pytest.approx(float(share))


def test_rules_are_the_strict_curve_and_the_regraded_average():
    frame, bars = drawing.rules_frame(PAPER), {(bar.model, bar.dataset_name): bar for bar in PAPER.repeated}
    for model in {model for model, _ in PAPER.curves}:
        for name in COLUMNS:
            assert one(frame, model=drawing.paper_name(PAPER, model), dataset_name=name, rule="strict").percent == float(PAPER.curves[model, name][1])
        mean = sum(bars[model, name].average for name in COLUMNS) / 6
        assert one(frame, model=drawing.paper_name(PAPER, model), dataset_name="average", rule="regrade").percent == pytest.approx(float(mean))
    gains = drawing.gains_frame(frame, BASES)
    assert len(gains) == 4 * 7 * 2
    expected = PAPER.curves["3B-RL_m23k", "slake_closed"][1] - PAPER.curves["Qwen2.5-VL-3B-Instruct", "slake_closed"][1]
    assert one(gains, model="3B RL(m23k)", dataset_name="slake_closed", rule="strict").difference == pytest.approx(float(expected))


def test_our_rules_have_an_average_only_over_all_six():
    missing = record("tiny")
    del missing["rules"]["strict"]["pmc_vqa"]
    assert set(drawing.our_rules_frame([missing]).query("dataset_name == 'average'")["rule"]) == set(RULES) - {"strict"}


def test_pass_counts_without_their_band_are_refused():
    counted = pd.DataFrame({"model": "tiny", "corpus": "m23k", "right": range(17), "of": 16, "questions": 1})
    with pytest.raises(UserError, match="name no band; run paper/2_difficulty again"):
        drawing.pass_frame(PAPER, counted, "synthetic")


def test_a_changed_number_is_drawn():
    "Each figure of the paper's numbers follows a changed copy of them."
    odd = Decimal("1.7")
    rows = tuple(dataclasses.replace(row, scores=dict.fromkeys(row.scores, odd)) if row.model.startswith(("GPT-4o", "MedVLThinker")) else row for row in PAPER.rows)
    changed = everything(dataclasses.replace(
        PAPER, rows=rows, repeated=tuple(dataclasses.replace(bar, average=odd) for bar in PAPER.repeated),
        curves={key: dict.fromkeys(curve, odd) for key, curve in PAPER.curves.items()}, histogram=(17, *PAPER.histogram[1:])))
    for name in ("pass_counts", "radar_7B", "radar_32B", "repeated", "pass_at_k", "rules", "gains"):
        (before, draw), (after, _) = ALL[name], changed[name]
        assert numbers(draw(before)) != numbers(draw(after)), name
        if "percent" in after and not name.startswith("radar"):
            assert 1.7 in numbers(draw(after)), name


@pytest.mark.parametrize("name", ALL)
def test_a_figure_draws_its_table_with_source_n_intervals_and_the_warning(name):
    frame, draw = ALL[name]
    figure = draw(frame)
    value = next((column for column in ("percent", "difference") if column in frame and not name.startswith("radar")), None)
    if value:
        kept = frame[frame["origin"] != "difference"] if "origin" in frame else frame
        assert {round(x, 6) for x in kept[value]} <= numbers(figure)
    text, ours = notes(figure), frame[frame["origin"] == "ours"] if "origin" in frame else frame
    assert (SYNTHETIC_NOTE in text) == bool((ours["source"] == "synthetic").any())
    assert "Paper:" in text or "Ours:" in text
    assert "n" not in frame or re.search(r"\bn( of ours)?: ", text)
    if "low" in frame and frame["low"].notna().any():
        assert "95 % intervals" in text and any(trace.error_x.array is not None or trace.error_y.array is not None for trace in figure.data)
    codes = {trace.name: trace.marker.pattern.shape if trace.type == "bar" else (trace.marker.symbol, trace.line.dash) for trace in figure.data}
    assert len(set(codes.values())) == len(codes), "colour is never the only code"
    assert figure.layout.height <= 1.6 * 900, "no strips"


def test_names_from_outside_stay_text():
    "A model's name is no HTML in a figure."
    evil = "<img src=x onerror=alert(1)>"
    for figure in (drawing.rules_figure(drawing.our_rules_frame([record(evil)])), drawing.curve_figure(drawing.curve_frame(PAPER, [repeats(evil)])), drawing.accuracy_figure(results_table([record(evil)]))):
        assert evil not in figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")


def test_training_curves_are_means_over_a_twentieth():
    frame = ALL["training"][0].query("model == 'tiny-SFT_m23k' and measure == 'reward'")
    reward, own = drawing.training_figure(frame).data[0], frame["value"].tolist()
    assert list(reward.x) == list(range(1, 61)) and reward.y[29] == pytest.approx(sum(own[28:31]) / 3)


@pytest.mark.parametrize("named", ["", "missing", "/bin/false"])
def test_without_a_browser_the_rest_is_written_and_one_sentence_said(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("BROWSER_PATH", named)
    plots.find_browser.cache_clear()
    drawing._print_once.cache_clear()
    for name in ("claims", "again"):
        paths = drawing.write_figure_files(name, ALL["claims"][0], drawing.forest_figure(ALL["claims"][0]), tmp_path / "figures")
        assert [path.name for path in paths] == [f"{name}.html", f"{name}.csv"] and all(path.stat().st_size for path in paths)
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
    frame, draw = ALL["repeated"]
    paths = [drawing.write_figure_files("repeated", frame, draw(frame), tmp_path / folder) for folder in "ab"]
    assert [path.suffix for path in paths[0]] == [".html", ".csv", ".png"]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    table = pd.read_csv(paths[0][1])
    assert len(table) == len(frame) and table["percent"].to_numpy() == pytest.approx(frame["percent"].to_numpy())


# Outputs that are stored in the repository

STORED = [ROOT / "nbs" / "paper" / "5_results.ipynb", ROOT / "nbs" / "paper" / "6_audit.ipynb"]


def outputs(nb):
    "What a notebook shows, without its pictures."
    cells = json.loads(json.dumps([cell["outputs"] for cell in nb["cells"] if cell["cell_type"] == "code"]))
    for output in itertools.chain.from_iterable(cells):
        output.get("data", {}).pop("image/png", None)
    return [[(output.get("name"), output.get("text"), output.get("data")) for output in each] for each in cells]


@pytest.mark.parametrize("path", [path for path in STORED if any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])], ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_belong_to_the_code_as_it_is(path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are not installed")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and not re.search(r"/(tmp|root|home|Users)/", text) and str(ROOT) not in text
    pictures = [len(output["data"]["image/png"]) for cell in json.loads(text)["cells"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert pictures and max(pictures) < 200_000  # base64 of 150 kB
    stored, now = outputs(nbformat.read(path, 4)), outputs(plots.with_outputs(path, draw=lambda figure: b""))
    assert stored == now, f"store it anew: python -c \"from medvlthinker.core.plots import store_outputs; store_outputs('nbs/paper/{path.name}')\""


# What a reader sees

TEXTS = """() => {
  const plot = document.querySelector('.js-plotly-plot'), frame = plot.getBoundingClientRect(), found = [];
  for (const text of plot.querySelectorAll('.main-svg text')) {
    const box = text.getBoundingClientRect();
    if (!text.textContent.trim() || !box.width || getComputedStyle(text).visibility === 'hidden' || getComputedStyle(text).opacity === '0') continue;
    found.push({text: text.textContent.slice(0, 60), left: box.left - frame.left, top: box.top - frame.top, right: box.right - frame.left, bottom: box.bottom - frame.top,
                size: parseFloat(getComputedStyle(text).fontSize)});
  }
  return {texts: found, width: frame.width, height: frame.height};
}"""


def wrong_texts(seen):
    "Texts that leave the figure, and pairs that lie on each other by more than two pixels each way."
    wrong = [f"{t['text']!r} leaves the figure" for t in seen["texts"] if t["left"] < -1 or t["top"] < -1 or t["right"] > seen["width"] + 1 or t["bottom"] > seen["height"] + 1]
    for a, b in itertools.combinations(seen["texts"], 2):
        across, down = min(a["right"], b["right"]) - max(a["left"], b["left"]), min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
        if across > 2 and down > 2:
            wrong.append(f"{a['text']!r} lies on {b['text']!r} ({across:.0f} x {down:.0f})")
    return wrong


@pytest.mark.heavy
def test_no_text_overlaps_or_is_cut_on_a_phone_or_a_wide_page(tmp_path, browser):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong = []
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        for (name, (frame, draw)), width in itertools.product(ALL.items(), (400, 1200)):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(plots.write_figure(name, draw(frame), tmp_path).as_uri())
            page.add_style_tag(content="body {margin: 0}")
            page.evaluate("() => Plotly.Plots.resize(document.querySelector('.js-plotly-plot'))")
            page.wait_for_timeout(100)
            seen = page.evaluate(TEXTS)
            assert len(seen["texts"]) >= 8 and seen["width"] == width and min(text["size"] for text in seen["texts"]) >= 10, name
            wrong += [f"{name} at {width}: {each}" for each in wrong_texts(seen)]
        chromium.close()
    assert wrong == []
