"The tiny model where a notebook cannot test it: several processes, a kill, its accuracy."
import os
import re
import subprocess
import sys

import pytest
from medvlthinker.core.files import file_hash
from medvlthinker.core.grade import grade
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.tiny_model import SPECIAL_TOKENS, make_tiny_model

STEPS = 3  # of each half of the training: enough to change every weight
MAKE = ("from medvlthinker.generation.tiny_model import make_tiny_model\n"
        "make_tiny_model({!r}, seed=3, steps={})")


@pytest.fixture(scope="session")
def barely(tmp_path_factory):
    "A tiny model after a few steps of both halves of its training."
    return make_tiny_model(tmp_path_factory.mktemp("barely") / "tiny", 3, STEPS, show=lambda line: None)


def test_two_processes_make_one_model(barely, tmp_path):
    "The second one waits, and finds it done; the same seed gives the same files anywhere, whether the hub may be asked or not."
    code = f"""import torch
torch.manual_seed(9); torch.set_num_threads(2)
before = torch.get_rng_state()
{MAKE.format(str(tmp_path / "tiny"), STEPS)}
assert torch.equal(before, torch.get_rng_state()), "the caller's random state changed"
assert torch.get_num_threads() == 2, "the caller's threads changed"
"""
    makers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONHASHSEED": str(i), "HF_HUB_OFFLINE": "0"}) for i in (5, 6)]
    lines = [maker.communicate()[0].splitlines() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert sorted(map(len, lines)) == [0, 2 * STEPS]
    for file in barely.iterdir():
        assert file_hash(tmp_path / "tiny" / file.name) == file_hash(file), file.name


def test_the_chat_template_renders_as_qwens(barely):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(barely)
    render, tokenizer = processor.apply_chat_template, processor.tokenizer
    parts = [{"type": "image", "image": None}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cyst."}]
    asked = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
             + "<|vision_start|><|image_pad|><|vision_end|>" * 2
             + "What is it?<|im_end|>\n<|im_start|>assistant\n")
    assert render(chat[:1], tokenize=False, add_generation_prompt=True) == asked
    assert render(chat, tokenize=False) == f"{asked}A cyst.<|im_end|>\n"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert render(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == [*range(ids[0], ids[0] + len(SPECIAL_TOKENS))], "in Qwen's order, after all others"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_half_a_model_never_has_the_name(barely, tmp_path):
    "A kill leaves nothing under the folder's name, and the next call makes the same model."
    folder = tmp_path / "tiny"
    words = [sys.executable, "-u", "-c", MAKE.format(str(folder), 220)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()  # it is in the middle of its first half now
    child.kill()
    child.communicate()
    assert not folder.exists()
    (tmp_path / ".tiny.part").mkdir()  # as a kill leaves it that comes while the files are written
    (tmp_path / ".tiny.part" / "half").touch()
    make_tiny_model(folder, 3, STEPS, show=lambda line: None)
    assert file_hash(folder / "model.safetensors") == file_hash(barely / "model.safetensors")
    assert {file.name for file in folder.iterdir()} == {file.name for file in barely.iterdir()}


def test_it_answers_in_the_format_and_above_chance(warm_tiny):
    "The full model: above blind guessing, below its ceiling, in the format; it stops by itself."
    engine, right = open_engine(EngineSettings(model=str(warm_tiny))), 0
    for name in synthetic.BENCHMARKS:
        samples = synthetic.benchmark(name, 20, seed=4)
        asked = [Request(sample, i, Sampling(max_tokens=64)) for i, sample in enumerate(samples)]
        for request, [answer] in engine.answer(asked):
            assert re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", answer.text, re.DOTALL)
            assert answer.finish_reason == "stop"
            sample = request.sample
            right += grade(answer.text, sample.options, sample.answer_label, "strict").correct
    assert 60 < right < 108  # of 120; blind guessing 41
