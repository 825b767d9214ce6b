"""The examples of configs/cluster: what they start exists, and they are closed to strangers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

import jsonschema
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.launch import kuberay_fields
from vlm_dist.config import CheckpointConfig

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
    templates = (cluster["headGroupSpec"]["template"], workers["template"])
    for template in (*templates, job["spec"]["submitterPodTemplate"]):
        assert template["metadata"]["labels"] == labels
    assert len({container["image"] for template in (*templates, job["spec"]["submitterPodTemplate"])
                for container in template["spec"]["containers"]}) == 1  # fmt: skip


def misspelt(value: object) -> Iterator[object]:
    """Copies of a document with one key of an object changed, each in turn."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {f"{name}s" if name == key else name: found for name, found in value.items()}
            yield from ({**value, key: changed} for changed in misspelt(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], changed, *value[place + 1 :]] for changed in misspelt(inner))


def test_kuberay_has_the_fields_of_its_crds():
    """Each field is one that the operator or Kubernetes knows; of the copies with one misspelt all are found, but for free names."""
    free = ("labels", "matchLabels", "rayStartParams", "limits")
    for document in YAML(typ="safe", pure=True).load_all((FOLDER / "kuberay.yaml").read_text()):
        validator = jsonschema.Draft202012Validator(kuberay_fields.of(document["kind"]))
        assert [error.message for error in validator.iter_errors(document)] == []
        copies = list(misspelt(document))
        passed = [copy for copy in copies if validator.is_valid(copy)]
        names = sum(len(found) for found in objects_named(document, free))
        assert len(copies) > 15 and len(passed) == names, len(copies)


def objects_named(value: object, names: tuple[str, ...]) -> Iterator[dict]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key in names:
            yield inner
        else:
            yield from objects_named(inner, names)


def test_kuberay_lets_in_whoever_must_come_and_leaves_time_to_save():
    """The pod that submits the job and the operator, wherever it is installed; a pod ends after its ranks have saved."""
    job, policy = YAML(typ="safe", pure=True).load_all((FOLDER / "kuberay.yaml").read_text())
    own, operator = policy["spec"]["ingress"][0]["from"]
    assert own["podSelector"]["matchLabels"] == job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert operator["namespaceSelector"] == {} and operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        drain = {one["name"]: float(one["value"]) for one in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert CheckpointConfig().grace_s <= drain < spec["terminationGracePeriodSeconds"]
    wait = YAML(typ="safe", pure=True).load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert float(wait) >= CheckpointConfig().grace_s and "ray.use_gpu=true" in job["spec"]["entrypoint"]
    install = (FOLDER / "install.sh").read_text()
    assert "for name in ray vlm-dist; do ln -sf" in install and re.search(r"apt-get install .* wget", install)  # KubeRay calls both


def test_on_premise():
    """As Ray itself checks it; every address is private, the dashboard on the machine's own, and the token asked for."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = YAML(typ="safe", pure=True).load((FOLDER / "ray_on_premise.yaml").read_text())
    validate_config(prepare_config(config))
    provider = config["provider"]
    assert all(ipaddress.ip_address(address).is_private for address in (provider["head_ip"], *provider["worker_ips"]))
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key] if "ray start" in line]
    text = (FOLDER / "ray_on_premise.yaml").read_text()
    assert "ray submit" not in text and "'RAY_AUTH_MODE=token /app/.venv/bin/python /app/launch/ray_train.py" in text
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts) and "--dashboard-host=127.0.0.1" in starts[0]
