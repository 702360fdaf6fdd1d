"""What the tests share: where the real data lies, and a home for runs that is not the user's."""
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from medvlthinker.core.grade import RULES, grade
from medvlthinker.data.sample import InvalidRow, Sample
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("core", "data", "generation", "difficulty", "training", "evaluation", "results", "app")  # of nbs and of the package, from the ground up
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script: all that is started here would ignore Ctrl-C too, and some tests press it
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = ("test_verl", "test_workflow", "test_notebooks", "test_faults", "test_colocated", "test_gradients", "test_memory", "test_engines", "test_lab", "test_train", "test_docs", "test_checkpoint", "test_rollout",
        "test_server", "test_verl_paths", "test_site", "test_image_ablation", "test_pass_counts", "test_hostile")


def pytest_configure(config):
    "The files keep the order in which they are collected; pytest-xdist would begin with those of many tests, and end with one of minutes."
    from hypothesis import HealthCheck, settings

    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    settings.register_profile("busy machine", deadline=None, suppress_health_check=slow)
    settings.load_profile("busy machine")
    if warm.PLACE not in os.environ:  # else this is a worker of pytest-xdist, or a test that runs tests
        warm.prepare()


def pytest_collection_modifyitems(items):
    "Files that take long come first, so that no worker is left with one at the end; test_engines not beside test_verl: Ray gives its processes 30 seconds to start, however busy the machine is."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder with real questions and images; tests that need it are skipped where it is absent."
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) is not on this machine; everything else is tested without it")
    return folder


def shared_cases(name: str) -> list[dict]:
    "Cases that others have met, from ../shared/cases."
    path = ROOT.parent / "shared" / "cases" / f"{name}.json"
    if not path.is_file():
        pytest.skip("the collected cases (../shared/cases) are not on this machine; their kinds "
                    "are tested without them")
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def by_hand(reply, model="by hand"):
    "In place of an engine: `reply(sample, number)` gives each of the n completions."
    from medvlthinker.generation.engine import FunctionEngine

    return FunctionEngine(lambda request: [reply(request.sample, number) for number in range(request.sampling.n)], model)


