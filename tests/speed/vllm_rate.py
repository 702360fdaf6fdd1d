"What a rollout leaves of the rate of bare vLLM."
import importlib.util
import sys
import tempfile

from measuring import Bound, NotHere, alternate, quiet, report
from medvlthinker.data import synthetic
from medvlthinker.app.profile import Workspace
from medvlthinker.generation.engine import _vllm_prompt, open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.generation.rollout import generate

BOUNDS = (Bound("a rollout's rate over that of bare LLM.chat (tiny model on the CPU, 2,000 image "
                "questions, n=4)", "x", 0.95, "at least"),)


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
    chats = [_vllm_prompt(request) for request in asked]
    params = [SamplingParams(n=4, temperature=1.0, max_tokens=40, seed=each.seed,
                             logit_bias=engine._loaded.bias) for each in asked]

    def fresh():
        llm.reset_prefix_cache()
        llm.reset_mm_cache()

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            generate(samples, engine, sampling, folder, quiet)

    def bare():  # its images are decoded beforehand
        llm.chat(chats, params, use_tqdm=False)

    yield [alone / whole for whole, alone in alternate(ours, bare, 4, before=fresh)]


if __name__ == "__main__":
    report(lambda: vllm_rate(*sys.argv[1:2]), BOUNDS)
