"Tokens a second in SFT and GRPO of a model of the shape of Qwen2.5-VL-3B, on a GPU."
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from measuring import Bound, NotHere, report, seconds
from medvlthinker.app.profile import Workspace, load_profile
from medvlthinker.app.runs import engine_settings, training_places
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import Request, Sampling
from medvlthinker.generation.tiny_model import tiny_config, tiny_processor
from medvlthinker.training.grpo import train_grpo
from medvlthinker.training.memory import count_parameters, model_config
from medvlthinker.training.recipe import find
from medvlthinker.training.sft import plan, train_sft
from medvlthinker.training.train import curves

BOUNDS = tuple(Bound(f"{what}: tokens a second on one GPU", "1/s", 0, "at least")
               for what in ("3B-SFT_m23k", "3B-RL_m23k", "the engine alone"))
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12,  # dense bfloat16 operations a second,
         "L40": 181e12, "4090": 165e12}  # from the makers' data sheets
SAME = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "tie_word_embeddings", "layer_types")
ANSWER = 512  # tokens
SHORT = {"batch": 8, "mini_batch": 8, "max_response_length": ANSWER, "kl_coef": 0.0}


def random_model(folder: Path, shape) -> Path:
    "Random weights of this shape, under the embedded tokenizer and processor."
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = tiny_processor()
    config = tiny_config(processor.tokenizer)
    half = shape.hidden_size // shape.num_attention_heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config.text_config.update({key: getattr(shape, key) for key in SAME} | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}})
    config.tie_word_embeddings = shape.tie_word_embeddings
    config.vision_config.out_hidden_size = shape.hidden_size
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def training_rates(shape, gpus: int, rows: int = 64, words: int = 900):
    "Tokens a second, and operations a token and parameter, of SFT, GRPO and the engine."
    workspace = Workspace("smoke")
    folder = random_model(workspace.home / "model", shape)
    machine = {"gpus": gpus, "engine": "vllm", "dtype": "bfloat16"} if gpus else {}
    profile = load_profile("smoke", **machine, max_steps=8, max_tokens=ANSWER)
    drawn = synthetic.corpus("m23k", rows)
    long = [replace(each, reasoning=(each.reasoning + " ") * (words // 12)) for each in drawn]
    write_samples(long, workspace.samples / "synthetic/corpus/m23k-distilled.parquet")
    write_samples(drawn, workspace.curated / "synthetic/m23k-200-tiny-easy_to_hard.parquet")
    for name, change, act, work in (("3B-SFT_m23k", {}, train_sft, 6),
                                    ("3B-RL_m23k", SHORT, train_grpo, 8)):
        recipe = find(name)
        places = training_places(recipe, profile)
        changed = replace(recipe, init=str(folder), gpus=gpus, how=replace(recipe.how, **change))
        act(plan(changed, profile, *places))
        late = curves(places[-1]).iloc[3:]  # the first steps warm up
        spent = late.seconds.iloc[-1] - late.seconds.iloc[0]
        yield (late.tokens.iloc[-1] - late.tokens.iloc[0]) / spent, work
    engine = open_engine(engine_settings(profile, str(folder)))
    sampling, made = Sampling(n=8, temperature=1.0, max_tokens=ANSWER), []
    asked = [Request(sample, i, sampling) for i, sample in enumerate(drawn)]
    taken = seconds(lambda: made.extend(engine.answer(asked)))
    yield sum(each.tokens for _, answers in made for each in answers) / taken, 2


def gpu_training():
    "Random weights; the share of the GPU's arithmetic is printed where its peak is known."
    import torch

    if not torch.cuda.is_available():
        raise NotHere("there is no GPU")
    name, shape = torch.cuda.get_device_name(), model_config("3B").text_config
    weights = shape.num_hidden_layers * count_parameters("3B").layer
    peak = next((value for key, value in PEAKS.items() if key in name), float("nan"))
    with tempfile.TemporaryDirectory() as home:
        os.environ["MEDVLTHINKER_HOME"] = home
        for rate, work in training_rates(shape, 1):
            print(f"    {100 * work * weights * rate / peak:.1f} % of the arithmetic of a {name}")
            yield rate


if __name__ == "__main__":
    report(gpu_training, BOUNDS)
