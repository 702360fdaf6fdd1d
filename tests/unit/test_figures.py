"""The figures: tables against the paper's data, drawings against the tables, no text on other text or cut off, and the stored outputs."""

import functools
import base64
import itertools
import re

import pandas as pd
import pytest
from conftest import ROOT, shown

pytest.importorskip("plotly", reason="figures need plotly")

from medvlthinker.core import plots
from medvlthinker.evaluation.evaluate import repeated_accuracy
from medvlthinker.results import figures as drawing
from medvlthinker.results.published import COLUMNS, MEASURES, published, read_published
from medvlthinker.results.tables import SYNTHETIC_NOTE, results_table

PAPER = published()
MODELS = ("tiny", *(f"tiny-{recipe}" for recipe in ("SFT_m23k", "SFT_PMC", "SFT_m23k-RL_PMC", "RL_m23k", "RL_PMC",
                                                    "RL_m23k-RL_PMC")))


def repeats(model):
    "Invented: of twelve questions of each set, two on an image, 0 to 8 of eight answers are right."
    lines = [{"dataset_name": name, "image": f"{name}{q // 2}", "n": 8, "right": q * 5 % 9,
              "majority": float(q * 5 % 9 > 4)} for name in COLUMNS for q in range(12)]
    found = repeated_accuracy(pd.DataFrame(lines)).to_dict("records")
    return {"model": model, "source": "synthetic", "rules": dict.fromkeys(("strict", "regrade"), found)}


def record(model):
    counts = {name: [12 + at, 40] for at, name in enumerate(COLUMNS)}
    return {"model": model, "source": "synthetic", "rule": "regrade", "counts": counts}


CLAIMS = pd.DataFrame([("MedVLThinker-7B RL(m23k)", "HuatuoGPT-Vision-7B", 0.19, -1.3, 1.7, "Published", "paper", "invented", 8220),
                       ("tiny-RL_m23k", "tiny", -0.5, -3.4, 2.4, "This run", "ours", "synthetic", 600)],
                      columns="first second difference low high group origin source n".split())


SAMPLED, RECORDS = drawing.sampled_frame(PAPER, [*map(repeats, MODELS[::3])]), [*map(record, MODELS)]
ALL = {  # every figure's table, published and ours, with the function that draws it
    "radar": (results_table((), "comparison", only=drawing.RADARS["32B"]), drawing.radar_figure),
    "repeated": (SAMPLED[SAMPLED["rule"] == "regrade"], drawing.repeated_figure),
    "pass_at_k": (SAMPLED[SAMPLED["rule"] == "strict"], drawing.pass_at_k_figure),
    "claims": (CLAIMS, drawing.forest_figure),
    "one_group": (CLAIMS.assign(group="Published, as if the models were independent"), drawing.forest_figure),
    "accuracy": (results_table(RECORDS), drawing.accuracy_figure),
    "comparison": (results_table(RECORDS, "comparison"), drawing.accuracy_figure)}


@functools.cache
def figure_of(name):
    frame, draw = ALL[name]
    return draw(frame)


def numbers(figure):
    "Every number that the traces of a figure show."
    values = (getattr(trace, axis, None) for trace in figure.data for axis in ("x", "y", "r"))
    return {round(float(x), 6) for each in values if each is not None for x in each if not isinstance(x, str)}


def test_every_published_bar_and_point_is_a_row_and_none_is_invented():
    printed = {(line["model"], line["dataset_name"], "regrade", measure): float(line[measure])
               for line in read_published("five_answers") for measure in MEASURES if line[measure]}
    printed |= {(line["model"], line["dataset_name"], "strict", f"pass@{line['k']}"): float(line["percent"])
                for line in read_published("pass_at_k")}
    frame = drawing.sampled_frame(PAPER)
    labels = {name: name.replace(base, PAPER.row(base).label) for name, *_ in printed for base in [name.split("@")[0]]}
    key = ["model", "dataset_name", "rule", "measure"]
    assert frame.set_index(key)["percent"].to_dict() == {(labels[name], *rest): x for (name, *rest), x in printed.items()}
    assert {*frame[frame["label"] != frame["model"]]["model"]} == {"7B RL(m23k)+RL(PMC)@900"}


