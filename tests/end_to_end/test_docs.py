"""Every code block and command of the documentation is executed as it stands, or is listed below with what is run in its place and why."""
import ast
import contextlib
import doctest
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import warm
from conftest import ROOT
from medvlthinker.app import cli
from medvlthinker.data import benchmarks, corpora, synthetic, prompt
from medvlthinker.generation import model
from medvlthinker.training import recipe

NOTEBOOKS = sorted([*(ROOT / "nbs").glob("[!_]*.ipynb"), *(ROOT / "nbs").glob("[!_]*/[!_.]*.ipynb")], key=lambda path: path.name)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]

# --- what is not run letter by letter, and why ----------------------------------------------------------------------------------

PLACES = {  # what a reader puts in, and where a command would write into the project: word -> what stands there here
    ".venv/bin/": f"{Path(sys.executable).parent}/", "python -m": f"{sys.executable} -m", "FOLDER": "{folder}", "MODEL": "{model}",
    "scan.png": "{place}/scan.png", "--model 3B-RL_m23k": "--model {model}", "mine.py": "{place}/mine.py", "my_rules.py": "{place}/my_rules.py", "folder=logs": "folder={place}/logs",
    "checkpoints/tiny": "{place}/checkpoints/tiny"}

CI = {  # .ci/run calls them itself, before or after this test: command -> how the line begins there
    "./reproduce.sh": "./reproduce.sh smoke limit=40 ",  # 8 minutes; the same graph with fewer questions, steps and recipes
    "./reproduce.sh test": "./reproduce.sh test",
    "./reproduce.sh test heavy": "./reproduce.sh test heavy",
    "./reproduce.sh setup": "./reproduce.sh setup",
    "./reproduce.sh setup full": "./reproduce.sh setup full",
    "./reproduce.sh verify smoke cell=tiny-RL_PMC/PMC": "./reproduce.sh verify smoke cell=tiny-RL_PMC/PMC",  # of the run above it
    ".venv/bin/nbdev-export": ".venv/bin/nbdev-export",  # writes in the project
    ".venv/bin/nbdev-clean": ".venv/bin/nbdev-clean",
    "./reproduce.sh docs --readme": "./reproduce.sh docs --readme",
    ".venv/bin/ruff check .": ".venv/bin/ruff check .",
    ".venv/bin/python -m mypy medvlthinker": ".venv/bin/python -m mypy medvlthinker",
    "git diff --exit-code --stat": "git diff --exit-code --stat"}

MORE = {  # the same command with words behind it: how it begins -> the words, and why
    "./reproduce.sh run mini": "--dry-run",  # a GPU and the hub
    "./reproduce.sh run paper": "--dry-run",  # eight GPUs and the hub
    "./reproduce.sh lab": "--version",  # opens a browser, and stays until it is ended; test_viewer.py works in JupyterLab
    "./reproduce.sh evaluate smoke": "limit=4",
    "./reproduce.sh evaluate mini": "data=synthetic limit=4 engine=transformers gpus=0 dtype=float32 repeats_others=0 max_tokens=40",
    "./reproduce.sh viewer smoke": "limit=6 recipes=",  # of the answers that the fixture has asked for
    "./reproduce.sh preflight smoke": "limit=6 train_limit=6",
    "./reproduce.sh ablate smoke": "limit=6",
    "./reproduce.sh train smoke": "train_limit=20 max_steps=2",
    "./reproduce.sh compare smoke old=": "limit=6",
    "./reproduce.sh export smoke": "limit=6",
    "./reproduce.sh bench": "--list",
    ".venv/bin/python -m pytest": "--collect-only"}  # the run that collects it is this one, or another worker's

