"""Tokens a second and memory in SFT and GRPO of a model of the shape of Qwen2.5-VL-3B, on a GPU.

Each part runs in a process of its own, for what a trainer and vLLM hold of a GPU they give back when
they end. `python tests/speed/gpu_training.py PART [SIZE GPUS]` runs one: `tiny 0` tries it on a CPU."""
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measuring import Bound, NotHere, last_line, seconds
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.tiny_model import tiny_config, tiny_processor
from medvlthinker.training.grpo import train_grpo
from medvlthinker.training.memory import (
    count_parameters, estimate, model_config, settings_that_fit)
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.sft import plan, train_sft
from medvlthinker.training.train import curves

PARTS = {"3B-SFT_m23k": 6, "3B-RL_m23k": 8, "engine": 2}  # operations a token and parameter
RATE, MEMORY = "tokens a second on one GPU", "memory of torch over the estimate"
BOUNDS = (
    Bound(f"3B-SFT_m23k: {RATE}", "1/s", 0, "at least"), Bound(f"3B-SFT_m23k: {MEMORY}", "x", 1),
    Bound(f"3B-RL_m23k: {RATE}", "1/s", 0, "at least"), Bound(f"3B-RL_m23k: {MEMORY}", "x", 1),
    Bound(f"the engine alone: {RATE}", "1/s", 0, "at least"))
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12,  # dense bfloat16 operations a second,
         "L40": 181e12, "4090": 165e12}  # from the makers' data sheets
SAME = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "tie_word_embeddings", "layer_types")
ANSWER = 512  # tokens
CONTEXT = 16384  # tokens
CHANGES = {"3B-SFT_m23k": {"batch": 4}, "3B-RL_m23k": {
    "batch": 8, "mini_batch": 8, "max_prompt_length": 512, "max_response_length": ANSWER,
    "kl_coef": 0.0}}


def random_model(folder: Path, shape) -> Path:
    "Random weights of this shape, under the embedded tokenizer and processor."
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = tiny_processor()
    processor.tokenizer.model_max_length = CONTEXT
    config = tiny_config(processor.tokenizer)
    half = shape.hidden_size // shape.num_attention_heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config.text_config.update({key: getattr(shape, key) for key in SAME} | {
        "max_position_embeddings": CONTEXT, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}})
    config.tie_word_embeddings = shape.tie_word_embeddings
    config.vision_config.out_hidden_size = shape.hidden_size
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def drawn(words: int = 0, rows: int = 64) -> list:
    "Questions, with chains of thought of so many words."
    samples = synthetic.corpus("m23k", rows)
    return [replace(each, reasoning=(each.reasoning + " ") * (words // 12)) for each in samples]


def train(part: str, home: Path, machine: dict) -> tuple[float, float]:
    "Tokens a second of a training, and GiB of torch over those of the estimate."
    import torch

    recipe, rows = get_recipe(part), drawn(11000 if machine["gpus"] else 200)  # about 7,300 tokens
    recipe = replace(recipe, init=str(home / "model"), gpus=machine["gpus"],
                     config=replace(recipe.config, **CHANGES[part]))
    write_samples(rows, home / "rows.parquet")
    settings = TrainingSettings(**machine, max_steps=8)
    run = plan(recipe, settings, home / "rows.parquet", home, home / "logs")
    run = replace(run, settings=settings_that_fit(
        recipe, run.settings, row=run.longest, model=run.start))
    (train_sft if recipe.method == "SFT" else train_grpo)(run)
    late = curves(run.logs).iloc[3:]  # the first steps warm up
    tokens, spent = (late[name].iloc[-1] - late[name].iloc[0] for name in ("tokens", "seconds"))
    expected = estimate(recipe, run.settings, row=run.longest, model=run.start)
    measured = torch.cuda.max_memory_allocated() / 2**30 if machine["gpus"] else 0
    print(f"    {part}: row of {tuple(run.longest)} tokens, micro_batch={run.settings.micro_batch}, "
          f"gradient_checkpointing={run.settings.gradient_checkpointing}: {measured:.1f} GiB, "
          f"estimated {expected:.1f} with libraries", file=sys.stderr, flush=True)
    return tokens / spent, measured / expected


def answer(home: Path, machine: dict) -> tuple[float]:
    "Tokens a second of the engine alone."
    engine = open_engine(EngineSettings(**machine, model=str(home / "model")))
    sampling, made = Sampling(n=8, temperature=1.0, max_tokens=ANSWER), []
    asked = [Request(sample, i, sampling) for i, sample in enumerate(drawn())]
    taken = seconds(lambda: made.extend(engine.answer(asked)))
    return (sum(each.tokens for _, answers in made for each in answers) / taken,)


def run_part(part: str, size: str = "3B", gpus: str = "1") -> None:
    "Print what was measured as the last line, in JSON."
    machine = {"gpus": int(gpus)}
    if int(gpus):
        machine |= {"engine": "vllm", "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        random_model(home / "model", model_config(size).text_config)
        found = answer(home, machine) if part == "engine" else train(part, home, machine)
    print(json.dumps(found))


def gpu_training():
    "Random weights; the share of the GPU's arithmetic is printed where its peak is known."
    import torch

    if not torch.cuda.is_available():
        raise NotHere("there is no GPU")
    name, shape = torch.cuda.get_device_name(), model_config("3B").text_config
    weights = shape.num_hidden_layers * count_parameters("3B").layer
    peak = next((value for key, value in PEAKS.items() if key in name), float("nan"))
    for part, work in PARTS.items():
        rate, *more = last_line(__file__, part)
        print(f"    {100 * work * weights * rate / peak:.1f} % of the arithmetic of a {name}")
        yield rate
        yield from more


if __name__ == "__main__":
    run_part(*sys.argv[1:])
