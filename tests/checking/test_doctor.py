"""`vlm-dist doctor` does what it checks, and names what is planted."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

from tests.conftest import write_config
from vlm_dist.checking import doctor
from vlm_dist.cli.main import main


def run(capsys, *arguments: str) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", *arguments, "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_this_machine(settings, tmp_path, capsys):
    code, checks = run(capsys, str(write_config(settings, tmp_path)))
    assert code == 0 and not [check for check in checks.values() if check["state"] == "bad"]
    assert {"python", "packages", "gpu", "4-bit", "kernels", "host", "/dev/shm", "disk", "data train"} <= set(checks) or "gpu 0" in checks
    assert "60 samples" in checks["data train"]["found"] and "torch 2" in checks["packages"]["found"]
    assert main(["doctor"]) == 0
    assert "fit to train: 0 bad" in capsys.readouterr().out


def test_a_card_is_not_looked_at_where_the_cpu_is_asked_for(settings, tmp_path, capsys, monkeypatch):
    settings["engine"] = {"device": "cpu"}
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "the driver is too old for this torch")
    code, checks = run(capsys, str(write_config(settings, tmp_path)))
    assert code == 0 and checks["gpu"] == {**checks["gpu"], "state": "ok", "found": "not looked at: engine.device=cpu"}


def test_what_is_planted_is_found(monkeypatch, tmp_path, capsys, settings):
    versions = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "peft" else versions(name))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: (_ for _ in ()).throw(socket.gaierror("no such name")))
    monkeypatch.setattr(doctor, "LEAST_DISK", 10**18)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    settings["data"]["train"] = str(tmp_path / "nothing-*.tar")
    code, checks = run(capsys, str(write_config(settings, tmp_path)))
    assert code == 6
    assert checks["peft"]["state"] == "bad" and checks["peft"]["fix"].startswith("pip install 'peft>=")
    assert checks["open files"]["fix"] == "ulimit -n 4096" and "g++" in checks["compiler"]["fix"]
    assert {checks[name]["state"] for name in ("network", "disk", "NCCL_P2P_DISABLE", "NCCL_DEBUG")} == {"warn"}
    assert checks["data"]["state"] == "bad" and "no shard matches" in checks["data"]["found"]


def test_an_address_that_no_other_node_reaches(monkeypatch):
    """Debian writes the host's own name beside 127.0.1.1, where gloo would then listen."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    for name in doctor.INTERFACES:
        monkeypatch.delenv(name, raising=False)
    (check,) = doctor._sockets()
    assert check.state == "warn" and "export GLOO_SOCKET_IFNAME" in check.fix and "NCCL_SOCKET_IFNAME" in check.fix
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    (check,) = doctor._sockets()
    assert check.state == "warn" and "export GLOO" not in check.fix and "export NCCL_SOCKET_IFNAME" in check.fix
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    (check,) = doctor._sockets()
    assert check.state == "ok" and "GLOO_SOCKET_IFNAME=eth0" in check.found


def test_a_broken_library_is_a_finding(monkeypatch, capsys):
    from bitsandbytes import functional

    monkeypatch.setattr(functional, "quantize_4bit", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA SETUP failed\nlong story")))
    code, checks = run(capsys)
    assert code == 6 and checks["four_bit"]["found"] == "RuntimeError: CUDA SETUP failed"


def test_a_clock_that_is_wrong(tmp_path, monkeypatch):
    (right,) = doctor._clock(tmp_path / "runs" / "not there yet")
    assert right.state == "ok" and not list(tmp_path.iterdir())
    now = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() - 90)
    (wrong,) = doctor._clock(tmp_path)
    assert wrong.state == "warn" and "within 90.0 s" in wrong.found and "NTP" in wrong.fix


@pytest.mark.parametrize("mode", [0o500])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write anywhere
    (found,) = doctor._disk(tmp_path / "runs")
    assert found.state == "bad" and str(tmp_path) in found.found and shutil.disk_usage(tmp_path)


def test_a_checkout_that_is_not_installed(monkeypatch):
    """As on a machine that has the packages and no vlm_dist among them: told, and no traceback."""
    from vlm_dist.checking import doctor

    real = doctor.metadata.requires

    def requires(name):
        if name == "vlm_dist":
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    (check,) = doctor._packages()
    assert check.state == "warn" and "not installed" in check.found and check.fix == "scripts/setup.sh"
