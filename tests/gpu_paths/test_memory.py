"""What the estimate of memory says, held against measured runs on a CPU, against the paper's hardware and against small cards."""
import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from conftest import ROOT
from medvlthinker.core.files import UserError
from medvlthinker.training.memory import (
    Row, activations, estimate, logits, plan_of, seen_memory, settings_that_fit, states)
from medvlthinker.training.recipe import RECIPES, TrainingSettings, get_recipe
from medvlthinker.training.sft import row_mean_loss
from medvlthinker.training.train import _launch

MINI = TrainingSettings(gpus=1, dtype="bfloat16", engine="vllm", lora_rank=32)
PAPER = TrainingSettings(gpus=8, dtype="bfloat16", engine="vllm", trainer="verl", tensor_parallel=0)
PUBLISHED = [recipe for recipe in RECIPES.values() if recipe.size != "tiny"]


def decided(name: str, settings: TrainingSettings, memory: float) -> tuple[TrainingSettings, float, str]:
    "The settings that fit, the GiB that they need, and what is said."
    said: list[str] = []
    fits = settings_that_fit(get_recipe(name), settings, memory, show=said.append)
    return fits, estimate(get_recipe(name), fits, memory), " ".join(said)


# ---- the paper's hardware ----


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda recipe: recipe.name)
def test_eight_gpus_of_80_gb_get_what_the_paper_had_or_the_largest_micro_batch_that_fits(recipe):
    fits, need, said = decided(recipe.name, PAPER, 79.6)
    assert need <= 0.95 * 79.6 and fits.gpu_memory_utilization == 0.0
    if recipe.method == "SFT":  # one row at a time, and only the 32B computes its layers again
        assert (fits.micro_batch, fits.gradient_checkpointing, said) == (1, str(recipe.size == "32B").lower(), "")
        return
    own = recipe.config.micro_batch
    assert fits.gradient_checkpointing == "true" and own % fits.micro_batch == 0
    assert fits.micro_batch == own or estimate(recipe, replace(fits, micro_batch=2 * fits.micro_batch), 79.6) > 0.95 * 79.6
    assert (fits.micro_batch == own) == (said == "") and (not said or "equal up to rounding" in said)


# ---- one card ----


@pytest.mark.parametrize("name, share", [("3B-SFT_m23k", 0.0), ("3B-RL_m23k", 0.5)])
def test_mini_fits_a_card_of_24_gib_and_says_what_changed(name, share):
    "vLLM's usual share, 0.3, does not hold the model."
    fits, need, said = decided(name, MINI, 24.0)
    assert need <= 0.95 * 24 and (fits.micro_batch, fits.gradient_checkpointing) == (1, "true")
    assert said.startswith(name) and f"and {need:.1f} GiB. An update keeps" in said and "equal up to rounding" in said
    assert fits.gpu_memory_utilization == share and ("gpu_memory_utilization=0.5" in said) == (share > 0)


def test_grpo_is_reckoned_at_the_longest_answer_and_not_at_300_tokens():
    "B4 of the audit: 32 answers at once need 74 GiB at 1,000 tokens, 200 at 4,096, and the first edition let them start."
    at = lambda answer: estimate(get_recipe("3B-RL_m23k"), replace(MINI, micro_batch=32), 79.6, Row(2048, 0, answer))
    assert at(300) < 0.95 * 79.6 < at(1000) < at(4096) and at(4096) > 200
    fits, need, said = decided("3B-RL_m23k", MINI, 79.6)
    assert 2 <= fits.micro_batch <= 8 and need <= 0.95 * 79.6 and fits.gpu_memory_utilization == 0.0 and "micro_batch=32" in said


# ---- what the user sets ----


@pytest.mark.parametrize("name, more, memory, said", [
    ("3B-RL_m23k", {"micro_batch": 32}, 79.6, "with micro_batch=32 gradient_checkpointing=true.*Leave micro_batch"),
    ("3B-SFT_m23k", {"gradient_checkpointing": "false"}, 24.0, "with micro_batch=1 gradient_checkpointing=false.*Leave micro_batch"),
    ("3B-RL_m23k", {"gpu_memory_utilization": 0.2}, 24.0, r"needs [23]\d.\d GiB with micro_batch=1 .*95 % of a GPU's 24.0 GiB can be used. Leave micro_batch, gradient_checkpointing and gpu_memory_utilization"),
    ("3B-SFT_m23k", {"lora_rank": 0}, 24.0, r"of a GPU's 24.0 GiB.*adapters \(lora_rank=32\) or a smaller model")])
