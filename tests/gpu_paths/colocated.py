"""GRPO through TRL as on GPUs, with vLLM beside each process, on a CPU.

`python colocated.py FOLDER LORA_RANK`, alone or under `accelerate launch`: trains the questions of FOLDER, and writes what test_colocated.py looks at to FOLDER/seen.json.
vLLM for CPUs cannot sleep, and packs its weights where a GPU leaves them as they are; both are taken out here. All else is what runs on GPUs.
"""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import vllm.model_executor.layers.utils as layers
from accelerate import PartialState
from medvlthinker.training import grpo, sft
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl.generation import vllm_generation
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported
from worker import shard_on_cpu

SLEPT, MOVED, MARKS = [], set(), set()


class LLM(vllm_generation.LLM):
    def __init__(self, enable_sleep_mode: bool, **given):
        SLEPT.append(f"made for {given['max_num_seqs']} at once, {'to sleep' if enable_sleep_mode else 'to stay awake'}")
        super().__init__(**given, dtype="float32", enforce_eager=True, enable_chunked_prefill=False)

    def generate(self, *given, **named):
        answered = super().generate(*given, **named)
        mark = self.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
        MARKS.update(list(each.prompt_token_ids).count(mark) for each in answered)
        return answered

    def sleep(self, level: int) -> None:
        SLEPT.append("sleeps")

    def wake_up(self, tags: list[str]) -> None:
        SLEPT.append(f"wakes: {', '.join(tags)}")


def on_cpu(run: sft.Run, save_every: int, plain=sft.shared_settings) -> dict:
    return plain(run, save_every) | {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "dataloader_num_workers": 0}


def note_moved(self, data, plain=Trainer._prepare_input):
    MOVED.update(data if isinstance(data, dict) else ())
    return plain(self, data)


def whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def weights_of_vllm(trainer) -> dict[str, torch.Tensor]:
    "The weights of the language model that vLLM holds under the names that the trainer has for them."
    net = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name.replace("language_model.model.", "model.language_model."): weight for name, weight in net.named_parameters()}


def train(folder: Path, lora_rank: int) -> None:
    sft.check_machine = lambda recipe, settings: None  # it asks for GPUs
    grpo.shared_settings, grpo.AT_ONCE, vllm_generation.LLM = on_cpu, 24, LLM
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear)
    Trainer._prepare_input = note_moved
    trainers, run_trainer = [], grpo.run_trainer
    grpo.run_trainer = lambda run, trainer: (trainers.append(trainer), run_trainer(run, trainer))
    if (gpus := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        shard_on_cpu()
    state, recipe = PartialState(cpu=True), replace(get_recipe("tiny-RL_PMC"), gpus=gpus)
    settings = TrainingSettings(gpus=gpus, engine="vllm", base=str(folder / "tiny"), max_steps=2, lora_rank=lora_rank, tensor_parallel=gpus, micro_batch=16, gradient_checkpointing="true")
    recipe = replace(recipe, config=replace(recipe.config, warmup_steps=1))  # the first step moves nothing
    with state.main_process_first():
        run = sft.plan(recipe, settings, folder / "data.parquet", folder / "checkpoints", folder / "logs", lambda *_: None)
    grpo.train_grpo(run)
    trainer = trainers[0]
    trainer.vllm_generation.sync_weights()
    frozen = {name.removeprefix("base_model.model.").replace("language_model.", "").replace(".base_layer", ""): whole(weight.detach()).clone() for name, weight in trainer.model.named_parameters() if ".base_layer." in name}
    answering, learnt = weights_of_vllm(trainer), {name: whole(weight).clone() for name, weight in trainer.vllm_generation._iter_named_params()}
    start = load_file(folder / "tiny" / "model.safetensors") if frozen else {}
    shared = [name for name in answering.keys() & learnt.keys() if answering[name].shape == learnt[name].shape]  # others are fused, or shared out
    current_platform.is_cuda = lambda: True
    if state.is_main_process:
        seen = {"steps": sft.read_metrics(run.metrics), "slept": SLEPT, "moved": sorted(MOVED), "image tokens": sorted(MARKS), "compiles for CUDA": flashinfer_sampler_supported(), "weights": len(shared),
                "equal": all(torch.equal(answering[name], learnt[name]) for name in shared),
                "reference gathered": sum(weight.numel() for weight in trainer.ref_model.parameters() if not isinstance(weight, DTensor)) if trainer.ref_model else 0,
                "frozen": len(frozen), "as at the start": all(torch.equal(frozen[name], start[name]) for name in frozen)}
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
