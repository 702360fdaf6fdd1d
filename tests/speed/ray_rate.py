"What Ray costs: a rollout by one worker over vLLM in this process."
import importlib.util

from measuring import Bound, NotHere, alternate
from medvlthinker.data import synthetic
from medvlthinker.generation.request import Sampling
from stored import ask_all, tiny_engine

BOUNDS = (Bound("rollout by one worker of Ray over vLLM in this process (1,000 image questions, "
                "n=4)", "x", 2),)


def ray_rate():
    "The same rollout by vLLM here and by one worker of Ray; start-up aside."
    if not all(map(importlib.util.find_spec, ("vllm", "ray"))):
        raise NotHere("vLLM and Ray are not both installed (./reproduce.sh setup full)")
    sampling = Sampling(n=4, temperature=1.0, max_tokens=40)
    samples = synthetic.benchmark("pmc_vqa", 1000)
    ray, vllm = tiny_engine(engine="ray"), tiny_engine(engine="vllm")
    turns = alternate(lambda: ask_all(samples, ray, sampling),
                      lambda: ask_all(samples, vllm, sampling), 3)
    yield [ours / alone for ours, alone in turns]
