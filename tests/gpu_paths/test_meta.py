"""3B, 7B and 32B on the meta device: what the GPU paths rely on by name and by number, without a weight."""
import importlib.util
import json
import re
import sys

import pytest
import warm
from conftest import ROOT, succeeded
from medvlthinker.training.memory import SIZES, count_parameters, meta_model, model_config
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.train import accelerate_config

LAYERS = {"3B": 36, "7B": 28, "32B": 64}
PUBLISHED = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}  # the totals that the hub shows, 3.75, 8.29 and 33.5 billion
ADAPTERS = {  # of rank 32: A and B of queries and output, of keys and values, of the feed-forward part
    "3B": 36 * 32 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008)),
    "7B": 28 * 32 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944)),
    "32B": 64 * 32 * (2 * 10240 + 2 * (5120 + 1024) + 3 * (5120 + 27648))}
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_published_models(size):
    assert count_parameters(size).all == PUBLISHED[size]


@pytest.mark.parametrize("size", SIZES)
def test_adapters_stand_beside_the_seven_matrices_of_the_language_model_alone(size):
    net = meta_model(size, 32)
    trained = {name: weight.numel() for name, weight in net.named_parameters() if weight.requires_grad}
    assert sum(trained.values()) == ADAPTERS[size]
    targets = {re.sub(r"\.lora_[AB]\.default\.weight$", "", name) for name in trained}
    assert {name.rsplit(".", 1)[1] for name in targets} == MATRICES and len(targets) == 7 * LAYERS[size]
    assert not [name for name in targets if "visual" in name or "embed" in name or "head" in name]


@pytest.mark.parametrize("size", SIZES)
def test_the_layers_that_fsdp_wraps_are_classes_of_the_model_and_only_the_3b_ties_its_head(size):
    net = meta_model(size)
    wrapped = accelerate_config(get_recipe(f"{size}-SFT_m23k"), TrainingSettings(gpus=8, dtype="bfloat16"))["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    modules = [type(module).__name__ for module in net.modules()]
    assert {name: modules.count(name) for name in wrapped} == {"Qwen2_5_VLDecoderLayer": LAYERS[size], "Qwen2_5_VLVisionBlock": 32}
    assert set(wrapped) == set(net._no_split_modules)  # by which the estimate counts what is gathered
    tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
    assert tied == (size == "3B") == net.config.tie_word_embeddings == net.config.text_config.tie_word_embeddings


def load_into_vllm(size: str, folder: str) -> None:
    "Hand every weight of a model to vLLM's, both on the meta device; print the places of vLLM's model, those that were filled, and its parameters."
    import torch
    from medvlthinker.generation.tiny_model import tiny_processor
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Theirs

    config = model_config(size)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)  # vLLM asks for one, whichever it is
    settings = VllmConfig(model_config=ModelConfig(model=folder, dtype="bfloat16", max_model_len=4096, enforce_eager=True))
    with set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            theirs = Theirs(vllm_config=settings, prefix="")
    places = {name for name, _ in theirs.named_parameters()}
    filled = theirs.load_weights(iter(meta_model(size).state_dict().items()))  # a name that it does not know is an error
    print(json.dumps([sorted(places), sorted(filled), sum(weight.numel() for weight in theirs.parameters())]))


@pytest.mark.heavy
@pytest.mark.parametrize("size", SIZES)
def test_every_weight_finds_its_place_in_vllm_and_no_place_stays_empty(size, tmp_path):
    if not importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is not installed; ./reproduce.sh setup full installs it")
    done = succeeded(warm.run(__file__, size, tmp_path, cwd=ROOT))
    places, filled, parameters = json.loads(done.stdout.splitlines()[-1])
    assert places == filled and parameters == PUBLISHED[size]


if __name__ == "__main__":
    load_into_vllm(*sys.argv[1:])
