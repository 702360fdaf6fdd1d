"""Each step as a job of Slurm. A made-up sbatch runs the script that it is given; sacct and srun stand beside it."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, stand_in, until

PROGRAMS = {
    "sbatch": """printf '%s ' "$@" >> {folder}/asked
[ -z "${REFUSES:-}" ] || exit 1
while [ $# -gt 0 ]; do
    case "$1" in
        --wrap=*) script=${1#--wrap=} ;;
        --output) log=$2; shift ;;
    esac
    shift
done
number=$(($(cat {folder}/last 2> /dev/null || echo 100) + 1)); echo $number > {folder}/last
printf '%s\\n' "$script" > {folder}/$number.script
[ -z "${SLOW:-}" ] || sleep 300
(SLURM_JOB_ID=$number bash -c "$script" > "${log/\\%j/$number}" 2>&1 && echo COMPLETED > {folder}/$number || echo FAILED > {folder}/$number) < /dev/null &
echo $number""",
    "sacct": """case "$*" in *Account*) echo nobody; exit ;; esac
for script in {folder}/*.script; do
    number=$(basename "$script" .script)
    echo "$number|$(cat {folder}/$number 2> /dev/null || echo RUNNING)"
done""",
    "srun": """while case "$1" in -*) true ;; *) false ;; esac; do shift; done
exec "$@\"""",
    "sinfo": "echo PARTITION; echo all*", "scancel": """printf '%s ' "$@" >> {folder}/cancelled""", "sacctmgr": "echo nobody", "sshare": "echo nobody"}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    "The folder in which the made-up scheduler keeps scripts and states."
    (folder := tmp_path / "jobs").mkdir()
    scripts = {name: text.replace("{folder}", str(folder)) for name, text in PROGRAMS.items()}
    programs = stand_in(tmp_path / "bin", **scripts)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("USER", "somebody")
    return folder


@pytest.mark.heavy
def test_a_step_is_a_job(slurm, warm_home):
    done = python("-m", "medvlthinker.app.cli", "run", "smoke", "limit=2", "train_limit=6", "recipes=", "--executor", "slurm", "-j", "1",
                  "--slurm-init-seconds-before-status-checks", "5", "notebooks/1_data.ipynb")
    assert done.returncode == 0, done.stdout + done.stderr + (warm_home / "smoke" / "logs" / "snakemake.log").read_text()
    assert "step 1 of 1  1_data: done in" in done.stdout and (warm_home / "smoke" / "notebooks" / "1_data.ipynb").is_file()
    script, = slurm.glob("*.script")
    assert "snakemake" in script.read_text() and (slurm / script.stem).read_text().strip() == "COMPLETED"
    assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=8", "--mem", "32000"} <= {*(slurm / "asked").read_text().split()}
    assert "1_data           done" in python("-m", "medvlthinker.app.cli", "status", "smoke", "limit=2", "train_limit=6", "recipes=").stdout


@pytest.mark.heavy
def test_a_step_on_gpus_gets_one_node_with_all_of_them(slurm, warm_home, monkeypatch):
    "In one task, with the cores and the memory that the README names for the 7B: Snakemake's own words would be a task a GPU, one core and 1 GB."
    (notebooks := warm_home / "smoke" / "notebooks").mkdir()
    (notebooks / "1_data.ipynb").touch()
    monkeypatch.setenv("REFUSES", "1")
    done = python("-m", "medvlthinker.app.cli", "run", "smoke", "gpus=8", "engine=vllm", "recipes=", "--allowed-rules", "evaluate",
                  "--executor", "slurm", "notebooks/4_evaluate-tiny.ipynb")
    assert done.returncode and "Traceback" not in done.stderr
    asked = (slurm / "asked").read_text().split()
    assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=64", "--gpus-per-node=8"} <= {*asked} and int(asked[asked.index("--mem") + 1]) > 265_000


@pytest.mark.heavy
def test_an_interrupted_run_cancels_its_jobs(slurm, warm_home):
    "Else they go on, and the next start submits the same steps beside them."
    run = subprocess.Popen([sys.executable, "-m", "medvlthinker.app.cli", "run", "smoke", "limit=2", "train_limit=6", "recipes=", "--executor", "slurm", "-j", "1",
                            "notebooks/1_data.ipynb"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = warm_home / "smoke" / "logs" / "snakemake.log"
    until(lambda: log.exists() and "submitted with SLURM jobid 101" in log.read_text(), run, log)
    run.send_signal(signal.SIGINT)
    assert "The jobs of this run are cancelled." in run.communicate(timeout=120)[0] and run.returncode == 130
    assert "101" in (slurm / "cancelled").read_text().split()
    until((slurm / "101").exists)  # the made-up scheduler only notes who is to be cancelled


@pytest.mark.heavy
def test_a_job_that_is_being_submitted_is_cancelled_too(slurm, warm_home):
    "Snakemake has no number of it yet, and cancels by number; it bears the name of the run."
    run = subprocess.Popen([sys.executable, "-m", "medvlthinker.app.cli", "run", "smoke", "limit=2", "train_limit=6", "recipes=", "--executor", "slurm", "-j", "1",
                            "--slurm-init-seconds-before-status-checks", "5", "notebooks/1_data.ipynb"], cwd=ROOT, env={**os.environ, "SLOW": "1"}, stdout=subprocess.PIPE, text=True)
    until((slurm / "101.script").exists, run)
    run.send_signal(signal.SIGINT)
    assert "The jobs of this run are cancelled." in run.communicate(timeout=120)[0] and run.returncode == 130
    asked = (slurm / "asked").read_text().split()
    assert f"--name={asked[asked.index('--job-name') + 1]}" in (slurm / "cancelled").read_text().split()


@pytest.mark.heavy
def test_the_sentence_of_a_step_that_failed_as_a_job_is_shown(slurm, warm_home, tmp_path):
    done = python("-m", "medvlthinker.app.cli", "run", "smoke", "limit=2", "models=tiny", "recipes=", f"data_dir={tmp_path}", "--executor", "slurm", "-j", "1",
                  "--slurm-init-seconds-before-status-checks", "5", "notebooks/1_data.ipynb")
    assert done.returncode == 2 and "holds no copy of pmc_vqa" in done.stderr and "has died" not in done.stderr, done.stderr
