"""`vlm-dist launch`: the command that starts a training under each launcher."""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_config, new_parser
from vlm_dist.cli.starter import starter_file
from vlm_dist.config import Config
from vlm_dist.config_load import load_config
from vlm_dist.distributed import free_port
from vlm_dist.errors import ConfigError, MachineError, warn
from vlm_dist.launched import bracketed, port_of
from vlm_dist.redaction import redacted

CPUS = 8  # of a rank: it reads and decodes beside training
HOSTFILE, TIME = "hostfile", "24:00:00"
THEIRS = Path("/job/hostfile")  # which deepspeed takes by itself
NOT_SENT = ["/.venv", "/.git", "/data", "/runs"]  # of this folder, to a job of Ray's
IN_IMAGE = "/app/launch/train.py"  # of configs/cluster/apptainer.def
MATTER = ("AWS_", "GLOO_", "HF_", "OMP_", "TOKENIZERS_", "TORCH_", "TRITON_", "VLM_DIST_", "WANDB_")  # variables that a rank heeds


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "launch",
        "Start a training on several GPUs or nodes, or print the command that does.",
        "vlm-dist launch configs/qwen2_5_vl_7b_qlora.yaml --slurm --nodes 2 --gpus 8 --print",
    )
    add_config(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--deepspeed", dest="launcher", action="store_const", const=_deepspeed, help="DeepSpeed's launcher; nodes by hostfile"
    )
    kind.add_argument("--torchrun", dest="launcher", action="store_const", const=_torchrun, help="torchrun; the same command on every node")
    kind.add_argument("--slurm", dest="launcher", action="store_const", const=_slurm, help="sbatch; goes on by itself after the time limit")
    kind.add_argument("--ray", dest="launcher", action="store_const", const=_ray, help="Ray: a running cluster, or one on this machine")
    parser.add_argument("--gpus", metavar="N", type=_positive, help="processes on each node, one a GPU (default: the GPUs of this machine)")
    parser.add_argument("--nodes", metavar="M", type=_positive, default=1, help="nodes (default: 1)")
    parser.add_argument("--head", metavar="HOST", type=_host, help="several nodes: name or address of the first")
    parser.add_argument(
        "--port",
        metavar="N",
        type=_port_number,
        help="where ranks meet (default: a free one; on several nodes one that follows from the run's name, or the job's number)",
    )
    parser.add_argument("--hostfile", metavar="FILE", help=f"--deepspeed: a line `HOST slots=N` for each node (default: {HOSTFILE})")
    parser.add_argument("--time", metavar="LIMIT", help=f"--slurm: time limit of one start (default: {TIME})")
    parser.add_argument("--cpus", metavar="N", type=_positive, help=f"--slurm: CPUs of each process (default: {CPUS})")
    parser.add_argument("--address", metavar="URL", help="--ray: submit as a job to this address, e.g. http://127.0.0.1:8265")
    parser.add_argument("--preflight", action="store_true", help="check the nodes and what lies between them, by the same launcher")
    parser.add_argument("--print", dest="only_print", action="store_true", help="print the command, start nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.deepspeed_config import check_batches

    config = load_config(arguments.config, arguments.overrides)
    _refuse_unheeded(arguments)
    arguments.gpus = arguments.gpus or _gpus_here(arguments)
    check_batches(config, arguments.gpus * arguments.nodes)
    if arguments.nodes > 1:
        _keep_groups_inside(config.engine.sequence_parallel, arguments.gpus)
    if arguments.preflight:
        arguments.overrides = [*arguments.overrides, "--preflight"]
    command = arguments.launcher(arguments, config)
    print(shlex.join(command), flush=True)
    if arguments.only_print:
        return 0
    if shutil.which(command[0]) is None:
        raise MachineError(f"launch: '{command[0]}' is not installed here, or not on PATH; --print prints the command for use elsewhere")
    return os.execvp(command[0], command)


def _keep_groups_inside(sharing: int, gpus: int) -> None:
    """Ranks are numbered node by node, so those that share rows are of one node if their number divides its GPUs.

    Raises:
        ConfigError: it does not, though they would have room in one.
    """
    if sharing > gpus:
        warn(f"launch: engine.sequence_parallel={sharing} of {gpus} GPUs a node: rows are shared between nodes, over links that are slower")
    elif gpus % sharing:
        raise ConfigError(
            f"launch: engine.sequence_parallel={sharing} does not divide the {gpus} GPUs of a node: some rows would be shared between two "
            f"nodes; give --gpus {gpus // sharing * sharing}, or another engine.sequence_parallel"
        )


def _refuse_unheeded(arguments: argparse.Namespace) -> None:
    """Options that this launcher has no use for."""
    launcher, several = arguments.launcher, arguments.nodes > 1
    heeded = {
        "head": several and launcher in (_torchrun, _deepspeed),
        "port": launcher is not _ray,
        "hostfile": several and launcher is _deepspeed,
        "time": launcher is _slurm,
        "cpus": launcher is _slurm,
        "address": launcher is _ray,
    }
    for name, is_heeded in heeded.items():
        if getattr(arguments, name) is not None and not is_heeded:
            nodes = " on one node" if not several and name in ("head", "hostfile") else ""
            raise ConfigError(f"--{name}: nothing heeds it with --{launcher.__name__.strip('_')}{nodes}; leave it out")


def _training(arguments: argparse.Namespace, script: str = "train.py") -> list[str]:
    return [_script(script), "--config", arguments.config, *arguments.overrides]


def _deepspeed(arguments: argparse.Namespace, config: Config) -> list[str]:
    command = [_beside_python("deepspeed"), "--master_port", str(_port(arguments, config))]
    if arguments.nodes == 1:
        found = [path for path in (Path(HOSTFILE), THEIRS) if path.is_file()]
        if found:
            warn(f"launch: {found[0]} is not heeded: this start has one node, this one; to use its nodes: --nodes M --hostfile {found[0]}")
        command += ["--hostfile", os.devnull] if THEIRS in found else []
    else:
        hostfile = arguments.hostfile or HOSTFILE
        if not Path(hostfile).exists() and not arguments.only_print:
            raise ConfigError(f"--hostfile: '{hostfile}' is missing; write a line `HOST slots={arguments.gpus}` for each node")
        if shutil.which("pdsh") is None and not arguments.only_print:
            raise MachineError("launch: deepspeed reaches the other nodes by pdsh, which is not installed here (apt-get install pdsh)")
        if left := left_here():
            warn(f"launch: deepspeed hands {', '.join(left)} to no other node; write what they need as NAME=VALUE into ~/.deepspeed_env")
        command += ["--hostfile", hostfile, "--num_nodes", str(arguments.nodes), "--master_addr", _head(arguments)]
    return [*command, "--num_gpus", str(arguments.gpus), *_training(arguments)]


def left_here() -> list[str]:
    """Names of variables that a rank heeds, are set here, and do not reach the other nodes through deepspeed 0.19, which hands on those of
    `.deepspeed_env` and a few of its own (MLFLOW*, MV2*, PYTHON*, UCX*, with CUDA NCCL*)."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    written = {line.partition("=")[0].strip() for path in files for line in path.read_text().splitlines()}
    return sorted(one for one in os.environ if one.startswith(MATTER) and one not in written)


def _torchrun(arguments: argparse.Namespace, config: Config) -> list[str]:
    command = [_beside_python("torchrun"), "--nproc-per-node", str(arguments.gpus)]
    if arguments.nodes > 1:
        port = _port(arguments, config)
        endpoint = f"{bracketed(_head(arguments))}:{port}"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", f"{config.name}-{port}"]
        command += ["--nnodes", str(arguments.nodes), *meeting]
    else:
        command += ["--master-port", str(arguments.port)] if arguments.port else ["--standalone"]
    return [*command, *_training(arguments)]


def _port(arguments: argparse.Namespace, config: Config) -> int:
    """On one node a free one. On several each node must come to the same without asking: it follows from the run's directory."""
    if arguments.port:
        return arguments.port
    return port_of(str(Path(config.output_dir).absolute() / config.name)) if arguments.nodes > 1 else free_port()


def _slurm(arguments: argparse.Namespace, config: Config) -> list[str]:
    """Absolute paths: SLURM runs a copy of the script, and the command may be given elsewhere."""
    size = [f"--nodes={arguments.nodes}", f"--ntasks-per-node={arguments.gpus}", f"--gpus-per-node={arguments.gpus}",
            f"--cpus-per-task={arguments.cpus or CPUS}"]  # fmt: skip
    python, config_file = _python_of_nodes(), os.path.abspath(arguments.config)
    training = IN_IMAGE if python.endswith(".sif") else str(starter_file("launch/train.py"))
    for path in (python, training, config_file):
        if "," in path:
            raise ConfigError(f"--slurm: '{path}' has a comma in it, at which SLURM's scripts would cut it; use a path without one")
    where = f"--export=ALL,VLM_DIST_PYTHON={python},VLM_DIST_TRAIN={training}"
    where += f",VLM_DIST_PORT={arguments.port}" if arguments.port else ""
    options = [f"--job-name={config.name}", *size, f"--time={arguments.time or TIME}", f"--chdir={Path.cwd()}", where]
    return ["sbatch", *options, str(starter_file("launch/slurm/train.sbatch")), config_file, *arguments.overrides]


def _python_of_nodes() -> str:
    """What VLM_DIST_PYTHON names, which may lie on the nodes alone, or be an image and no program here; else this Python."""
    named = os.environ.get("VLM_DIST_PYTHON") or sys.executable
    found = shutil.which(named)
    if found is None and "/" not in named:
        raise ConfigError(f"VLM_DIST_PYTHON: '{named}' is no program here; give its absolute path, as the nodes see it, or unset it")
    return os.path.abspath(found or named)


def _ray(arguments: argparse.Namespace, config: Config) -> list[str]:
    workers = f"ray.workers={arguments.gpus * arguments.nodes}"
    if arguments.address is None:
        return [_python(), *_training(arguments, "ray_train.py"), workers]
    for override in arguments.overrides:
        if redacted(override) != override:
            raise ConfigError(f"launch: '{redacted(override)}' holds a secret, and Ray shows the command of a job; write it into the YAML")
    _refuse_unseen(arguments, config)
    seconds = str(math.ceil(config.checkpoint.grace_s))
    settings = {"excludes": NOT_SENT, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": seconds}}
    job = ["job", "submit", "--address", arguments.address, "--working-dir", ".", "--runtime-env-json", json.dumps(settings), "--"]
    return [_beside_python("ray"), *job, sys.executable, *_training(arguments, "ray_train.py"), workers]  # .venv is not sent


def _refuse_unseen(arguments: argparse.Namespace, config: Config) -> None:
    """What a job does not find, or leaves where it is deleted: Ray sends a copy of this folder, and removes it after the job."""
    from vlm_dist.upstream.ray import left_out

    if not Path(config.output_dir).is_absolute():
        raise ConfigError(
            f"output_dir: '{config.output_dir}' would lie in the copy of this folder that Ray makes for the job and deletes after it; "
            "give an absolute path on storage that every node sees"
        )
    if os.path.relpath(arguments.config).startswith("..") and not Path(arguments.config).is_absolute():
        raise ConfigError(f"'{arguments.config}' is outside of this folder, of which Ray sends a copy; give an absolute path that all see")
    if not Path(arguments.config).is_absolute() and (by := left_out(Path(arguments.config), NOT_SENT)):
        raise ConfigError(
            f"'{arguments.config}' is not in the copy of this folder that Ray sends to the job ({by}); move it, to configs/ for example, "
            "or give an absolute path that every node sees"
        )


def _script(name: str) -> str:
    return _short(starter_file(f"launch/{name}"))


def _python() -> str:
    return _short(Path(sys.executable))


def _beside_python(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    return _short(path) if path.exists() else name


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _head(arguments: argparse.Namespace) -> str:
    if arguments.head is None:
        raise ConfigError("--head: several nodes need the name or address of the first, which all of them reach")
    return arguments.head


def _host(text: str) -> str:
    """A name or an address, IPv6 too, with brackets or without; which of the two each launcher wants is written into its command."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if with_port := re.fullmatch(r"(\[.+\]|[^:]+):(\d+)", text):
        raise argparse.ArgumentTypeError(f"'{text}' has a port; give --head {with_port[1].strip('[]')} --port {with_port[2]}")
    try:
        if ":" in host and ipaddress.IPv6Address(host).is_link_local:
            raise argparse.ArgumentTypeError(f"'{text}' holds on one link alone; give a name or another address")
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no IPv6 address; expected a name or an address") from None
    if ":" not in host and not re.fullmatch(r"[\w.-]+", host):
        raise argparse.ArgumentTypeError(f"'{text}' is no name or address of a host")
    return host


def _gpus_here(arguments: argparse.Namespace) -> int:
    import torch

    here = torch.cuda.device_count()
    if not here and (arguments.launcher is _slurm or arguments.address):
        raise ConfigError("--gpus: this machine has no GPU to count, and the nodes are others; say how many each of them has")
    return max(1, here)


def _port_number(text: str) -> int:
    if _positive(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text} is no port: they end at 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 1 or more")
    return int(text)
