"""What all tests share: no network, fresh memory poisoned, tiny real checkpoints and shards made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores, several processes

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from vlm_dist.quiet import quiet_libraries
from vlm_dist.testing import tiny_families

quiet_libraries()
warm.prepare()
ROOT = Path(__file__).resolve().parent.parent
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TASKS = ("caption", "qa", "reading")
DURATIONS = ROOT / "docs" / "benchmarks" / "tests.json"
SLOW = ("slow", "ray", "slurm", "browser", "gpu")
QUICK_S = 0.5  # a test of a file, on average
QUICK_FAMILIES = ("llava", "qwen2_5_vl")


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"leave out what is marked {', '.join(SLOW)}; two families of twenty")


def pytest_collection_modifyitems(config, items) -> None:
    """The files that took longest first, so that parallel workers end together; with --quick only what is quick."""
    rows = {row["file"]: row for row in json.loads(DURATIONS.read_text())["files"]} if DURATIONS.exists() else {}
    items.sort(key=lambda item: -rows.get(_file_of(item), {"seconds": 0.0})["seconds"])
    if config.getoption("--quick"):
        lasting = {file for file, row in rows.items() if row["seconds"] > QUICK_S * row["tests"]}
        kept = [item for item in items if _is_quick(item) and _file_of(item) not in lasting]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _file_of(item) -> str:
    return item.path.relative_to(ROOT).as_posix()


def _is_quick(item) -> bool:
    family = getattr(item, "callspec", None) and item.callspec.params.get("any_checkpoint")
    return not any(item.get_closest_marker(name) for name in SLOW) and (family is None or family in QUICK_FAMILIES)


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch):
    """torch.empty gives NaN, so that reading memory that nobody wrote shows."""
    import torch

    empty = torch.empty
    with torch.device("meta"):  # torch notes its constructors at the first use, and must note its own
        empty(1)

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _signals_as_before():
    """What a test leaves ignored or blocked, every process that a later one starts would ignore too."""
    handlers, blocked = {number: signal.getsignal(number) for number in OF_A_JOB}, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    left = [number.name for number, handler in handlers.items() if signal.getsignal(number) != handler]
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)
    masked = signal.pthread_sigmask(signal.SIG_SETMASK, blocked) ^ blocked
    assert not left and not masked, f"handlers of {left} changed, {masked} (un)blocked"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, list[str]]:
    """Paths of tiny synthetic shards by "TASK-SPLIT"."""
    from vlm_dist.data.synthetic import synthesise

    out = tmp_path_factory.mktemp("shards")
    settings = {"seed": 1, "size": 32, "image_format": "jpg", "shard_size": 20, "questions_per_picture": 3}
    made = synthesise(out, train=60, heldout=12, tasks=TASKS, **settings)
    return {name: [str(path) for path in paths] for name, paths in made.items()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """family -> path of its tiny checkpoint, each made once."""
    from vlm_dist.testing import tiny_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    def path(family: str) -> str:
        if not (folder / family).exists():
            tiny_checkpoint(family, folder / family)
        return str(folder / family)

    return path


@pytest.fixture(scope="session")
def llava(checkpoint) -> str:
    """Path of a tiny LLaVA checkpoint."""
    return checkpoint("llava")


@pytest.fixture(scope="session")
def qwen(checkpoint) -> str:
    """Path of a tiny Qwen2.5-VL checkpoint."""
    return checkpoint("qwen2_5_vl")


@pytest.fixture(params=tiny_families())
def any_checkpoint(request, checkpoint) -> str:
    """Path of a tiny checkpoint of each family in turn."""
    return checkpoint(request.param)


@pytest.fixture
def settings(tmp_path, shards, llava) -> dict:
    """A small QLoRA run's configuration as plain values, to change and to write."""
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name": llava, "load_in_4bit": True, "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": shards["qa-train"], "heldout": shards["qa-heldout"], "max_seq_length": 256, "shuffle_window": 30},
        "optim": {"lr": 1e-3},
        "training": {"steps": 4, "global_batch": 4, "micro_batch": 2},
        "evaluation": {"samples": 4, "max_new_tokens": 4},
        "checkpoint": {"save_every": 2},
        "log": {"wandb": "disabled"},
    }


def write_config(settings: dict, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def command(*arguments: str) -> list[str]:
    """`vlm-dist ARGUMENTS` from nothing, for subprocess."""
    return [sys.executable, "-m", "vlm_dist.cli.main", *arguments]


def run_command(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """`vlm-dist ARGUMENTS` in a process of its own."""
    process = start_command(*arguments, **environment)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def start_command(*arguments: str, **environment: str) -> warm.Warm:
    """The same, not waited for."""
    return warm.Warm(list(arguments), child_environment(**environment))


def child_environment(**changes: str) -> dict[str, str]:
    """This environment without what says that this process is a rank of something."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **changes}
