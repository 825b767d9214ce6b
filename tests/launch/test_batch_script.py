"""launch/slurm/train.sbatch by itself, where srun and its kin are short scripts: what it hands to the ranks, and signals that come early.
Under a real SLURM: test_slurm.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment
from vlm_dist.cli.main import main

SCRIPT = str(ROOT / "launch" / "slurm" / "train.sbatch")
SRUN = 'shift\nenv | grep -E "^(RANK|WORLD_SIZE|LOCAL_RANK|TORCHELASTIC|MASTER_ADDR)" | sort\necho "srun $*"\n'
LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "a"}


@pytest.fixture
def job(tmp_path):
    """A function that runs the script with such commands; returns its exit code and what it printed."""

    def run(srun: str = SRUN, scontrol: str = "case $2 in hostnames) echo node-a ;; esac\n", **changes: str) -> tuple[int, str]:
        for name, text in (("srun", srun), ("scontrol", scontrol), ("scancel", "exit 1\n")):
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
            (tmp_path / name).chmod(0o755)
        there = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-a", "VLM_DIST_PYTHON": "bash", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        words = ["bash", SCRIPT, str(tmp_path / "my.yaml")]
        done = subprocess.run(words, cwd=ROOT, env=child_environment(**there | changes), capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_what_the_shell_has_left_over_reaches_no_rank(job):
    """sbatch hands on the environment it was called in, such as a pod's; the first node's name serves where SLURM knows no address."""
    code, told = job(**LEFT_OVER)
    assert code == 0 and "MASTER_ADDR=node-a\nsrun bash launch/train.py --config " in told
    assert not any(f"\n{name}=" in told for name in LEFT_OVER), told


def test_an_image_has_a_training_of_its_own(job, tmp_path):
    image = tmp_path / "vlm_dist.sif"
    image.write_text("#!/bin/sh\n")
    image.chmod(0o755)
    assert f"srun {image} /app/launch/train.py --config " in job(VLM_DIST_PYTHON=str(image))[1]
    assert f"srun {image} /mine/train.py --config " in job(VLM_DIST_PYTHON=str(image), VLM_DIST_TRAIN="/mine/train.py")[1]


def test_the_signal_before_the_limit_comes_before_training(job):
    """A limit of less than the two minutes: it would come again, and again queue the job."""
    signal = 'for pid in $PPID $(ps -o ppid= -p $PPID); do grep -q train.sbatch "/proc/$pid/cmdline" && kill -USR1 "$pid"; done\n'
    code, told = job(scontrol=f"{signal}sleep 0.1\n")
    assert code == 2 and told.strip().splitlines() == [
        "train.sbatch: the signal before the time limit came before training began; give a longer --time; not queued again"
    ]


@pytest.mark.parametrize("saves", [True, False])
def test_the_signal_comes_as_the_ranks_are_started(job, tmp_path, saves):
    """They are told to end, also where SLURM does not know them yet. The job is queued again if they have saved; else the next start would
    come no further, and the next."""
    scontrol = f"case $1 in requeue) echo requeued >{tmp_path}/requeued; kill $PPID ;; *) echo node-a ;; esac\n"
    touch = 'touch "$VLM_DIST_SAVED"' if saves else f'dirname "$VLM_DIST_SAVED" >{tmp_path}/where'
    code, told = job(srun=f'{touch}\ntrap "exit 143" TERM\nkill -USR1 $PPID\nwhile true; do sleep 0.05; done\n', scontrol=scontrol)
    assert Path(tmp_path / "requeued").exists() == saves
    if not saves:
        assert code == 2 and told.strip().splitlines()[-1] == (
            "train.sbatch: the time limit came before this start had saved anything; give a longer --time; not queued again"
        )
        assert not Path((tmp_path / "where").read_text().strip()).exists()


def launched(capsys, monkeypatch, config: str, python: str | None) -> tuple[int, str]:
    """The exit code and words of `vlm-dist launch --slurm --print` in the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VLM_DIST_PYTHON", raising=False)
    if python is not None:
        monkeypatch.setenv("VLM_DIST_PYTHON", python)
    code = main(["launch", config, "--slurm", "--gpus", "1", "--print"])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_launch_takes_the_python_of_the_nodes(capsys, monkeypatch, tmp_path):
    """One that only they have, and an image, which is no program everywhere; never another one in silence."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    code, told = launched(capsys, monkeypatch, config, "/nodes/only/python")
    assert code == 0 and f"VLM_DIST_PYTHON=/nodes/only/python,VLM_DIST_TRAIN={ROOT}/launch/train.py " in told
    (tmp_path / "x.sif").touch()
    code, told = launched(capsys, monkeypatch, config, str(tmp_path / "x.sif"))
    assert code == 0 and f"VLM_DIST_PYTHON={tmp_path}/x.sif,VLM_DIST_TRAIN=/app/launch/train.py " in told
    code, told = launched(capsys, monkeypatch, config, "no-such-python")
    assert code == 2 and "VLM_DIST_PYTHON: 'no-such-python' is no program here" in told and told.count("\n") == 1


def test_launch_refuses_a_comma(capsys, monkeypatch, tmp_path):
    """The batch script would take the path of the configuration for a list of two."""
    path = tmp_path / "a,b.yaml"
    path.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    code, told = launched(capsys, monkeypatch, str(path), None)
    assert code == 2 and f"'{path}' has a comma in it" in told
    with pytest.raises(SystemExit):
        main(["launch", str(path), "--torchrun", "--port", "x", "--print"])
    assert "--port: 'x' is no whole number of 1 or more" in capsys.readouterr().err
