"A prompt that is read once for all its answers: the log-probabilities and gradients of rows that are each read whole."
import pytest
import torch
from medvlthinker.data import synthetic
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.training.grpo import grpo_chat, read_once
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.mark.parametrize("corpus", ["pmc_vqa", "m23k"])
def test_gradients_of_shared_prompts(tmp_path, corpus):
    "Prompts of unequal lengths, answers of unequal lengths, in mixed order; one has two pictures."
    base = make_tiny_model(tmp_path / "base", steps=0, show=lambda line: None)
    model, processor = AutoModelForImageTextToText.from_pretrained(base, dtype="float32"), AutoProcessor.from_pretrained(base, padding_side="left")
    rows = [grpo_chat(sample) for sample in synthetic.corpus(corpus, 3)]
    texts = ["<|vision_start|><|image_pad|><|vision_end|>" * len(row.get("images", ())) + row["prompt"][0]["content"] for row in rows]
    images = [row["images"] for row in rows if "images" in row]
    if images:
        texts[0], images[0] = texts[0].replace("<|vision_end|>", "<|vision_end|><|vision_start|><|image_pad|><|vision_end|>", 1), images[0] + images[1]
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
