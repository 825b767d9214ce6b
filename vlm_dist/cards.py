"""Which card a rank computes on, under every way in which a scheduler hands them out; and why CUDA does not start where there are some."""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_dist.errors import MachineError

if TYPE_CHECKING:
    import torch

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")  # in a container the driver shows, whether or not it was given a card
OF_WINDOWS = Path("/usr/lib/wsl/lib/libcuda.so.1")  # under WSL the driver is Windows' own, and there is neither of the two
HIDDEN = ("", "-1", "none", "void", "nodevfiles")
"""Words of CUDA_VISIBLE_DEVICES and NVIDIA_VISIBLE_DEVICES that say: no card for this process."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 gave it the first name, and reads the second too


def choose_device(local_rank: int, wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The device of a rank, made the current one.

    Raises:
        MachineError: a card is there, but CUDA does not start.
    """
    import torch

    if not any(name in os.environ for name in ALLOCATOR):  # rows are of many lengths: blocks that grow leave no holes
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    if wanted == "cpu":
        if torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if (problem := why_no_cuda()) is not None:
            raise MachineError(
                f"{problem}; install a torch that fits the driver, or compute on the CPU: engine.device=cpu, "
                "or CUDA_VISIBLE_DEVICES= before the command"
            )
        return torch.device("cpu")
    number = card_of(local_rank, torch.cuda.device_count())
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def device_here(wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The card that this process uses, or the CPU where there is none; for what runs in one process.

    Raises:
        MachineError: a card is there, but CUDA does not start.
    """
    import torch

    if wanted == "auto" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return choose_device(0, wanted)


def card_of(local_rank: int, visible: int) -> int:
    """The number of a rank's card among those that it sees: its own number, the only one (srun --gpus-per-task=1), or, where each pair of
    ranks sees a pair of cards of its own (--gpu-bind=closest), its place among those. Too few cards are found by `check_cards`."""
    return local_rank % visible


def card_id(device: torch.device) -> str:
    """What tells this card from every other; empty for a CPU."""
    import torch

    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


def check_cards(cards: list[tuple[str, str]]) -> None:
    """Of each rank the node and the card.

    Raises:
        MachineError: two ranks have one card, or some have a card and some have none.
    """
    ranks_of = defaultdict(list)
    for rank, (node, card) in enumerate(cards):
        ranks_of[node, card].append(rank)
    without = [rank for rank, (_, card) in enumerate(cards) if not card]
    if without and len(without) < len(cards):
        node = cards[without[0]][0]
        raise MachineError(
            f"rank {without[0]} on {node} has no GPU, other ranks have one; ask for a card for each, or set engine.device=cpu"
        )
    for (node, card), ranks in ranks_of.items():
        if card and len(ranks) > 1:
            raise MachineError(
                f"ranks {ranks[0]} and {ranks[1]} share one GPU of {node} ({card}); start one rank for each card, "
                "and under srun --gpu-bind let neighbours see the same cards: --distribution=block:block"
            )


def why_no_cuda() -> str | None:
    """Why torch has no CUDA though a driver is there, with both versions; None where there is no driver, or the cards were hidden."""
    import torch

    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES") if os.environ.get(name, "all").lower() in HIDDEN]
    is_native = DRIVER.is_file() and any(DEVICES.glob("nvidia[0-9]*"))
    if hidden or not (is_native or OF_WINDOWS.exists()):
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if is_native else None
    driver = f"NVIDIA driver {found[0]}" if found else "an NVIDIA driver" if is_native else "Windows' NVIDIA driver"
    if torch.version.cuda is None:
        return f"{driver} is here, but torch {torch.__version__} is built for the CPU alone"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
        said = "it sees no card: nvidia-smi and CUDA_VISIBLE_DEVICES say which there are"
    except (RuntimeError, AssertionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{driver} is here, but CUDA {torch.version.cuda} of torch {torch.__version__} does not start ({said})"
