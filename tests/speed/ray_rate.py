"What Ray costs: a rollout by one worker over vLLM in this process."
import importlib.util
import sys
import tempfile
from functools import partial

from measuring import Bound, NotHere, alternate, quiet, report
from medvlthinker.data import synthetic
from medvlthinker.app.profile import Workspace
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Sampling
from medvlthinker.generation.rollout import generate

BOUNDS = (Bound("rollout by one worker of Ray over vLLM in this process (1,000 image questions, "
                "n=4)", "x", 2),)


def ray_rate(model: str = "tiny"):
    "The same rollout by vLLM here and by one worker of Ray; start-up aside."
    if not all(map(importlib.util.find_spec, ("vllm", "ray"))):
        raise NotHere("vLLM and Ray are not both installed (./reproduce.sh setup full)")
    samples, checkpoints = synthetic.benchmark("pmc_vqa", 1000), Workspace("smoke").checkpoints
    engines = [open_engine(EngineSettings(model=model, engine=name, checkpoints=str(checkpoints)))
               for name in ("ray", "vllm")]

    def ask(engine):
        with tempfile.TemporaryDirectory() as folder:
            sampling = Sampling(n=4, temperature=1.0, max_tokens=40)
            generate(samples, engine, sampling, folder, quiet)

    yield [ray / vllm for ray, vllm in alternate(*(partial(ask, each) for each in engines), 3)]


if __name__ == "__main__":
    report(lambda: ray_rate(*sys.argv[1:2]), BOUNDS)
