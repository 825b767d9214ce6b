"""Is this machine fit to train? Each check does the thing itself, where it can: a weight is quantised, a kernel runs, a socket is bound."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_dist.cards import why_no_cuda
from vlm_dist.environment import available_memory
from vlm_dist.launched import left_over

if TYPE_CHECKING:
    from vlm_dist.config import Config

LEAST_DISK = 20 * 10**9
LEAST_SHARED = 10**9
LEAST_FILES = 4096
LEAST_MEMORY = 8 * 10**9
MOST_APART = 2.0  # seconds between clocks
READ = 200 * 10**6  # bytes of the data that are read to tell its speed
SLOWING = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LEFT_ON = ("NCCL_DEBUG", "CUDA_LAUNCH_BLOCKING", "TORCH_DISTRIBUTED_DEBUG", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Check:
    """One finding. ok; warn: works, but slower or only in part; bad: training will fail."""

    name: str
    state: Literal["ok", "warn", "bad"]
    found: str
    fix: str = ""

    to_dict = asdict


def examine(config: Config | None = None) -> Iterator[Check]:
    """Check after check; with a configuration also its data and the folder for its runs."""
    on_cpu = config is not None and config.engine.device == "cpu"
    if on_cpu:
        yield Check("gpu", "ok", "not looked at: engine.device=cpu")
    cards = () if on_cpu else (_gpus, _peers)
    machine = (_compiler, _memory, _shared, _files, _sockets, _variables)
    for check in (_python, _packages, *cards, _vision, _four_bit, _kernels, *machine):
        yield from _guarded(check)
    folder = Path(config.output_dir if config else ".")
    yield from _guarded(_disk, folder)
    yield from _guarded(_clock, folder)
    if config is not None:
        yield from _guarded(_batch_norm, config)
        yield from _guarded(_data, config)


def _guarded(check: Callable[..., Iterator[Check]], *arguments: Any) -> Iterator[Check]:
    """What a check itself dies of is a finding."""
    try:
        yield from check(*arguments)
    except Exception as error:
        name = check.__name__.strip("_")
        yield Check(name, "bad", f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", "see the message")


def _judge(name: str, good: bool, found: str, fix: str, otherwise: Literal["warn", "bad"] = "warn") -> Check:
    return Check(name, "ok", found) if good else Check(name, otherwise, found, fix)


def _python() -> Iterator[Check]:
    yield Check("python", "ok", sys.version.split()[0])


def _packages() -> Iterator[Check]:
    """What setup.py asks for, against what is installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("vlm_dist") or []
    except metadata.PackageNotFoundError:
        found = "vlm_dist runs from a checkout that is not installed: what it needs was not compared"
        yield Check("packages", "warn", found, "scripts/setup.sh")
        return
    wrong = []
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append((wanted, "missing"))
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            wrong.append((wanted, have))
    for wanted, have in wrong:
        yield Check(wanted.name, "bad", f"{have}; needs {wanted.specifier}", f"pip install '{wanted.name}{wanted.specifier}'")
    if not wrong:
        names = ("torch", "transformers", "deepspeed", "bitsandbytes", "peft", "triton", "ray")
        yield Check("packages", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in names))
    have = metadata.version("triton")
    for wanted in (Requirement(line) for line in metadata.requires("torch") or [] if line.startswith("triton")):
        if not wanted.specifier.contains(have, prereleases=True):
            found = f"{have}; this torch was built with {wanted.specifier}"
            yield Check("triton", "warn", found, f"pip install 'triton{wanted.specifier}'")


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        if (problem := why_no_cuda()) is None:
            yield Check("gpu", "warn", "none; training runs on the CPU", "fine for the quickstart and tiny models")
            return
        yield Check(
            "gpu", "bad", problem, "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that this driver is new enough for that CUDA version"
        )
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        about = f"{torch.cuda.get_device_name(number)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, capability {major}.{minor}"
        if major < 8:
            yield Check(f"gpu {number}", "warn", f"{about}: no bfloat16", "model.dtype: auto takes float16, and scales the loss")
        else:
            yield _judge(f"gpu {number}", free >= 0.9 * total, about, "another process holds memory: nvidia-smi names it")


def _peers() -> Iterator[Check]:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    found = f"GPUs {apart[0][0]} and {apart[0][1]} cannot read each other's memory" if apart else f"all {count} GPUs reach each other"
    yield _judge("peer-to-peer", not apart, found, "gradients go through the host: prefer LoRA at engine.zero_stage 0")


def _vision() -> Iterator[Check]:
    """torchvision must fit torch: transformers' picture processors run on it."""
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    yield Check("torchvision", "ok", metadata.version("torchvision"))


