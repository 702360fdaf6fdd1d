"""Engines: nothing that a model's own files recommend changes a run, batches are the same whoever
computes them, and what cannot be asked is a sentence."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from medvlthinker.core.files import UserError
from medvlthinker.data import synthetic
from medvlthinker.data.sample import image_bytes
from medvlthinker.generation import engine as engine_module
from medvlthinker.generation.engine import (
    batches, check_nodes, draw_answers, load_transformers, model_inputs, open_engine)
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from transformers import GenerationConfig

SAMPLES = synthetic.benchmark("pmc_vqa", 3)
GREEDY, SAMPLED = Sampling(max_tokens=40), Sampling(n=2, temperature=0.7, max_tokens=40)


def requests(sampling: Sampling) -> list[Request]:
    return [Request(sample, index, sampling) for index, sample in enumerate(SAMPLES)]


def answers(engine, sampling: Sampling) -> dict:
    return {request.index: found for request, found in engine.answer(requests(sampling))}


# ---- generation_config.json ----


@pytest.fixture(scope="module")
def plain(warm_tiny) -> dict:
    "What the model answers by its own generation_config.json, which recommends nothing."
    engine = open_engine(EngineSettings(model=str(warm_tiny)))
    return {sampling: answers(engine, sampling) for sampling in (GREEDY, SAMPLED)}


RECOMMENDED = [  # as in ../shared/cases/generation-config.json, and what else is found in models
    {"no_repeat_ngram_size": 3, "min_new_tokens": 30, "min_p": 0.9, "typical_p": 0.1, "top_k": 1,
     "repetition_penalty": 1.9, "encoder_repetition_penalty": 1.9, "num_beams": 3,
     "do_sample": True, "temperature": 5.0, "top_p": 0.01, "num_return_sequences": 2,
     "penalty_alpha": 0.6, "guidance_scale": 3.0, "sequence_bias": [[[5], 9.0]]},
    {"max_new_tokens": 3, "max_length": 5}]


@pytest.mark.parametrize("given", RECOMMENDED, ids=",".join)
def test_what_a_model_recommends_changes_no_answer(warm_tiny, plain, tmp_path, capfd, given):
    "Greedy and drawn; what is not applied is said once."
    folder = Path(shutil.copytree(warm_tiny, tmp_path / "copy"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    engine = open_engine(EngineSettings(model=str(folder)))
    for sampling, expected in plain.items():
        assert answers(engine, sampling) == expected
    harmless = {"max_new_tokens", "max_length"} >= given.keys()
    assert capfd.readouterr().out.count("not applied") == (not harmless)


def test_a_generation_config_that_says_nothing(warm_tiny, plain, tmp_path):
    "Then the model's config says which token ends an answer."
    folder = Path(shutil.copytree(warm_tiny, tmp_path / "copy"))
    (folder / "generation_config.json").write_text("{}")
    assert answers(open_engine(EngineSettings(model=str(folder))), GREEDY) == plain[GREEDY]


# ---- chat template ----


def without_template(model: Path, place: Path) -> Path:
    folder = Path(shutil.copytree(model, place / "copy"))
    (folder / "chat_template.jinja").unlink()
    for path in folder.glob("*_config.json"):
        known = json.loads(path.read_text())
        known.pop("chat_template", None)
        path.write_text(json.dumps(known))
    return folder


def test_a_missing_chat_template_is_a_sentence_and_a_raw_dialect_needs_none(warm_tiny, tmp_path):
    engine = open_engine(EngineSettings(model=str(without_template(warm_tiny, tmp_path))))
    with pytest.raises(UserError, match="copy has no chat template .chat_template.jinja."):
        answers(engine, GREEDY)
    engine.dialect = "plain"
    raw = [replace(request, dialect="plain", sample=replace(request.sample, images=()))
           for request in requests(GREEDY)]
    assert len(list(engine.answer(raw))) == 3


def test_a_tokenizer_of_a_newer_library_is_a_sentence(warm_tiny, tmp_path):
    folder = Path(shutil.copytree(warm_tiny, tmp_path / "copy"))
    known = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(known | {"pre_tokenizer": {"type": "New"}}))
    with pytest.raises(UserError, match="copy cannot be loaded .Exception: data did not match"):
        answers(open_engine(EngineSettings(model=str(folder))), GREEDY)


# ---- how often, and with whom ----


@pytest.fixture(scope="module")
def batch(warm_tiny):
    "The tiny model, and a padded batch of questions with two images, one, and none."
    pair = next(sample for sample in synthetic.benchmark("MedXpertQA-MM", 40) if len(sample.images) == 2)
    mixed = [pair, SAMPLES[0], replace(SAMPLES[1], images=()), SAMPLES[2]]
    model, processor = load_transformers(warm_tiny, EngineSettings())
    asked = [Request(sample, index, GREEDY) for index, sample in enumerate(mixed)]
    return model, model_inputs(asked, processor)


def until_end(answers: list[list[int]], model) -> list[list[int]]:
    [end] = model.generation_config.eos_token_id
    return [tokens[:tokens.index(end)] if end in tokens else tokens for tokens in answers]


def drawn(batch, config: dict, draws: int) -> list[list[int]]:
    "Answers by `draw_answers` from one seed."
    torch.manual_seed(1)
    model, inputs = batch
    config = GenerationConfig(max_new_tokens=40, **config)
    return until_end(draw_answers(model, inputs, config, draws), model)


def test_greedy_answers_from_a_shared_prompt_are_those_from_one_each(batch, monkeypatch):
    "Whenever ended rows leave: positions of images, padding and cache are right."
    monkeypatch.setattr(engine_module, "_STEPS", 3)
    greedy = {"do_sample": False}
    alone = drawn(batch, greedy, 1)
    assert drawn(batch, greedy, 3) == [answer for answer in alone for _ in range(3)]


def test_sampled_answers_from_a_shared_prompt_are_those_from_one_each(batch, monkeypatch):
    "While no row leaves; another architecture computes the prompt for each answer."
    config = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    assert drawn(batch, config, 3) == drawn(batch, config, 3)
    monkeypatch.setattr(engine_module, "_STEPS", 40)
    shared = drawn(batch, config, 3)
    monkeypatch.setattr(batch[0].config, "model_type", "llava")
    assert drawn(batch, config, 3) == shared


def test_batches_do_not_depend_on_who_answered_before():
    "Neighbours of one rollout; two rollouts share none."
    sample = SAMPLES[0]
    asked = [Request(sample, index, GREEDY, rollout=rollout)
             for rollout, index in [(0, 4), (0, 5), (0, 6), (1, 6), (1, 8)]]
    found = [[(each.rollout, each.index) for each in batch] for batch in batches(asked, 4)]
    assert found == [[(0, 4), (0, 5), (0, 6)], [(1, 6)], [(1, 8)]]


def test_a_processor_knows_whose_image_is_whose():
    "Gemma's refuses a list of images from which it would have to guess."
    blind, both = replace(SAMPLES[0], images=()), replace(
        SAMPLES[1], images=SAMPLES[0].images + SAMPLES[1].images)

    class Processor:
        def apply_chat_template(self, chat, **given):
            return "text"

        def __call__(self, images, **given):
            self.images = images and [len(row) for row in images]
            return SimpleNamespace(convert_to_tensors=str)

    processor, found = Processor(), []
    for batch in ([SAMPLES[0], blind, both], [blind, blind]):
        model_inputs([Request(sample, 0, GREEDY) for sample in batch], processor)
        found.append(processor.images)
    assert found == [[1, 0, 2], None]


def test_a_question_that_a_processor_refuses_is_named(warm_tiny):
    "A strip that is too thin, and a word that stands for an image."
    narrow = replace(SAMPLES[2], images=(image_bytes(Image.new("RGB", (8, 1700))),))
    word = replace(SAMPLES[2], question="What is <|image_pad|>?")
    engine = open_engine(EngineSettings(model=str(warm_tiny), batch_size=2))
    for sample, said in ((narrow, "aspect ratio must be smaller than 200"), (word, "")):
        asked = [Request(each, index, GREEDY) for index, each in enumerate((*SAMPLES[:2], sample))]
        with pytest.raises(UserError, match=f"does not take the question .*/2: .*{said}"):
            list(engine.answer(asked))


# ---- a GPU that is of no use ----


def test_a_batch_that_a_gpu_does_not_hold_is_a_sentence(warm_tiny, monkeypatch):
    def draw(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(engine_module, "draw_answers", draw)
    with pytest.raises(UserError, match="no room for 3 prompts at once; lower batch_size .now 32"):
        answers(open_engine(EngineSettings(model=str(warm_tiny))), GREEDY)


def test_a_driver_that_is_too_old_is_a_sentence_and_no_reason_to_use_the_cpu(warm_tiny, monkeypatch):
    "It counts the GPUs, and CUDA does not start: a model of seven billion would answer for weeks."
    def refuse(module, device):
        assert device == "cuda"
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with pytest.raises(UserError, match="driver on your system is too old.*about the machine"):
        answers(open_engine(EngineSettings(model=str(warm_tiny), gpus=1)), GREEDY)


def test_gpus_that_transformers_leaves_idle_are_said_before_anything_runs(capsys):
    "They are not refused: a training with the same keys may use them."
    for keys in ({"gpus": 8, "data_parallel": 2}, {"gpus": 1}, {"gpus": 8, "engine": "vllm"}):
        check_nodes(EngineSettings(**keys))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "gpus=8 and data_parallel=2 would be of use" in said


# ---- vLLM's queue ----


class Stepping:
    "A vLLM that ends an answer a step: first the first ones of all questions."

    def __init__(self):
        self.left, self.most = {}, []

    def get_num_unfinished_requests(self):
        return sum(self.left.values())

    def step(self):
        self.most.append(len(self.left))
        name = max(self.left, key=self.left.get)
        self.left[name] -= 1
        if self.left[name]:
            return []
        del self.left[name]
        return [SimpleNamespace(request_id=name, finished=True, outputs=[])]


def test_vllm_gets_questions_for_each_answer_that_has_ended(monkeypatch):
    "Not only when all answers to a question have: the last one may take ten times as long."
    model, vllm = Stepping(), object.__new__(engine_module.VllmEngine)

    def add(request, chat):
        model.left[str(request.index)] = request.sampling.n
        return str(request.index)

    vllm.queue, vllm.add, vllm.llm = 8, add, SimpleNamespace(llm_engine=model)
    asked = [Request(SAMPLES[0], index, Sampling(n=4, temperature=1.0)) for index in range(12)]
    assert {request.index for request, _ in vllm.answer(asked)} == {*range(12)}
    assert max(model.most) > 2


# ---- what there is not ----


def test_an_unknown_dtype_is_a_sentence():
    with pytest.raises(UserError, match="Unknown dtype float8; did you mean "):
        open_engine(EngineSettings(model="/nowhere", dtype="float8"))


@pytest.mark.parametrize("name", ["tiny", "3B-of-a-colleague", "a/b"])
def test_a_served_model_is_looked_up_nowhere(name):
    "Its name is the server's; there is no network in these tests that could answer."
    engine = open_engine(EngineSettings(model=name, engine="openai", base_url="http://[::1]:9/v1"))
    assert (engine.model, engine.revision, engine.weights) == (name, "", "")
