"""The figures: tables against the paper's data, drawings against the tables, and no text on other text or cut off."""

import dataclasses
import io
import itertools
import random
import re
from decimal import Decimal

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("plotly", reason="figures need plotly")

from medvlthinker.results import figures as drawing
from medvlthinker.core.files import UserError
from medvlthinker.evaluation.evaluate import repeated_accuracy
from medvlthinker.results.published import COLUMNS, SIZES, published
from medvlthinker.results.tables import SYNTHETIC_NOTE
from medvlthinker.core.stats import majority, pass_at_k

PAPER = published()
RULES = ("reward", "strict", "regrade", "llava", "lenient")
BASES = {f"{size} RL({data})": f"Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B") for data in ("m23k", "PMC")}


def toy_lines(questions=12, answers=8, seed=0):
    "Invented questions, two on each image: how many of a question's answers are right, and its labels."
    dice = random.Random(seed)
    drawn = [(name, index, dice.choices("ABCD", k=answers)) for name in COLUMNS for index in range(questions)]
    return [dict(dataset_name=name, dataset_index=index, image=f"{name}{index // 2}", n=answers, labels=labels, right=labels.count("A"), majority=majority(labels[:5], "A")) for name, index, labels in drawn]


def toy_repeats(model, lines):
    return {"model": model, "source": "synthetic", "rules": {rule: repeated_accuracy(pd.DataFrame(lines)).to_dict("records") for rule in ("strict", "regrade")}}


def toy_record(model, right):
    return {"model": model, "source": "synthetic", "rules": {rule: {name: [right + i + at, 40] for at, name in enumerate(COLUMNS)} for i, rule in enumerate(RULES)}}


def toy_training():
    dice = random.Random(1)
    return {f"tiny-{recipe}": pd.DataFrame({"reward": [dice.random() for _ in range(60)], "length": [20 + dice.random() for _ in range(60)], "kl": [1e-4 * i for i in range(60)],
                                            "loss": [dice.gauss(0, 1) for _ in range(60)]}, index=pd.RangeIndex(1, 61, name="step"))
            for recipe in ("SFT_m23k", "RL_m23k", "SFT_m23k-RL_PMC", "RL_m23k-RL_PMC")}


CLAIMS = pd.DataFrame([("MedVLThinker-7B RL(m23k) minus HuatuoGPT-Vision-7B", 0.19, -1.3, 1.7, "Claims of the abstract", 8220, "invented"),
                       ("3B RL(m23k) minus its base", 4.05, 1.0, 7.0, "Claims of the abstract", 8220, "invented"),
                       ("tiny-RL_m23k minus tiny", -0.5, -3.4, 2.4, "This run", 600, "synthetic")], columns="label difference low high group n source".split())


def everything(paper):
    "Every figure's table, published and ours, with the function that draws it."
    repeats, ours = [toy_repeats("tiny", toy_lines())], drawing.our_rules_frame([toy_record("tiny", 10), toy_record("tiny-RL_m23k", 20)])
    rules = drawing.rules_frame(paper)
    return {
        "passes": (pd.concat([drawing.pass_frame(paper), drawing.counts_frame([30, 10, 8, 6, 46], "tiny", "m23k", "synthetic"),
                              drawing.counts_frame(range(5, 22), "7B", "m23k", "hub")]), drawing.pass_figure),
        "radar-7b": (drawing.radar_frame(paper, "7B"), drawing.radar_figure),
        "radar-32b": (drawing.radar_frame(paper, "32B"), drawing.radar_figure),
        "dots": (drawing.radar_frame(paper, "32B"), drawing.dots_figure),
        "repeated": (pd.concat([drawing.repeated_frame(paper), drawing.our_repeated_frame(repeats)]), drawing.repeated_figure),
        "curves": (pd.concat([drawing.curve_frame(paper), drawing.our_curve_frame(repeats)]), drawing.curve_figure),
        "rules": (rules, drawing.rules_figure),
        "our-rules": (ours, drawing.rules_figure),
        "gains": (drawing.gains_frame(rules, BASES), drawing.gains_figure),
        "our-gains": (drawing.gains_frame(ours, {"tiny-RL_m23k": "tiny"}), drawing.gains_figure),
        "sizes": (drawing.sizes_frame({name: 100 for name in COLUMNS}, "synthetic"), drawing.sizes_figure),
        "training": (drawing.training_frame(toy_training(), "synthetic"), drawing.training_figure),
        "forest": (CLAIMS, drawing.forest_figure),
    }