ELSEWHERE = {  # another test runs them: how it begins -> its file, its name, and words that stand in it, in this order
    "./reproduce.sh evaluate mini model=MODEL benchmark=vqa_rad": ("test_workflow.py", "test_real_radiographs", '"-p", "benchmark", "vqa_rad", "-p", "data_dir", real_data'),
    "./reproduce.sh compare smoke model=tiny with=": ("test_commands.py", "test_two_models_on_the_command_line", '"model=tiny", f"with='),
    "./reproduce.sh compare smoke model=tiny batch_size=": ("test_commands.py", "test_parity_on_the_command_line", '"compare", "smoke", "model=tiny"', "batch_size="),
    "./reproduce.sh merge": ("test_checkpoint.py", "test_a_model_and_its_card_are_made_on_the_command_line", '"merge", "smoke", "recipe='),  # of a smaller run
    "./reproduce.sh card": ("test_checkpoint.py", "test_a_model_and_its_card_are_made_on_the_command_line", '"card", "smoke", "recipe='),
    "./reproduce.sh docs --outputs": ("test_figures.py", "test_stored_outputs_are_small_and_belong_to_the_code_as_it_is", "plots.with_outputs(path"),
    ".venv/bin/nbdev-test": ("test_notebooks.py", "test_runs", 'nbdev_test, f"nbs/{name}", "--n-workers", "0"'),
    "22_model": ("test_model.py", "test_a_hub_model_has_one_identity_before_and_after_its_download", ""),  # from a hub on this machine
    "47_train": ("3_train.ipynb", "", "final = train(recipe, run, *places"),  # for each recipe of .ci/run's smoke
    "46_checkpoint": ("test_checkpoint.py", "test_verl_merges_two_ranks", "merge("),  # a checkpoint of eight GPUs
}

UNRUN = {  # nothing runs them: why, and what is looked at instead
    "locks/lock.sh": "solves three environments for minutes, from the registry, and writes the locks; it is read for its grammar",
}

GIVEN = {  # what a chapter's example takes as known
    **dict.fromkeys(("21_request", "24_engine", "25_rollout"), "from medvlthinker.data import synthetic\nfrom medvlthinker.app.profile import Workspace\nfrom medvlthinker.generation.engine import open_engine\n"
                    "samples, checkpoints = synthetic.benchmark('vqa_rad_closed', 2), str(Workspace('smoke').checkpoints)\nsample, engine = samples[0], open_engine(EngineSettings(checkpoints=checkpoints))"),
    "30_pass_counts": "from medvlthinker.evaluation.evaluate import grade_rollout\n"
                      "write_samples(synthetic.corpus('m23k', 30), 'm23k.parquet'); folder, samples = Path('.'), SampleFile('m23k.parquet')\n"
                      "rollout = [{'dataset_name': sample.dataset_name, 'dataset_index': sample.dataset_index, 'completions': [{'text': sft_target('AB'[k > 4], 'So it is.'), 'finish_reason': 'stop', 'tokens': 9}\n"
                      "           for k in range(16)]} for sample in samples]",
    **dict.fromkeys(("42_sft", "43_grpo"), "from medvlthinker.app.profile import Workspace\ndata, checkpoints, logs = Path('pmc_vqa.parquet'), Workspace('smoke').checkpoints, Path('logs')\n"
                                          "write_samples(synthetic.corpus('pmc_vqa', 40), data)"),
    "51_compare": "samples = synthetic.benchmark('pmc_vqa', 9)\n"
                  "rollout = first = second = [{'dataset_name': sample.dataset_name, 'dataset_index': sample.dataset_index, 'completions': [{'text': '(A)', 'finish_reason': 'stop', 'tokens': 3}]}\n"
                  "                            for sample in samples]",
    "04_plots": "import pandas as pd, plotly.express as px\nfolder = Path('figures')",
    "62_figures": "records = []",
}

SMALLER = {  # a chapter's example with less to do: text -> what is run
    "20_tiny_model": {"seed=0": "seed=0, steps=1"},
    "24_engine": {'model="tiny"': 'model="tiny", checkpoints=checkpoints'},
    "71_runs": {'load_profile("smoke")': 'load_profile("smoke", limit=6)'},
    "42_sft": {"TrainingSettings()": "TrainingSettings(max_steps=2)", "(60, 200)": "(2, 40)"},
    "43_grpo": {"TrainingSettings()": "TrainingSettings(max_steps=1)"},
    "64_viewer": {'load_profile("smoke")': 'load_profile("smoke", limit=6)', "at=12": "at=1"},
    "15_benchmarks": {'"copies"': "REAL"},  # the folder with real data; without it the example is skipped
}


# --- the blocks -----------------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    file: str  # README.md, or a notebook's name
    place: int  # its line, or the number of its cell
    language: str
    text: str
    result: str = ""  # of a README's block: the block without a language that follows at once

    @property
    def name(self) -> str:
        return f"{self.file}:{self.place}"


