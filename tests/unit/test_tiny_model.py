"""The tiny model where a notebook cannot test it: several processes, TRL, vLLM, verl."""
import importlib.util
import re
import subprocess
import sys
import textwrap

import pytest

from conftest import python
from medvlthinker.core.files import file_hash
from medvlthinker.core.grade import grade
from medvlthinker.data import synthetic
from medvlthinker.data.prompt import messages, sft_target, user_text, verl_prompt
from medvlthinker.generation.tiny_model import SPECIAL_TOKENS, make_tiny_model

STEPS = 3  # of each half of the training: enough to change every weight
MAKE = "from medvlthinker.generation.tiny_model import make_tiny_model; make_tiny_model({!r}, seed=3, steps={})"


@pytest.fixture(scope="session")
def barely(tmp_path_factory):
    "A tiny model after a few steps of both halves of its training."
    return make_tiny_model(tmp_path_factory.mktemp("barely") / "tiny", 3, STEPS, show=lambda line: None)


def test_same_seed_same_weights_in_another_process(barely, tmp_path):
    code = f"""
        import torch
        torch.manual_seed(9); torch.set_num_threads(2)
        before = torch.get_rng_state()
        {MAKE.format(str(tmp_path / "tiny"), STEPS)}
        assert torch.equal(before, torch.get_rng_state()), "the caller's random state changed"
        assert torch.get_num_threads() == 2, "the caller's threads changed"
    """
    done = python("-c", textwrap.dedent(code), PYTHONHASHSEED="5")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert file_hash(tmp_path / "tiny" / name) == file_hash(barely / name), name


def test_another_seed_other_weights_same_tokenizer(barely, tmp_path):
    other = make_tiny_model(tmp_path / "tiny", 4, STEPS, show=lambda line: None)
    assert file_hash(other / "model.safetensors") != file_hash(barely / "model.safetensors")
    assert file_hash(other / "tokenizer.json") == file_hash(barely / "tokenizer.json")


def test_loads_through_the_auto_classes(barely):
    from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    net, cut = AutoModelForImageTextToText.from_pretrained(barely), AutoProcessor.from_pretrained(barely)
    assert type(net) is Qwen2_5_VLForConditionalGeneration and type(cut) is Qwen2_5_VLProcessor
    for name, index in (("pathvqa_closed", 0), ("MedXpertQA-MM", 1)):  # one picture, two pictures
        sample = synthetic.benchmark(name, index + 1)[index]
        batch = cut.apply_chat_template(messages(sample), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        assert (batch["input_ids"] == net.config.image_token_id).sum() == 16 * len(sample.images)
        assert net(**batch).logits.isfinite().all()


def test_the_weights_are_safetensors_only(barely):
    from safetensors import safe_open

    assert [path.name for path in barely.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")] == []
    with safe_open(barely / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}


def test_the_chat_template_renders_as_qwens(barely):
    from transformers import AutoProcessor

    cut = AutoProcessor.from_pretrained(barely)
    chat = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A cyst."}]
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert cut.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == (
        f"{head}{picture}{picture}What is it?<|im_end|>\n<|im_start|>assistant\n")
    assert cut.apply_chat_template(chat, tokenize=False) == f"{head}{picture}{picture}What is it?<|im_end|>\n<|im_start|>assistant\nA cyst.<|im_end|>\n"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert cut.apply_chat_template(own, tokenize=False) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    ids = cut.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS))), "Qwen's special tokens, in Qwen's order, after all others"
    assert (cut.tokenizer.eos_token, cut.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_trl_trains_it_for_a_step(barely, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed; ./reproduce.sh setup installs it")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    net, cut = AutoModelForImageTextToText.from_pretrained(barely, dtype="float32"), AutoProcessor.from_pretrained(barely)
    rows = [{"images": sample.pictures(), "prompt": [{"role": "user", "content": user_text(sample)}],
             "completion": [{"role": "assistant", "content": sft_target(sample.answer_label, sample.reasoning)}]} for sample in synthetic.corpus("pmc_vqa", 4)]
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    how = SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, max_length=None, completion_only_loss=True,
                    report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
                    dataloader_pin_memory=False, disable_tqdm=True)
    trainer = SFTTrainer(model=net, args=how, train_dataset=Dataset.from_list(rows), processing_class=cut)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 1 and 0 < float(losses[0]) < 20
    assert all(weight.isfinite().all() for weight in net.parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in net.named_parameters())


def test_half_a_model_never_has_the_name(barely, tmp_path):
    "A process that is killed in the middle leaves nothing under the folder's name, and the next call makes the same model."
    folder = tmp_path / "tiny"
    child = subprocess.Popen([sys.executable, "-u", "-c", MAKE.format(str(folder), 220)], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()  # it is in the middle of its first half now
    child.kill()
    child.communicate()
    assert not folder.exists() and (tmp_path / ".tiny.part").exists()
    make_tiny_model(folder, 3, STEPS, show=lambda line: None)
    assert file_hash(folder / "model.safetensors") == file_hash(barely / "model.safetensors")
    assert not (tmp_path / ".tiny.part").exists()


def test_two_processes_make_one_model(tmp_path):
    "The second one waits, and finds the model done."
    code = MAKE.format(str(tmp_path / "tiny"), STEPS)
    makers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [maker.communicate()[0].splitlines() for maker in makers]
    assert sorted(map(len, lines)) == [0, 2 * STEPS] and [maker.returncode for maker in makers] == [0, 0]


def greedy(model, processor, samples) -> list[str]:
    "One completion a sample, with the token that ends it."
    import torch

    prompts = processor.apply_chat_template([messages(sample) for sample in samples], tokenize=False, add_generation_prompt=True)
    pictures = [picture for sample in samples for picture in sample.pictures()]
    inputs = processor(text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64)
    return [text.replace("<|endoftext|>", "") for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1]:])]  # that is the padding


