"""The paper at laptop scale, end to end: a second run does nothing, an edit re-runs what depends on it, a kill loses nothing, bad input gets a sentence."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, STEPS, at_work, in_copy, python, says, succeeded, until
from medvlthinker.core.files import UserError
from medvlthinker.app import cli
from medvlthinker.app.profile import load_profile, steps
from medvlthinker.app.cost import dry_run
from medvlthinker.data.sample import SampleFile
from medvlthinker.generation.engine import vllm_arguments
from medvlthinker.generation.model import folder_name
from medvlthinker.training.recipe import get_recipe
from medvlthinker.training.train import accelerate_config

EVALUATE = ("-j", "2", "notebooks/4_evaluate-tiny.ipynb")  # as far as this step


def call(folder: Path, verb: str, *words, **environment) -> subprocess.CompletedProcess:
    "A verb for the small run in a folder."
    return python("-m", "medvlthinker.app.cli", verb, *SMALL, *words, cwd=folder / "project", **in_copy(folder) | environment)


def run(folder: Path, *words) -> tuple[list[str], str]:
    "Run it again: the steps that ran, and all that was printed."
    done = succeeded(call(folder, "run", *words))
    return re.findall(r"^step \d+ of \d+  (\S+): done in", done.stdout, re.M), done.stdout


def status(folder: Path, *words, at_work: bool = False) -> tuple[dict[str, str], str]:
    "The state of each step, and the whole text; asking changes nothing."
    home = folder / "home"
    stamps = lambda: {path: path.stat().st_mtime_ns for path in home.rglob("*") if ".snakemake" not in path.parts}
    before = stamps()
    done = succeeded(call(folder, "status", *words))
    assert at_work or stamps() == before, "asking writes nothing, but for notes of Snakemake's own"
    lines = done.stdout.splitlines()
    assert "\033" not in done.stdout
    return {line.split()[0]: line.split()[1] for line in lines[1:-2] if not line.startswith(" ")}, done.stdout


def due(folder: Path) -> set[str]:
    "What the next run would do."
    return {name for name, state in status(folder)[0].items() if state != "done"}


def edit(folder: Path, module: str) -> None:
    with open(folder / "project" / "medvlthinker" / module, "a") as file:
        file.write("\n# edited\n")


def test_a_first_run_can_be_watched(small_run):
    out = (small_run / "out").read_text()
    ran = re.findall(r"^step \d+ of \d+  (\S+): done in", out, re.M)
    assert set(ran) == {*STEPS} and ran[0] == "1_data" and set(ran[-2:]) == {"5_results", "6_audit"}
    assert ran.index("2_difficulty") < ran.index("3_train-tiny-RL_PMC") < ran.index("4_evaluate-tiny-RL_PMC")
    assert "step 1 of 7  1_data: it has not run yet" in out and "tiny-RL_PMC: step 2 of 2" in out
    assert "nothing medical" in out and "7B" in out, "the table is printed, with its warning, beside the paper's rows"
    assert sorted(path.stem for path in (small_run / "home" / "smoke" / "notebooks").glob("*.ipynb")) == sorted(ran)


def test_what_makes_it_run_again(own_run):
    project, home = own_run / "project", own_run / "home" / "smoke"
    os.utime(project / "medvlthinker" / "results" / "figures.py")
    notebook = project / "nbs" / "paper" / "1_data.ipynb"
    notebook.write_text(notebook.read_text().replace("Two corpora, six benchmarks, one format", "Another sentence"))
    ran, out = run(own_run)
    assert ran == [] and "nothing ran" in out, "a touched file is the same file, and a sentence is no code"
    assert "No step ran." in run(own_run, "--summary")[1], "which says nothing of what is done"
    states, out = status(own_run)
    assert set(states.values()) == {"done"} and "7 steps: 7 done" in out and "The next run has nothing to do." in out
    assert re.search(r"3_train-tiny-RL_PMC +done +\d+ s", out), out

    table = home / "results" / "table.txt"
    table.rename(table.with_suffix(".away"))
    assert due(own_run) == {"5_results"}, "a lost table is made again"
    table.with_suffix(".away").rename(table)
    step = home / "notebooks" / "4_evaluate-tiny.ipynb"
    step.rename(step.with_suffix(".away"))
    assert "4_evaluate-tiny" in due(own_run), "and so is a lost notebook"
    step.with_suffix(".away").rename(step)
    edit(own_run, "results/figures.py")
    assert due(own_run) == {"5_results", "6_audit"}, "only what imports the edited module"
    edit(own_run, "training/memory.py")
    states, out = status(own_run)
    coming = {name for name, state in states.items() if state == "stale"}
    assert re.search(r"3_train-tiny-RL_PMC +stale .* Updated input files: .*training/memory.py", out), out
    assert "another job: notebooks/3_train-tiny-RL_PMC.ipynb" in out, out
    assert coming == {"3_train-tiny-RL_PMC", "4_evaluate-tiny-RL_PMC", "5_results", "6_audit"}
    answers = {path: path.stat().st_mtime_ns for path in home.rglob("rollout.jsonl")}
    ran, out = run(own_run)
    assert set(ran) == coming, "what status said would run"
    assert "step 2 of 2" not in out and {path: path.stat().st_mtime_ns for path in home.rglob("rollout.jsonl")} == answers, "notebooks are run again; nothing is trained or asked again"


def test_what_a_verb_executed_with_other_keys_is_executed_again(own_run):
    "Else a run would train on the fewer questions of `curate train_limit=8`, and call everything done."
    alone = lambda *words: python("-m", "medvlthinker.app.cli", "step", "1_data", *SMALL, *words, cwd=own_run / "project", **in_copy(own_run))
    assert alone("max_pixels=50000").returncode == 0
    assert re.search("1_data +stale .* it was executed by itself, with other keys", out := status(own_run)[1]), out
    assert alone().returncode == 0 and "1_data" not in due(own_run), "with the run's own keys it is what a run would make"


def test_a_model_with_a_blank_in_its_path_and_questions_that_are_edited(own_run):
    "Both are the user's own; a model or a key that changes is no reason to show the old numbers."
    shutil.copytree(own_run / "home" / "smoke" / "checkpoints" / "tiny", model := own_run / "mein modell ä")
    (own_run / "chest").mkdir()
    (questions := own_run / "chest" / "test.csv").write_text("question,answer_label\nIs it?,A\nIs it not?,B\n")
    (own_run / "mine.py").write_text("""from medvlthinker.data.benchmarks import register_benchmark
