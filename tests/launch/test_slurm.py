"""Under a real SLURM controller with two nodes: the same losses; and a job that outlives its time limit."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, child_environment, command, losses_of, run_command, write_config
from vlm_dist.launched import port_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    settings["training"] = {"steps": 6, "global_batch": 4, "micro_batch": 2}
    return str(write_config(settings, tmp_path))


def environment(slurm: dict[str, str]) -> dict[str, str]:
    return child_environment(SLURM_CONF=slurm["SLURM_CONF"], VLM_DIST_PYTHON=sys.executable)


def test_srun_on_two_nodes_gives_the_losses_of_one_process(slurm, config, tmp_path):
    assert run_command("train", config, "name=plain").returncode == 0
    """After a look at both nodes by the same command."""
    command = ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=1", "--open-mode=truncate", f"--output={tmp_path}/job.log"]
    for more in (["--preflight"], []):
        words = [*command, "launch/slurm/train.sbatch", config, "name=slurm", *more]
        result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(slurm), check=False, timeout=240)
        log = (tmp_path / "job.log").read_text()
        assert result.returncode == 0 and log.count("fit to train on these nodes: 0 bad") == len(more), log
    runs = tmp_path / "runs"
    assert losses_of(runs / "slurm") == pytest.approx(losses_of(runs / "plain"), rel=1e-4)
    assert json.loads((runs / "slurm" / "environment.json").read_text())["ranks"] == 2 and "2 tasks, start 1" in log


def test_an_array_of_configurations_and_a_mistake(slurm, config, tmp_path):
    """Each task takes the configuration of its number; a mistake of two ranks is told once and ends it with its exit code, and so does a
    number without one."""
    other = tmp_path / "other.yaml"
    other.write_text("name: other\n")
    command = [
        "sbatch",
        "--wait",
        "--array=0-2",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/job-%a.log",
        "launch/slurm/train.sbatch",
        f"{config},{other}",
        "optim.lrr=1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(slurm), check=False, timeout=240)
    first, second, third = ((tmp_path / f"job-{task}.log").read_text() for task in range(3))
    assert result.returncode == 2 and first.count("optim.lrr") == 1 and config in first, first
    assert str(other) in second and "has no configuration; 2 were given" in third


def test_a_job_saves_before_its_limit_queues_again_and_ends(slurm, config, tmp_path):
    """SIGUSR1 in mid-run, as SLURM sends before the time limit: checkpoint, requeue, continue; the losses are those of one long run."""
    more = ["training.steps=60", "checkpoint.save_every=1000"]
    assert run_command("train", config, "name=plain", *more).returncode == 0
    command = ["sbatch", "--parsable", f"--output={tmp_path}/job.log", "launch/slurm/train.sbatch", config, "name=limited", *more]
    job = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(slurm), check=True).stdout.strip()
    metrics = tmp_path / "runs" / "limited" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, tmp_path)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=environment(slurm), check=True)
    summary = tmp_path / "runs" / "limited" / "summary.json"
    wait_for(lambda: summary.exists() and json.loads(summary.read_text())["ended"] == "finished", tmp_path)
    log = (tmp_path / "job.log").read_text()
    assert "the time limit is near; saving" in log and "saved; queueing again" in log and "start 2" in log
    assert losses_of(tmp_path / "runs" / "limited") == pytest.approx(losses_of(tmp_path / "runs" / "plain"), rel=1e-4)


def test_a_rank_has_eight_cpus_and_a_port(slurm, config, tmp_path):
    """SLURM gives one CPU by default; and srun takes the number from the job only when it is handed on. The port is the job's, or the
    user's; what is none is refused."""
    script = tmp_path / "cpus.sh"
    script.write_text("echo a rank has $SLURM_CPUS_PER_TASK$RANK, of job $SLURM_JOB_ID, at $MASTER_PORT\n")
    cases = (([], "", 8, 0), (["--cpus-per-task=3"], "31234", 3, 0), ([], "65536", 0, 2), ([], "node-1", 0, 2))
    for number, (more, port, cpus, code) in enumerate(cases):
        log = tmp_path / f"job-{number}.log"
        words = ["sbatch", "--wait", f"--output={log}", *more, "launch/slurm/train.sbatch", config]
        there = (
            environment(slurm)
            | {"VLM_DIST_PYTHON": "/bin/sh", "VLM_DIST_TRAIN": str(script), "RANK": "0", "WORLD_SIZE": "2"}
            | ({"VLM_DIST_PORT": port} if port else {})
        )
        done = subprocess.run(words, capture_output=True, cwd=ROOT, env=there, check=False, timeout=240)
        told = log.read_text()
        assert done.returncode == code, told
        if code:
            assert f"VLM_DIST_PORT='{port}' is no port, expected a whole number of 1 to 65535" in told
            continue
        job = re.search(rf"a rank has {cpus}, of job (\d+), at (\d+)\n", told)
        assert job is not None and job[2] == (port or str(port_of(job[1]))) and f"ranks meet at 127.0.0.1:{job[2]}\n" in told, told


