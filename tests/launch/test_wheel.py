"""The wheel, in an environment that sees this one's packages but not the repository: what it brings is found from an empty folder."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment

TINY = ["training.steps=2", "training.global_batch=4", "training.micro_batch=2", "data.heldout=[]", "log.wandb=disabled"]
FORMS = {
    "torchrun": ["--torchrun", "--gpus", "1"],
    "deepspeed": ["--deepspeed", "--gpus", "2"],
    "slurm": ["--slurm", "--gpus", "2"],
    "ray": ["--ray", "--gpus", "2"],
}
# Several commands in one process: each would load torch again
MANY = "import json, sys\nfrom vlm_dist.cli.main import main\nfor words in json.loads(sys.argv[1]):\n    assert main(words) == 0, words"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source") / "vlm_dist"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():  # building in the repository would leave build/ there
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, env=child_environment(PYTHONPATH=""), check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return next(out.glob("*.whl"))


class Installed:
    """The wheel in an environment of its own, used from an empty folder."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder / "env", symlinks=True, with_pip=True)
        self.bin, self.home = folder / "env" / "bin", folder / "empty"
        self.home.mkdir()
        self.environment = child_environment()
        del self.environment["PYTHONPATH"]
        pip = [str(self.bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(pip, check=True, env=self.environment)
        # Folders that a .pth file names are looked in, but their own .pth files are not run: the repository's editable install stays away
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        for name in ("torchrun", "deepspeed"):
            _, script = Path(sys.executable).with_name(name).read_text().split("\n", 1)
            (self.bin / name).write_text(f"#!{self.bin / 'python'}\n{script}")
            (self.bin / name).chmod(0o755)

    def run(self, program: str, *words: str) -> str:
        command = [str(self.bin / program), *words]
        result = subprocess.run(command, capture_output=True, text=True, cwd=self.home, env=self.environment, timeout=400, check=False)
        assert result.returncode == 0, f"{words}: {result.stdout[-1500:]}{result.stderr[-3000:]}"
        return result.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"), wheel)


def test_wheel_brings_configs_and_launch_scripts_once(wheel):
    """The same bytes as in the repository; nowhere else in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if "starter/" in name}
        for folder in ("configs", "launch"):
            for path in (ROOT / folder).rglob("*"):
                name = f"vlm_dist/starter/{path.relative_to(ROOT)}"
                if path.is_file() and path.suffix != ".pyc":
                    assert archive.read(name) == path.read_bytes()
                    names.discard(name)
    assert not names


@pytest.mark.slow
def test_quickstart_from_an_empty_folder(installed):
    """init, data, base, and the main job under torchrun; every launcher is given scripts of the wheel."""
    found = installed.run("python", "-c", "import vlm_dist, vlm_kernels; print(vlm_dist.__file__, vlm_kernels.__file__)")
    environment = str(installed.bin.parent)
    assert all(path.startswith(environment) for path in found.split()), found
    told = json.loads(installed.run("vlm-dist", "init", "--quickstart", ".", "--json"))
    assert told["written"] == ["configs/quickstart_base.yaml", "configs/quickstart.yaml"]
    assert (installed.home / "configs/quickstart.yaml").read_text() == (ROOT / "configs/quickstart.yaml").read_text()
    assert told["next"][1:3] == ["vlm-dist train configs/quickstart_base.yaml", "vlm-dist train configs/quickstart.yaml"]
    data = ["data", "synth", "data/quickstart", "--train", "40", "--heldout", "4"]
    prints = [["launch", "configs/quickstart.yaml", *options, "--print", *TINY] for options in FORMS.values()]
    shown = installed.run("python", "-c", MANY, json.dumps([data, ["train", "configs/quickstart_base.yaml", *TINY], *prints]))
    for words in map(shlex.split, shown.splitlines()[-len(prints) :]):
        paths = [word.rpartition("=")[2] for word in words if word.endswith((".py", ".sbatch"))]
        assert paths and all(path.startswith(environment) and Path(path).is_file() for path in paths), words
    installed.run("vlm-dist", "launch", "configs/quickstart.yaml", *FORMS["torchrun"], *TINY)
    summary = json.loads((installed.home / "runs/quickstart/summary.json").read_text())
    assert summary["ended"] == "finished" and summary["step"] == 2
