"""A companion to MedVLThinker: the main names, each loaded when it is first used."""
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.grade import grade as grade
    from .data.benchmarks import load_benchmark as load_benchmark
    from .data.benchmarks import register_benchmark as register_benchmark
    from .data.corpora import register_corpus as register_corpus
    from .data.readers import DatasetLayout as DatasetLayout
    from .data.readers import DataSettings as DataSettings
    from .data.sample import Sample as Sample
    from .evaluation.evaluate import accuracy as accuracy
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.evaluate import grade_rollout as grade_rollout
    from .generation.ask import ask as ask
    from .generation.engine import open_engine as open_engine
    from .generation.request import EngineSettings as EngineSettings
    from .generation.request import Sampling as Sampling
    from .generation.rollout import generate as generate

__version__ = "0.1.0"

NOUNS = {"grade": "core.grade", "load_benchmark": "data.benchmarks", "DataSettings": "data.readers", "Sample": "data.sample",
         "DatasetLayout": "data.readers", "register_benchmark": "data.benchmarks", "register_corpus": "data.corpora",
         "accuracy": "evaluation.evaluate", "evaluate": "evaluation.evaluate", "grade_rollout": "evaluation.evaluate",
         "ask": "generation.ask", "open_engine": "generation.engine", "EngineSettings": "generation.request",
         "Sampling": "generation.request", "generate": "generation.rollout"}
__all__ = list(NOUNS)  # what help() lists, and an import of everything brings


def __getattr__(name: str):
    if name in NOUNS:
        return getattr(importlib.import_module(f"{__name__}.{NOUNS[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}; it offers {', '.join(NOUNS)}")


def __dir__() -> list[str]:
    return [*globals(), *NOUNS]