from medvlthinker.data.readers import DatasetLayout
register_benchmark("chest", "chest", DatasetLayout("test.csv", "", lambda row, where: {"options": {"A": "Yes", "B": "No"}, **row}))
""")
    step = f"4_evaluate-{folder_name(str(model))}"
    words = (f"extend={own_run / 'mine.py'}", "benchmark=chest", f"models={model}", "recipes=")
    out = run(own_run, *words, "-j", "1", f"notebooks/{step}.ipynb")[1]
    assert f"step 2 of 2  {step}: done in" in out, out
    lines = lambda: {line.split("  ")[0]: line for line in status(own_run, *words)[1].splitlines()}
    assert " done " in lines()["1_data"] and " done " in lines()[step]
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    found = lines()
    assert " done " in found["1_data"] and re.search("Updated input files: .*config.json", found[step])
    questions.write_text(questions.read_text().replace("not?,B", "not?,A"))
    found = lines()
    assert re.search("Updated input files: .*test.csv", found["1_data"]) and "notebooks/1_data.ipynb" in found[step]


def test_killed_interrupted_and_called_again(own_run):
    "SIGKILL, and then Ctrl-C, to the whole process group while it runs; the next call goes on, and the results are those of a run without either."
    folder, before = own_run, own_run / "home" / "smoke" / "results" / "synthetic" / "tiny" / "evaluation.json"
    error = own_run / "error"
    counts = json.loads(before.read_text())["counts"]
    shutil.move(folder / "home" / "smoke" / "checkpoints" / "tiny", folder / "tiny")
    shutil.rmtree(folder / "home")
    shutil.move(folder / "tiny", folder / "home" / "smoke" / "checkpoints" / "tiny")

    def begin(word: str) -> subprocess.Popen:
        "Start a run, and wait for the first process with this word in its command line."
        words = [sys.executable, "-m", "medvlthinker.app.cli", "run", *SMALL]
        environment = os.environ | {key: str(value) for key, value in in_copy(folder).items()}
        with error.open("w") as file:
            process = subprocess.Popen(words, cwd=folder / "project", env=environment,
                                       stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
        lines = lambda: at_work(folder / "home").values()
        until(lambda: any(word in line for line in lines()), process, error)
        return process

    process = begin("ipykernel")
    unfinished = folder / "home" / "smoke" / "notebooks" / "1_data.running.ipynb"
    running = lambda: unfinished.exists() and '"status": "running"' in unfinished.read_text()
    until(running, process, error)  # papermill writes when it begins a cell
    assert status(folder, at_work=True)[0]["1_data"] == "unfinished"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not at_work(folder / "home"))  # a kernel looks after its parent once a second
    states, out = status(folder)
    assert states["1_data"] == "unfinished" and "1_data.running.ipynb" in out and "first 1_data" in out, out

    process = begin("medvlthinker.app.cli rollout")
    os.killpg(process.pid, signal.SIGINT)
    code, said = process.wait(120), "interrupted; the same command goes on where this one stopped."
    assert (code, error.read_text()) == (130, f"medvlthinker: {said}\n")
    assert at_work(folder / "home") == {}, "neither a kernel nor what it had started is left"
    assert "unfinished" in status(folder)[0].values()
    assert "4_evaluate-tiny" in run(folder, *EVALUATE)[0] and json.loads(before.read_text())["counts"] == counts


def test_a_failed_notebook_leaves_its_partial_copy_and_a_sentence(own_run):
    source, notebooks = own_run / "project" / "nbs" / "paper" / "1_data.ipynb", own_run / "home" / "smoke" / "notebooks"
    shutil.rmtree(own_run / "home")
    notebook = json.loads(source.read_text())
    notebook["cells"].insert(4, {"cell_type": "code", "id": "broken", "metadata": {}, "outputs": [], "execution_count": None, "source": "1 / 0"})
    source.write_text(json.dumps(notebook))
    says(call(own_run, "run"), "ZeroDivisionError: division by zero", "1_data stopped there", "1_data.running.ipynb")
    assert [path.name for path in notebooks.glob("*.ipynb")] == ["1_data.running.ipynb"], "what waits for a failed step does not run"
    states, out = status(own_run)
    assert states == {name: "failed" if name == "1_data" else "missing" for name in STEPS}
    assert f"ZeroDivisionError: division by zero ({notebooks}/1_data.running.ipynb)\n" in out, out


@pytest.mark.parametrize("words, part", [
    ("smoke benchmark=vqa_red", "vqa_rad"), ("smoke recipes=3B-RL", "3B-RL_m23k"), ("smoke --dryrum", "unrecognized arguments: --dryrum"),
    ("smoke -j 1 limit=5", "limit=5 stands behind an option"), ("smoke -n -j 1 limit=5", "limit=5 stands behind an option"), ("smoke -n -j 1 notebooks/7_none.ipynb", "No rule to produce notebooks/7_none.ipynb"),
    ("smoke data_dir=no/such/folder", "no/such/folder"), ("paper --dry-run nodes=4", "nodes=4 needs engine=ray")])
def test_bad_words(words, part, home):
    with pytest.raises(UserError) as said:
        cli.main(["run", *words.split()])
    assert part in str(said.value) and "\n" not in str(said.value)


MACHINES = {  # keys -> what reaches models that answer, the call of verl, and accelerate
    "one GPU": ({"gpus": 1, "dtype": "float16", "gpu_memory_utilization": 0.5}, {"dtype": "float16", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5},
                ["trainer.n_gpus_per_node=1", "trainer.nnodes=1", "rollout.dtype=float16", "rollout.tensor_model_parallel_size=1", "rollout.gpu_memory_utilization=0.5", "param_dtype=fp16"],
                {"num_machines": 1, "num_processes": 1, "mixed_precision": "fp16"}),
    "four nodes": ({"gpus": 4, "nodes": 4, "engine": "ray", "tensor_parallel": 4, "dtype": "float32", "gpu_memory_utilization": 0.7}, {"dtype": "float32", "tensor_parallel_size": 4, "gpu_memory_utilization": 0.7},
                   ["trainer.n_gpus_per_node=4", "trainer.nnodes=1", "rollout.dtype=float32", "rollout.tensor_model_parallel_size=4", "rollout.gpu_memory_utilization=0.7", "param_dtype=fp32"],
                   {"num_machines": 1, "num_processes": 4, "mixed_precision": "no"})}  # four nodes answer; a recipe takes its own


@pytest.mark.parametrize("machine", MACHINES)
def test_hardware_reaches_every_command_of_the_whole_paper(machine, home):
    "Every step in order, with its hardware and a command that can be pasted anywhere; nothing is touched."
    keys, asked, learnt, shared = MACHINES[machine]
    paper = load_profile("paper", **keys)
    plans = dict(part.split("\n", 1) for part in dry_run(paper, {}))
    assert [*plans] == [step.name for step in steps(paper)] and len([name for name in plans if name.startswith("3_train")]) == 13
    for name, text in plans.items():
        assert re.search(r"\n  hardware .*\n  command ", text), text
        for line in re.findall(r"^(?:  command   |            )(.*medvlthinker.app.cli.*)$", text, re.M):
            words = shlex.split(line)
            assert os.access(words[0], os.X_OK) and {f"{key}={value}" for key, value in keys.items() if value != getattr(load_profile("paper"), key)} <= {*words}, line
        if name.startswith(("3_train", "4_evaluate")) and "32B" not in name:
            assert f"nodes {keys.get('nodes', 1) if name[0] == '4' else 1}, GPUs a node {keys['gpus']}\n" in text
    for part in learnt:
        assert part in plans["3_train-3B-RL_m23k"], f"verl lacks {part}:\n{plans['3_train-3B-RL_m23k']}"
    assert asked.items() <= vllm_arguments(paper, paper.tensor_parallel or 1).items() and shared.items() <= accelerate_config(get_recipe("3B-SFT_m23k"), paper).items()
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_full_disk(small_disk):
    "The whole pipeline on a file system of one megabyte: one sentence, exit code 2."
    with small_disk("1m") as disk:
        says(python("-m", "medvlthinker.app.cli", "run", "smoke", MEDVLTHINKER_HOME=disk), "No space left on device", "what was finished before is kept")
        for path in disk.rglob("*.parquet"):
            assert list(SampleFile(path)), "what is there is whole"


def test_real_radiographs(real_data, warm_home, tmp_path):
    "The README's command for real images: papermill on the evaluation notebook, VQA-RAD from a local folder, every usable closed question; each is asked once."
    out = tmp_path / "out.ipynb"
    done = python("-m", "papermill", "nbs/paper/4_evaluate.ipynb", out, "-k", "python3", "-p", "benchmark", "vqa_rad", "-p", "data_dir", real_data, "-p", "repeats", 0, MEDVLTHINKER_HOME=warm_home)
    succeeded(done)
    record = json.loads(next(warm_home.rglob("evaluation.json")).read_text())
    (right, n), = record["counts"].values()
    assert record["source"] == "local" and n == 338, "every usable closed question of the 60 images: see 15_benchmarks"
    assert "256 rows of its source are left out" in out.read_text(), "and the notebook says where the others are"
    shown = "".join("".join(o.get("data", {}).get("text/plain", "")) for c in json.loads(out.read_text())["cells"] for o in c.get("outputs", []))
    row = next(line.split() for line in shown.splitlines() if line.startswith("vqa_rad_closed"))
    assert [float(cell) for cell in row[1:4]] == [right, n, round(100 * right / n, 2)] and float(row[4]) < float(row[3]) < float(row[5])


PAPER = ["1_data", "2_difficulty", "3_train", "4_evaluate", "5_results", "6_audit"]


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_explained_and_unknown_ones_refused(name):
    "What `papermill --help-notebook` prints, and what the notebook's own first cells say to a parameter that nobody knows."
    from papermill.inspection import inspect_notebook

    path = ROOT / "nbs" / "paper" / f"{name}.ipynb"
    assert all(len(each["help"].split()) > 4 for each in inspect_notebook(str(path)).values())
    first, second, *_ = (cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
    names: dict = {}
    exec("".join(first["source"]), names)
    with pytest.raises(UserError, match=r"^Unknown parameter gpu; did you mean gpus\?"):
        exec("".join(second["source"]), names | {"gpu": 1})  # as papermill writes it into the notebook


def test_a_folder_of_test_sets_alone_is_enough_to_evaluate(tmp_path):
    "Without a training corpus there is no difficulty to measure, and the rest runs; whoever names a corpus is told that it is not there."
    (tmp_path / "vqa_rad" / "images_dev").mkdir(parents=True)
    assert [step.notebook for step in steps(load_profile("smoke", data_dir=str(tmp_path)))] == ["1_data", "4_evaluate", "5_results", "6_audit"]
    assert "2_difficulty" in [step.notebook for step in steps(load_profile("smoke", data_dir=str(tmp_path), corpus="m23k"))]