@pytest.fixture(scope="module")
def all_figures():
    return everything(PAPER)


def one(frame, **where):
    "The only row of a table with these values."
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, where
    return frame.iloc[0]


def drawn_numbers(figure):
    "Every number that the traces of a figure show."
    numbers = set()
    for trace in figure.data:
        for values in (trace.x if trace.type != "scatterpolar" else None, trace.y if trace.type == "scatter" else None, getattr(trace, "r", None)):
            numbers.update(float(x) for x in values or () if isinstance(x, (int, float)))
    return numbers


def near(number, numbers):
    "Is it among them, to the digits that are drawn?"
    return any(abs(number - each) < 0.006 for each in numbers)


def test_every_bar_of_five_answers_is_a_row_and_none_is_invented():
    frame = drawing.repeated_frame(PAPER)
    for bar in PAPER.repeated:
        rows = frame[(frame["dataset_name"] == bar.dataset_name) & (frame["model"] == drawing._model(bar.model))]
        assert dict(zip(rows["measure"], rows["percent"])) == {measure: float(x) for measure, x in zip(drawing.MEASURES, (bar.average, bar.majority, bar.passed)) if x is not None}
        assert set(rows["source"]) == {bar.source} and set(rows["n"]) == {PAPER.row(bar.model.split("@")[0]).sizes[bar.dataset_name]}
    assert len(frame) == sum(2 + (bar.majority is not None) for bar in PAPER.repeated)
    assert set(frame[frame["label"] != frame["model"]]["model"]) == {"7B RL(m23k)+RL(PMC), step 900"}


def test_every_point_of_the_curves_is_a_row():
    frame = drawing.curve_frame(PAPER)
    assert len(frame) == sum(map(len, PAPER.curves.values())) and set(frame["source"]) == {"read off the picture"}
    for (model, name), curve in PAPER.curves.items():
        for k, percent in curve.items():
            row = one(frame, model=drawing._model(model), dataset_name=name, k=k)
            sizes = PAPER.row(model).sizes
            assert row.percent == float(percent) and row.n == (sum(sizes.values()) if name == "all" else sizes[name])


def test_rules_are_the_strict_curve_and_the_regraded_average():
    frame = drawing.rules_frame(PAPER)
    bars = {(bar.model, bar.dataset_name): bar for bar in PAPER.repeated}
    for model in {model for model, _ in PAPER.curves}:
        for name in COLUMNS:
            assert one(frame, model=drawing._model(model), dataset_name=name, rule="strict").percent == float(PAPER.curves[model, name][1])
            assert one(frame, model=drawing._model(model), dataset_name=name, rule="regrade").percent == float(bars[model, name].average)
        mean = sum(bars[model, name].average for name in COLUMNS) / 6
        assert one(frame, model=drawing._model(model), dataset_name="average", rule="regrade").percent == pytest.approx(float(mean))
    gains = drawing.gains_frame(frame, BASES)
    assert len(gains) == 4 * 7 * 2
    expected = PAPER.curves["3B-RL_m23k", "slake_closed"][1] - PAPER.curves["Qwen2.5-VL-3B-Instruct", "slake_closed"][1]
    assert one(gains, model="3B RL(m23k)", dataset_name="slake_closed", rule="strict").difference == pytest.approx(float(expected))


@pytest.mark.parametrize("key", drawing.RADARS)
def test_a_radar_axis_ends_at_the_best(key):
    frame = drawing.radar_frame(PAPER, key)
    rows = [PAPER.row(name) for name in drawing.RADARS[key]]
    for name in COLUMNS:
        best = max(row.scores[name] for row in rows)
        for row in rows:
            assert one(frame, model=row.model, dataset_name=name).share == pytest.approx(float(100 * row.scores[name] / best))
    worse = frame[frame["percent"] < frame["best"]]
    assert (drawing.normalised(worse)["best"] < worse["best"]).all(), "the best of those shown, not of those that were"
    figure = drawing.radar_figure(frame)
    for name, heading in COLUMNS.items():
        best = max(row.scores[name] for row in rows)
        assert f"{heading}<br>{float(best):.1f} %" in figure.data[0].theta


