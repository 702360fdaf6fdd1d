"""Processes that find the slow libraries loaded: a server that imported them once forks itself, and the child runs what `python` would run with the same words.

To import torch, transformers and TRL takes longer than most of what the tests do with them. All workers of pytest-xdist share one server; the first test that needs
it starts it, and it ends with the tests. It knows nothing of this project: our modules are imported, and files run as `__main__`, in the new process. There
`sys.executable`, and the kernel of Jupyter, is a program that asks the same server, so that whatever such a process starts is warm too.
What differs from `python`: hash seeds are the server's, so is what libraries read from the environment while they are imported (`HF_HOME`, `OMP_NUM_THREADS`),
/proc shows the server's environment, and a process is no child of the one that started it. Tests of those start `python` itself."""
import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

LOADED = ["pandas", "pyarrow.parquet", "scipy.stats", "statsmodels.stats.multitest", "PIL.Image", "plotly.express", "datasets", "safetensors.torch", "nbdev.test", "papermill",
          "snakemake.cli", "typer", "peft", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
          "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]
PLACE, OWNER = "MEDVLTHINKER_TESTS_WARM", "MEDVLTHINKER_TESTS_OWNER"  # the folder of the server's socket, and the number of the process that all the tests belong to
PARENTS = ("MEDVLTHINKER_PARENT", "JPY_PARENT_PID")  # whom a process would look after; the server ends it in their place


class Process:
    "A process that the server forked, with these three files as its streams; it leads a session, and is killed when nobody waits for it any more."

    def __init__(self, words: list[str], cwd: str, environment: dict[str, str], files: list[int]):
        self.line, self.exitcode = connect(), None
        self.line.settimeout(300)  # a server that stands still fails a test
        request = json.dumps([words, cwd, environment]).encode()
        self.line.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        self.line.sendall(request)
        self.said = self.line.makefile("rb")
        self.pid = int(self.said.readline())
        self.line.settimeout(None)

    def join(self, timeout: float | None = None) -> None:
        "Wait until it has ended, or so many seconds."
        with selectors.DefaultSelector() as selector:
            selector.register(self.line, selectors.EVENT_READ)
            if self.exitcode is None and selector.select(timeout):
                self.exitcode = int(self.said.readline() or -signal.SIGKILL)

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None


def connect() -> socket.socket:
    "A line to the server, which is started if it is not there."
    import fcntl

    folder, line = Path(os.environ[PLACE]), socket.socket(socket.AF_UNIX)
    address = str(folder / "socket")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen(64)
                # who forks should have no second thread, such as one of Arrow's memory
                alone = {**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
                subprocess.Popen([sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()], start_new_session=True,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone)
    line.connect(address)
    return line


def prepare() -> None:
    "Make the server's folder, which goes away with this process, and in it what stands in place of `python` and of its kernel."
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {PLACE: str(folder), OWNER: str(os.getpid())}
    path, kernel = folder / "python", folder / "kernels" / "python3" / "kernel.json"
    path.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport warm\nwarm.ask({sys.executable!r})\n")
    path.chmod(0o755)
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": [str(path), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))


def ask(python: str) -> None:
    "What stands in place of `python`: the server runs modules and files, Python itself all else. Signals are passed on."
    words = sys.argv[1:]
    if not words or words[0].startswith("-") and words[0] != "-m":
        os.execv(python, [python, *words])  # noqa: S606
    process = Process(words, os.getcwd(), dict(os.environ), [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    process.join()
    if process.exitcode < 0:  # a signal ended it
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(process.exitcode)


def serve(listener: socket.socket) -> None:
    "Fork a process for each request; say its number, and its exit code when it has ended."
    for name in LOADED:
        with contextlib.suppress(ImportError):  # it is not installed
            importlib.import_module(name)
    gc.freeze()
    lines, selector, (wake, notice) = {}, selectors.DefaultSelector(), socket.socketpair()
    for each in (wake, notice):
        each.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(notice.fileno())
    selector.register(listener, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    while os.path.exists(listener.getsockname()) and os.path.exists(f"/proc/{os.environ[OWNER]}"):
        for key, _ in selector.select(1):
            if key.fileobj is listener:
                line, _ = listener.accept()
                size, files, *_ = socket.recv_fds(line, 8, 3)
                request = line.makefile("rb").read(int.from_bytes(size, "big"))
                if not request or len(request) < int.from_bytes(size, "big"):  # whoever asked was killed meanwhile
                    for file in (*files, line.detach()):
                        os.close(file)
                    continue
                if not (pid := os.fork()):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (notice, line, *lines.values(), listener, wake):
                        other.close()
                    selector.close()
                    become(*json.loads(request), files)
                for file in files:
                    os.close(file)
                with contextlib.suppress(OSError):  # whoever asked is gone, as the line says below
                    line.sendall(f"{pid}\n".encode())
                selector.register(line, selectors.EVENT_READ, pid)
                lines[pid] = line
            elif key.fileobj is not wake and key.data in lines:  # nobody is at its other end any more
                selector.unregister(key.fileobj)
                try:
                    os.killpg(key.data, signal.SIGKILL)
                except ProcessLookupError:  # it has not come to lead its group yet
                    os.kill(key.data, signal.SIGKILL)
        with contextlib.suppress(BlockingIOError):
            wake.recv(4096)
        while lines and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            line = lines.pop(ended[0])
            with contextlib.suppress(KeyError):
                selector.unregister(line)
            with line, contextlib.suppress(OSError):
                line.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())


def become(words: list[str], cwd: str, environment: dict[str, str], files: list[int]) -> None:
    "The new process: its streams and its environment, and then the module or the file, until its end."
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    place = os.environ[PLACE]
    os.environ.clear()
    os.environ.update({key: value for key, value in environment.items() if key not in PARENTS})
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (place, environment.get("JUPYTER_PATH"))))
    os.chdir(cwd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1 if environment.get("PYTHONUNBUFFERED") else -1), open(2, "w", buffering=1)
    sys.argv, sys.executable = words[1:] if words[0] == "-m" else words, os.path.join(place, "python")
    own = [cwd] if words[0] == "-m" else [str(Path(words[0]).parent), str(Path(__file__).parent)]
    sys.path[0:0] = [*own, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True) if words[0] == "-m" else runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(code)


def start(*words, cwd, out: str = os.devnull, error: str = os.devnull, **environment) -> Process:
    "Start a module (\"-m\", name, words ...) or a file (path, words ...)."
    files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) for path in (os.devnull, out, error)]
    try:
        return Process([*map(str, words)], str(cwd), {**os.environ, **{key: str(value) for key, value in environment.items()}}, files)
    finally:
        for file in files:
            os.close(file)


def run(*words, cwd, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    "Start it, wait (at most so many seconds: then it is killed), and give what it said and its exit code."
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        process = start(*words, cwd=cwd, out=out.name, error=error.name, **environment)
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (out, error)))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