def test_it_answers_in_the_format_and_above_chance(warm_tiny):
    "The full model: well above blind guessing, below its ceiling, always in the format, and it stops by itself."
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(warm_tiny, dtype="float32"), AutoProcessor.from_pretrained(warm_tiny)
    right = 0
    for name in synthetic.BENCHMARKS:
        samples = synthetic.benchmark(name, 20, seed=4)
        for sample, text in zip(samples, greedy(model, processor, samples), strict=True):
            assert re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer><\|im_end\|>", text, re.DOTALL), text
            right += grade(text.removesuffix("<|im_end|>"), sample.options, sample.answer_label, "strict").correct
    assert 60 < right < 108  # of 120; blind guessing 41


@pytest.mark.heavy
def test_verl_reads_it(barely, tmp_path):
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed; ./reproduce.sh setup full installs it")
    import datasets
    from omegaconf import OmegaConf
    from verl.utils import hf_processor, hf_tokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    rows = [{"data_source": "synthetic", "prompt": verl_prompt(sample), "images": [{"bytes": image, "path": None} for image in sample.images],
             "ability": "medical_mcqa", "reward_model": {"style": "rule", "ground_truth": sample.answer}, "extra_info": {"index": sample.dataset_index}}
            for sample in synthetic.corpus("pmc_vqa", 3)]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    table.to_parquet(str(tmp_path / "train.parquet"))
    how = OmegaConf.create({"prompt_key": "prompt", "image_key": "images", "max_prompt_length": 256, "filter_overlong_prompts": True,
                            "filter_overlong_prompts_workers": 1, "truncation": "error", "return_raw_chat": True, "cache_dir": str(tmp_path / "cache")})
    read = RLHFDataset(data_files=str(tmp_path / "train.parquet"), tokenizer=hf_tokenizer(str(barely)), processor=hf_processor(str(barely)), config=how)
    assert len(read) == 3, "no prompt is longer than 256 tokens"
    content = read[0]["raw_prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