def test_our_answers_equal_a_count_by_hand():
    lines = toy_lines()
    repeats = [toy_repeats("tiny", lines)]
    frame, curve = drawing.our_repeated_frame(repeats), drawing.our_curve_frame(repeats)
    for name in COLUMNS:
        own = [line for line in lines if line["dataset_name"] == name]
        right, most = [line["labels"].count("A") for line in own], [max(dict.fromkeys(line["labels"][:5]), key=line["labels"][:5].count) == "A" for line in own]  # the earliest of the tied
        for measure, value in (("average", sum(right) / 96), ("majority", sum(most) / 12), ("pass@5", sum(pass_at_k(r, 8, 5) for r in right) / 12)):
            row = one(frame, dataset_name=name, measure=measure)
            assert row.percent == pytest.approx(100 * value) and row.low <= row.percent <= row.high and (row.n, row.answers) == (12, 8)
        assert one(curve, dataset_name=name, k=4).percent == pytest.approx(100 * sum(pass_at_k(r, 8, 4) for r in right) / 12)
    assert one(curve, dataset_name="all", k=2).percent == pytest.approx(100 * sum(pass_at_k(line["right"], 8, 2) for line in lines) / 72)
    alone = drawing.our_repeated_frame([toy_repeats("tiny", [line | {"image": f"{line['image']}/{line['dataset_index']}"} for line in lines])])
    assert alone["percent"].equals(frame["percent"]) and not alone["low"].equals(frame["low"]), "questions on one image hang together"


def test_our_rules_have_an_average_only_over_all_six():
    record = toy_record("tiny", 10)
    frame = drawing.our_rules_frame([record])
    assert one(frame, dataset_name="average", rule="strict").percent == pytest.approx(sum(100 * (11 + at) / 40 for at in range(6)) / 6)
    del record["rules"]["strict"]["pmc_vqa"]
    assert set(drawing.our_rules_frame([record]).query("dataset_name == 'average'")["rule"]) == set(RULES) - {"strict"}


def test_a_changed_number_is_drawn(all_figures):
    "Each figure of the paper's numbers follows a changed copy of them."
    odd = Decimal("1.7")
    rows = tuple(dataclasses.replace(row, scores={name: odd for name in row.scores}) if row.model.startswith(("GPT-4o", "MedVLThinker")) else row for row in PAPER.rows)
    changed = everything(dataclasses.replace(PAPER, rows=rows, repeated=tuple(dataclasses.replace(bar, average=odd) for bar in PAPER.repeated),
                                             curves={key: {k: odd for k in curve} for key, curve in PAPER.curves.items()},
                                             histogram=(17, *PAPER.histogram[1:])))
    for name in ("passes", "radar-7b", "radar-32b", "dots", "repeated", "curves", "rules", "gains"):
        (before, draw), (after, _) = all_figures[name], changed[name]
        assert drawn_numbers(draw(before)) != drawn_numbers(draw(after)), name
    for name in ("dots", "repeated", "curves", "rules"):
        assert 1.7 in drawn_numbers(changed[name][1](changed[name][0])), name
    assert near(100 * 17 / (17 + sum(PAPER.histogram[1:])), drawn_numbers(drawing.pass_figure(changed["passes"][0])))


def test_what_is_drawn_is_what_the_table_holds(all_figures):
    for name in ("dots", "repeated", "curves", "rules", "our-rules"):
        frame, draw = all_figures[name]
        shown = drawn_numbers(draw(frame))
        assert all(near(x, shown) for x in frame["percent"]), name
    for name in ("gains", "our-gains", "forest"):
        frame, draw = all_figures[name]
        shown = drawn_numbers(draw(frame))
        assert all(near(x, shown) for x in frame["difference"]), name
    assert set(SIZES.values()) <= drawn_numbers(drawing.sizes_figure(drawing.sizes_frame()))


