"""Processes that read, measure and encode samples in place of a stream's threads: Python's lock stays with the training loop.

Order, quarantine and state stay where they are, in the stream: what is handed over is one sample, as a thread would do it. Its tensors
come back in shared memory, one file a sample that is gone as soon as it is opened; where there is no room for it, through the pipe.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from vlm_dist.data.dataset import Dataset, open_storage
from vlm_dist.data.encoded import Encoded
from vlm_dist.data.preparer import Preparer, Workers
from vlm_dist.data.rows import Slot
from vlm_dist.errors import MachineError
from vlm_dist.quiet import quiet_libraries

logger = logging.getLogger(__name__)
PRELOADED = ["vlm_dist.data.processes", "vlm_dist.data.encode", "torchvision.transforms.v2", "transformers"]
SHARED = Path("/dev/shm")
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""A scheduler sends them to all processes of a job."""
_numbers, _mark = itertools.count(), ""  # in a worker: of its files in shared memory, and what all their names begin with
_preparer: Preparer | Exception | None = None  # in a worker: what it works with, or why it cannot


def workers_for(number: int, preparer: Preparer, in_processes: bool) -> Workers | Processes:
    """What prepares a stream's samples. Where `data.processes` leaves it open, threads do when processes cannot, told.

    Raises:
        MachineError: as `Processes`, where `data.processes` asks for them.
    """
    if not in_processes or not number:
        return Workers(number)
    try:
        return Processes(number, preparer)
    except MachineError as error:
        if preparer.config.processes != "auto":
            raise
        logger.warning("%s; threads prepare the samples", error)
        return Workers(number)


class Processes:
    """As `Workers`, for a preparer's `encode` and `measure`. The first begins at once, in a second or two, the others when there is work.

    Args:
        number: of processes.
        preparer: whose data sets, settings and processor they get; it hears of what they notice.

    Raises:
        MachineError: the processor cannot be handed to another process, or one of them was killed; this also from a sample's result.
    """

    def __init__(self, number: int, preparer: Preparer):
        self._preparer, self._mark = preparer, str(SHARED / f"vlm_dist-{os.getpid()}-{os.urandom(6).hex()}")
        encoder, sources = preparer.encoder, [(one.name, one.index, one.weight) for one in preparer.datasets]
        try:
            processor = pickle.dumps((type(encoder), encoder.processor))
        except Exception as error:  # an object of others refuses as it likes
            raise _not_handed(error) from None
        made = pickle.dumps((processor, preparer.config, sources, preparer.seed, preparer.lanes, self._mark))
        self._pool = ProcessPoolExecutor(number, _Context(), _begin, (made,))
        try:
            with _told_when_killed():
                self._pool.submit(_ready).result()
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        _clear(self._mark)

    def begin(self, call: Callable, *arguments: Any) -> Future:
        """Begin a method of the preparer in one of them; what it gives comes as from the method itself."""
        with _told_when_killed():
            return _Coming(self, self._pool.submit(_do, call.__name__, *arguments), call.__name__, arguments)  # type: ignore[return-value]

    def take(self, future: Future, *call: Any) -> Any:
        """The result of a call, its tensors in this process."""
        with _told_when_killed():
            try:
                found, prompts = _opened(*future.result())
            except _Swept:
                found, prompts = _opened(*self._pool.submit(_piped, *call).result())
        if isinstance(found, Slot):
            return found
        slot, encoded = found
        self._preparer.hear(slot, encoded, prompts)
        return slot, encoded and _with(encoded, _tensor)


class _Coming:
    """A result that becomes tensors when it is asked for, in the thread that asks."""

    def __init__(self, processes: Processes, future: Future, name: str, arguments: tuple):
        self._processes, self._future, self._call = processes, future, (name, *arguments)

    def result(self) -> Any:
        return self._processes.take(self._future, *self._call)


class _Swept(Exception):
    """A sample's file is gone: systemd deletes a user's there when their last session on the machine ends (RemoveIPC)."""


@contextmanager
def _told_when_killed() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise MachineError(
            "data.processes: a process that prepares samples was killed from outside, most likely for lack of memory; "
            "set data.workers lower, or data.processes: false"
        ) from None


def _not_handed(error: Exception) -> MachineError:
    reason = (f"{error}".splitlines() or [type(error).__name__])[0]
    return MachineError(f"data.processes: this processor cannot be handed to another process ({reason}); set it to false")


def _begin(made: bytes) -> None:
    """In a worker: everything that a preparer needs."""
    global _preparer
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)  # the trainer is asked, and ends when it has saved
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _preparer = _receive(made)
    except Exception as error:  # told by the first sample
        _preparer = error


