"What a rollout by transformers costs over bare generate, and eight answers over one."
from measuring import Bound, cpu_seconds
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import batches, model_inputs
from medvlthinker.generation.request import Request, Sampling
from stored import ask_all, tiny_engine

BOUNDS = (
    Bound("rollout over bare generate, n=1, greedy (tiny model, inputs prepared beforehand)", "x",
          1.05),
    Bound("the same, where bare generate prepares its inputs too", "x", 1.05),
    Bound("rollout, our own cost a question (decode, template, processor, files)", "ms", 2),
    Bound("eight sampled answers to a question over one", "x", 5.5))


def transformers_rate():
    "200 image questions, at most 64 tokens, five turns of all in one process; processor time."
    import torch

    torch.set_num_threads(1)
    engine = tiny_engine()
    samples, greedy = synthetic.benchmark("pmc_vqa", 200), Sampling(max_tokens=64)
    asked = [Request(sample, i, greedy) for i, sample in enumerate(samples)]
    list(engine.answer(asked[:1]))  # loads
    loaded = engine._loaded

    def inputs():
        for batch in batches(asked, engine.batch_size):
            yield model_inputs(batch, loaded.processor)

    def bare(inputs):
        with torch.inference_mode():
            for batch in inputs:
                loaded.model.generate(**batch, max_new_tokens=64, do_sample=False)

    sampled = [Sampling(n=n, temperature=1.0, max_tokens=64) for n in (1, 8)]
    prepared = list(inputs())
    acts = [lambda: bare(prepared), lambda: bare(inputs()),
            *(lambda each=each: ask_all(samples, engine, each) for each in (greedy, *sampled))]
    turns = []
    for turn in range(6):  # what runs later finds a warmer machine; the first turn warms up
        found = {act: cpu_seconds(act) for act in (acts if turn % 2 else acts[::-1])}
        turns.append([found[act] for act in acts])
        print("    bare, bare with inputs, n=1, n=1 sampled, n=8:", *(f"{each:.2f}" for each in turns[-1]), "s",
              flush=True)
    yield [ours / alone for alone, _, ours, _, _ in turns[1:]]
    yield [ours / whole for _, whole, ours, _, _ in turns[1:]]
    yield [1000 * (ours - alone) / len(samples) for alone, _, ours, _, _ in turns[1:]]
    yield [eight / one for *_, one, eight in turns[1:]]
