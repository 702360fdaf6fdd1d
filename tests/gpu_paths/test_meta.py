"""3B, 7B and 32B on the meta device: what the GPU paths rely on by name and by number, without a weight."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

if str(Path(__file__).parent.parent) not in sys.path:  # where this file is run by itself
    sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import python
from medvlthinker.training.memory import SIZES, count_parameters, meta_model, model_config
from medvlthinker.training.recipe import TrainingSettings, find
from medvlthinker.training.sft import accelerate_config

# Written by hand from the dimensions on the hub's pages: embedding, head, a layer (queries with bias, keys and values with bias, output, three of the
# feed-forward part, two norms), number of layers, the last norm, and the vision tower
LANGUAGE = {
    "3B": (151936 * 2048, 0, 2048 * 2049 + 2 * 256 * 2049 + 2048**2 + 3 * 2048 * 11008 + 2 * 2048, 36, 2048),
    "7B": (152064 * 3584, 152064 * 3584, 3584 * 3585 + 2 * 512 * 3585 + 3584**2 + 3 * 3584 * 18944 + 2 * 3584, 28, 3584),
    "32B": (152064 * 5120, 152064 * 5120, 5120 * 5121 + 2 * 1024 * 5121 + 5120**2 + 3 * 5120 * 27648 + 2 * 5120, 64, 5120)}
INNER = {"3B": 3420, "7B": 3420, "32B": 3456}  # of the vision tower: 32 blocks of width 1280
PUBLISHED = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}  # the totals that the hub shows, 3.75, 8.29 and 33.5 billion
ADAPTERS = {  # of rank 32: A and B of queries and output, of keys and values, of the feed-forward part
    "3B": 36 * 32 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008)),
    "7B": 28 * 32 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944)),
    "32B": 64 * 32 * (2 * 10240 + 2 * (5120 + 1024) + 3 * (5120 + 27648))}
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def vision_parameters(size: str) -> int:
    "Patches of 3 x 2 x 14 x 14 pixels, 32 blocks, and the merger of four patches into a token."
    v, inner, width = 1280, INNER[size], LANGUAGE[size][-1]
    block = 3 * v * (v + 1) + v * (v + 1) + 3 * v * inner + 2 * inner + v + 2 * v
    return 3 * 2 * 14 * 14 * v + 32 * block + v + 4 * v * (4 * v + 1) + width * (4 * v + 1)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_published_models(size):
    embedding, head, layer, layers, norm = LANGUAGE[size]
    language = embedding + head + layers * layer + norm
    assert count_parameters(size).all == language + vision_parameters(size) == PUBLISHED[size]
    assert count_parameters(size, freeze_vision=True).trained == language
    assert count_parameters(size).layer == layer


@pytest.mark.parametrize("size", SIZES)
def test_adapters_stand_beside_the_seven_matrices_of_the_language_model_alone(size):
    net = meta_model(size, 32)
    trained = {name: weight.numel() for name, weight in net.named_parameters() if weight.requires_grad}
    assert sum(trained.values()) == ADAPTERS[size]
    targets = {re.sub(r"\.lora_[AB]\.default\.weight$", "", name) for name in trained}
    assert {name.rsplit(".", 1)[1] for name in targets} == MATRICES and len(targets) == 7 * LANGUAGE[size][3]
    assert not [name for name in targets if "visual" in name or "embed" in name or "head" in name]


@pytest.mark.parametrize("size", SIZES)
def test_the_layers_that_fsdp_wraps_are_classes_of_the_model_and_only_the_3b_ties_its_head(size):
    net = meta_model(size)
    wrapped = accelerate_config(find(f"{size}-SFT_m23k"), TrainingSettings(gpus=8, dtype="bfloat16"))["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    modules = [type(module).__name__ for module in net.modules()]
    assert {name: modules.count(name) for name in wrapped} == {"Qwen2_5_VLDecoderLayer": LANGUAGE[size][3], "Qwen2_5_VLVisionBlock": 32}
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
    done = python(__file__, size, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    places, filled, parameters = json.loads(done.stdout.splitlines()[-1])
    assert places == filled and parameters == PUBLISHED[size]


if __name__ == "__main__":
    load_into_vllm(*sys.argv[1:])
