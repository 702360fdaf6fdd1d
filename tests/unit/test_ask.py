"""One image, one question, one model: what is sent, what comes back, and what is refused."""
import json
import shutil

import pytest
from conftest import ROOT, python, succeeded
from medvlthinker.core.files import UserError
from medvlthinker.data import synthetic
from medvlthinker.generation import tiny_model
from medvlthinker.generation.ask import STYLES, ask, own_sample
from medvlthinker.generation.engine import (EngineSettings, FunctionEngine, model_inputs, open_engine)
from medvlthinker.generation.model import BASELINES, Baseline
from medvlthinker.generation.request import Completion, Request
from PIL import Image

SYSTEM = ("You will solve a problem/request. You should provide your thoughts within <think> </think> tags before "
          "providing the answer.\nWrite your final answer within <answer> </answer> tags.")  # with a line break
SCAN = Image.new("L", (56, 40), 90)
YES_NO = ("Yes", "No")


@pytest.fixture(scope="module")
def tiny(warm_tiny):
    return open_engine(EngineSettings(model="tiny", checkpoints=str(warm_tiny.parent)))


def test_the_tiny_model_reasons_and_names_options(tiny):
    answers = [(sample, ask(sample.images[0], sample.question, sample.options, tiny))
               for sample in synthetic.benchmark("pmc_vqa", 12)]
    for sample, answer in answers:
        assert sample.question in answer.prompt and answer.prompt.count("<image>") == 1
        assert answer.reasoning and answer.reasoning in answer.completion
        assert "means nothing medical" in answer.note and "means nothing medical" in str(answer)
    named = [(sample, answer) for sample, answer in answers if answer.label]
    assert len(named) > 9 and all(sample.options[answer.label] == answer.option for sample, answer in named)


def test_the_free_form_of_a_raw_model_without_a_template_is_a_sentence(warm_tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(warm_tiny, tmp_path / "raw", ignore=shutil.ignore_patterns("*.jinja"))
    monkeypatch.setitem(BASELINES, "raw", Baseline(str(folder), "plain"))
    with pytest.raises(UserError, match="raw has no chat template"):
        ask(SCAN, "What is seen?", model=str(folder), style="free")


def test_the_free_form_has_its_own_system_turn_and_no_other(tiny):
    request = Request(own_sample(SCAN, "Which side is abnormal?"), 0, STYLES["free"], "free")
    engine = tiny._loaded or tiny._load()
    inputs = model_inputs([request], engine.processor)
    text = engine.processor.decode(inputs["input_ids"][0])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]  # 56 x 40 pixels, enlarged a little
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
    assert "helpful assistant" not in text and "Question:" not in text
    assert text.endswith("Which side is abnormal?<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def asked():
    "An engine by hand, and the requests that it was given."
    seen: list[Request] = []
    says = Completion("<think> It is dark. </think>\n<answer> left </answer>", "stop", 9)
    return FunctionEngine(lambda request: seen.append(request) or [says]), seen


def test_the_free_form_is_the_demo_of_the_readme(asked):
    engine, seen = asked
    answer = ask(SCAN, "Which side is abnormal?", model=engine, style="free")
    [request] = seen
    system, user = request.chat()
    assert (system["role"], system["content"]) == ("system", [{"type": "text", "text": SYSTEM}])
    assert user["role"] == "user" and [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] == "Which side is abnormal?"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.95, 2048)
    assert (answer.reasoning, answer.answer, answer.label) == ("It is dark.", "left", None)


def test_the_trained_form_is_one_greedy_turn_with_a_literal_backslash(asked):
    engine, seen = asked
    ask(SCAN, "Is there a nodule?", YES_NO, engine)
    [request] = seen
    [user] = request.chat()
    assert user["content"][1]["text"] == SYSTEM.replace("\n", "\\n") + "\n\nQuestion: Is there a nodule?\n\nOptions:\n\nA. Yes\n\nB. No"
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 4096)
    assert user["content"][0]["image"].size == SCAN.size


def test_a_server_that_gives_no_answer_is_a_sentence():
    engine = FunctionEngine(lambda request: [Completion("", "failed", 0, "error 500")], model="served")
    with pytest.raises(UserError, match="served gave no answer: error 500"):
        ask(SCAN, "Is there a nodule?", YES_NO, engine)


@pytest.mark.parametrize("said", ["<img src=x onerror=alert(1)>", "</pre><script>alert(1)</script>", "\x1b]0;title\x07\x1b[2J", "\u202eB", "&lt;b&gt;\x00",
                                  "<think> <a href='javascript:alert(1)'>x</a> </think>\n<answer> \x9b31m </answer>"])
def test_what_a_model_writes_stays_text(said):
    from bs4 import BeautifulSoup

    engine = FunctionEngine(lambda request: [Completion(said, "stop", 1)], model="<b>by hand</b>")
    answer = ask(SCAN, f"What is {said}?", [said, "No"], engine)
    page = BeautifulSoup(answer._repr_html_(), "html.parser")
    assert {tag.name for tag in page.find_all()} == {"img", "details", "summary", "b", "pre"}
    assert page.img["src"].startswith("data:image/png;base64,") and not [key for key in page.img.attrs if key.startswith("on")]
    for shown in (str(answer), page.get_text()):
        assert all(c.isprintable() or c == "\n" for c in shown)
    assert answer.completion == said, "the completion itself is kept as it came"


@pytest.mark.parametrize("words, given, sentence", [
    (("{note}", "What?"), {}, "note.txt cannot be used: no usable image"),
    (("{folder}", "What?"), {}, "cannot be read"),
    ((b"", "What?"), {}, "no usable image"),
    ((7, "What?"), {}, "The image cannot be used: there is no image"),
    ((Image.new("L", (3, 90)), "What?"), {}, "3x90 pixels"),
    ((Image.new("CMYK", (30, 30)), "What?"), {}, "The image cannot be read (cannot write mode CMYK as PNG)"),
    ((SCAN, " "), {}, "There is no question"),
    ((SCAN, "Left?", "Yes"), {}, "options is one text"),
    ((SCAN, "Left?", YES_NO), {"style": "polite"}, "Unknown style polite; known are trained, free"),
    ((SCAN, "Left?", YES_NO), {"model": "no such model"}, "No model 'no such model'"),
])
def test_a_mistake_is_one_sentence(words, given, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model, "make_tiny_model", lambda *_, **__: pytest.fail("a model is made before the mistake is said"))
    (tmp_path / "note.txt").write_text("not an image")
    places = {"{note}": tmp_path / "note.txt", "{folder}": tmp_path}
    first = places.get(words[0], words[0]) if isinstance(words[0], str) else words[0]
    with pytest.raises(UserError) as error:
        ask(first, *words[1:], **given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_quickstart_runs_from_top_to_bottom(warm_home, tmp_path):
    done = python("-m", "papermill", "nbs/quickstart.ipynb", tmp_path / "out.ipynb", "-k", "python3", "--no-progress-bar", cwd=ROOT, MEDVLTHINKER_HOME=warm_home)
    succeeded(done)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    assert len(cells) == 1 + 10, "a title and ten cells"
    shown = ["".join(output["data"]["text/plain"]) for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert [text.partition("(")[0].partition("\n")[0] for text in shown[:3]] == ["FileUpload", "Prompt", "Prompt"]
    assert "Answer\nA. X-ray" in shown[1] and "[system]" in shown[2]
    assert shown[3].split()[:5] == ["right", "n", "accuracy", "low", "high"] and shown[3].split()[7] in "0123" and shown[3].split()[8] == "3"
