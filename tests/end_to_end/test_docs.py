"""Every command and code block of README and CONTRIBUTING, and every command of the quickstart, is executed, or a table says what runs it elsewhere; what the chapters name exists."""
import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import warm
from conftest import ROOT
from medvlthinker.app import cli
from medvlthinker.data import synthetic

NOTEBOOKS = sorted([*(ROOT / "nbs").glob("[!_]*.ipynb"), *(ROOT / "nbs").glob("[!_]*/[!_.]*.ipynb")], key=lambda path: path.name)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]

PLACES = {  # what a reader puts in, and where a command would write into the project: word -> what stands there here
    ".venv/bin/": f"{Path(sys.executable).parent}/", "FOLDER": "{place}/copies", "MODEL": "{place}/runs/smoke/checkpoints/tiny", "scan.png": "{place}/scan.png",
    "--model 3B-RL_m23k engine=vllm gpus=1 dtype=bfloat16": "--model {place}/runs/smoke/checkpoints/tiny", "mine.py": "{place}/mine.py"}

MORE = {  # the same command with words behind it: how it begins -> the words, and why
    "./reproduce.sh run mini": "--dry-run",  # a GPU and the hub
    "./reproduce.sh run paper": "--dry-run",  # eight GPUs and the hub
    "./reproduce.sh lab": "--version",  # opens a browser, and stays until it is ended; test_lab.py works in it
    "./reproduce.sh evaluate smoke": "limit=4",
    "./reproduce.sh evaluate mini": "data=synthetic limit=4 engine=transformers gpus=0 dtype=float32 repeats_others=0 max_tokens=40",
    "./reproduce.sh viewer smoke": "limit=6 recipes=",  # of the answers that the fixture has asked for
    "./reproduce.sh bench": "--list",
    ".venv/bin/python -m pytest": "--collect-only"}

CI = (ROOT / ".ci/run").read_text(encoding="utf-8")  # what it runs, word for word, is not run here

ELSEWHERE = {  # what runs it in its place: how it begins -> a file, and what stands in it
    "./reproduce.sh": (".ci/run", "./reproduce.sh smoke limit=20 "),  # the same graph with fewer questions, steps and recipes
    "./reproduce.sh docs --outputs nbs/core/01_stats.ipynb": ("tests/unit/test_figures.py", "plots.with_outputs(path"),
    "./reproduce.sh docs": ("tests/browser/test_site.py", "site.build("),
    "./reproduce.sh evaluate mini model=MODEL benchmark=vqa_rad": ("tests/end_to_end/test_workflow.py", '"-p", "benchmark", "vqa_rad", "-p", "data_dir", real_data'),
    "locks/lock.sh": ("tests/../locks/lock.sh", "uv")}  # solves three environments for minutes, from the registry


class Block(NamedTuple):
    file: str
    language: str
    text: str


def blocks(text: str, file: str) -> list[Block]:
    "The fenced blocks of a text."
    return [Block(file, *found) for found in re.findall(r"^```([^\s`]*)\n(.*?)^```$", text, re.M | re.S)]


def prose(path: Path) -> list[str]:
    "The text of a page, or of the cells of a notebook that are no code."
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


BLOCKS = [block for path in PAGES[:2] for block in blocks(*prose(path), path.name)]
CHAPTERS = [block for path in NOTEBOOKS for text in prose(path) for block in blocks(text, path.name)]


def commands(block: Block) -> list[str]:
    "The command lines of a block, without comments; a chain of them is taken apart."
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.text.splitlines()]
    return [re.sub(r"\s+", " ", part.strip()) for line in lines if line and line[0] != "#" for part in line.split(" && ")]


def inline(path: Path) -> list[str]:
    "Commands inside sentences."
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", "\n".join(prose(path)), flags=re.M | re.S)
    return re.findall(r"`((?:\./reproduce\.sh|\.venv/bin/|locks/)[^`\n]*)`", text)


SHELL = dict.fromkeys([command for block in BLOCKS if block.language == "sh" for command in commands(block)] + [command for path in (*PAGES[:2], ROOT / "nbs" / "quickstart.ipynb") for command in inline(path)])


