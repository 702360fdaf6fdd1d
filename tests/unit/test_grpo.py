"A prompt that is read once for all its answers: the log-probabilities and gradients of rows that are each read whole; and steps with and without images."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from medvlthinker.data import synthetic
from medvlthinker.data.sample import write_samples
from medvlthinker.training.grpo import grpo_chat, read_once, skip_empty_images, train_grpo
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.training.sft import plan, read_metrics
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLModel


def samples(corpus):
    "Three questions: with images, without, or one without between two with them."
    images, texts = (synthetic.corpus(name, 3) for name in ("pmc_vqa", "m23k"))
    return {"pmc_vqa": images, "m23k": texts, "mixed": [images[0], texts[0], images[1]]}[corpus]


@pytest.mark.parametrize("corpus", ["pmc_vqa", "m23k", "mixed"])
def test_gradients_of_shared_prompts(blank, corpus):
    "Prompts of unequal lengths, answers of unequal lengths, in mixed order; one has two pictures."
    model, processor = AutoModelForImageTextToText.from_pretrained(blank, dtype="float32"), AutoProcessor.from_pretrained(blank, padding_side="left")
    rows = [grpo_chat(sample) for sample in samples(corpus)]
    texts = ["<|vision_start|><|image_pad|><|vision_end|>" * len(row["images"]) + row["prompt"][0]["content"] for row in rows]
    images = [row["images"] for row in rows] if corpus != "m23k" else []
    if images:
        texts[0], images[0] = texts[0].replace("<|vision_end|>", "<|vision_end|><|vision_start|><|image_pad|><|vision_end|>", 1), images[0] + images[2]
    order, answers = [0, 1, 0, 2, 1, 0], torch.randint(20, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    given = processor(text=[texts[place] for place in order], images=[images[place] for place in order] if images else None,
                      padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    real = torch.arange(7) < torch.tensor([7, 3, 5, 7, 1, 4])[:, None]
    for key, more in (("input_ids", answers), ("attention_mask", real.int()), ("mm_token_type_ids", torch.zeros_like(answers))):
        given[key] = torch.cat([given[key], more.to(given[key].dtype)], 1)
    found = []
    for call in (model, read_once(model)):
        chosen = call(**given, logits_to_keep=8, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, answers[..., None])[..., 0] * real
        found.append((chosen, torch.autograd.grad((chosen * torch.linspace(-1, 1, 7)).sum(), [*model.model.language_model.parameters()])))
    torch.testing.assert_close(*(each[0] for each in found))
    for whole, shared in zip(*(each[1] for each in found)):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_gradients_of_a_mixed_batch(blank):
    "Rows with and without images at once: what each gives alone, where a text comes with 0 rows of pixels, as TRL splits a step."
    model, processor = AutoModelForImageTextToText.from_pretrained(blank, dtype="float32"), AutoProcessor.from_pretrained(blank, padding_side="left")
    rows = [grpo_chat(sample) for sample in samples("mixed")]
    texts = ["<|vision_start|><|image_pad|><|vision_end|>" * len(row["images"]) + row["prompt"][0]["content"] for row in rows]
    given = dict(processor(text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt", return_mm_token_type_ids=True))
    patches = [0, *given["image_grid_thw"].prod(1).cumsum(0).tolist()]
    own = [slice(0, 1), slice(1, 1), slice(1, 2)]  # the images of each row
    split = [{"pixel_values": given["pixel_values"][patches[some.start]:patches[some.stop]], "image_grid_thw": given["image_grid_thw"][some],
              **{key: given[key][place:place + 1] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}} for place, some in enumerate(own)]
    weights = [weight for name, weight in model.named_parameters() if "lm_head" not in name]
    found = []
    for call in (model, read_once(model)):
        for batches in ([given], split):
            logits = torch.cat([skip_empty_images(call)(**batch, logits_to_keep=5, use_cache=False).logits for batch in batches])[:, :-1]
            chosen = logits.log_softmax(-1)[..., 7]
            found.append((chosen, torch.autograd.grad((chosen * torch.linspace(-1, 1, 4)).mean(), weights)))
    for chosen, grads in found[1:]:
        torch.testing.assert_close(chosen, found[0][0])
        for grad, whole in zip(grads, found[0][1]):
            torch.testing.assert_close(grad, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("again", ["true", "false"])  # the second reads a question once for all its answers
@pytest.mark.parametrize("first", ["text", "image"])
def test_a_corpus_with_and_without_images(blank, tmp_path, monkeypatch, first, again):
    "Whichever question a step begins with, each image is seen where it is answered and where it is learnt."
    images, texts = synthetic.corpus("pmc_vqa", 4), synthetic.corpus("m23k", 8)
    mixed = images[:2] + texts + images[2:] if first == "image" else texts[:2] + images + texts[2:]
    write_samples(mixed, tmp_path / "mixed.parquet")
    recipe = get_recipe("tiny-RL_PMC")
    recipe = replace(recipe, config=replace(recipe.config, shuffle=False, batch=4, mini_batch=2, micro_batch=2))
    settings = TrainingSettings(base=str(blank), max_steps=3, gradient_checkpointing=again)
    asked, learnt, forward = [], [], Qwen2_5_VLModel.forward

    def record(self, *given, **named):
        pixels, past = named.get("pixel_values"), named.get("past_key_values")
        pads = int((named["input_ids"] == self.config.image_token_id).sum())
        rows = 0 if pixels is None else len(pixels)
        if past is None or not past.get_seq_length():
            assert rows == 4 * pads
            (learnt if torch.is_grad_enabled() else asked).append(rows)
        return forward(self, *given, **named)

    monkeypatch.setattr(Qwen2_5_VLModel, "forward", record)
    run = plan(recipe, settings, tmp_path / "mixed.parquet", tmp_path, tmp_path / "logs")
    train_grpo(run)
    assert len(read_metrics(run.metrics)) == 3
    processor = AutoProcessor.from_pretrained(blank).image_processor
    patches = len(processor([grpo_chat(sample)["images"][0] for sample in images], return_tensors="pt")["pixel_values"])
    assert 0 in learnt and sum(learnt) == 8 * patches if again == "true" else patches <= sum(learnt) <= 8 * patches
    assert sum(asked) >= 2 * patches, "for an answer, and by the start"


def test_what_a_base_recommends_changes_no_answer_and_stops_no_saving(blank, tmp_path):
    write_samples(synthetic.corpus("pmc_vqa", 4), tmp_path / "data.parquet")
    recipe, curves = get_recipe("tiny-RL_PMC"), []
    recipe = replace(recipe, config=replace(recipe.config, batch=4, mini_batch=4, micro_batch=4))
    for name, given in (("plain", {}), ("odd", {"no_repeat_ngram_size": 1, "num_beams": 3, "min_p": 0.9})):
        base = Path(shutil.copytree(blank, tmp_path / name))
        known = json.loads((base / "generation_config.json").read_text())
        (base / "generation_config.json").write_text(json.dumps(known | given))
        run = plan(recipe, TrainingSettings(base=str(base), max_steps=1), tmp_path / "data.parquet", tmp_path / f"{name} made", tmp_path / f"{name} logs")
        train_grpo(run)
        curves.append([(line["length"], line["entropy"], line["grad_norm"]) for line in read_metrics(run.metrics)])
    assert curves[0] == curves[1] and len(curves[0]) == 1