@pytest.fixture(scope="session")
def warm_tiny(tmp_path_factory) -> Path:
    "The embedded model, fully warmed up as in `smoke`: about a minute, once for all test workers, and for all test runs that share a folder MEDVLTHINKER_WARM."
    from medvlthinker.generation.tiny_model import make_tiny_model
    from medvlthinker.generation.rollout import file_lock

    base = tmp_path_factory.getbasetemp()
    folder = Path(os.environ.get("MEDVLTHINKER_WARM") or (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm")
    with file_lock(folder):  # one worker works, the others wait and find it done
        return make_tiny_model(folder / "tiny")


@pytest.fixture(scope="session")
def blank(tmp_path_factory) -> Path:
    "The embedded model with random weights."
    pytest.importorskip("torch")
    from medvlthinker.generation.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("blank") / "tiny"
    return make_tiny_model(folder, steps=0, show=lambda line: None)


SMALL = ("smoke", "limit=3", "benchmark=pmc_vqa,vqa_rad", "corpus=pmc_vqa", "train_limit=40", "recipes=tiny-RL_PMC", "max_steps=2", "rollouts=4", "max_tokens=64", "repeats=0", "repeats_others=0")
STEPS = ["1_data", "2_difficulty", "3_train-tiny-RL_PMC", "4_evaluate-tiny", "4_evaluate-tiny-RL_PMC", "5_results", "6_audit"]  # of such a run


@pytest.fixture(scope="session")
def small_run(warm_tiny) -> Path:
    "A copy of the project, beside it the home of a run of each of its steps, and what the run printed; made once for all test workers, and copied by tests that write."
    from medvlthinker.generation.rollout import file_lock

    folder = Path(os.environ[warm.PLACE]) / "small_run"
    with file_lock(folder):
        if not (folder / "out").exists():
            copy_project(folder / "project")
            shutil.copytree(warm_tiny, folder / "home" / "smoke" / "checkpoints" / "tiny")
            done = python("-m", "medvlthinker.app.cli", "run", *SMALL, cwd=folder / "project", **in_copy(folder))
            (folder / "out").write_text(succeeded(done).stdout)
    return folder


def copy_project(folder: Path) -> Path:
    "The files that git knows or would take, in a folder where they can be edited."
    files = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, folder / name)  # a folder is a link to one
    return folder


def in_copy(folder: Path) -> dict:
    "The environment of a command in such a copy; pictures have their own tests."
    return {"MEDVLTHINKER_HOME": folder / "home", "PYTHONPATH": folder / "project", "BROWSER_PATH": "none"}


@pytest.fixture
def own_run(small_run, tmp_path) -> Path:
    "A copy of the project and its run for one test."
    return shutil.copytree(small_run, tmp_path / "own", symlinks=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    "Does a server of this machine take a call?"
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(
    so: Callable,
    process: subprocess.Popen | None = None,  # whose end is the end of waiting
    log: Path | None = None,  # what it says
    seconds: float = 300,
):
    "Wait until it is so, and return what was found; not for ever."
    end = time.monotonic() + seconds
    while not (found := so()):
        said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
        assert process is None or process.poll() is None, f"it has ended before that: {said}"
        assert time.monotonic() < end, f"not so after {seconds} seconds: {said}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def vllm_server(warm_tiny, tmp_path_factory):
    "`vllm serve` on the CPU; the model's generation_config has what nobody should take over."
    pytest.importorskip("vllm", reason="vllm is not installed; ./reproduce.sh setup full installs it")
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(warm_tiny, folder / "tiny")
    config = folder / "tiny" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "repetition_penalty": 1.5,
                                  "top_k": 1}))
    port = free_port()
    # without chunked prefill, because vLLM 0.27.1 on a CPU dies of a seeded request in pieces
    words = ["serve", folder / "tiny", "--host", "127.0.0.1", "--port", port,
             "--served-model-name", "tiny", "embedded", "--dtype", "float32", "--enforce-eager",
             "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 8, "video": 0}',
             "--no-enable-chunked-prefill"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *map(str, words)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   env={**os.environ, **environment}, start_new_session=True)
    try:
        until(lambda: answers(port), process, folder / "log", seconds=300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def stand_in(folder: Path, **programs: str) -> Path:
    "A folder with programs in place of other people's: the lines of a shell script for each name."
    folder.mkdir(exist_ok=True)
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    "Makes a file system of this size, in a folder of its own."
    @contextlib.contextmanager
    def small_disk(size: str):
        (folder := tmp_path / "disk").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here (needs root): a full disk is "
                        "not tested")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    return small_disk


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    "An empty MEDVLTHINKER_HOME."
    monkeypatch.setenv("MEDVLTHINKER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def warm_home(home, warm_tiny) -> Path:
    "A MEDVLTHINKER_HOME in which the embedded model is ready."
    shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
    return home


def python(*words, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    "Run the environment's Python with these words; a module of ours, or papermill, in a process that finds the libraries loaded, where what they read while they load is as it was."
    if words[0] == "-m" and words[1].startswith(("medvlthinker.", "papermill")) and while_loading({**os.environ, **environment}) == AT_START:
        return warm.run(*words, cwd=cwd, **environment)
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
                          env={**os.environ, **{key: str(value) for key, value in environment.items()}})


def while_loading(environment: dict) -> dict:
    "The variables that libraries read while they are imported."
    return {key: str(value) for key, value in environment.items() if re.match("(HF|OMP|XDG|PYTHON(?!PATH))", key)}


AT_START = while_loading(os.environ)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    "The command, which ended well."
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def says(done: subprocess.CompletedProcess, *parts: str) -> None:
    "The command failed with one sentence that holds these parts, and without a traceback."
    assert done.returncode not in (0, 1), done.stderr  # 1 is Python's own exit code for a traceback
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def at_work(home: Path) -> dict[int, str]:
    "What runs for this home, from /proc: number and command line. A process has the home in its environment, whoever its parent is."
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"MEDVLTHINKER_HOME={home}\0".encode() in (place / "environ").read_bytes() and (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def chromium():
    "A browser, for the tests of one file."
    if not (path := shutil.which("chromium")):
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    "Opens pages; in the end nothing has failed in any of them."
    opened = []

    def new_page(**given):
        opened.append(watched(chromium, **given))
        return opened[-1][0]

    yield new_page
    for page, wrong, _ in opened:
        page.close()
        assert wrong == []


def watched(browser, **given):
    "A new page, and what must stay empty: errors and dialogs; and what it asks for."
    page, wrong, asked = browser.new_page(**given), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(f"{message.text} ({message.location})") if message.type == "error" else None)
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda websocket: asked.append(websocket.url))
    return page, wrong, asked


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    "What `datasets` copies while it reads goes away with the test."
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(width: int = 60, height: int = 40, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).save(file, kind)
    return file.getvalue()


def split(rows) -> tuple[list[Sample], list[InvalidRow]]:
    rows = list(rows)
    return [item for item in rows if isinstance(item, Sample)], [item for item in rows if isinstance(item, InvalidRow)]


def key_opens(sample: Sample, as_text: bool = True) -> bool:
    "Is the sample's own answer right under every rule, as a letter and as a text?"
    texts = [f"<think> It is seen. </think>\n<answer> {words} </answer>" for words in (sample.answer_label, sample.answer)[:1 + as_text]]
    return all(grade(text, sample.options, sample.answer_label, rule).correct for text in texts for rule in RULES)


def shown(nb) -> list[list[tuple]]:
    "What each code cell of a notebook shows, without its pictures."
    cells = json.loads(json.dumps([cell["outputs"] for cell in nb["cells"] if cell["cell_type"] == "code"]))
    for output in itertools.chain.from_iterable(cells):
        output.get("data", {}).pop("image/png", None)
    return [[(output.get("name"), output.get("text"), output.get("data")) for output in each] for each in cells]
