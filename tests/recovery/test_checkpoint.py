"""Sharded by two processes, merged by one: the same function. And what the notebook cannot hold: kills."""
import functools
import importlib.util
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import warm
from conftest import ROOT, free_port, python
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.checkpoint import merge
from medvlthinker.core.files import UserError, record_path


def prompt(base) -> dict:
    "A prompt with a picture, as tensors."
    from medvlthinker.data.synthetic import corpus
    from medvlthinker.data.prompt import messages
    from transformers import AutoProcessor

    cut, chat = AutoProcessor.from_pretrained(base), messages(corpus("pmc_vqa", 1, seed=5)[0])
    images = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
    return cut(text=[cut.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)], images=images, return_tensors="pt")


def logits_of(folder, batch) -> np.ndarray:
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.inference_mode():
        return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()(**batch).logits.numpy()


def train_sharded(base: str, folder: str, lora: str, how: str) -> None:
    "One of the processes of an FSDP2 run: two steps, the checkpoint that accelerate (or verl) writes, and the logits of the sharded model."
    import torch
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForImageTextToText

    state = PartialState(cpu=True)
    torch.manual_seed(0)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    net = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
    if lora != "full":
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    for layer in (net.model if lora == "full" else net.base_model.model.model).language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    batch, rate = prompt(base), 0.05 if lora != "full" else 1e-3
    stepper = torch.optim.AdamW([weight for weight in net.parameters() if weight.requires_grad], lr=rate)
    for _ in range(2):
        net(**batch, labels=batch["input_ids"]).loss.backward()
        stepper.step()
        stepper.zero_grad()
    if how == "verl":
        torch.save(net.state_dict(), Path(folder, f"model_world_size_2_rank_{state.process_index}.pt"))
    else:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="transformer_based_wrap")
        save_fsdp_model(plugin, SimpleNamespace(process_index=state.process_index, num_processes=2), net, folder, adapter_only=lora != "full")
    with torch.no_grad():
        logits = net.eval()(**batch).logits.numpy()
    if state.is_main_process:
        np.save(Path(folder).parent / "logits.npy", logits)
        if lora != "full":
            net.peft_config["default"].save_pretrained(folder)
    state.destroy_process_group()


def sharded_run(tmp_path, lora: str = "full", how: str = "accelerate"):
    "A base model, and the training folder that two processes left."
    base, own = make_tiny_model(tmp_path / "base", seed=3, steps=0), tmp_path / "r.training"
    checkpoint = own / ("global_step_2/actor" if how == "verl" else "checkpoint-2")
    checkpoint.mkdir(parents=True)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
              "OMP_NUM_THREADS": 1}
    logs = [str(tmp_path / f"rank-{rank}.log") for rank in (0, 1)]
    ranks = [warm.start(__file__, base, checkpoint, lora, how, cwd=ROOT, out=log, error=log, **common, RANK=rank, LOCAL_RANK=rank) for rank, log in enumerate(logs)]
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(Path(log).read_text() for log in logs)[-3000:]
    return base, own, checkpoint


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    "A run of two processes with all weights trained, once for several tests."
    return sharded_run(tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("lora", ["full", "adapter"])
def test_two_ranks_merge_to_the_same_logits(tmp_path, lora, full_run):
    base, own, checkpoint = full_run if lora == "full" else sharded_run(tmp_path, lora)
    assert len(list(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))) == 2
    final = merge(checkpoint, str(base), tmp_path / "final", own=own)
    expected = np.load(checkpoint.parent / "logits.npy")
    found = logits_of(final, prompt(base))
    assert abs(found - logits_of(base, prompt(base))).max() > 0.01  # the steps changed it
    assert abs(found - expected).max() <= 1e-6 if lora == "full" else abs(found - expected).max() <= 2e-5
    assert not [path for path in final.iterdir() if path.suffix in (".bin", ".pt")]
    assert {path.name for path in base.iterdir()} - {path.name for path in final.iterdir()} == {"tiny.json"}
    assert (final / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_shard_of_the_other_rank_is_missing_or_cut(tmp_path, full_run):
    base, own = full_run[0], shutil.copytree(full_run[1], tmp_path / "own")
    checkpoint = own / "checkpoint-2"
    second = sorted(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))[1]
    whole = second.read_bytes()
    damages = (whole[: len(whole) // 2], b"", whole[:2000] + bytes(len(whole) - 2000), None)
    for damage in damages:
        second.unlink() if damage is None else second.write_bytes(damage)
        with pytest.raises(UserError, match="cannot be read.*take an earlier checkpoint"):
            merge(checkpoint, str(base), tmp_path / "final", own=own)
    assert not (tmp_path / "final").exists() and not list(tmp_path.glob(".*"))
    second.write_bytes(whole)
    assert (merge(checkpoint, str(base), tmp_path / "final", own=own) / "model.safetensors").is_file()


def test_a_full_disk_is_not_called_a_damaged_shard(tmp_path, full_run):
    base, own, checkpoint = full_run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="put together .*File too large"):
            merge(checkpoint, str(base), tmp_path / "final", own=own)
        with pytest.raises(UserError, match="final cannot be written .*File too large"):
            merge(base, str(base), tmp_path / "final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.heavy
@pytest.mark.parametrize("lora", ["full", "adapter"])
def test_verl_merges_two_ranks_and_no_adapter(tmp_path, lora):
    if not importlib.util.find_spec("verl"):
        pytest.skip("verl is not installed; ./reproduce.sh setup full installs it")
    base, own, checkpoint = sharded_run(tmp_path, lora, how="verl")
    (checkpoint / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    shutil.copytree(base, checkpoint / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    merged = functools.partial(merge, checkpoint, str(base), tmp_path / "final", own=own, log=tmp_path / "log")
    if lora == "adapter":
        with pytest.raises(UserError, match="holds an adapter of verl's"):
            merged()
        return
    final = merged()
    expected, found = np.load(checkpoint.parent / "logits.npy"), logits_of(final, prompt(base))
    assert abs(found - logits_of(base, prompt(base))).max() > 0.01
    assert abs(found - expected).max() < 0.05  # verl stores bfloat16


def test_a_kill_leaves_no_half_model(tmp_path, full_run):
    "Killed while it writes, a merge leaves no folder or the whole one; the next call removes what was left and ends well."
    base, own, checkpoint = full_run
    final = tmp_path / "final"
    words = [sys.executable, "-c", f"from medvlthinker.training.checkpoint import atomic_folder, merge; print('begin', flush=True); merge({str(checkpoint)!r}, {str(base)!r}, {str(final)!r}, own={str(own)!r})"]
    torn = 0
    for _ in range(3):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "begin\n"
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end and not list(tmp_path.glob(".final.*.part/[a-z]*")):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if final.exists():
            assert (final / "model.safetensors").is_file() and {path.name for path in base.iterdir()} - {path.name for path in final.iterdir()} == {"tiny.json"}
            shutil.rmtree(final)
        torn += bool(list(tmp_path.glob(".final.*.part")))
        record_path(final).unlink(missing_ok=True)
    assert torn, "no kill came in the middle"
    merge(checkpoint, str(base), final, own=own)
    assert (final / "model.safetensors").is_file() and not list(tmp_path.glob(".final.*"))


# LoRA on a tensor that the model uses twice
def tied_cases() -> list:
    "Settings of peft that train the embedding or the head of a tied model: ours, and those of ../shared/cases."
    found = [{"target_modules": r".*(q_proj|lm_head)"}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
             {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}]
    path = ROOT.parent / "shared" / "cases" / "lora-on-tied-weights.json"
    found += [case["lora"] for case in json.loads(path.read_text())["cases"]] if path.is_file() else []
    return [pytest.param(each, id=f"{number}-{'-'.join(map(str, each.values()))[:50]}") for number, each in enumerate(found)]


def trained_adapter(base, folder, **lora):
    "An adapter with weights that changed, and the live model."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    net = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype="float32"), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape))
    net.save_pretrained(folder)
    return net.eval()


def sharded_adapter(net, adapter: Path, folder: Path) -> Path:
    "The checkpoint that a sharded run leaves of an adapter."
    import torch.distributed.checkpoint as dcp

    trained = {name: weight.detach() for name, weight in net.named_parameters() if weight.requires_grad}
    dcp.save({"model": trained}, storage_writer=dcp.FileSystemWriter(folder / "pytorch_model_fsdp_0"), no_dist=True)
    shutil.copy(adapter / "adapter_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tied") / "base", seed=3, steps=0)


