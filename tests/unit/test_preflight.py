"""Preflight's counts are the real processor's: 60 pictures, with the embedded processor and with one limited like Qwen2.5-VL's."""
import functools
import io
import random
from dataclasses import replace

import pytest
from medvlthinker.data import synthetic
from medvlthinker.generation.tiny_model import tiny_processor
from medvlthinker.difficulty.preflight import findings, lengths, picture_size
from medvlthinker.data.prompt import messages
from PIL import Image

LIMITS = {"embedded": (3136, 12544), "like Qwen2.5-VL": (3136, 12845056)}
EXTREME = [(17, 17), (8, 8), (8, 1600), (14, 2800), (28, 5600), (5600, 28), (1, 1), (3, 40), (42, 70), (4096, 40), (3584, 3584), (3585, 3585), (4200, 3100)]


@pytest.fixture(scope="module", params=LIMITS)
def processor(request):
    from transformers import Qwen2VLImageProcessor

    shortest, longest = LIMITS[request.param]
    made = tiny_processor()
    made.image_processor = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size={"shortest_edge": shortest, "longest_edge": longest},
                                                 resample=0, do_rescale=False, do_normalize=False)  # what a pixel becomes changes no count, and takes most of the time
    return made


def encoded(width: int, height: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(file, format, **{"PNG": {"compress_level": 1}, "WEBP": {"method": 0}}.get(format, {}))
    return file.getvalue()


@functools.cache
def drawn(n: int, seed: int) -> list:
    "Questions with one to three pictures, of n sizes between 28 and 2,000 pixels a side and the extreme ones."
    rng = random.Random(seed)
    sizes = [(rng.randint(28, 2000), rng.randint(28, 2000)) for _ in range(n - len(EXTREME))] + EXTREME
    files = [encoded(w, h, rng.choice(("PNG", "JPEG", "WEBP"))) for w, h in sizes]
    questions, samples = synthetic.corpus("pmc_vqa", 40) + synthetic.benchmark("MMMU-medical", 40), []
    while files:
        count = rng.choice((1, 1, 2, 3))
        samples.append(replace(rng.choice(questions), images=tuple(files[:count]), dataset_index=len(samples)))
        del files[:count]
    return samples


def test_sizes_of_every_kind(processor):
    samples = drawn(60, seed=42)
    table = lengths(samples, processor)
    assert table.images.sum() == 60 and (table.problem == "").all()
    for sample, line in zip(samples, table.itertuples()):
        chat = messages(sample)
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        pictures = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
        ids = processor(text=[text], images=pictures)["input_ids"][0]
        sizes = [picture.size for picture in pictures]
        assert [picture_size(data) for data in sample.images] == sizes
        assert (line.prompt_tokens, line.image_tokens) == (len(ids), list(ids).count(processor.image_token_id)), sizes
        assert line.text_tokens == line.prompt_tokens - line.image_tokens, sizes


def test_text_only_and_every_instruction(processor):
    samples = synthetic.corpus("m23k", 20) + [replace(synthetic.corpus("m23k", 1)[0], question="Größe 5 µm ≥ 3 <b>?</b>\n\t" + "δ" * 3000)]
    for instruction in ("trained", "newline", "none"):
        for sample, line in zip(samples, lengths(samples, processor, instruction).itertuples()):
            text = processor.apply_chat_template(messages(sample, instruction), tokenize=False, add_generation_prompt=True)
            assert (line.prompt_tokens, line.image_tokens) == (len(processor(text=[text])["input_ids"][0]), 0)


def test_edges_of_the_limits():
    samples = synthetic.corpus("m23k", 30)
    table = lengths(samples, tiny_processor())
    longest = int(table.prompt_tokens.max())
    limits = {"max_model_len": 4096, "max_tokens": 64, "max_prompt_length": longest, "max_pixels": 12544}

    def found(**changed):
        return set(findings(table, "m23k", limits | changed).finding) - {"measured"}

    assert found() == set() == found(max_prompt_length=0)
    assert found(max_prompt_length=longest - 1) == {"over max_prompt_length"}
    assert found(max_model_len=longest + 64) == set()
    assert found(max_model_len=longest + 63) == {"completion cut"}
    assert "over max_model_len" in found(max_model_len=longest) and "over max_model_len" not in found(max_model_len=longest + 1)