FENCE = re.compile(r"^(`{3,})([^\s`]*)[^\n]*\n(.*?)^\1 *$\n*(?:(?=`{3,}\n)`{3,}\n(.*?)^`{3,} *$)?", re.M | re.S)


def blocks(text: str, file: str, place: int | None = None) -> list[Block]:
    "The fenced blocks of a text; one without a language that follows at once belongs to the one before."
    found = []
    for match in FENCE.finditer(text):
        at = text.count("\n", 0, match.start()) + 1 if place is None else place
        found.append(Block(file, at, match[2], match[3], match[4] or ""))
    return found


def prose(path: Path) -> list[tuple[int, str]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(number, "".join(cell["source"])) for number, cell in enumerate(cells) if cell["cell_type"] == "markdown"]


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
BLOCKS = [*README, *blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "CONTRIBUTING.md"),
          *(block for path in NOTEBOOKS if path.stem != "index" for number, text in prose(path) for block in blocks(text, path.stem, number))]  # README is index


def commands(block: Block) -> list[str]:
    "The command lines of a block, without comments; a chain of them is taken apart."
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip() and not line.startswith("#")]
    return [re.sub(r"\s+", " ", part.strip()) for line in found for part in line.split(" && ")]


def inline(path: Path) -> list[str]:
    "Commands inside sentences."
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`((?:\./reproduce\.sh|\.venv/bin/|python -m|locks/)[^`\n]*)`", text)


_FOUND = [(block.file, command) for block in BLOCKS if block.language == "sh" for command in commands(block)] + [(path.name, command) for path in PAGES[:2] for command in inline(path)]
SHELL = [*{command: (file, command) for file, command in reversed(_FOUND)}.values()][::-1]  # each once, where it stands first
PYTHON = [block for block in BLOCKS if block.language == "python"]


def first_of(table: dict, command: str):
    "The entry of a table whose key begins the command, the longest first."
    return next((table[key] for key in sorted(table, key=len, reverse=True) if command == key or command.startswith(f"{key} ") or key.endswith("=") and command.startswith(key)), None)


# --- what they stand on ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, warm_tiny):
    "A folder with what the examples name, and a home in which the embedded model has answered six questions of each set."
    place = tmp_path_factory.mktemp("docs")
    folder, home = place / "copies", place / "home"
    (folder / "images").mkdir(parents=True)
    lines = ["file,ask,first,second,key,reasoning"]
    for number, sample in enumerate(synthetic.benchmark("vqa_rad_closed", 24)):
        if list(sample.options) == ["A", "B"]:
            (folder / "images" / f"{number}.png").write_bytes(sample.images[0])
            lines.append(f"{number}.png,{sample.question.replace(',', ';')},{sample.options['A']},{sample.options['B']},{sample.answer_label},It is seen.")
    for name in ("test.csv", "train.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    (place / "scan.png").write_bytes(synthetic.benchmark("pmc_vqa", 1)[0].images[0])
    values = {"place": place, "folder": folder, "model": warm_tiny}
    for block in README:
        if block.language == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
            (place / name[1]).write_text(put_in(block.text, values))
    (place / "my_rules.py").write_text("import re\nfrom medvlthinker.core.grade import Grade\n\n\ndef first_capital(text, options, label):\n"
                                       "    found = re.search(r'\\b[A-Z]\\b', text)\n    letter = found[0] if found else None\n    return Grade(letter, letter, letter == label)\n")
    for there in (home / "smoke", place):  # in the second as for whoever calls the command again: it was made for `warm_tiny`
        shutil.copytree(warm_tiny, there / "checkpoints" / "tiny")
    tables = [benchmarks.LOCAL, corpora.LOCAL, model.BASELINES, prompt.INSTRUCTIONS, recipe.RECIPES]
    before, here = [dict(table) for table in tables], Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLTHINKER_HOME", str(home))
        patch.setenv("BROWSER_PATH", "none")  # pictures have their own tests
        from medvlthinker.app.runs import rollouts
        from medvlthinker.app.profile import load_profile
        from medvlthinker.evaluation.evaluate import evaluate

        evaluate(rollouts(load_profile("smoke", limit=6), "tiny"), home / "smoke" / "results" / "synthetic")
        os.chdir(place)
        yield SimpleNamespace(path=place, values=values)
    os.chdir(here)
    for table, content in zip(tables, before):  # the examples add rows
        table.clear()
        table.update(content)


def put_in(text: str, values: dict) -> str:
    "The text with the words of `PLACES` replaced."
    for word, meaning in PLACES.items():
        text = re.sub(rf"(?<![\w/.]){re.escape(word)}(?![\w-])" if word[-1].isalnum() else rf"(?<![\w/]){re.escape(word)}", lambda _: meaning.format(**values), text)
    return text


# --- they are run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, command", SHELL, ids=[f"{file}: {command}" for file, command in SHELL])
def test_command(file, command, request):
    if line := CI.get(command):
        assert re.search(rf"^{re.escape(line)}", (ROOT / ".ci" / "run").read_text(), re.M), f".ci/run does not run {line}"
        return
    if command in UNRUN:
        assert subprocess.run(["bash", "-n", ROOT / command], check=False).returncode == 0
        return
    if found := first_of(ELSEWHERE, command):
        return stands_in(*found)
    place = request.getfixturevalue("place")
    more = first_of(MORE, command) if "--dry-run" not in command else None
    line = put_in(command + (f" {more}" if more else ""), place.values)
    done = by_shell(line)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def by_shell(line: str) -> subprocess.CompletedProcess:
    "Run a command line; a bare call of one of our verbs, modules or files by a process that finds torch loaded."
    line = re.sub(rf"^\./reproduce\.sh (?=({'|'.join(cli.VERBS)})( |$))", f"{sys.executable} -m medvlthinker.app.cli ", line)
    environment = {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if re.fullmatch(rf"{re.escape(str(Path(sys.executable).parent))}/python\S* (-m medvlthinker\.|-m pytest |\S+\.py )[^$|&;<>*?~`]*", line):
        return warm.run(*shlex.split(line)[1:], cwd=ROOT, **environment)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **environment})