def test_settings_that_do_not_fit_are_refused_and_never_changed(name, more, memory, said):
    with pytest.raises(UserError, match=said):
        settings_that_fit(get_recipe(name), replace(MINI, **more), memory)
    assert decided("3B-RL_m23k", replace(MINI, micro_batch=2), 79.6)[0].micro_batch == 2


def test_a_card_that_a_run_does_not_use_does_not_count(monkeypatch):
    "A display card beside the one that trains."
    cards = [SimpleNamespace(total_memory=size * 2**30) for size in (80, 48, 8)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
    assert [seen_memory(replace(MINI, gpus=gpus)) for gpus in (1, 2, 3, 8)] == [80, 48, 8, 8]


def test_a_machine_that_cannot_hold_what_is_loaded_is_refused_before_anything_is(tmp_path, monkeypatch):
    "Each process of FSDP fills all weights, the reference of RL too."
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=300e9))
    monkeypatch.setattr("medvlthinker.training.train.run_logged", lambda words, log, show: started.append(words))
    eight, started = replace(MINI, gpus=8, lora_rank=0), []
    launch = lambda name, settings: _launch(SimpleNamespace(recipe=get_recipe(name), settings=settings, start="", data=tmp_path, logs=tmp_path, model_step=1, checkpoint=str), tmp_path, print)
    with pytest.raises(UserError, match=r"7B-RL_PMC on 8 GPUs .* 531 GB in all; this machine has 300 GB. Take fewer GPUs of each machine \(gpus\), or adapters"):
        launch("7B-RL_PMC", eight)
    assert not started
    for name, settings in (("7B-SFT_PMC", eight), ("7B-RL_PMC", replace(eight, gpus=4)), ("7B-RL_PMC", replace(eight, lora_rank=32))):
        launch(name, settings)
    assert len(started) == 3


def test_embedded_recipes_on_a_cpu_take_their_whole_batch():
    for name, size in (("tiny-SFT_PMC", 16), ("tiny-RL_PMC", 64)):
        fits, need, said = decided(name, TrainingSettings(), 4.0)
        assert (fits.micro_batch, fits.gradient_checkpointing, said) == (size, "false", "") and need < 3


# ---- measured memory: a model of random weights, wide and long enough that tensors outweigh Python, without images ----
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1}  # for bfloat16, which many processors compute ten times slower
COMMON = {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
TOWER = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128}
SETTINGS = {
    "SFT": {}, "SFT, checkpointing": {"gradient_checkpointing": "true"}, "SFT, LoRA": {"lora_rank": 16},
    "GRPO": {"method": "RL"},
    "SFT, bfloat16": {"bfloat16": True, "micro_batch": 2}, "GRPO, bfloat16": {"method": "RL", "bfloat16": True, "micro_batch": 2},
    "GRPO, bfloat16, LoRA, checkpointing": {"method": "RL", "bfloat16": True, "micro_batch": 4, "lora_rank": 16, "gradient_checkpointing": "true"}}


def wide_config(bfloat16: bool = False, vocabulary: int = 8192):
    from transformers import Qwen2_5_VLConfig

    size = NARROW if bfloat16 else WIDE
    return Qwen2_5_VLConfig(text_config=size | COMMON | {"vocab_size": vocabulary}, vision_config=TOWER | {"out_hidden_size": size["hidden_size"]}, tie_word_embeddings=True,
                            image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)


