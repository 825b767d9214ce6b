"""A real SLURM on this machine: a controller and two nodes, each with one CPU."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "munged")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The environment in which srun and sbatch reach the cluster."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed here ({missing[0]}); on Debian: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start SLURM's daemons")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = _start_munge()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(_configuration(host, folder))
    (folder / "state").mkdir()
    daemons = []
    try:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]):
            log = (folder / f"{command[0]}-{len(daemons)}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for _ in range(300):
            found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False).stdout.split()
            if found == ["idle"]:
                break
            time.sleep(0.2)
        else:
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.out")))
            pytest.skip(f"SLURM's daemons do not come up on this machine: {found}\n{logs}")
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
        if munged is not None:
            munged.terminate()


def _start_munge() -> subprocess.Popen | None:
    """The authentication daemon, if it is not running."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return None
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        key.write_bytes(os.urandom(1024))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge", "munge")
    daemon = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground", "--force"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
            return daemon
        time.sleep(0.1)
    return pytest.skip("munged does not come up on this machine, and SLURM needs it")


def _configuration(host: str, folder: Path) -> str:
    ports = [_free_port() for _ in range(3)]
    nodes = "".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1 + number]} CPUs=8 State=UNKNOWN\n" for number in range(2)
    )
    return f"""ClusterName=test
SlurmdParameters=config_overrides
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ReturnToService=2
MpiDefault=none
KillWait=20
JobRequeue=1
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