def stands_in(file: str, name: str, *words: str) -> None:
    "The words stand in a function of another file, in this order."
    text = next(path for folder in ("tests", "nbs") for path in (ROOT / folder).rglob(file)).read_text()
    if name:
        text = ast.get_source_segment(text, next(node for node in ast.parse(text).body if getattr(node, "name", "") == name))
    assert re.search(".*?".join(map(re.escape, words)), text, re.S), f"{file} does not run it in {name}"


@pytest.mark.parametrize("block", PYTHON, ids=[block.name for block in PYTHON])
def test_python(block, request):
    if block.file in ELSEWHERE:
        return stands_in(*ELSEWHERE[block.file])
    place = request.getfixturevalue("place")
    text = put_in(block.text, place.values)
    for old, new in SMALLER.get(block.file, {}).items():
        text = text.replace(old, repr(str(request.getfixturevalue("real_data"))) if new == "REAL" else new)
    if block.file == "README.md" and (name := re.match(r"# (\w+\.py)\n", block.text)):
        assert any(name[1] in command and not CI.get(command) for _, command in SHELL), f"{name[1]} is a file that no command names"
        compile(text, name[1], "exec")
        return
    names = known(block.file)
    exec(GIVEN.get(block.file, ""), names)
    if ">>>" in text:
        return by_doctest(text, names, block.name)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(text, names)
    assert not block.result or out.getvalue().strip() == block.result.strip()


def known(file: str) -> dict:
    "The names that a chapter's reader knows: those of its module, and of the ones that it stands on."
    number = lambda path: int(match[1]) if (match := re.match(r"(\d\d)_", path.name)) else 99
    names = {"os": os, "Path": Path}
    for path in NOTEBOOKS:
        if number(path) <= number(Path(file)) and file[:2].isdigit():
            module = importlib.import_module(f"medvlthinker.{path.parent.name}.{path.stem[3:]}")
            names |= {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return names


def by_doctest(text: str, names: dict, name: str) -> None:
    "Run lines that begin with >>> and compare what they show; ... stands for anything."
    told = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    assert example.examples and not runner.run(example, out=told.write).failed, told.getvalue()


def run(text: str, names: dict) -> None:
    "Run a text statement by statement; a comment behind an expression that reads like a value is compared with it."
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Expr):
            exec(compile(ast.Module([node], []), "<block>", "exec"), names)
            continue
        value = eval(compile(ast.Expression(node.value), "<block>", "eval"), names)
        if shown := re.match(r"\s*#\s*(.*)", lines[node.end_lineno - 1][node.end_col_offset:]):
            if re.match(r"""['"(\[{\d-]|[A-Z]\w*\(""", shown[1]):
                assert any(agrees(shown[1][:end].strip(), value) for end in ends(shown[1])), f"{ast.unparse(node)} is {value!r}, and the page says {shown[1]}"


