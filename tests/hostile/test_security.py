"""What the project does not do, whoever asks: run code that came with data or a model, hand words to a shell, tell a secret, or open a port to others."""
import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from conftest import ROOT
from medvlthinker.data import synthetic
from medvlthinker.training import sft
from medvlthinker.generation.tiny_model import make_tiny_model
from medvlthinker.core.files import UserError, file_hash, record_path
from medvlthinker.app.profile import Profile, Workspace, load_profile
from medvlthinker.app.runs import training_places
from medvlthinker.training.recipe import TrainingSettings, get_recipe
from medvlthinker.data.sample import write_samples
from servers import Handler, serving

PACKAGE = sorted((ROOT / "medvlthinker").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "locks" / "compat").glob("*/*.py"))]


# --- the code, read as code ---


def test_what_no_linter_looks_for():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in SOURCES}
    holding = lambda pattern: {name for name, text in texts.items() if re.search(pattern, text, re.M)}
    assert holding(r"allow_pickle=True|\[['\"](?:/bin/)?(?:ba|z|da)?sh['\"], *['\"]-\w*c|torch\.load\(") == set(), "no pickle by another name, and no shell"
    assert holding(r"^\s*(import|from) .*\b(pickle|marshal|shelve|dill|cloudpickle|joblib)\b") == set()
    assert holding("exec_module") == {"commands"}, "a user's own Python file is run where extend= names it, and in one place"


