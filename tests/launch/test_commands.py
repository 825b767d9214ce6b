"""What `vlm-dist launch` makes of addresses, hostfiles and folders, compared with what the launchers themselves do with it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT, child_environment, write_config
from vlm_dist.cli import launch
from vlm_dist.cli.main import main

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
TWO_NODES = ["--nodes", "2", "--gpus", "1", "training.micro_batch=1"]


def printed(capsys, *words: str) -> tuple[int, str, str]:
    """The exit code of `vlm-dist launch WORDS --print`, and what it says."""
    try:
        code = main(["launch", *words, "--print"])
    except SystemExit as ended:
        code = int(str(ended.code))
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("head", ["::1", "[::1]"])
def test_an_address_of_ipv6(capsys, head):
    """Each launcher gets it in its own spelling; torch's own reader of endpoints takes torchrun's."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    code, told, _ = printed(capsys, QUICKSTART, "--torchrun", "--head", head, "--port", "29511", *TWO_NODES)
    words = shlex.split(told)
    assert code == 0 and parse_rendezvous_endpoint(words[words.index("--rdzv-endpoint") + 1], 1) == ("::1", 29511)
    assert "--master_addr ::1 " in printed(capsys, QUICKSTART, "--deepspeed", "--head", head, *TWO_NODES)[1]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("[::1]:29500", "'[::1]:29500' has a port; give --head ::1 --port 29500"),
        ("node-a:29500", "'node-a:29500' has a port; give --head node-a --port 29500"),
        ("fe80::1", "'fe80::1' holds on one link alone"),
        ("fe80::1%eth0", "'fe80::1%eth0' holds on one link alone"),
        ("fd00::z", "'fd00::z' is no IPv6 address"),
        ("", "'' is no name or address of a host"),
    ],
)
def test_what_is_no_head(capsys, head, expected):
    for launcher in ("--torchrun", "--deepspeed"):
        code, out, err = printed(capsys, QUICKSTART, launcher, "--head", head, *TWO_NODES)
        assert (code, out) == (2, "") and expected in err.strip().splitlines()[-1]


@pytest.mark.parametrize("launcher", ["--torchrun", "--slurm", "--ray"])
def test_ranks_that_share_rows_are_of_one_node(capsys, launcher):
    """Where they have room in one; where they have not, a line says so."""
    head = ["--head", "node-a"] if launcher == "--torchrun" else []
    words = [QUICKSTART, launcher, *head, "--nodes", "2", "training.micro_batch=1", "training.global_batch=12"]
    code, out, err = printed(capsys, *words, "--gpus", "3", "engine.sequence_parallel=2")
    assert (code, out) == (2, "") and "does not divide the 3 GPUs of a node" in err and "give --gpus 2, or" in err
    code, _, err = printed(capsys, *words, "--gpus", "2", "engine.sequence_parallel=2")
    assert code == 0 and "sequence_parallel" not in err
    code, _, err = printed(capsys, *words, "--gpus", "1", "engine.sequence_parallel=2")
    assert code == 0 and "engine.sequence_parallel=2 of 1 GPUs a node: rows are shared between nodes" in err


def test_a_hostfile_beside_a_start_of_one_node(capsys, monkeypatch, tmp_path):
    """Plain deepspeed would go by its own, also by ssh to another machine; here --nodes says how many, and a line says that it is left."""
    from deepspeed.launcher.runner import DLTS_HOSTFILE, fetch_hostfile

    assert str(launch.THEIRS) == DLTS_HOSTFILE
    words = [QUICKSTART, "--deepspeed", "--gpus", "1", "training.micro_batch=1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "THEIRS", tmp_path / "job" / "hostfile")
    assert "--hostfile" not in printed(capsys, *words)[1]
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    code, out, err = printed(capsys, *words)
    assert code == 0 and "--hostfile" not in out and "launch: hostfile is not heeded: this start has one node" in err
    launch.THEIRS.parent.mkdir()
    (tmp_path / "hostfile").rename(launch.THEIRS)
    code, out, err = printed(capsys, *words)
    left = shlex.split(out)[shlex.split(out).index("--hostfile") + 1]
    assert code == 0 and fetch_hostfile(left) is None and f"launch: {launch.THEIRS} is not heeded" in err


def test_a_configuration_that_ray_does_not_send(capsys, monkeypatch, settings, tmp_path):
    """What is refused is what Ray itself leaves out of the copy of this folder."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "here"
    texts = {".gitignore": "/mine/\n", "sub/.rayignore": "*.yaml\n"}
    configs = ("data/a.yaml", "mine/a.yaml", "sub/a.yaml", "venv/a.yaml", "configs/a.yaml", "configs/data/a.yaml")
    for name in (*texts, *configs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(texts.get(name) or write_config(settings, tmp_path).read_text())
    monkeypatch.chdir(folder)
    excludes = [*get_runtime_env_default_excludes(), *launch.NOT_SENT]
    create_package(str(folder), tmp_path / "copy.zip", include_gitignore=True, excludes=excludes)
    capsys.readouterr()  # Ray's own words
    sent = set(zipfile.ZipFile(tmp_path / "copy.zip").namelist())
    assert {name for name in configs if name in sent} == {"configs/a.yaml", "configs/data/a.yaml"}
    job = ["--ray", "--gpus", "1", "--address", "http://127.0.0.1:1", "training.micro_batch=1"]
    for name in configs:
        code, out, err = printed(capsys, name, *job)
        if name in sent:
            assert code == 0 and name in out
        else:
            assert (code, out) == (2, "") and err.startswith(f"vlm-dist: '{name}' is not in the copy of this folder that Ray sends")
            assert err.count("\n") == 1
    assert "left out by sub/.rayignore" in printed(capsys, "sub/a.yaml", *job)[2]
    assert printed(capsys, os.path.abspath(configs[0]), *job)[0] == 0


ON_A_WORKER = """
import importlib.util, sys
from vlm_dist.training.ray_cluster import leave_repository
before = importlib.util.find_spec("kernels")
leave_repository()
import vlm_kernels.reference, vlm_dist.config_text
print(before is not None, importlib.util.find_spec("kernels"), "transformers" in sys.modules)
"""


def test_a_worker_of_ray_does_not_take_our_kernels_for_another_package():
    """Its path has the repository's root three times: for this package, as the driver's folder, and in the copy that is sent to a job."""
    words = [sys.executable, "-c", f"import sys; sys.path += ['', {str(ROOT)!r}]\n{ON_A_WORKER}"]
    done = subprocess.run(words, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "None", "False"]