def test_every_figure_names_source_and_n_and_says_what_drawn_scans_are(all_figures):
    for name, (frame, draw) in all_figures.items():
        figure = draw(frame)
        note = next(each.text for each in figure.layout.annotations if each.name == "notes").replace("<br>", " ")
        assert (SYNTHETIC_NOTE in note) == bool(((frame["origin"] == "ours" if "origin" in frame else True) & (frame["source"] == "synthetic")).any()), name
        assert "Paper:" in note or "This run:" in note, name
        assert "n" not in frame or "n: " in note or "n of this run: " in note, name
        axes = [figure.layout[key] for key in figure.to_dict()["layout"] if re.match(r"xaxis\d*$", key)]
        assert any(axis.title.text for axis in axes) or figure.layout.polar.angularaxis.direction, name


def test_colour_is_never_the_only_code(all_figures):
    for name, (frame, draw) in all_figures.items():
        codes = {}
        for trace in draw(frame).data:
            if trace.name and trace.hoverinfo != "skip":
                codes[trace.name] = (trace.marker.symbol, trace.line.dash) if trace.type != "bar" else (trace.marker.pattern.shape, trace.name.split(":")[0])
        assert len(set(codes.values())) == len(codes), (name, codes)


def test_names_from_outside_stay_text():
    "A model's name is no HTML, and no formula in a spreadsheet."
    evil = "<img src=x onerror=alert(1)>"
    frame = drawing.our_rules_frame([toy_record(evil, 10)])
    assert evil not in drawing.rules_figure(frame).to_json().replace("\\u003c", "<")
    curve = drawing.our_curve_frame([toy_repeats(evil, toy_lines())])
    assert evil not in drawing.curve_figure(curve).to_json().replace("\\u003c", "<")
    text = drawing.frame_csv(CLAIMS.assign(label="=1+1"))
    assert "'=1+1" in text and "\n=1+1" not in text
    assert r"50 \% \& \_" in drawing.frame_tex(CLAIMS.assign(label="50 % & _"))


def test_training_curves_keep_the_order_of_the_recipes_and_are_smoothed():
    tables = toy_training()
    frame = drawing.training_frame(tables, "synthetic").sample(frac=1, random_state=0).sort_values("model", kind="stable", ascending=False)
    figure = drawing.training_figure(frame)
    assert list(dict.fromkeys(trace.name for trace in figure.data)) == list(dict.fromkeys(frame["model"]))
    reward = next(trace for trace in figure.data if trace.name == "tiny-RL_m23k" and trace.yaxis == "y")
    own = tables["tiny-RL_m23k"]["reward"]
    assert list(reward.x) == list(range(1, 61))
    assert reward.y[29] == pytest.approx(own.loc[29:31].mean(), rel=1e-3), "the mean of three steps of sixty"


def test_tables_hold_every_number(all_figures):
    for name, (frame, _) in all_figures.items():
        table = pd.read_csv(io.StringIO(drawing.frame_csv(frame)))
        assert len(table) == len(frame) and list(table.columns) == list(frame.columns), name
        for column in set(frame.columns) & {"percent", "low", "high", "difference", "n", "questions", "at_least", "value"}:
            assert table[column].to_numpy(float) == pytest.approx(frame[column].to_numpy(float), rel=1e-6, nan_ok=True), (name, column)
        tex = drawing.frame_tex(frame, "A caption")
        assert tex.count("\\\\\n") >= len(frame) and r"\toprule" in tex


@pytest.mark.parametrize("named", ["", "missing", pytest.param("/bin/false", marks=pytest.mark.heavy)])
def test_without_a_browser_the_rest_is_written_and_one_sentence_said(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("BROWSER_PATH", named)
    drawing._say.cache_clear()
    for name in ("claims", "again"):
        paths = drawing.write_figure_files(name, CLAIMS, drawing.forest_figure(CLAIMS), tmp_path / "figures")
        assert [path.name for path in paths] == [f"{name}.html", f"{name}.csv", f"{name}.tex"] and all(path.stat().st_size for path in paths)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("No svg, pdf, png of the figures: "), said


@pytest.fixture(scope="module")
def browser():
    try:
        return drawing.find_browser()
    except UserError as error:
        pytest.skip(f"no picture can be drawn: {error}")


@pytest.mark.heavy
def test_files_are_the_same_twice(tmp_path, browser):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    for name, (frame, draw) in everything(PAPER).items():
        if name not in ("passes", "radar-7b", "forest"):
            continue
        paths = [drawing.write_figure_files(name, frame, draw(frame), tmp_path / folder) for folder in "ab"]
        assert [path.suffix for path in paths[0]] == [".html", ".csv", ".tex", ".svg", ".pdf", ".png"]
        assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]], name
        assert paths[0][3].read_bytes().startswith(b"<svg") and paths[0][4].read_bytes().startswith(b"%PDF")
        assert not re.search(rb"https?://(?!www\.w3\.org)", paths[0][3].read_bytes())


