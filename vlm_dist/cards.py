"""Which card a rank computes on, under every way in which a scheduler hands them out; and why CUDA does not start where there are some."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_dist.errors import MachineError

if TYPE_CHECKING:
    import torch

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")  # in a container the driver shows, whether or not it was given a card
OF_WINDOWS = Path("/usr/lib/wsl/lib/libcuda.so.1")  # under WSL the driver is Windows' own, and there is neither of the two
HIDDEN = ("", "-1", "none", "void", "nodevfiles")
"""Words of CUDA_VISIBLE_DEVICES and NVIDIA_VISIBLE_DEVICES that say: no card for this process."""
SAID_S = 300.0  # that ranks, all of which have met, wait for one another's cards
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 gave it the first name, and reads the second too


def choose_device(local_rank: int, wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The device of a rank that asks no other, made the current one.

    Raises:
        MachineError: a card is there, but CUDA does not start.
    """
    import torch

    return take_card(local_rank % torch.cuda.device_count()) if starts_cuda(wanted) else torch.device("cpu")


def starts_cuda(wanted: Literal["auto", "cpu"] = "auto") -> bool:
    """Whether to compute on a card.

    Raises:
        MachineError: a card is there, but CUDA does not start.
    """
    import torch

    if not any(name in os.environ for name in ALLOCATOR):  # rows are of many lengths: blocks that grow leave no holes
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    if wanted == "cpu":
        if torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return False
    if torch.cuda.is_available():
        return True
    if (problem := why_no_cuda()) is not None:
        raise MachineError(
            f"{problem}; install a torch that fits the driver, or compute on the CPU: engine.device=cpu, "
            "or CUDA_VISIBLE_DEVICES= before the command"
        )
    return False


def take_card(number: int) -> torch.device:
    """Make one of the cards that this process sees the current one."""
    import torch

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


def agreed_card(store: Any, world_size: int, rank: int, node: str, local_rank: int, seen: Sequence[str]) -> int | None:
    """The number of a rank's card among those that it sees: its place among the ranks of its node that see the same cards. So the only one
    (srun --gpus-per-task=1), its own of all, or of those that some ranks share (--gpu-bind=closest), however srun deals out the ranks. Too
    few cards are found by `check_cards`. None where no rank sees one. Every rank must call it.

    Args:
        store: of all ranks (torch.distributed.Store).
        node: its name.
        seen: what tells each card from every other (`card_id`), in the order of their numbers.

    Raises:
        MachineError: some ranks see a card, and some none; or one does not say.
    """
    store.append(f"cards of {node}" if seen else "no cards", json.dumps([rank, node, local_rank, *seen]) + "\n")
    if store.add("cards told", 1) == world_size:
        store.set("all cards", "")
    _wait(store, "all cards")
    if store.check(["no cards"]):
        without = sorted(_lines(store, "no cards"))
        if len(without) < world_size:
            raise MachineError(_without(*without[0][:2]))
        return None
    told = [(place, cards) for _, _, place, *cards in _lines(store, f"cards of {node}")]
    return sorted(place for place, cards in told if cards == list(seen)).index(local_rank) % len(seen)


def _wait(store: Any, key: str) -> None:
    """In steps, because a store's own wait hears no Ctrl-C.

    Raises:
        MachineError: it does not come.
    """
    ends, pause = time.monotonic() + SAID_S, 0.01
    while not store.check([key]):
        if time.monotonic() > ends:
            raise MachineError(f"not every rank has said in {SAID_S:.0f} s which cards it sees; one may have ended: its own log says why")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def _lines(store: Any, key: str) -> list[list[Any]]:
    return [json.loads(line) for line in store.get(key).decode().splitlines()]


def _without(rank: int, node: str) -> str:
    return f"rank {rank} on {node} has no GPU, other ranks have one; ask for a card for each, or set engine.device=cpu"


def card_id(device: torch.device) -> str:
    """What tells this card from every other; empty for a CPU."""
    import torch

    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


def seen_cards() -> list[str]:
    """Of each card that this process sees what tells it from every other."""
    import torch

    return [card_id(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]


def check_cards(cards: list[tuple[str, str]]) -> None:
    """Of each rank the node and the card.

    Raises:
        MachineError: two ranks have one card, or some have a card and some have none.
    """
    ranks_of = defaultdict(list)
    for rank, (node, card) in enumerate(cards):
        ranks_of[node, card].append(rank)
    without = [(rank, node) for rank, (node, card) in enumerate(cards) if not card]
    if 0 < len(without) < len(cards):  # where the launcher made the process group, nobody has asked before (`agreed_card`)
        raise MachineError(_without(*without[0]))
    for (node, card), ranks in ranks_of.items():
        if card and len(ranks) > 1:
            raise MachineError(f"ranks {ranks[0]} and {ranks[1]} share one GPU of {node} ({card}); start one rank for each card")


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