def ends(text: str) -> list[int]:
    return [len(text), *(match.start() for match in re.finditer(r"[:,]", text))]


def agrees(shown: str, value) -> bool:
    "Is this the value? Numbers to the digits that are shown, ... for anything inside a text."
    if "..." in shown:
        return bool(re.fullmatch(re.escape(shown).replace(r"\.\.\.", ".*"), repr(value), re.S))
    try:
        said = eval(shown, {"Decimal": Decimal, "__builtins__": {}})
    except (SyntaxError, NameError):
        return False
    return alike(said, value)


def alike(said, value) -> bool:
    if isinstance(said, dict):
        return isinstance(value, dict) and said.keys() == value.keys() and all(alike(said[key], value[key]) for key in said)
    if isinstance(said, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(said) == len(value) and all(map(alike, said, value))
    if isinstance(said, float) and "e" not in repr(said):
        return abs(said - float(value)) <= 0.501 * 10 ** -len(repr(said).partition(".")[2])
    return math.isclose(said, value) if isinstance(said, float) else said == value


# --- and nothing slips through --------------------------------------------------------------------------------------------------


def test_every_block_has_a_class():
    "A block is shell, Python, or (without a language) data or a result, and then no line of it is a command."
    assert len(PYTHON) > 20 and len(SHELL) > 20, "the pattern finds what it looks for"
    for block in BLOCKS:
        assert block.language in ("sh", "python", ""), f"{block.name}: nothing runs blocks of {block.language!r}"
        for line in (block.text if not block.language else block.result).splitlines():
            assert not re.match(r"(\$ |\./|\.venv/|python |pip |papermill |>>> )", line), f"{block.name}: is {line!r} a command? Then it belongs into a block of sh or python."


def test_every_exemption_is_used():
    "An entry that no block or command needs any more hides nothing, and goes."
    lines, files = [command for _, command in SHELL], {block.file for block in PYTHON}
    for table in (CI, MORE, UNRUN):
        assert not [key for key in table if not any(line == key or line.startswith(key) for line in lines)]
    assert not [key for key in ELSEWHERE if key not in files and not any(line.startswith(key) for line in lines)]
    assert not [key for key in (*GIVEN, *SMALLER) if key not in files]


def test_verbs_and_modules_that_the_chapters_name_exist():
    verbs = {*cli.VERBS, "setup", "test", "clean", "smoke", "mini", "paper", "VERB", "--help"}
    for path in NOTEBOOKS:
        for number, text in prose(path):
            assert not {verb for verb in re.findall(r"\./reproduce\.sh ([\w-]*\w)", text)} - verbs, (path.name, number)
            assert not [module for module in re.findall(r"-m medvlthinker\.([\w.]*\w)", text) if not (ROOT / "medvlthinker" / f"{module.replace('.', '/')}.py").is_file()], (path.name, number)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    texts = [text for _, text in prose(path)] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    for text in texts:
        plain = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
        for target in [a or b for a, b in re.findall(r"""\]\(([^)\s]+)\)|\b(?:src|href)="([^"]+)\"""", plain)]:
            if not re.match(r"[a-z]+:", target):
                file, _, anchor = target.partition("#")
                there = (path.parent / file).resolve() if file else path
                assert there.exists(), f"{path.name} leads to {target}"
                assert not anchor or anchor in anchors(there), f"{path.name} leads to {target}, where there is no such heading"


def anchors(path: Path) -> set[str]:
    "The names of the headings of a page, as they are made from their words."
    text = "\n".join(text for _, text in prose(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself_with_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"Examples?: medvlthinker {verb}\b", said) and len(said.splitlines()) > 5
