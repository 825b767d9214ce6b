"""The container file and the Apptainer definition, without building them; scripts/check_containers.py runs their commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from check_containers import FOLDER, instructions, sections

INSTALL = (FOLDER / "install.sh").read_text()


def copied() -> dict[str, str]:
    """Source by its place in the image, of the cuda stage."""
    places = {}
    for instruction, value in instructions("cuda"):
        if instruction == "COPY":
            *sources, target = [word for word in shlex.split(value) if not word.startswith("--")]
            places |= {f"{target}{source}" if target.endswith("/") else target: source for source in sources}
    return places


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_stages(target):
    """Both run as a user, install by the one script, and end where /data is mounted."""
    steps = instructions(target)
    user = steps.index(("USER", "1000:1000"))
    assert user < steps.index(("RUN", f"configs/cluster/install.sh packages {target}"))
    assert ("RUN", "/app/configs/cluster/install.sh system") in steps[:user]
    assert [value for name, value in steps if name == "WORKDIR"][-1] == "/data"
    assert ("ENV", "PATH=/app/.venv/bin:$PATH") in steps


def test_what_is_copied_exists_and_is_let_in():
    """.dockerignore shuts everything out but that."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for place, source in copied().items():
        assert (ROOT / source).exists() and place == f"/app/{source}", source
        assert source.split("/")[0] in let_in
    assert {source.split("/")[0] for source in copied().values()} == let_in


def test_apptainer_copies_and_installs_the_same():
    parts = sections((FOLDER / "apptainer.def").read_text())
    files = dict(reversed(line.split()) for line in parts["files"].strip().splitlines())
    assert files == {place: source for place, source in copied().items() if source != "configs/cluster/install.sh"}
    assert re.findall(r"install.sh (.+)", parts["post"]) == ["system", "packages cuda"]
    base = re.search(r"^From: (.+)$", parts["header"], re.M)
    assert base and f"docker.io/library/{base[1]}\n" in (FOLDER / "Containerfile").read_text()


def test_the_image_has_what_the_cluster_files_expect():
    """Every path below /app that they name is copied there, or a program of .venv that a package of the image brings."""
    job, _ = YAML(typ="safe", pure=True).load_all((FOLDER / "kuberay.yaml").read_text())
    texts = [job["spec"]["entrypoint"], (FOLDER / "ray_on_premise.yaml").read_text()]
    paths = {path for text in texts for path in re.findall(r"/app/[\w./-]+", text)}
    assert {"/app/.venv/bin/python", "/app/.venv/bin/ray", "/app/launch/ray_train.py"} == paths
    assert "/app/launch" in copied() and "--editable '.[" in INSTALL and ".venv" in INSTALL


def test_versions_are_those_of_the_constraints():
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert "--constraints constraints.txt" in INSTALL
    major = constraints["cuda-toolkit"].split(".")[0]
    home = dict(value.split("=", 1) for name, value in instructions("cuda") if name == "ENV")["CUDA_HOME"]
    assert home.endswith(f"python3.11/site-packages/nvidia/cu{major}") and "python:3.11-" in (FOLDER / "Containerfile").read_text()
    packages = re.search(r'uv pip install "\$@" (torch .+) \$toolkit', INSTALL)
    assert packages and all(name in constraints for name in packages[1].split())
    image = re.search(r"image: \S+:(\S+)", (FOLDER / "kuberay.yaml").read_text())
    assert (
        image and f'version="{image[1]}"' in (ROOT / "setup.py").read_text() and f":{image[1]} ." in (FOLDER / "Containerfile").read_text()
    )


def test_the_script_is_valid_shell_and_refuses_other_kinds():
    assert subprocess.run(["sh", "-n", str(FOLDER / "install.sh")], check=False).returncode == 0
    wrong = subprocess.run([str(FOLDER / "install.sh"), "packages", "tpu"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "neither cpu nor cuda" in wrong.stderr