def test_models_bring_neither_code_nor_pickles():
    "Every call that opens a model says so: weights as safetensors alone, and none of the model's own code."
    calls = [ast.unparse(node) for path in PACKAGE for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained|LLM", ast.unparse(node.func))]
    assert len(calls) > 8
    for call in calls:
        assert "trust_remote_code=False" in call, call
        assert not call.startswith("AutoModel") or "use_safetensors=True" in call, call
        assert not call.startswith("LLM") or "load_format='safetensors'" in call, call
    assert not [key for key in Profile.__dataclass_fields__ if "trust" in key], "and no key of a profile turns it on"


# --- weights and code that would do something ---


class Program:
    "What a pickle of this makes a file of."

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    "A model whose weights are a program, the same in the hub's cache, one with code of its own; and the mark that each would leave."
    import torch

    place = tmp_path_factory.mktemp("traps")
    mark, pickled = place / "it ran", make_tiny_model(place / "pickled", steps=0)
    (pickled / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Program(mark)}, pickled / "pytorch_model.bin")
    cached = place / "hf" / "hub" / "models--someone--thing"
    shutil.copytree(pickled, cached / "snapshots" / ("1" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1" * 40)
    own_code = make_tiny_model(place / "own-code", steps=0)
    names = {"AutoConfig": "own.Config", "AutoProcessor": "own.Processor", "AutoModelForImageTextToText": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (own_code / file).write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (own_code / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nProcessor = Model = Tokenizer = Config\n")
    return place, mark


OPEN = """
import json, os, sys
from medvlthinker.core.files import UserError
from medvlthinker.app.profile import load_profile
from medvlthinker.training.checkpoint import merge
from medvlthinker.data import synthetic
from medvlthinker.generation.engine import open_engine
from medvlthinker.generation.request import EngineSettings, Request, Sampling
from medvlthinker.difficulty.preflight import open_processor
from transformers import AutoConfig

request = Request(synthetic.benchmark("pmc_vqa", 1)[0], 0, Sampling(max_tokens=4))
ways = {"engine": lambda model: list(open_engine(EngineSettings(model=model)).answer([request])), "processor": open_processor, "merge": lambda model: merge(model, model, f"{model}-merged"),
        "trusting": lambda model: AutoConfig.from_pretrained(model, trust_remote_code=True)}
for what in sys.argv[2:]:
    way, model = what.split("=")
    try:
        said = ways[way](model) and ""
    except UserError as error:
        said = str(error)
    except Exception as error:
        said = repr(error)
    print(json.dumps([said, os.path.exists(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def opened(traps):
    "What is said to whoever opens the model in the hub's cache, and the one with code of its own, and whether the mark was there afterwards; the last one trusts it."
    place, mark = traps
    ways = ["engine=someone/thing", *(f"{way}={place / 'own-code'}" for way in ("engine", "processor", "merge", "trusting"))]
    done = subprocess.run([sys.executable, "-c", OPEN, mark, *ways], check=True, cwd=ROOT, capture_output=True, text=True, input="y\n" * 20, env={**os.environ, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"})
    assert mark.exists(), "the program of the last one has run"
    mark.rmdir()
    assert "[y/N]" not in done.stdout and len(found := [json.loads(line) for line in done.stdout.splitlines()]) == len(ways), done.stdout
    return found


def test_weights_that_are_a_program_do_not_run(traps, opened, home):
    "By every engine on this machine, by training and by merging: one sentence, and the program has not run."
    import torch
    from medvlthinker.training.checkpoint import merge
    from medvlthinker.generation.engine import open_engine
    from medvlthinker.generation.request import EngineSettings, Request, Sampling

    place, mark = traps
    pickled, request = place / "pickled", Request(synthetic.benchmark("pmc_vqa", 1)[0], 0, Sampling(max_tokens=4))
    ask = lambda **settings: list(open_engine(EngineSettings(model=str(pickled), **settings)).answer([request]))
    write_samples(synthetic.corpus("pmc_vqa", 8), place / "pmc_vqa.parquet")
    trained = lambda name: sft.plan(get_recipe(name), TrainingSettings(base=str(pickled)), place / "pmc_vqa.parquet", place / "checkpoints", place / "logs")
    ways = {**{f"engine={name}": lambda name=name: ask(engine=name) for name in ("transformers", "vllm", "ray")},
            "copies": lambda: ask(data_parallel=2),
            **{recipe: lambda recipe=recipe: trained(recipe) for recipe in ("tiny-SFT_PMC", "tiny-RL_PMC")},
            "merge": lambda: merge(pickled, "tiny", place / "merged")}
    for name, way in ways.items():
        with pytest.raises(UserError, match=r"holds no weights") as said:
            way()
        assert "\n" not in str(said.value) and not mark.exists(), name
    said, ran = opened[0]
    assert "someone--thing" in said and "is not opened" in said and "\n" not in said and not ran, said
    torch.load(pickled / "pytorch_model.bin", weights_only=False)  # and it would have
    mark.rmdir()


def test_code_of_a_model_does_not_run(opened):
    "Not even where somebody at the terminal says yes to what transformers would ask."
    for said, ran in opened[1:-1]:
        assert said and not ran and "\n" not in said and "Error(" not in said, said
    assert opened[-1][1], "it would have run"


# --- secrets ---

SECRETS = {"HF_TOKEN": "hf_ThisTokenOpensNothing0123456789ab", "WANDB_API_KEY": "4f1cafe0ffee5ec2e75ec2e75ec2e7c0ffee99b7", "OPENAI_API_KEY": "sk-proj-ThisKeyOpensNothing-0123456789_xyz"}


@pytest.fixture
def secrets(monkeypatch):
    "Keys in the environment of this test and of what it starts."
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def forms() -> dict[bytes, str]:
    "What a secret looks like, as it is and in base64 wherever it may begin -> its name."
    found = {}
    for name, value in SECRETS.items():
        found[value.encode()] = name
        for lead in range(3):
            found[base64.b64encode(b" " * lead + value.encode())[4 * (lead > 0):-4]] = f"{name} in base64"
    return found


def told(folder: Path | None, *texts: str) -> list[str]:
    "Where a secret stands: in a file below the folder, or in a text."
    places = {str(path): path.read_bytes() for path in (folder.rglob("*") if folder else ()) if path.is_file()}
    places |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    return sorted({f"{name} in {place}" for place, data in places.items() for form, name in forms().items() if form in data})


class Echo(Handler):
    "A server that repeats the key that it is sent in everything that it says."

    def do_GET(self):
        self.say(401 if self.server.locked == "list" else 200, {"data": [{"id": "someone", "owned_by": self.key()}]})

    def do_POST(self):
        body = self.body()
        with self.server.lock:
            kind = self.server.seen.setdefault(body, len(self.server.seen)) % 4
        message = {"content": f"<answer> A </answer> {self.key()}", "role": "assistant"}
        usage = {"completion_tokens": 3, "prompt_tokens": 3}
        answer = {"choices": [{"message": message, "finish_reason": "stop", "index": 0}], "usage": usage}
        self.say(401 if self.server.locked else (200, 400, 500, 200)[kind], answer)

    def key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def say(self, status: int, said: dict):
        if status != 200:
            message = f"{self.key()} is refused; header {self.headers}"
            said = {"error": {"message": message, "code": self.key()}}
        self.reply(status, said, Retry_After_Ms=1, X_Key=self.key())

    def send_response(self, status: int, message=None):
        super().send_response(status, self.key() if status != 200 else None)


@pytest.fixture
def echo():
    with serving(Echo, seen={}, locked="") as server:
        yield server


def test_a_server_that_repeats_the_key_in_all_it_says(home, echo, secrets):
    "In answers, refusals, failures and headers: nothing of it is stored or shown."
    words = ("-m", "medvlthinker.app.cli", "rollout", "smoke", "model=someone", "engine=openai",
             f"base_url={echo.url}/v1", "benchmark=pmc_vqa", "limit=8")
    for locked, part in (("", ""), ("list", "refuses the key (401: "), ("answers", "refuses the key (401: ")):
        echo.locked = locked
        done = warm.run(*words, *(["seed=1"] if locked == "answers" else []), cwd=ROOT)
        assert part in done.stderr and told(home, done.stdout, done.stderr) == [], done.stderr
    stored = "".join(path.read_text() for path in home.rglob("rollout.jsonl"))
    assert stored.count("<answer> A </answer> ***") == 4 and "400: *** is refused" in stored and "500: ***" in stored, stored[:3000]


def test_nothing_of_ours_prints_the_environment(home, secrets, capsys):
    "Neither commands and settings as they are printed and written, nor a status, nor a step's notebook, record and logs."
    from medvlthinker.app import workflow
    from medvlthinker.app.cost import dry_run
    from medvlthinker.training import train

    workspace, paper = Workspace("smoke"), load_profile("paper", report_to="wandb")
    for recipe in map(get_recipe, ("7B-SFT_m23k", "7B-RL_m23k")):
        for trainer in ("trl", "verl"):
            print(train.printed_command(recipe, replace(paper, trainer=trainer), *training_places(recipe, paper)))
        (workspace.logs / f"{recipe.name}.json").write_text(json.dumps(train.accelerate_config(recipe, paper)))
    print(*dry_run(paper, {}), *workflow.status(load_profile("smoke")))
    done = workflow.execute("1_data", load_profile("smoke", limit=2, train_limit=2))
    out = capsys.readouterr()
    assert done.is_file() and record_path(done).is_file()
    assert "medvlthinker" in out.out and told(home, out.out, out.err) == []


KEYS = """FIRST='x'
HF_TOKEN=hf_file
# keys
export WANDB_API_KEY="quoted"
OPENAI_API_KEY=$(touch ran)`touch ran`
not a line
BASH_ENV x=1"""


@pytest.mark.parametrize("encoding, line_end", [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_keys_in_a_file_are_read_and_not_run(tmp_path, encoding, line_end):
    """Of .env reproduce.sh takes names with values, also as Windows saves them; it runs nothing, and what the
    environment says counts."""
    (tmp_path / ".env").write_text(KEYS, encoding=encoding, newline=line_end)
    setup = (ROOT / "locks" / "setup.sh").read_text()
    function = re.search(r"^read_env\(\) \{.*?^\}\n", setup, re.M | re.S)[0]
    show = 'read_env; printf "%s|" "$FIRST" "$HF_TOKEN" "$WANDB_API_KEY" "$OPENAI_API_KEY"'
    environment = {"HF_TOKEN": "hf_environment", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", function + show], check=True, cwd=tmp_path,
                          capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("x|hf_environment|quoted|$(touch ran)`touch ran`|", "")
    assert not (tmp_path / "ran").exists()
    ignored = subprocess.run(["git", "check-ignore", ".env"], check=False, cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128), "git would take .env"  # 128: no repository


# --- the reward ---


def test_the_hash_of_the_reward_decides(blank, home, tmp_path, monkeypatch):
    "It stands among the inputs of a run, and one more byte makes another run, in a folder of its own."
    file, recipe = ROOT / "medvlthinker" / "core" / "grade.py", get_recipe("tiny-RL_PMC")
    write_samples(synthetic.corpus("pmc_vqa", 8), tmp_path / "pmc_vqa.parquet")
    places = tmp_path / "pmc_vqa.parquet", tmp_path / "checkpoints", tmp_path / "logs"
    small = TrainingSettings(base=str(blank))
    run = sft.plan(recipe, small, *places)
    assert run.inputs["reward"] == file_hash(file)
    (tmp_path / "grade.py").write_bytes(file.read_bytes() + b"\n")
    monkeypatch.setattr(sft, "REWARD", tmp_path / "grade.py")
    assert sft.plan(recipe, small, *places).folder != run.folder


# --- ports ---


def test_what_serves_listens_here_only(tmp_path):
    "What trainers are told; JupyterLab is looked at in test_lab.py, Ray in test_engines.py."
    from medvlthinker.training import train, verl

    opens = {path.stem for path in SOURCES if re.search(r"\w*HTTPServer\(|\.bind\(|create_server\(|start_server\(|\.listen\(", path.read_text(encoding="utf-8"))}
    assert not opens, "nothing in the package opens a port itself"
    for profile in (load_profile("smoke"), load_profile("mini", gpus=2)):
        assert train.accelerate_config(get_recipe("tiny-SFT_PMC"), profile)["main_process_ip"] == "127.0.0.1"
    here = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert verl.environment(tmp_path)[here] == "0" and here not in verl.environment(tmp_path, nodes=4)
