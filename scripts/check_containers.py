"""Build what configs/cluster/Containerfile or apptainer.def describe without a container engine: each of their commands, in a new Debian.

python scripts/check_containers.py cpu                                       # as root, on Debian with debootstrap; some GB, some minutes
python scripts/check_containers.py cpu --build-arg TORCH_BACKEND=            # where only the package index can be reached
python scripts/check_containers.py apptainer --root /var/tmp/image --keep

The base image is replaced by a Debian bookworm with its own Python 3.11. Then `vlm-dist --help`, `doctor` and two steps of each of the
quickstart's trainings run inside, as the image's user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "cluster"
SUITE, BASE = "bookworm", "python3,python3-venv,python3-dev,ca-certificates"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
OF_THIS_MACHINE = re.compile(r"SSL_CERT_FILE|(https?|no)_proxy", re.I)
AFTER = """
vlm-dist --help
vlm-dist doctor
[ -z "${CUDA_HOME-}" ] || "$CUDA_HOME/bin/nvcc" --version
bash -lc 'ray --version && vlm-dist --help' | head -n 1
python /app/launch/ray_train.py --help | head -n 1
cd "$(mktemp -d)"
vlm-dist init --quickstart .
vlm-dist data synth data/quickstart --train 64 --heldout 8
vlm-dist train configs/quickstart_base.yaml training.steps=2 evaluation.samples=8
vlm-dist train configs/quickstart.yaml training.steps=2 evaluation.samples=8 evaluation.every=0
"""


@dataclass
class Image:
    """A folder that is an image's file system, and what holds for the next command."""

    root: Path
    folder: str = "/"
    user: str = "root"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> None:
        """By its shell, with a /proc and /dev/shm of its own."""
        started = time.monotonic()
        print(f"{self.user}:{self.folder}$ {command}", flush=True)
        given = {name: value for name, value in os.environ.items() if OF_THIS_MACHINE.fullmatch(name)}
        variables = {**given, "HOME": "/root", **self.arguments, **self.environment}
        inside = [
            "chroot",
            f"--userspec={self.user}",
            str(self.root),
            "env",
            "-i",
            *(f"{name}={value}" for name, value in variables.items()),
        ]
        inside += ["/bin/sh", "-ec", f"cd {shlex.quote(self.folder)}\n{command}"]
        mounted = f"mkdir -p {self.root}/dev/shm && mount -t tmpfs -o mode=1777 tmpfs {self.root}/dev/shm && exec {shlex.join(inside)}"
        unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.root / 'proc'}", "sh", "-c", mounted]
        result = subprocess.run(unshared, check=False)
        if result.returncode:
            sys.exit(f"check_containers: exit code {result.returncode} of: {command}")
        print(f"   ... {time.monotonic() - started:.0f} s", flush=True)

    def copy(self, sources: list[str], target: str, owner: str | None = None) -> None:
        """As COPY does: of several sources, or where `target` ends with a slash, into it; a folder's contents."""
        print(f"copy {' '.join(sources)} to {target}", flush=True)
        for source in sources:
            place = self.root / target.lstrip("/") / (source if target.endswith("/") else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / source, place)
        if owner:
            self.run_as_root(f"chown -R {owner} {target}")

    def run_as_root(self, command: str) -> None:
        user, self.user = self.user, "root"
        self.run(command)
        self.user = user


def instructions(target: str) -> list[tuple[str, str]]:
    """Instruction and value of the stages that `target` is made of, in order."""
    from dockerfile_parse import DockerfileParser

    stages: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for step in DockerfileParser(fileobj=BytesIO((FOLDER / "Containerfile").read_bytes())).structure:
        if step["instruction"] == "FROM":
            parent, _, name = step["value"].split()
            stages[name] = [*stages.get(parent, [])]
        elif step["instruction"] != "COMMENT":
            stages[name].append((step["instruction"], step["value"]))
    return stages[target]


def sections(text: str) -> dict[str, str]:
    """The sections of an Apptainer definition by name; what stands before them is 'header'."""
    parts = re.split(r"^%(\w+)\n", text, flags=re.M)
    return dict(zip(["header", *parts[1::2]], parts[::2], strict=True))


def follow(image: Image, instruction: str, value: str) -> None:
    """Do what one instruction of a Containerfile says."""
    if instruction == "RUN":
        image.run(value)
    elif instruction == "COPY":
        words = shlex.split(value)
        owner = next((word.removeprefix("--chown=") for word in words if word.startswith("--chown=")), None)
        *sources, target = [word for word in words if not word.startswith("--")]
        image.copy(sources, target, owner)
    elif instruction == "WORKDIR":
        (image.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        image.folder = value
    elif instruction == "USER":
        image.user = value
    elif instruction == "ENV":
        for word in shlex.split(value):
            name, _, text = word.partition("=")
            image.environment[name] = Template(text).substitute(image.environment)
    elif instruction == "ARG":
        name, _, default = value.partition("=")
        image.arguments.setdefault(name, default)
    elif instruction == "CMD":
        image.run(shlex.join(json.loads(value)))
    else:
        sys.exit(f"check_containers: no rule for {instruction} {value}")


def build_apptainer(image: Image) -> None:
    parts = sections((FOLDER / "apptainer.def").read_text())
    for line in parts["files"].strip().splitlines():
        source, target = line.split()
        image.copy([source], target)
    image.run(parts["post"])
    image.run(parts["environment"] + parts["test"])
    image.run(parts["environment"] + f"set -- /app/launch/train.py --help\n{parts['runscript']}")
    for line in re.findall(r"export (.+)", parts["environment"]):
        follow(image, "ENV", line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("cpu", "cuda", "apptainer"))
    parser.add_argument("--build-arg", metavar="NAME=VALUE", action="append", default=[], help="as a container engine takes it")
    parser.add_argument("--root", type=Path, help="an empty folder for the image (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the image there")
    options = parser.parse_args()
    if os.geteuid() or shutil.which("debootstrap") is None:
        sys.exit("check_containers: needs root, and on Debian: apt-get install debootstrap")
    root = (options.root or Path(tempfile.mkdtemp(prefix="image-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    try:
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={BASE}", SUITE, str(root)], check=True, stdout=subprocess.DEVNULL)
        for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
            shutil.copy(name, root / name[1:])
        image = Image(root, arguments=dict(word.split("=", 1) for word in options.build_arg))
        if options.target == "apptainer":
            build_apptainer(image)
        else:
            for instruction, value in instructions(options.target):
                follow(image, instruction, value)
        image.run(AFTER)
        size = subprocess.run(["du", "-sxh", str(root)], capture_output=True, text=True, check=True).stdout.split()[0]
        print(f"check_containers: every command of {options.target} ran; the image has {size}")
    finally:
        if not options.keep:
            shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