def _ready() -> None:
    """In a worker: raise what it cannot work for."""
    if isinstance(_preparer, Exception):
        raise _preparer


def _receive(made: bytes) -> Preparer:
    import torch

    quiet_libraries()
    torch.set_num_threads(1)
    global _mark
    handed, config, sources, seed, lanes, _mark = pickle.loads(made)
    try:
        kind, processor = pickle.loads(handed)
    except Exception as error:  # its class may be one that only the trainer has
        raise _not_handed(error) from None
    storage = open_storage(config)
    datasets = [Dataset(name, index, storage, weight) for name, index, weight in sources]
    return Preparer(datasets, config, kind.of(processor, config), seed, lanes)


def _do(name: str, *arguments: Any) -> tuple[bytes, list[int], Path | None]:
    """In a worker: a method of the preparer; its result, and the system prompts that were noticed, as `_opened` takes them."""
    arrays: list[pickle.PickleBuffer] = []
    found = _done(name, *arguments)
    head = pickle.dumps(found, protocol=5, buffer_callback=arrays.append)
    parts = [array.raw() for array in arrays]
    if not parts:
        return head, [], None
    path = Path(f"{_mark}-{os.getpid()}-{next(_numbers)}")
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:  # nobody else's to read
            file.writelines(parts)
    except OSError:  # a container's shared memory is often 64 MB
        with suppress(OSError):
            path.unlink()
        return pickle.dumps(found, protocol=5), [], None
    return head, [part.nbytes for part in parts], path


def _piped(name: str, *arguments: Any) -> tuple[bytes, list[int], None]:
    """In a worker: the same, without a file."""
    return pickle.dumps(_done(name, *arguments), protocol=5), [], None


def _opened(head: bytes, sizes: list[int], path: Path | None) -> Any:
    """In the trainer: what a worker did, its arrays where the worker wrote them."""
    if path is None:
        return pickle.loads(head)
    try:
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except FileNotFoundError:
        raise _Swept from None
    path.unlink(missing_ok=True)
    ends = list(itertools.accumulate(sizes))
    return pickle.loads(head, buffers=[whole[end - size : end] for size, end in zip(sizes, ends, strict=True)])


def _done(name: str, *arguments: Any) -> tuple[Any, list[str | None]]:
    _ready()
    assert isinstance(_preparer, Preparer)
    found = getattr(_preparer, name)(*arguments)
    if isinstance(found, Slot):
        return _light(found), []
    slot, encoded = found
    prompts = getattr(_preparer.encoder, "prompts", None)
    return (_light(slot), encoded and _with(encoded, _array)), [] if prompts is None else list(prompts.found)


def _light(slot: Slot) -> Slot:
    """The files of a sample that can be used need not travel back."""
    if slot.problem is None:
        slot.raw = None
    elif slot.raw is not None:
        slot.raw = {name: value for name, value in slot.raw.items() if name.startswith("__")}
    return slot


def _with(encoded: Encoded, change: Callable[[Any], Any]) -> Encoded:
    inputs = {name: change(value) for name, value in encoded.inputs.items()}
    return Encoded(encoded.key, inputs, change(encoded.labels), change(encoded.picture), encoded.notes)


def _array(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else value


def _tensor(value: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _clear(_mark)
        os._exit(1)


def _clear(mark: str) -> None:
    """What was written and not asked for."""
    for path in SHARED.glob(f"{Path(mark).name}-*"):
        path.unlink(missing_ok=True)


class _Process(ForkServerProcess):
    """A fork of a server of our own: children of the one that the rest of the program shares would begin with other signals than it blocks,
    and those of others with ours blocked."""

    def start(self) -> None:
        """A new process reads its parent's main module, which in a script without a guard is the training itself; it needs nothing of it.
        Signals wait until it knows that they are not for it; also those to the server that it comes from."""
        resource_tracker.ensure_running()  # at its start it would unblock what is blocked here
        with _starting:
            main, shared = sys.modules["__main__"], forkserver.connect_to_new_process
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
            sys.modules["__main__"], forkserver.connect_to_new_process = types.ModuleType("__main__"), _server.connect_to_new_process
            try:
                super().start()
            finally:
                sys.modules["__main__"], forkserver.connect_to_new_process = main, shared
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(ForkServerContext):
    Process = _Process


_starting = threading.Lock()
_server = forkserver.ForkServer()
_server.set_forkserver_preload(PRELOADED)