TEXTS = """() => {
  const plot = document.querySelector('.js-plotly-plot'), frame = plot.getBoundingClientRect(), found = [];
  for (const text of plot.querySelectorAll('.main-svg text')) {
    const box = text.getBoundingClientRect();
    if (!text.textContent.trim() || !box.width || getComputedStyle(text).visibility === 'hidden' || getComputedStyle(text).opacity === '0') continue;
    found.push({text: text.textContent.slice(0, 60), left: box.left - frame.left, top: box.top - frame.top, right: box.right - frame.left, bottom: box.bottom - frame.top,
                ink: getComputedStyle(text).fill, size: parseFloat(getComputedStyle(text).fontSize)});
  }
  return {texts: found, width: frame.width, height: frame.height, ground: getComputedStyle(plot.querySelector('.main-svg')).backgroundColor,
          panels: [...plot.querySelectorAll('.plot')].map(panel => panel.getBoundingClientRect().height)};
}"""


def wrong_texts(seen):
    "Texts that leave the figure, and pairs that lie on each other by more than two pixels each way."
    wrong = [f"{t['text']!r} leaves the figure" for t in seen["texts"] if t["left"] < -1 or t["top"] < -1 or t["right"] > seen["width"] + 1 or t["bottom"] > seen["height"] + 1]
    for a, b in itertools.combinations(seen["texts"], 2):
        across, down = min(a["right"], b["right"]) - max(a["left"], b["left"]), min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
        if across > 2 and down > 2:
            wrong.append(f"{a['text']!r} lies on {b['text']!r} ({across:.0f} x {down:.0f})")
    return wrong


def luminance(colour):
    "Relative luminance of rgb(...)."
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    return sum(w * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4) for w, x in zip((0.2126, 0.7152, 0.0722), parts))


def test_the_guard_itself_sees_an_overlap():
    box = dict(text="a", left=0, top=0, right=20, bottom=10)
    assert wrong_texts({"texts": [box, box | {"left": 10, "right": 40}], "width": 100, "height": 100})
    assert wrong_texts({"texts": [box | {"right": 120}], "width": 100, "height": 100})
    assert not wrong_texts({"texts": [box, box | {"top": 10, "bottom": 20}], "width": 100, "height": 100})


@pytest.mark.heavy
def test_no_text_overlaps_or_is_cut(tmp_path, browser, all_figures):
    from medvlthinker.core.plots import write_figure

    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong = []
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for (name, (frame, draw)), dark in itertools.product(all_figures.items(), (False, True)):
            path = write_figure(name, draw(frame, dark=dark), tmp_path)
            page = chromium.new_page(viewport={"width": 400, "height": 900})
            page.goto(path.as_uri())
            page.add_style_tag(content="body {margin: 0}")
            for width in (400, 1400):
                page.set_viewport_size({"width": width, "height": 900})
                page.evaluate("() => Plotly.Plots.resize(document.querySelector('.js-plotly-plot'))")
                page.wait_for_timeout(100)
                seen = page.evaluate(TEXTS)
                assert len(seen["texts"]) > 8 and seen["width"] == width, (name, width, seen["width"], len(seen["texts"]))
                wrong += [f"{name} at {width}, {'dark' if dark else 'light'}: {each}" for each in wrong_texts(seen)]
                ground = luminance(seen["ground"])
                assert (ground < 0.1) == dark, (name, seen["ground"])
                for text in seen["texts"]:
                    light, deep = sorted((ground, luminance(text["ink"])), reverse=True)
                    assert (light + 0.05) / (deep + 0.05) >= 4.5 and text["size"] >= 10, (name, text)
            page.close()
        chromium.close()
    assert wrong == []
