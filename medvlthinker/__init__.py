"""MedVLThinker, reproduced: the main nouns, each loaded when it is first asked for."""
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.grade import grade as grade
    from .data.benchmarks import load_benchmark as load_benchmark
    from .data.sample import Sample as Sample
    from .evaluation.evaluate import evaluate as evaluate
    from .generation.engine import open_engine as open_engine
    from .generation.rollout import generate as generate

__version__ = "0.1.0"

NOUNS = {"grade": "core.grade", "Sample": "data.sample", "load_benchmark": "data.benchmarks",
         "open_engine": "generation.engine", "generate": "generation.rollout", "evaluate": "evaluation.evaluate"}


def __getattr__(name: str):
    if name in NOUNS:
        return getattr(importlib.import_module(f"{__name__}.{NOUNS[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}; it offers {', '.join(NOUNS)}")


def __dir__() -> list[str]:
    return [*globals(), *NOUNS]
