"What a rollout leaves of the rate of bare vLLM."
import importlib.util
import statistics
import sys
import tempfile

from measuring import Bound, NotHere, quiet, report, seconds
from medvlthinker.data import synthetic
from medvlthinker.app.profile import Workspace
from medvlthinker.generation.engine import _pil_chat, open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import generate

BOUNDS = (Bound("a rollout's rate over that of bare LLM.chat (tiny model on the CPU, 2,000 image "
                "questions, n=4)", "x", 0.95, "at least"),)
TURNS = 5  # the first warms up


def vllm_rate(model: str = "tiny", number: int = 2000):
    "generate against LLM.chat on the same questions, in turns, start-up aside."
    if not importlib.util.find_spec("vllm"):
        raise NotHere("vLLM is not installed (./reproduce.sh setup full)")
    from vllm import SamplingParams

    sampling = Sampling(n=4, temperature=1.0, max_tokens=40)
    samples = synthetic.benchmark("pmc_vqa", number)
    checkpoints = str(Workspace("smoke").checkpoints)
    engine = open_engine(EngineSettings(model=model, engine="vllm", checkpoints=checkpoints))
    asked = [Request(sample, i, sampling) for i, sample in enumerate(samples)]
    list(engine.answer(asked[:8]))  # loads
    llm = engine._loaded.llm
    chats = [_pil_chat(request.chat()) for request in asked]
    params = [SamplingParams(n=4, temperature=1.0, max_tokens=40, seed=each.seed) for each in asked]

    def fresh():
        llm.reset_prefix_cache()
        llm.reset_mm_cache()

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            generate(samples, engine, sampling, folder, quiet)

    def bare():  # its images are decoded beforehand
        llm.chat(chats, params, use_tqdm=False)

    ratios = []
    for turn in range(TURNS):  # who comes first changes: what runs later finds a warmer machine
        taken = {}
        for act in (bare, ours) if turn % 2 else (ours, bare):
            fresh()
            taken[act] = seconds(act)
        ratios.append(taken[bare] / taken[ours])
        print(f"    turn {turn}: bare {taken[bare]:.1f} s, ours {taken[ours]:.1f} s", flush=True)
    print(f"    {TURNS - 1} ratios from {min(ratios[1:]):.2f} to {max(ratios[1:]):.2f}")
    yield statistics.median(ratios[1:])


if __name__ == "__main__":
    report(lambda: vllm_rate(*sys.argv[1:2]), BOUNDS)