def first_of(table: dict, command: str):
    "The entry of a table whose key begins the command, the longest first."
    return next((table[key] for key in sorted(table, key=len, reverse=True) if command == key or key != "./reproduce.sh" and command.startswith(f"{key} ") or key[-1] == "=" and command.startswith(key)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory, warm_tiny):
    "A folder with what the examples name, and a home in which the embedded model has answered six questions of each set."
    place = tmp_path_factory.mktemp("docs")
    (place / "copies" / "images").mkdir(parents=True)
    lines = ["file,ask,first,second,key,reasoning"]
    for number, sample in enumerate(synthetic.benchmark("vqa_rad_closed", 24)):
        if list(sample.options) == ["A", "B"]:
            (place / "copies" / "images" / f"{number}.png").write_bytes(sample.images[0])
            lines.append(f"{number}.png,{sample.question.replace(',', ';')},{sample.options['A']},{sample.options['B']},{sample.answer_label},It is seen.")
    for name in ("test.csv", "train.csv"):
        (place / "copies" / name).write_text("\n".join(lines) + "\n")
    (place / "scan.png").write_bytes(synthetic.benchmark("pmc_vqa", 1)[0].images[0])
    for block in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", block.text):
            (place / name[1]).write_text(put_in(block.text, place))
    shutil.copytree(warm_tiny, place / "runs" / "smoke" / "checkpoints" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLTHINKER_HOME", str(place / "runs"))
        patch.setenv("BROWSER_PATH", "none")  # pictures have their own tests
        patch.chdir(place)
        from medvlthinker.app.profile import load_profile
        from medvlthinker.app.runs import rollouts
        from medvlthinker.evaluation.evaluate import evaluate

        evaluate(rollouts(load_profile("smoke", limit=6), "tiny"), place / "runs" / "smoke" / "results" / "synthetic")
        yield place


def put_in(text: str, place: Path) -> str:
    "The text with the words of `PLACES` replaced."
    for word, meaning in PLACES.items():
        text = re.sub(rf"(?<![\w/]){re.escape(word)}" + r"(?![\w-])" * word[-1].isalnum(), lambda _: meaning.format(place=place), text)
    return text


@pytest.mark.parametrize("command", SHELL)
def test_command(command, request):
    if re.search(rf"^{re.escape(command)}( \|\||$)", CI, re.M):
        return
    if found := first_of(ELSEWHERE, command):
        file, words = found
        assert words in (ROOT / file).read_text(), f"{file} does not run it"
        return
    more = first_of(MORE, command) if "--dry-run" not in command else None
    done = by_shell(put_in(f"{command} {more or ''}", request.getfixturevalue("place")).strip())
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def by_shell(line: str) -> subprocess.CompletedProcess:
    "Run a command line; a call of one of our verbs by a process that finds torch loaded."
    line = re.sub(rf"^\./reproduce\.sh (?=({'|'.join(cli.VERBS)})( |$))", f"{sys.executable} -m medvlthinker.app.cli ", line)
    environment = {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if line.startswith(f"{sys.executable} -m "):
        return warm.run(*shlex.split(line)[1:], cwd=ROOT, **environment)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **environment})


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python(number, place):
    text = PYTHON[number].text
    if name := re.match(r"# (\w+\.py)\n", text):
        assert any(name[1] in command for command in SHELL), f"{name[1]} is a file that no command names"
        return
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(put_in(text, place), {})
    assert out.getvalue().strip()


def test_every_block_has_a_class_and_every_exemption_is_used():
    "A block is shell, Python, or (without a language) data or a result; an entry that no command needs any more goes."
    assert len(SHELL) > 20 and PYTHON and {block.language for block in [*BLOCKS, *CHAPTERS]} <= {"sh", "python", ""}
    assert not [key for key in (*MORE, *ELSEWHERE) if not any(command.startswith(key) for command in SHELL)]


def test_what_the_chapters_name_exists():
    "Verbs and modules in sentences and commands, and whatever a block of Python imports from the package."
    verbs = {*cli.VERBS, "setup", "test", "clean", "smoke", "mini", "paper", "VERB", "--help"}
    for path in NOTEBOOKS:
        for text in prose(path):
            assert not {verb for verb in re.findall(r"\./reproduce\.sh ([\w-]*\w)", text)} - verbs, path.name
    for block in CHAPTERS:
        if block.language == "python" and ">>>" not in block.text:
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("medvlthinker"):
                    assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names), (block.file, node.module)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself_with_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"Examples?: medvlthinker {verb}\b", said) and len(said.splitlines()) > 5
