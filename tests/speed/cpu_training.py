"CPU seconds of the embedded runs: a step of GRPO beside plain TRL, and a model from its recipe."
import contextlib
import io
import os
import tempfile
from pathlib import Path

from measuring import Bound, cpu_seconds, quiet
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.grpo import grpo_chat, grpo_settings, rewards, train_grpo
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.sft import chats, plan
from medvlthinker.training.train import train

BOUNDS = (Bound("four steps of tiny-RL_PMC, ratio to plain TRL", "", 0.65),
          Bound("tiny-RL_PMC of four steps, all processes", "CPU s", 0, "at least"),
          Bound("tiny-SFT_PMC of four steps, all processes", "CPU s", 0, "at least"))


def train_plainly(run) -> None:
    "The same run by TRL's own trainer, which reads a question for each of its answers."
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForImageTextToText.from_pretrained(run.start, dtype="float32")
    model.model.visual.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(run.start, padding_side="left")
    settings = grpo_settings(run, processor)
    settings["generation_kwargs"] |= {"num_return_sequences": 1}
    GRPOTrainer(model=model, args=GRPOConfig(**settings), reward_funcs=rewards(),
                train_dataset=chats(run, grpo_chat), processing_class=processor).train()


def cpu_training(turns: int = 3):
    "64 drawn questions; GRPO in turns with its rival, after a turn that warms up."
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as home:
        folder, data = Path(home), Path(home) / "pmc_vqa.parquet"
        write_samples(synthetic.corpus("pmc_vqa", 64), data)
        settings = TrainingSettings(base=str(make_tiny_model(folder / "base", show=quiet)), max_steps=4)
        recipe, taken = get_recipe("tiny-RL_PMC"), []
        for turn in range(turns + 1):
            acts = (train_grpo, train_plainly) if turn % 2 else (train_plainly, train_grpo)
            runs = {act: plan(recipe, settings, data, folder / f"{turn}-{act.__name__}",
                              folder / f"logs-{turn}-{act.__name__}", quiet) for act in acts}
            with contextlib.redirect_stdout(io.StringIO()):  # both say how far they are
                taken.append({act: cpu_seconds(lambda act=act: act(runs[act])) for act in acts})
        print("    ours, plain TRL:", *(f"{each[train_grpo]:.1f}, {each[train_plainly]:.1f} CPU s;"
                                        for each in taken[1:]))
        yield [each[train_grpo] / each[train_plainly] for each in taken[1:]]
        for name in ("tiny-RL_PMC", "tiny-SFT_PMC"):
            places = (data, folder / "models", folder / f"logs-{name}")
            yield cpu_seconds(lambda: train(get_recipe(name), settings, *places, quiet))