def grpo_loss(net, reference, ids, answer: int):
    "GRPO's loss, with log-probabilities by the installed TRL's own code."
    import torch
    from trl import GRPOTrainer

    trainer = SimpleNamespace(model_kwarg_keys={"logits_to_keep"}, temperature=0.9, _entropy_bonus_enabled=False)
    known = lambda model, entropy=False: GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(
        trainer, model, ids, torch.ones_like(ids), answer, compute_entropy=entropy)[0]
    with torch.no_grad():
        start = known(reference)
    now = known(net, True)
    loss = -torch.exp(now - now.detach()).clamp(0.8, 1.2) + 0.01 * (torch.exp(start - now) - (start - now) - 1)
    return loss.mean()


def steps(method="SFT", micro_batch=4, answer=448, lora_rank=0, gradient_checkpointing="false", bfloat16=False, vocabulary=8192) -> None:
    "Two updates in a plain loop; in bfloat16 as accelerate prepares a model for one GPU."
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    make = lambda: Qwen2_5_VLForConditionalGeneration(wide_config(bfloat16, vocabulary))
    net = make()
    reference = make().requires_grad_(False) if method == "RL" and not lora_rank else net
    if gradient_checkpointing == "true":
        net.gradient_checkpointing_enable({"use_reentrant": False})
    if lora_rank:
        from medvlthinker.training.memory import LORA_TARGETS
        from peft import LoraConfig, get_peft_model

        net = net.to(torch.bfloat16) if bfloat16 else net
        net = reference = get_peft_model(net, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS))
        net.enable_input_require_grads()
    if bfloat16 and method == "RL":
        from accelerate import Accelerator

        prepare = Accelerator(mixed_precision="bf16", cpu=True).prepare_model
        net, reference = prepare(net), prepare(reference) if reference is not net else net
    stepper = torch.optim.AdamW([weight for weight in net.parameters() if weight.requires_grad], lr=1e-4)
    whole = torch.randint(5, vocabulary, (micro_batch, 64 + answer))
    for ids in (whole[:1, :80], whole):  # the first update makes the optimizer's state; the second peaks
        length = ids.shape[1] - 64
        if method == "SFT":
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                labels = torch.where(torch.arange(ids.shape[1]) < 64, -100, ids)
                loss = row_mean_loss(net, {"input_ids": ids, "labels": labels})
        else:
            loss = grpo_loss(net, reference, ids, length)
        loss.backward()
        stepper.step()
        stepper.zero_grad()


def measure(setting: str) -> None:
    "Print by how many bytes the resident memory grows at most during the steps of a setting."
    import torch

    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is larger goes back to the system when it is freed
    steps(**SETTINGS[setting] | {"micro_batch": 1, "answer": 8, "vocabulary": 512})  # loads what is loaded late
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    here = lambda key: next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    before = here("VmRSS")
    steps(**SETTINGS[setting])
    print(here("VmHWM") - before)


def reckoned(setting: str, folder: Path) -> float:
    "Bytes of an update by the estimate, without the constant; who answers is not measured here."
    wide_config(SETTINGS[setting].get("bfloat16", False)).save_pretrained(folder)
    given = {"micro_batch": 4, "gradient_checkpointing": "false", "lora_rank": 0} | SETTINGS[setting]
    method, short, answer = given.pop("method", "SFT"), given.pop("bfloat16", False), given.pop("answer", 448)
    settings = TrainingSettings(gpus=int(short), dtype="bfloat16" if short else "float32", **given)
    plan = plan_of(get_recipe(f"3B-{method}_m23k"), settings, 64.0, Row(64, 0, answer), str(folder))
    kept, again = activations(plan)
    return sum(states(plan).values()) + kept + max(logits(plan), again) - 1.5 * 2**30


OFTEN = ("SFT, checkpointing",)  # the others beside the heavy tests


@pytest.mark.parametrize("setting", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.heavy) for name in SETTINGS])
def test_the_estimate_is_within_15_percent_of_the_measured_memory(setting, tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc; this machine has none")
    done = warm.run(__file__, setting, cwd=ROOT)
    measured, expected = int(done.stdout.split()[-1]), reckoned(setting, tmp_path)
    print(f"{setting:36} measured {measured / 2**20:5.0f} MiB, estimated {expected / 2**20:5.0f} MiB, {100 * (expected / measured - 1):+.1f} %")
    assert abs(expected / measured - 1) <= 0.15


if __name__ == "__main__":
    measure(sys.argv[1])
