"""Processes that find the slow libraries loaded: forked from a server that imported them once, they run what `python` would run with the same words.

To import torch, transformers and TRL takes longer than most of what the tests do with them. The server knows nothing of this project: its modules are
imported, and its files run as `__main__`, in the new process. What differs from `python`: hash seeds are the server's, and so is what libraries read from the
environment while they are imported (`HF_HUB_OFFLINE`, `HF_HOME`, `OMP_NUM_THREADS`). Tests of those start `python`."""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LOADED = ["pandas", "pyarrow.parquet", "scipy.stats", "PIL.Image", "plotly.graph_objects", "datasets", "safetensors.torch", "nbdev.test", "peft",
          "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl", "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(LOADED)  # what is not installed is passed over


def become(words: list[str], cwd: str, environment: dict, files: tuple[str, str]) -> None:
    "The new process: its streams, its environment, and then the module or the file."
    os.setsid()
    for number, path in enumerate((os.devnull, *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "medvlthinker"]:  # the server of another test in this worker may know us
        del sys.modules[name]
    sys.path[0:0] = [cwd] if words[0] == "-m" else [str(Path(words[0]).parent), str(Path(__file__).parent)]
    try:
        sys.argv = words[1:] if words[0] == "-m" else words
        runpy.run_module(words[1], run_name="__main__", alter_sys=True) if words[0] == "-m" else runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a child of multiprocessing leaves out


def start(*words, cwd, out: str = os.devnull, error: str = os.devnull, **environment):
    "Start a module (\"-m\", name, words ...) or a file (path, words ...), as the leader of a session of its own."
    process = FORK.Process(target=become, args=([str(word) for word in words], str(cwd), {**os.environ, **{key: str(value) for key, value in environment.items()}}, (out, error)))
    process.start()
    return process


def run(*words, cwd, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    "Start it, wait (at most so many seconds: then it is killed), and give what it said and its exit code."
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        process = start(*words, cwd=cwd, out=out.name, error=error.name, **environment)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (out, error)))