@pytest.mark.filterwarnings("ignore")  # peft warns of such an adapter, and goes on
@pytest.mark.parametrize("lora", tied_cases())
def test_an_adapter_on_tied_weights_is_refused_in_both_layouts(tmp_path, tied, lora):
    net = trained_adapter(tied, tmp_path / "adapter", **lora)
    for place in (tmp_path / "adapter", sharded_adapter(net, tmp_path / "adapter", tmp_path / "own" / "checkpoint-1")):
        with pytest.raises(UserError, match=r"changes (embed_tokens|lm_head)( and lm_head)?, and the base model has one tensor for embed_tokens and lm_head") as said:
            merge(place, str(tied), tmp_path / "final", own=tmp_path / "own")
        assert "\n" not in str(said.value) and not (tmp_path / "final").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
def test_the_same_adapter_of_an_untied_model_is_merged(tmp_path, tied, lora):
    "As the 7B: head and embedding are two tensors, and an adapter on one of them changes that one."
    from transformers import AutoModelForImageTextToText

    apart = AutoModelForImageTextToText.from_pretrained(tied, dtype="float32", tie_word_embeddings=False)
    apart.config.text_config.tie_word_embeddings = False
    apart.lm_head.weight.data = apart.model.language_model.embed_tokens.weight.data + 0.1
    base = shutil.copytree(tied, tmp_path / "base")
    apart.save_pretrained(base)
    net, batch = trained_adapter(base, tmp_path / "adapter", **lora), prompt(base)
    expected = net(**batch).logits.detach().numpy()
    assert abs(expected - logits_of(base, batch)).max() > 0.01  # it changes something
    for place in (tmp_path / "adapter", sharded_adapter(net, tmp_path / "adapter", tmp_path / "own" / "checkpoint-1")):
        found = logits_of(merge(place, str(base), tmp_path / f"final-{place.name}", own=tmp_path / "own"), batch)
        assert abs(found - expected).max() <= 1e-5, place


def test_a_model_and_its_card_are_made_on_the_command_line(home, full_run):
    base, own, _ = full_run
    models = home / "smoke" / "checkpoints"
    shutil.copytree(own, models / "tiny-SFT_m23k.training")
    words = "-m", "medvlthinker.app.cli", "merge", "smoke", "recipe=tiny-SFT_m23k", f"base={base}"
    for step, place in (["step=2"], "tiny-SFT_m23k.steps/2"), ([], "tiny-SFT_m23k"):
        done = python(*words, *step)
        assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [str(models / place)]), done.stderr
    assert "Not measured." in (models / "tiny-SFT_m23k" / "README.md").read_text()


if __name__ == "__main__":
    train_sharded(*sys.argv[1:])
