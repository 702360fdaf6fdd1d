"What a model is: its identity on the hub and in the cache, weights that do not fit, GPUs that hold it, and the limits of its images."
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import python, stand_in, succeeded
from medvlthinker.core.files import UserError
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.model import (
    check_weights, model_fingerprint, pixel_limits, tensor_parallel_size, unloadable_error,
    weight_bytes)
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from servers import Hub, serving


def copied(blank: Path, place: Path, rename=lambda name: name, **config) -> Path:
    "A copy whose weights have other names (None drops one), and whose config.json says other things."
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(blank, place / "copy"))
    weights = {rename(name): weight for name, weight in load_file(blank / "model.safetensors").items()}
    save_file({name: weight for name, weight in weights.items() if name}, folder / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        inner = known["text_config"] if key.startswith("text_") else known
        inner[key.removeprefix("text_")] = value
    (folder / "config.json").write_text(json.dumps(known))
    return folder


def with_head(folder: Path, change: float) -> Path:
    "The same folder with a head of its own: the embedding, changed by so much."
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    embedding = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    save_file({**weights, "lm_head.weight": embedding + change}, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- weights ---


def dropped(pattern: str):
    return lambda name: None if re.search(pattern, name) else name


def behind(prefix: str):
    return lambda name: prefix + name


def same(name: str) -> str:
    return name


UNTIED = {"tie_word_embeddings": False, "text_tie_word_embeddings": False}
BROKEN = {  # how the names of the weights are changed, and the config -> what the sentence holds
    "one weight is missing": (dropped(r"layers\.2\.self_attn\.k_proj\.bias"), {}, [
        "1 missing (model.language_model.layers.2.self_attn.k_proj.bias)"]),
    "one layer too many": (same, {"text_num_hidden_layers": 2, "text_layer_types": ["full_attention"] * 2}, [
        "12 unexpected (model.language_model.layers.2."]),
    "wider layers": (same, {"text_intermediate_size": 512}, ["mismatched (", "mlp"]),
    "untied, and no head": (same, UNTIED, ["1 missing (lm_head.weight)"]),
    **{f"a wrapper left {prefix}": (behind(prefix), {}, ["missing (lm_head.weight", f"unexpected ({prefix}"])
       for prefix in ("module.", "base_model.model.", "_orig_mod.")},
}


@pytest.mark.parametrize("rename, config, parts", BROKEN.values(), ids=BROKEN)
def test_weights_that_do_not_fit_are_named(blank, tmp_path, rename, config, parts):
    with pytest.raises(UserError) as said:
        check_weights(copied(blank, tmp_path, rename, **config))
    assert all(part in str(said.value) for part in parts), said.value


@pytest.mark.parametrize("outer", [True, False])
def test_two_words_on_tied_embeddings_are_refused_where_the_file_does_not_decide(blank, tmp_path, outer):
    folder = copied(blank, tmp_path, tie_word_embeddings=outer, text_tie_word_embeddings=not outer)
    with pytest.raises(UserError, match="both tie_word_embeddings=true and false"):
        check_weights(folder)
    check_weights(with_head(folder, 0.0))  # the head is the embedding, whatever is read
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, .* lm_head\.weight that is not its embedding"):
        check_weights(with_head(folder, 0.5))


def test_a_config_that_says_nothing_on_the_head_means_what_transformers_takes(tmp_path):
    "A Gemma 3 is tied then."
    folder = small_models(tmp_path)["gemma"]
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    check_weights(folder)
    config["text_config"]["tie_word_embeddings"] = False  # vLLM reads the outer word alone
    for part in (config, {**config, "text_config": {**config["text_config"], "tie_word_embeddings": True}}):
        (folder / "config.json").write_text(json.dumps(part))
        with pytest.raises(UserError, match="that is not its embedding"):
            check_weights(with_head(folder, 0.5))


def test_weights_that_fit_are_not_refused(blank, tmp_path):
    "The names of the hub's Qwen2.5-VL and today's, in one file and in several, tied and untied."
    from transformers import AutoModelForImageTextToText

    check_weights(blank)
    check_weights(with_head(copied(blank, tmp_path / "tied"), 0.0))
    check_weights(with_head(copied(blank, tmp_path / "untied", **UNTIED), 0.5))
    model = AutoModelForImageTextToText.from_pretrained(blank)
    model.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    check_weights(tmp_path / "parts")
    today = lambda name: f"model.{name}" if name.startswith("visual") else name.replace("model.", "model.language_model.", 1)
    check_weights(copied(blank, tmp_path / "today", today))
    next((tmp_path / "parts").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="cannot be loaded .*model-00002-of-"):
        check_weights(tmp_path / "parts")


def small_models(place: Path) -> dict[str, Path]:
    "A LLaVA and a Gemma 3 with random weights."
    from transformers import CLIPVisionConfig, Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)
    sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    llava = LlavaConfig(vision_config=CLIPVisionConfig(**sight), text_config=LlamaConfig(**text), image_token_index=199)
    gemma = Gemma3Config(text_config={**text, "head_dim": 8}, vision_config=sight, mm_tokens_per_image=4)
    LlavaForConditionalGeneration(llava).save_pretrained(place / "llava")
    Gemma3ForConditionalGeneration(gemma).save_pretrained(place / "gemma")
    return {"llava": place / "llava", "gemma": place / "gemma"}


def test_other_architectures_are_judged_as_transformers_builds_them(tmp_path):
    from transformers import AutoModelForImageTextToText

    for name, folder in small_models(tmp_path).items():
        check_weights(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert weight_bytes(folder, "float32") == 4 * sum(weight.numel() for weight in model.parameters()), name
        with pytest.raises(UserError, match=r"missing \(.*vision_tower"):
            check_weights(copied(folder, tmp_path / f"{name}-blind", dropped("vision_tower")))


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, Path, Path]:
    "Data, checkpoints and logs of a training run; the data are eight questions."
    from medvlthinker.data.sample import write_samples

    write_samples(synthetic.corpus("pmc_vqa", 8), tmp_path / "pmc_vqa.parquet")
    return tmp_path / "pmc_vqa.parquet", tmp_path / "checkpoints", tmp_path / "logs"


def test_answering_and_training_refuse_a_model_that_is_not_whole(blank, home, tmp_path, corpus):
    from medvlthinker.training import sft
    from medvlthinker.training.recipe import TrainingSettings, get_recipe

    torn = copied(blank, tmp_path, dropped(r"\.layers\.1\."))
    asked = [Request(sample, 0, Sampling()) for sample in synthetic.benchmark("pmc_vqa", 1)]
    with pytest.raises(UserError, match="12 missing"):
        next(open_engine(EngineSettings(model=str(torn))).answer(asked))
    for name in ("tiny-SFT_PMC", "tiny-RL_PMC"):
        with pytest.raises(UserError, match="12 missing"):
            sft.plan(get_recipe(name), TrainingSettings(base=str(torn)), *corpus)
    run = sft.plan(get_recipe("tiny-SFT_PMC"), TrainingSettings(base=str(blank)), *corpus)
    with pytest.raises(UserError, match="12 missing"):
        sft.open_model(replace(run, start=str(torn)))


# --- the hub ---


@pytest.fixture
def hub(blank):
    "A hub on this machine with one model."
    commit = "0123456789abcdef0123456789abcdef01234567"
    with serving(Hub, repo="acme/tiny", folder=blank, commit=commit, asked=[]) as server:
        yield server


IDENTITY = """
import json, sys
from medvlthinker.core.files import UserError
from medvlthinker.generation.model import *
def say(*values): print(json.dumps(values))
try:
    say("before", model_fingerprint("acme/tiny"), resolve_revision("acme/tiny"))
    folder = download_model("acme/tiny", resolve_revision("acme/tiny"))
    say("after", model_fingerprint("acme/tiny"), model_fingerprint(folder))
    say("files", *sorted(path.name for path in folder.iterdir()))
    if "load" in sys.argv:
        check_weights(folder)
        from transformers import AutoModelForImageTextToText, AutoProcessor
        AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
        say("files", *sorted(path.name for path in folder.iterdir()))
except UserError as error:
    say("error", str(error))
"""


def test_a_hub_model_has_one_identity_before_and_after_its_download(hub, blank, tmp_path):
    endpoint, nobody = hub.url, "http://127.0.0.1:9"

    def identities(address: str, *words: str) -> dict[str, list]:
        "What a new process says of acme/tiny, always with the same cache."
        done = python("-c", IDENTITY, *words, HF_HUB_OFFLINE="0", HF_HOME=tmp_path / "hf",
                      HF_ENDPOINT=address)
        return {line[0]: line[1:] for line in map(json.loads, succeeded(done).stdout.splitlines())}

    (blank / "pytorch_model.bin").write_bytes(b"a program")
    try:
        assert "acme/tiny" in identities(nobody)["error"][0]  # no hub, no cache: one sentence
        first = identities(endpoint, "load")
    finally:
        (blank / "pytorch_model.bin").unlink()
    assert first["before"] == ["0123456789abcdef", hub.commit]
    assert first["after"] == ["0123456789abcdef"] * 2
    assert first["files"] == sorted(path.name for path in blank.iterdir())  # and no pickle
    assert identities(endpoint) == first and identities(nobody) == first  # from the cache
    fetched = [line for line in hub.asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(fetched) == 1

    hub.commit = "fedcba9876543210fedcba9876543210fedcba98"  # somebody has changed the model
    moved = identities(endpoint)
    assert moved["before"] == ["fedcba9876543210", hub.commit]
    assert moved["after"] == ["fedcba9876543210"] * 2 and identities(nobody) == moved


# --- chat template ---


def test_a_few_changed_matrices_in_a_large_file_are_another_model(tmp_path):
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(400 << 20)  # without a block on the disk
    before = model_fingerprint(tmp_path)
    with weights.open("r+b") as file:  # what an adapter changes, once merged: here one matrix
        file.seek(5 << 20)
        file.write(b"1" * (2 << 20))
    assert model_fingerprint(tmp_path) != before


def test_a_torn_chat_template_is_one_sentence_in_training(blank, tmp_path, corpus):
    from medvlthinker.training import sft
    from medvlthinker.training.recipe import TrainingSettings, get_recipe

    folder = copied(blank, tmp_path)
    run = sft.plan(get_recipe("tiny-SFT_PMC"), TrainingSettings(base=str(folder)), *corpus)
    template = (folder / "chat_template.jinja").read_text()
    for length, said in ((42, "leaves out what is asked"), (300, "TemplateSyntaxError")):
        (folder / "chat_template.jinja").write_text(template[:length])
        with pytest.raises(UserError, match=f"copy cannot be loaded .*{said}"):
            sft.open_model(run)


def test_a_missing_chat_template_is_one_sentence_in_preflight(blank, tmp_path):
    from medvlthinker.difficulty.preflight import open_processor

    folder = copied(blank, tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        open_processor(str(folder))


# --- GPUs ---

QWEN = {  # Qwen2.5-VL as published: hidden, inner, layers, heads, key-value heads, vocabulary, tied, inner of the vision tower
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    "The config.json of each size, in the form that the hub holds."
    made = {}
    for size, (hidden, inner, layers, heads, pairs, vocabulary, tied, sight) in QWEN.items():
        made[size] = tmp_path_factory.mktemp(size)
        vision = {"model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": sight, "num_heads": 16, "out_hidden_size": hidden}
        (made[size] / "config.json").write_text(json.dumps({
            "model_type": "qwen2_5_vl", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": pairs, "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 128000, "vision_config": vision}))
    return made


H100 = EngineSettings(engine="vllm", gpus=8, tensor_parallel=0, dtype="bfloat16")


@pytest.mark.parametrize("size, memory, settings, gpus", [
    ("3B", 80, H100, 1), ("7B", 80, H100, 1), ("32B", 80, H100, 2),
    ("3B", 24, H100, 1), ("7B", 24, H100, 2),
    ("7B", 40, replace(H100, dtype="float32"), 2), ("32B", 24, H100, 8),
    ("7B", 80, replace(H100, tensor_parallel=4), 4),  # whoever names a number gets it
    ("7B", 12, replace(H100, data_parallel=4), 2),  # four copies of at most two GPUs
    ("7B", 24, replace(H100, gpus=1), 1),  # it may fit with shorter sequences: vLLM says what does
    ("7B", 80, replace(H100, gpus=0), 1), ("7B", 80, replace(H100, engine="transformers"), 1),
])
def test_the_fewest_gpus_that_hold_a_model(published, size, memory, settings, gpus):
    assert tensor_parallel_size(published[size], settings, memory * 2**30) == gpus


def test_gpus_that_cannot_share_or_hold_a_model_are_a_sentence(published):
    with pytest.raises(UserError, match="tensor_parallel=8 does not divide the heads"):
        tensor_parallel_size(published["7B"], replace(H100, tensor_parallel=8), 80 * 2**30)
    with pytest.raises(UserError, match=r"takes 62\.3 GiB in bfloat16, and 2 GPUs with 21\.6 GiB each"):
        tensor_parallel_size(published["32B"], replace(H100, gpus=2), 24 * 2**30)


def test_a_small_gpu_that_is_not_ours_makes_no_model_too_large(published, tmp_path, monkeypatch):
    "As in a workstation: two large GPUs, and one for the screen; ours are those that are shown to us."
    smi = 'case "$*" in *--id=0,1*) ;; *) echo 12288 ;; esac\necho 81920\necho 81920'
    monkeypatch.setenv("PATH", str(stand_in(tmp_path, **{"nvidia-smi": smi})), prepend=":")
    for shown, gpus in (("0,1", 1), ("", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert tensor_parallel_size(published["7B"], replace(H100, gpus=2)) == gpus


@pytest.mark.parametrize("says, advice", [  # vLLM 0.27 and torch 2.13, word for word
    ("Free memory on device cuda:0 (9.1/79.2 GiB) on startup is less than desired GPU memory utilization",
     "end what else holds the GPU"),
    ("WorkerProc initialization failed due to an exception in a background process.", "about the machine"),
    ("CUDA error: no kernel image is available for execution on the device", "about the machine"),
    ("Device string must not be empty", "gpus=N asks for GPUs"),
    ("Error while deserializing header: incomplete metadata", "damaged")])
def test_a_model_that_does_not_load_comes_with_advice_that_fits(says, advice):
    assert advice in str(unloadable_error("m", RuntimeError(says)))


# --- images ---


def test_max_pixels_is_refused_where_a_model_brings_images_to_one_size(tmp_path):
    from transformers import CLIPImageProcessor

    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="max_pixels=3136 would do nothing"):
        pixel_limits(tmp_path, 3136)
    assert pixel_limits(tmp_path, 0) == {}


def test_max_pixels_means_the_same_in_preflight(blank):
    from medvlthinker.difficulty.preflight import lengths, open_processor

    samples = synthetic.benchmark("vqa_rad_closed", 20)
    limited, without = (lengths(samples, open_processor(blank, pixels)[0]).image_tokens for pixels in (3136, 0))
    assert limited.between(2, 4).all() and (without == 16).all()


def test_max_pixels_means_the_same_in_training(blank, corpus):
    from medvlthinker.training import grpo, sft, verl
    from medvlthinker.training.recipe import TrainingSettings, get_recipe

    recipe, small = get_recipe("tiny-RL_PMC"), TrainingSettings(base=str(blank), max_pixels=3136)
    run, plain = (sft.plan(recipe, settings, *corpus) for settings in (small, replace(small, max_pixels=0)))
    assert run.inputs["max_pixels"] == 3136 and run.folder != plain.folder and "max_pixels" not in plain.inputs
    _, processor, _ = sft.open_model(run)
    assert (processor.image_processor.size["shortest_edge"], processor.image_processor.size["longest_edge"]) == (3136, 3136)
    with pytest.raises(UserError, match="max_pixels=3136 does not reach the vLLM that TRL starts"):
        grpo.grpo_settings(replace(run, settings=replace(small, engine="vllm", gpus=1)), processor)
    told = verl.verl_settings(recipe, small, str(blank), "data.parquet", "folder")
    assert {key: value for key, value in told.items() if "pixels" in key} == {
        "+data.mm_processor_kwargs.min_pixels": 3136, "+data.mm_processor_kwargs.max_pixels": 3136}
