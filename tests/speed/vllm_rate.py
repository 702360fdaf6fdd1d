"What a rollout leaves of the rate of bare vLLM."
import importlib.util

from measuring import Bound, NotHere, alternate
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import _vllm_prompt
from medvlthinker.generation.request import Request, Sampling
from stored import ask_all, tiny_engine

BOUNDS = (Bound("a rollout's rate over that of bare LLM.chat (tiny model on the CPU, 2,000 image "
                "questions, n=4)", "x", 0.95, "at least"),)


def vllm_rate():
    "generate against LLM.chat on the same questions, in turns, start-up aside."
    if not importlib.util.find_spec("vllm"):
        raise NotHere("vLLM is not installed (./reproduce.sh setup full)")
    from vllm import SamplingParams

    sampling = Sampling(n=4, temperature=1.0, max_tokens=40)
    samples, engine = synthetic.benchmark("pmc_vqa", 2000), tiny_engine(engine="vllm")
    asked = [Request(sample, i, sampling) for i, sample in enumerate(samples)]
    list(engine.answer(asked[:8]))  # loads
    llm = engine._loaded.llm
    chats = [_vllm_prompt(request) for request in asked]
    params = [SamplingParams(n=4, temperature=1.0, max_tokens=40, seed=each.seed,
                             logit_bias=engine._loaded.bias) for each in asked]

    def fresh():
        llm.reset_prefix_cache()
        llm.reset_mm_cache()

    def bare():  # its images are decoded beforehand
        llm.chat(chats, params, use_tqdm=False)

    turns = alternate(lambda: ask_all(samples, engine, sampling), bare, 4, before=fresh)
    yield [alone / whole for whole, alone in turns]
