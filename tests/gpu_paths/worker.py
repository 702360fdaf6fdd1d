"""One process of a training run as on GPUs, on a CPU: it trains the cases of a file, and keeps the gradients of the first update.

`accelerate launch --config_file ... worker.py CASES.json`. On a CPU accelerate has no FSDP; here it is told that it has, and torch's
`fully_shard` runs on gloo. The model, the settings, the loss, the checkpoints and the resumption are those of `medvlthinker.training.sft`.
"""
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

warnings.filterwarnings("ignore")
import accelerate.state
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from medvlthinker.training import sft
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


@dataclass
class Case:
    model: str
    data: str
    folder: str
    settings: dict
    sharded: bool = True  # FSDP; else every process holds the whole model (DDP, or one process)
    again: bool = False  # take the last checkpoint away, and go on from the one before
    steps: int = 1
    drawn: bool = False  # adapters begin without a half that is 0, beside which the other has no gradient


def shard_on_cpu() -> None:
    "Let accelerate use FSDP where ACCELERATE_USE_FSDP asks for it, without a GPU."
    begin = accelerate.state.AcceleratorState.__init__

    def told(self, *given, **keys):
        plugin = keys.get("fsdp_plugin")
        begin(self, *given, **keys)
        if plugin is not None and self.distributed_type != DistributedType.FSDP:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does it, or it is forgotten

    accelerate.state.AcceleratorState.__init__ = told


class Gradients(TrainerCallback):
    "Keeps the gradient of every weight before the first update, and whether the weights are shared out."

    def __init__(self, path: Path):
        self.path = path

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step:
            return
        found, sharded = {}, False
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                sharded = sharded or isinstance(weight, DTensor)
                grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                found[name.replace("module.", "")] = grad.detach().clone()
        if PartialState().is_main_process:
            torch.save({"gradients": found, "sharded": sharded, "processes": PartialState().num_processes}, self.path)


def train(case: Case) -> None:
    accelerate.state.AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(case.sharded).lower()
    if PartialState(cpu=True).num_processes > 1:  # what the case before left
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    recipe, folder = get_recipe("tiny-SFT_PMC"), Path(case.folder)
    recipe = replace(recipe, config=replace(recipe.config, batch=4, freeze_vision=False, warmup=0.0))
    settings = TrainingSettings(base=case.model, max_steps=case.steps, keep_checkpoints=0, **case.settings)
    state = PartialState(cpu=True)
    with state.main_process_first():
        run = sft.plan(recipe, settings, Path(case.data), folder, folder / "logs", lambda *_: None)
    sft.curve_callback = lambda run: Gradients(folder / "gradients.pt") if case.steps == 1 else curves(run)
    sft._adapters = lambda rank: replace(adapters(rank), init_lora_weights=not case.drawn)
    sft.train_sft(run)
    if case.again:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.copy(run.metrics, folder / "undisturbed.jsonl")
            shutil.rmtree(run.checkpoint(case.steps))
        state.wait_for_everyone()
        accelerate.state.AcceleratorState._reset_state()
        sft.train_sft(run)


if __name__ == "__main__":
    shard_on_cpu()
    torch.set_num_threads(1)
    sft.check_machine = lambda recipe, settings: None  # it asks for GPUs
    plain, curves, adapters = sft.sft_settings, sft.curve_callback, sft._adapters
    here = {"use_cpu": True, "dataloader_num_workers": 0, "save_steps": 1, "max_grad_norm": 1e9}
    sft.sft_settings = lambda run: plain(run) | here
    for given in json.loads(Path(sys.argv[1]).read_text()):
        train(Case(**given))
