"""The paper at laptop scale, end to end: a second run does nothing, an edit re-runs what depends on it, a kill loses nothing, bad input gets a sentence."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, python, says
from medvlthinker.sample import read_samples


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    "A copy of the project, in which modules can be edited."
    files = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    copy = tmp_path_factory.mktemp("copy") / "project"
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def env(tree, warm_tiny, tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("runs")
    shutil.copytree(warm_tiny, home / "smoke" / "checkpoints" / "tiny")
    return {"MEDVLTHINKER_HOME": home, "PYTHONPATH": tree, "BROWSER_PATH": "none"}  # pictures have their own tests


def run(tree, env, *words):
    done = python("-m", "medvlthinker.pipeline", "run", "smoke", "limit=6", "train_limit=6", "recipes=", *words, cwd=tree, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines() if " runs: " in line], done.stdout


def test_first_run_and_what_makes_it_run_again(tree, env):
    words = ("train_limit=32", "recipes=tiny-SFT_m23k", "max_steps=2")
    ran, out = run(tree, env, *words)
    assert ran[0] == "1_data" and set(ran[-2:]) == {"5_results", "6_audit"}, ran
    assert set(ran[1:-2]) == {"2_difficulty", "3_train-tiny-SFT_m23k", "4_evaluate-tiny", "4_evaluate-tiny-SFT_m23k"} and ran.index("3_train-tiny-SFT_m23k") < ran.index("4_evaluate-tiny-SFT_m23k")
    assert "tiny-SFT_m23k: step 2 of 2" in out and "nothing medical" in out and "7B" in out, "the training can be watched, and the table is printed, with its warning, beside the paper's rows"
    home = Path(env["MEDVLTHINKER_HOME"]) / "smoke"
    assert sorted(path.stem for path in (home / "notebooks").glob("*.ipynb")) == sorted(ran)

    ran, out = run(tree, env, *words)
    assert ran == [] and "nothing ran" in out
    with open(tree / "medvlthinker" / "fit.py", "a") as module:
        module.write("\n# edited\n")
    ran, out = run(tree, env, *words)
    assert "3_train-tiny-SFT_m23k" in ran and "step 2 of 2" not in out, "the notebook is run again, the training is not"
    run(tree, env)

    os.utime(tree / "medvlthinker" / "report.py")
    os.utime(tree / "nbs" / "paper" / "5_results.ipynb")
    assert run(tree, env)[0] == [], "a touched file is the same file"

    shards = {path: path.stat().st_mtime_ns for path in home.rglob("shard-*")}
    with open(tree / "medvlthinker" / "report.py", "a") as module:
        module.write("\n# edited\n")
    assert set(run(tree, env)[0]) == {"5_results", "6_audit"}, "only what imports the edited module"
    with open(tree / "medvlthinker" / "grade.py", "a") as module:
        module.write("\n# edited\n")
    assert "4_evaluate-tiny" in run(tree, env)[0]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("shard-*")} == shards, "grading anew asks no model"

    (home / "results" / "table.txt").unlink()
    ran = run(tree, env)[0]  # a step that ran beside may count it among its own, and runs again too
    assert {"5_results"} <= set(ran) <= {"5_results", "6_audit"}, "a lost table is made again"


def test_killed_and_called_again(tree, env, tmp_path):
    "SIGKILL to the whole process group while it runs; the next call finishes, and the results are those of a run without a kill."
    home = tmp_path / "killed"
    shutil.copytree(Path(env["MEDVLTHINKER_HOME"]) / "smoke" / "checkpoints" / "tiny", home / "smoke" / "checkpoints" / "tiny")
    environment = {**os.environ, **{key: str(value) for key, value in env.items()}, "MEDVLTHINKER_HOME": str(home)}
    for wait in (4, 12):
        process = subprocess.Popen([sys.executable, "-m", "medvlthinker.pipeline", "run", "smoke", "limit=6", "train_limit=6", "recipes="], cwd=tree, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(tree, {**env, "MEDVLTHINKER_HOME": home})
    counts = [json.loads(next(path.rglob("evaluation.json")).read_text())["counts"] for path in (home, Path(env["MEDVLTHINKER_HOME"]))]
    assert counts[0] == counts[1]


def test_interrupted_notebook_leaves_a_wreck_and_a_sentence(tree, env, tmp_path):
    source = tree / "nbs" / "paper" / "1_data.ipynb"
    before = source.read_text()
    notebook = json.loads(before)
    notebook["cells"].insert(4, {"cell_type": "code", "id": "broken", "metadata": {}, "outputs": [], "execution_count": None, "source": "1 / 0"})
    try:
        source.write_text(json.dumps(notebook))
        done = python("-m", "medvlthinker.pipeline", "run", "smoke", "limit=6", "train_limit=6", "recipes=", cwd=tree, **{**env, "MEDVLTHINKER_HOME": tmp_path})
        says(done, "ZeroDivisionError: division by zero", "1_data stopped there", "1_data.running.ipynb")
        assert (tmp_path / "smoke" / "notebooks" / "1_data.running.ipynb").is_file()
        assert not (tmp_path / "smoke" / "notebooks" / "5_results.ipynb").exists(), "what waits for a failed step does not run"
    finally:
        source.write_text(before)


@pytest.mark.parametrize("words, parts", [
    (["smke"], ["No profile 'smke'", "known are smoke, mini, paper"]),
    (["smoke", "gpu=1"], ["Unknown profile key gpu", "gpus"]),
    (["smoke", "limit=many"], ["limit wants a whole number, not 'many'"]),
    (["smoke", "benchmark=vqa_red"], ["vqa_red", "vqa_rad"]),
    (["smoke", "mini"], ["One profile at a time"]),
    (["smoke", "recipes=3B-RL"], ["No recipe '3B-RL'", "3B-RL_m23k"]),
    (["smoke", "--dryrun"], ["Unknown option --dryrun", "--dry-run"]),
    (["smoke", "data_dir=no/such/folder"], ["no/such/folder"]),
])
def test_bad_words(words, parts, home):
    says(python("-m", "medvlthinker.pipeline", "run", *words), *parts)


@pytest.mark.parametrize("words, gpus, per_node", [(["gpus=1", "tensor_parallel=1", "recipes=3B-RL_m23k"], "1 node of 1 GPU", 1), (["gpus=8"], "1 node of 8 GPUs", 8), (["gpus=4", "nodes=4"], "4 nodes of 4 GPUs", 4)])
def test_dry_run_of_the_whole_paper(words, gpus, per_node, home):
    "Every command of the paper, in order, with its hardware, what it reads and writes; nothing is touched."
    done = python("-m", "medvlthinker.pipeline", "run", "paper", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    steps = dict(part.split("\n", 1) for part in done.stdout.split("\n\n") if part.strip())
    trained = [name for name in steps if name.startswith("3_train")]
    assert len(trained) == (1 if any("recipes" in word for word in words) else 13)
    written = set()
    for name, text in steps.items():
        lines = dict(line.strip().split(None, 1) for line in text.split("\n")[:5])
        assert {"hardware", "reads", "writes", "notebook"} <= lines.keys(), name
        written.update(lines["writes"].split(", "))
        for read in lines["reads"].split(", "):  # what is read comes from the hub or from an earlier step
            assert read.startswith(("Qwen/", "the sources", "results/")) or any(read.startswith(place.split("*")[0]) for place in written), f"{name} reads {read}"
        if name.startswith("3_train") and "32B" not in name:
            assert lines["hardware"] == gpus
        if "RL" in name.split("-")[-1] and name.startswith("3_train"):
            assert f"trainer.n_gpus_per_node={per_node}" in text and f"trainer.nnodes={4 if 'nodes=4' in words or '32B' in name else 1}" in text, name
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_bad_words_through_the_script(home):
    done = subprocess.run(["./reproduce.sh", "smoke", "gpu=1"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MEDVLTHINKER_HOME": str(home)})
    says(done, "Unknown profile key gpu")


def test_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    says(python("-m", "medvlthinker.pipeline", "run", "smoke", MEDVLTHINKER_HOME=tmp_path / "file"), "cannot be made", "MEDVLTHINKER_HOME")


def test_full_disk(tmp_path):
    "The whole pipeline on a file system of one megabyte: one sentence, exit code 2."
    (tmp_path / "disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root); the full disk is not tested")
    try:
        says(python("-m", "medvlthinker.pipeline", "run", "smoke", MEDVLTHINKER_HOME=tmp_path / "disk"), "No space left on device", "what was finished before is kept")
        for path in (tmp_path / "disk").rglob("*.parquet"):
            assert read_samples(path), "what is there is whole"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_real_radiographs(real_data, warm_home, tmp_path):
    "The README's command for real images: papermill on the evaluation notebook, VQA-RAD from a local folder, every usable closed question."
    out = tmp_path / "out.ipynb"
    papermill = Path(sys.executable).with_name("papermill")
    done = subprocess.run([papermill, "nbs/paper/4_evaluate.ipynb", out, "-k", "python3", "-p", "benchmark", "vqa_rad", "-p", "data_dir", real_data],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MEDVLTHINKER_HOME": str(warm_home)})
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(next(warm_home.rglob("evaluation.json")).read_text())
    (right, n), = record["counts"].values()
    assert record["source"] == "local" and n == 338, "every usable closed question of the 60 images: see 13_benchmark"
    shown = "".join("".join(o.get("data", {}).get("text/plain", "")) for c in json.loads(out.read_text())["cells"] for o in c.get("outputs", []))
    row = next(line.split() for line in shown.splitlines() if line.startswith("vqa_rad_closed"))
    assert [float(cell) for cell in row[1:4]] == [right, n, round(100 * right / n, 2)] and float(row[4]) < float(row[3]) < float(row[5])


def test_unknown_parameter_of_a_notebook_is_refused(home, tmp_path):
    papermill = Path(sys.executable).with_name("papermill")
    done = subprocess.run([papermill, "nbs/paper/1_data.ipynb", tmp_path / "out.ipynb", "-k", "python3", "-p", "gpu", "1"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "MEDVLTHINKER_HOME": str(home)})
    assert done.returncode and "Unknown profile key gpu; known are data, data_dir" in done.stderr


def test_a_folder_of_test_sets_alone_is_enough_to_evaluate(tmp_path):
    "Without a training corpus there is no difficulty to measure, and the rest runs; whoever names a corpus is told that it is not there."
    from medvlthinker.config import load_profile
    from medvlthinker.pipeline import steps

    (tmp_path / "vqa_rad" / "images_dev").mkdir(parents=True)
    assert [step.notebook for step in steps(load_profile("smoke", data_dir=str(tmp_path)))] == ["1_data", "4_evaluate", "5_results", "6_audit"]
    assert "2_difficulty" in [step.notebook for step in steps(load_profile("smoke", data_dir=str(tmp_path), corpus="m23k"))]
