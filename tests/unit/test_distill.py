"""The embedded model as a teacher: its first correct chain becomes the reasoning, and every question is accounted for."""
import json
import re
from collections import Counter

from medvlthinker.data import synthetic
from medvlthinker.core.files import record_path
from medvlthinker.difficulty.distill import OUTCOMES, distill, store_distilled, summarize_outcomes
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Sampling
from medvlthinker.core.grade import grade
from medvlthinker.generation.rollout import generate
from medvlthinker.data.sample import read_samples


def test_tiny_teaches(warm_tiny, tmp_path):
    import torch

    torch.set_num_threads(1)
    samples, engine = synthetic.corpus("pmc_vqa", 60), open_engine(EngineSettings(model=str(warm_tiny), batch_size=30))
    rolled = generate(samples, engine, Sampling(n=4, temperature=1.0, max_tokens=64, seed=42), tmp_path / "rollout", show=lambda line: None)
    rows = list(rolled)
    missing = rows.pop(7)

    counts, path = Counter(), tmp_path / "pmc_vqa.parquet"
    kept = list(distill(samples, rows, counts=counts))
    sources = {"samples": rolled.config.samples, "rollout": rolled.config.fingerprint}
    assert Counter(store_distilled(path, iter(samples), iter(rows), "tiny", sources)) == counts
    assert read_samples(path) == kept
    manifest = json.loads(record_path(path).read_text())
    assert manifest["inputs"] == {"teacher": "tiny", "rule": "strict", **sources} and set(manifest["counts"]) == set(OUTCOMES)

    print(summarize_outcomes(counts))
    assert sum(counts.values()) == 60 and counts["no rollout"] == 1 and counts["kept"] == len(kept)
    assert 10 <= len(kept) < 60, summarize_outcomes(counts)  # seed 42: better than nothing, worse than the key
    by_index = {row["dataset_index"]: row for row in rows}
    expected = {}
    for sample in samples:  # said again, without the module
        for completion in by_index.get(sample.dataset_index, {"completions": []})["completions"]:
            if grade(completion["text"], sample.options, sample.answer_label, "strict").correct:
                inside = re.findall(r"(?s)<think>(.*?)</think>", completion["text"])
                if inside and inside[0].strip():
                    expected[sample.dataset_index] = inside[0].strip()
                break
    assert {sample.dataset_index: sample.reasoning for sample in kept} == expected
    assert missing["dataset_index"] not in expected
    keys = {sample.dataset_index: sample.reasoning for sample in samples}
    assert any(sample.reasoning != keys[sample.dataset_index] for sample in kept)  # the teacher's words, not the key's
    for sample in kept:
        assert sample.images == samples[sample.dataset_index].images and sample.question == samples[sample.dataset_index].question