@pytest.mark.parametrize("name", ALL)
def test_a_figure_draws_its_table_with_source_n_intervals_and_the_warning(name):
    frame, figure = ALL[name][0], figure_of(name)
    value = "difference" if "difference" in frame else "percent"
    if name != "radar":
        assert {round(x, 6) for x in frame[value]} <= numbers(figure)
    text = figure.layout.title.text.replace("<br>", " ")
    ours = frame[frame["origin"] == "ours"]
    assert (SYNTHETIC_NOTE in text) == bool((ours["source"] == "synthetic").any())
    assert "Paper:" in text or "Ours:" in text
    assert re.search(r"; n = \d", text)
    if "low" in frame and frame["low"].notna().any():
        bars = [trace.error_x.array is not None or trace.error_y.array is not None for trace in figure.data]
        assert "95 % intervals" in text and any(bars)
    codes = {trace.name: (trace.marker.symbol, trace.line.dash) for trace in figure.data}
    assert len({*codes.values()}) == len(codes), "colour is never the only code"
    assert figure.layout.height <= 1.6 * 900, "no strips"


def test_names_from_outside_stay_text():
    evil = "<img src=x onerror=alert(1)>"
    curves = drawing.sampled_frame(PAPER, [repeats(evil)])
    for figure in (drawing.pass_at_k_figure(curves), drawing.accuracy_figure(results_table([record(evil)])),
                   drawing.radar_figure(results_table([record(evil)]))):
        assert evil not in figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")


def test_without_a_browser_the_rest_is_written_and_one_sentence_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    plots.find_browser.cache_clear()
    drawing.print_once.cache_clear()
    for name in ("claims", "again"):
        paths = drawing.write_figure_files(name, CLAIMS, figure_of("claims"), tmp_path / "figures")
        assert [path.name for path in paths if path.stat().st_size] == [f"{name}.html", f"{name}.csv"]
    said = capsys.readouterr().out.splitlines()
    plots.find_browser.cache_clear()
    assert len(said) == 1 and said[0].startswith("No png of the figures: "), said


@pytest.mark.heavy
def test_a_picture_is_drawn_where_there_is_a_browser(tmp_path, chromium):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    page, numbers, png = drawing.write_figure_files("repeated", ALL["repeated"][0], figure_of("repeated"), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG") and len(pd.read_csv(numbers)) == len(ALL["repeated"][0])


# Outputs that are stored in the repository

STORED = [ROOT / "nbs" / "paper" / "5_results.ipynb", ROOT / "nbs" / "paper" / "6_audit.ipynb"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_belong_to_the_code_as_it_is(path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are not installed")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and not re.search(r"/(tmp|root|home|Users)/", text) and str(ROOT) not in text
    pictures = [len(picture) for picture in re.findall(r'"image/png": "(.*)"', text)]
    assert pictures and max(pictures) < 200_000  # base64 of 150 kB
    stored, now = shown(nbformat.read(path, 4)), shown(plots.with_outputs(path, draw=lambda figure: b""))
    assert stored == now, "store it anew: ./reproduce.sh docs --outputs NOTEBOOK"


def test_the_picture_on_the_first_page_is_that_of_the_audit():
    text, picture = STORED[1].read_text(encoding="utf-8"), ROOT / "nbs" / "images" / "differences.png"
    assert base64.b64decode(re.search(r'"image/png": "(.*?)"', text)[1]) == picture.read_bytes()


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
def test_no_text_overlaps_or_is_cut_on_a_phone_or_a_wide_page(tmp_path, new_page):
    page, wrong = new_page(), []
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
    assert wrong == []