def _four_bit() -> Iterator[Check]:
    """A weight to NF4 and back, on the device that would train."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((dequantize_4bit(packed, state) - weight).abs().max())
    fix = "reinstall bitsandbytes for this CUDA version, or set model.load_in_4bit: false"
    yield _judge("4-bit", error < 0.2, f"NF4 on {device}, largest error {error:.3f} of 1", fix, "bad")


def _kernels() -> Iterator[Check]:
    """Our own kernel on the GPU, against PyTorch."""
    import torch

    if not torch.cuda.is_available():
        yield Check("kernels", "ok", "no GPU: PyTorch computes what the kernels would")
        return
    from vlm_dist.models.patching import kernels_agree

    good = kernels_agree(torch.device("cuda"))
    found = "a Triton kernel runs here" if good else "a Triton kernel gives wrong numbers here"
    yield _judge("kernels", good, found, "kernels: off, and report it", "bad")


def _compiler() -> Iterator[Check]:
    if shutil.which("g++") is None:
        yield Check("compiler", "warn", "no g++", "Triton and engine.offload compile at first use: apt-get install g++")
        return
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
    yield Check("compiler", "ok", f"g++ {version.strip()}")


def _memory() -> Iterator[Check]:
    available = available_memory()
    found = f"{available / 1e9:.1f} GB of memory free, {len(os.sched_getaffinity(0))} CPUs"
    fix = "close other programs, or lower data.workers, data.prefetch and data.pack_lookahead"
    yield _judge("host", available >= LEAST_MEMORY, found, fix)


def _shared() -> Iterator[Check]:
    size = shutil.disk_usage("/dev/shm").free
    fix = "NCCL and Ray need it: docker run --shm-size=8g, or an emptyDir with medium Memory under Kubernetes"
    yield _judge("/dev/shm", size >= LEAST_SHARED, f"{size / 1e9:.1f} GB free", fix)


def _files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _judge("open files", soft >= LEAST_FILES, f"{soft:,} (at most {hard:,})", f"ulimit -n {min(hard, 65536)}")


def _sockets() -> Iterator[Check]:
    """Ranks find one another by name and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        fix = "on several nodes: add it to DNS or /etc/hosts, or set MASTER_ADDR to an address"
        yield Check("network", "warn", f"the host's own name '{name}' does not resolve", fix)
        return
    chosen = [variable for variable in INTERFACES if os.environ.get(variable)]
    inside = address.startswith("127.") and len(chosen) < len(INTERFACES)
    fix = (
        f"no other node reaches that address. Ranks look for a better one themselves, except on Ray; to name it, on every node: "
        f"{' and '.join(f'export {variable}=INTERFACE' for variable in INTERFACES if variable not in chosen)} (`ip -br addr` names them), "
        f"or take '{name}' off the line of {address} in /etc/hosts"
    )
    yield _judge("network", not inside, f"{name} is {address}" + "".join(f", {one}={os.environ[one]}" for one in chosen), fix)


def _variables() -> Iterator[Check]:
    if (what := left_over()) is not None:
        found, _, fix = what.partition("; ")
        yield Check("launcher", "bad", found, fix)
    for name in SLOWING:
        if (value := os.environ.get(name, "0")) not in ("", "0"):
            yield Check(name, "warn", f"is {value}: slower transfers between GPUs", f"unset {name}, unless this cluster needs it")
    for name in LEFT_ON:
        if (value := os.environ.get(name, "0")) not in ("", "0", "WARN", "OFF"):
            yield Check(name, "warn", f"is {value}: for debugging, and slow", f"unset {name}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _disk(folder: Path) -> Iterator[Check]:
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        yield Check("disk", "bad", f"{there} cannot be written", "choose another output_dir")
        return
    free = shutil.disk_usage(there).free
    fix = "fewer checkpoints (checkpoint.keep_last), or another output_dir"
    yield _judge("disk", free >= LEAST_DISK, f"{free / 1e9:.1f} GB free below {there}", fix)


def _clock(folder: Path) -> Iterator[Check]:
    """This clock against that of the file system on which the runs lie: nodes that agree with it agree with one another."""
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        return
    with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
        before = time.time()
        os.utime(file.fileno())  # now, as the file system's server sees it
        apart = os.fstat(file.fileno()).st_mtime - before
    found = f"within {max(0.1, abs(apart)):.1f} s of the file system's"
    fix = "set it by NTP (chrony) on every node: times in logs and the watchdog's would disagree"
    yield _judge("clock", abs(apart) <= MOST_APART, found, fix)


def _batch_norm(config: Config) -> Iterator[Check]:
    """Parts that train and have BatchNorm."""
    from vlm_dist.checking.statistics import configured_model, moving_statistics
    from vlm_dist.models.going_on import settle
    from vlm_dist.models.modes import WITH_BATCH_NORM

    config = settle(config)
    model = configured_model(config)
    if model is not None and (moving := moving_statistics(config, *model)):
        yield Check("BatchNorm", "warn", moving, WITH_BATCH_NORM)


def _data(config: Config) -> Iterator[Check]:
    """How fast samples come from where they lie."""
    from vlm_dist.data.dataset import open_datasets

    for dataset in open_datasets(config.data):
        start, seen, count = time.perf_counter(), 0, 0
        for place in range(0, len(dataset.index), max(1, len(dataset.index) // 1000)):  # from all over: neighbours tell little
            seen += sum(len(value) for value in dataset.raw(place).values() if isinstance(value, bytes))
            count += 1
            if seen > READ:
                break
        seconds = max(time.perf_counter() - start, 1e-9)
        speed = f"{count / seconds:,.0f} a second, {seen / seconds / 1e6:,.0f} MB/s, read here and there"
        yield Check(f"data {dataset.name}", "ok", f"{len(dataset.index):,} samples; {speed}")
