"""The examples of configs/cluster: what they start exists, and they are closed to strangers."""

from __future__ import annotations

import ipaddress

from ruamel.yaml import YAML

from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "cluster"


def test_kuberay():
    job, policy = YAML(typ="safe", pure=True).load_all((FOLDER / "kuberay.yaml").read_text())
    assert job["kind"] == "RayJob" and policy["kind"] == "NetworkPolicy"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert cluster["rayVersion"] == version.removeprefix("ray==")
    script = next(word for word in job["spec"]["entrypoint"].split() if word.endswith(".py"))
    assert (ROOT / script.removeprefix("/app/")).exists()
    workers = cluster["workerGroupSpecs"][0]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert f"ray.workers={gpus * workers['replicas']}" in job["spec"]["entrypoint"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        assert template["metadata"]["labels"] == labels


def test_on_premise():
    """As Ray itself checks it; every address is private, the dashboard on the machine's own, and the token asked for."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = YAML(typ="safe", pure=True).load((FOLDER / "ray_on_premise.yaml").read_text())
    validate_config(prepare_config(config))
    provider = config["provider"]
    assert all(ipaddress.ip_address(address).is_private for address in (provider["head_ip"], *provider["worker_ips"]))
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key] if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts) and "--dashboard-host=127.0.0.1" in starts[0]
