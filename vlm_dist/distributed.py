"""Who is this process among the others, and what it asks of them. A plain `python` process becomes a world of one."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm_dist.cards import agreed_card, card_id, check_cards, choose_device, seen_cards, starts_cuda, take_card
from vlm_dist.errors import MachineError
from vlm_dist.joining import join
from vlm_dist.launched import Place, announced
from vlm_dist.networks import CHOSEN_BY, own_address

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
NEVER_S = 7 * 86400.0
LOADING_S = 3600.0
"""That ranks wait for one another before training: one may read its weights more slowly. torch's own limit is 10 to 30 minutes."""
_patient: Any = None
"""The process group whose collectives have no end."""


@dataclass(frozen=True)
class Ranks:
    """This process's place, and the few collectives that the project needs on plain numbers and objects."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    sharing: int = 1
    """Neighbouring ranks that share each row (engine.sequence_parallel)."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which rows this rank has: those of the ranks beside it that share them."""
        return self.rank // self.sharing

    @property
    def replicas(self) -> int:
        """How many ranks, or groups of ranks that share rows, there are."""
        return self.world_size // self.sharing

    @property
    def is_first_of_rows(self) -> bool:
        """Whether it speaks for the ranks that share its rows."""
        return self.rank % self.sharing == 0

    def sharing_group(self) -> Any:
        """The process group of those that share this rank's rows; every rank must call it."""
        import torch.distributed as dist

        own, _ = dist.new_subgroups(self.sharing)
        return own

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks, as float64."""
        return self.sums([value])[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each value, as float64: one collective for all."""
        if self.world_size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_and_gather(self, values: Sequence[float], *mine: float) -> tuple[list[float], list[list[float]]]:
        """The sums of `values` over all ranks, and of each of `mine` what every rank has, in order: one collective for all."""
        places = [[value if rank == self.rank else 0.0 for rank in range(self.world_size)] for value in mine]
        summed = self.sums([*values, *itertools.chain(*places)])
        gathered = summed[len(values) :]
        return summed[: len(values)], [gathered[i * self.world_size : (i + 1) * self.world_size] for i in range(len(mine))]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all ranks."""
        if self.world_size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank: the same answer on all."""
        return self.sum(float(flag)) > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank. The value must be picklable and come from our own ranks."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_on_node(self, do: Callable[[], T]) -> T:
        """What `do` returns, on every rank; one rank of each node does it before the others, who then find on the disk what it fetched.
        Every rank must call it."""
        if self.local_rank:
            self.patient_barrier()
            return do()
        try:
            return do()
        finally:
            self.patient_barrier()

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum(0)

    def patient_barrier(self) -> None:
        """Wait for every rank, however long one downloads or writes; other collectives give up (`LOADING_S`). A rank that is gone ends
        it, with an error."""
        if self.world_size > 1:
            import torch
            import torch.distributed as dist

            dist.all_reduce(torch.zeros(1), group=_patient)


def patient_group() -> Any:
    """The process group of `Ranks.patient_barrier`."""
    return _patient


def start(run: str = "", join_timeout_s: float = 600.0, device: Literal["auto", "cpu"] = "auto") -> Ranks:
    """Join the process group that the launcher describes (or a group of one), and choose the device of this rank.

    Args:
        run: what all ranks have in common, such as the run's directory; one that has come to another run's ranks leaves them alone.
        join_timeout_s: until all must be there; who is missing is told after 10 s.
        device: auto: the card that belongs to this rank, where there are cards.

    Raises:
        MachineError: the launcher's variables do not agree, or the others did not come; there are cards, but CUDA does not start, or not
            every rank has its own.
    """
    import torch
    import torch.distributed as dist

    from vlm_dist.upstream.torch import let_collectives_wait

    global _patient
    atexit.unregister(stop)  # one that fails may have collectives under way, which it would wait for
    place = announced()
    ours = {"RANK": place.rank, "LOCAL_RANK": place.local_rank, "WORLD_SIZE": place.world_size, "MASTER_ADDR": place.host}
    for name, value in ours.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(place.port or free_port())
    on_card = starts_cuda(device)
    seen = seen_cards() if on_card else []
    if dist.is_initialized():
        chosen = choose_device(place.local_rank, device)
    else:
        store = join(place, run, join_timeout_s)
        chosen = torch.device("cpu") if device == "cpu" else _agree(store, place, seen)
        backend = "cpu:gloo,cuda:nccl" if on_card else "gloo"
        with _reaching(place):
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)
    let_collectives_wait(LOADING_S)
    _patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=NEVER_S)) if place.world_size > 1 else None
    if on_card:
        os.environ["LOCAL_RANK"] = str(chosen.index)  # DeepSpeed takes it for the number of the card
    ranks = Ranks(dist.get_rank(), place.local_rank, dist.get_world_size(), chosen)
    check_cards(ranks.gather((socket.gethostname(), card_id(chosen))))
    return ranks


def _agree(store: Any, place: Place, seen: list[str]) -> torch.device:
    """The card of this rank."""
    import torch

    number = agreed_card(store, place.world_size, place.rank, socket.gethostname(), place.local_rank, seen)
    return torch.device("cpu") if number is None else take_card(number)


@contextmanager
def _reaching(place: Place) -> Iterator[None]:
    """Raises:
    MachineError: the ranks know one another's addresses, and cannot connect.
    """
    try:
        yield
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        why = str(error).splitlines()[0].rpartition("] ")[2][:120]
        raise MachineError(
            f"rank {place.rank} on {socket.gethostname()} cannot reach the others ({why}); name a network that leads to them, on every "
            f"node: {CHOSEN_BY}=INTERFACE (`ip -br addr` has them; here it is '{os.environ.get(CHOSEN_BY, '')}', and the host's own name "
            f"leads to {own_address() or 'nowhere'}), and let a firewall pass all ports between the nodes"
        ) from None


def alone() -> Ranks:
    """A world of one on the CPU, without a process group: for what looks at a run and is no part of one."""
    import torch

    return Ranks(0, 0, 1, torch.device("cpu"))


def stop() -> None:
    """Leave the process group; no collective may be under way."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def stop_at_exit() -> None:
    """What the ranks met for is done: leave the process group when this process ends. NCCL's would warn of itself otherwise, and gloo's
    threads end the process by SIGABRT now and then (torch 2.13: their last work frees tensors while Python is taken down)."""
    atexit.unregister(stop)
    atexit.register(stop)


def free_port() -> int:
    """A port of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step (dropout) a function of seed, step and rank: nothing to save for an exact continuation."""
    import torch

    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