def wait_for(condition, folder) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError((folder / "job.log").read_text() if (folder / "job.log").exists() else "no log")


def test_submitted_from_another_folder(slurm, config, tmp_path):
    """What `vlm-dist launch --slurm` printed in the repository (without GPUs: this SLURM has none). And a Python that is not there."""
    printing = command("launch", config, "--slurm", "--gpus", "1", "--print")
    told = subprocess.run(printing, capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=True)
    words = [word for word in shlex.split(told.stdout) if not word.startswith("--gpus-per-node")]
    words[1:1] = ["--wait", f"--output={tmp_path}/job.log"]
    there = child_environment(SLURM_CONF=slurm["SLURM_CONF"])
    result = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, env=there, check=False, timeout=240)
    log = (tmp_path / "job.log").read_text()
    assert result.returncode == 0 and "all checks passed" in log, log
    words = ["sbatch", "--wait", f"--output={tmp_path}/none.log", str(ROOT / "launch/slurm/train.sbatch"), config]
    result = subprocess.run(words, cwd=tmp_path, env=there, check=False, timeout=240)
    assert result.returncode == 6 and "set VLM_DIST_PYTHON and VLM_DIST_TRAIN to absolute paths" in (tmp_path / "none.log").read_text()


def test_what_a_new_start_does_not_mend_is_not_queued_again(slurm, tmp_path):
    """After the signal before the limit; the training is a script that ends with the exit code of a disk that fails."""
    script = tmp_path / "fails.sh"
    script.write_text("trap 'exit 5' TERM\ntouch $2.begun\nwhile true; do sleep 0.1; done\n")
    there = child_environment(SLURM_CONF=slurm["SLURM_CONF"], VLM_DIST_PYTHON="bash", VLM_DIST_TRAIN=str(script))
    words = ["sbatch", "--parsable", f"--output={tmp_path}/job.log", "launch/slurm/train.sbatch", f"{tmp_path}/c.yaml"]
    job = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=there, check=True).stdout.strip()
    wait_for(lambda: (tmp_path / "c.yaml.begun").exists(), tmp_path)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=there, check=True)
    wait_for(lambda: "ended with exit code 5, which a new start does not mend" in (tmp_path / "job.log").read_text(), tmp_path)
    assert "queueing again" not in (tmp_path / "job.log").read_text()


def test_a_limit_that_comes_while_the_model_is_loaded(slurm, config, tmp_path):
    """Every start would end there: it is told, and not queued again."""
    words = ["sbatch", "--parsable", f"--output={tmp_path}/job.log", "launch/slurm/train.sbatch", config, "name=short"]
    job = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(slurm), check=True).stdout.strip()
    wait_for(lambda: (tmp_path / "job.log").exists() and "start 1" in (tmp_path / "job.log").read_text(), tmp_path)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=environment(slurm), check=True)
    wait_for(lambda: "the time limit came before this start had saved anything" in (tmp_path / "job.log").read_text(), tmp_path)
    wait_for(lambda: "ExitCode=2:0" in told_of(job, slurm), tmp_path)
    assert "JobState=FAILED" in told_of(job, slurm) and "Restarts=0" in told_of(job, slurm)


def told_of(job: str, slurm: dict[str, str]) -> str:
    words = ["scontrol", "show", "job", job]
    return subprocess.run(words, capture_output=True, text=True, env=environment(slurm), check=True).stdout
