"""Before a long start: doctor on every node, through the launcher itself, and what only all nodes together can tell."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from vlm_dist import distributed, networks
from vlm_dist.checking.doctor import MOST_APART, Check, examine
from vlm_dist.config import Config
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.distributed import Ranks
from vlm_dist.environment import PACKAGES, version
from vlm_dist.errors import UserError
from vlm_dist.models.going_on import settle
from vlm_dist.run_dir import RunDir
from vlm_dist.run_lock import trains_there

MB = 16
ROUNDS = 3
MOST_NODES = 8  # of more only neighbours are measured against one another
SLOW = 0.5  # of the median bandwidth
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def preflight(config: Config, *, resume_anyway: bool = False) -> dict[str, Any]:
    """Check this start's nodes. Every rank must call it.

    Args:
        resume_anyway: the run there may be of another configuration.

    Returns:
        `fit`, and `checks`: the findings of each node (those of doctor that are not ok) and of all together, on every rank.

    Raises:
        ConfigError: the batch cannot be cut for so many ranks.
        MachineError: the ranks do not find one another.
    """
    run = RunDir(Path(config.output_dir) / config.name)
    ranks = distributed.start(os.path.abspath(run.path), config.distributed.join_timeout_s, config.engine.device)
    check_batches(config, ranks.world_size)
    nodes = _nodes(ranks)
    checks = [*_each_node(config, ranks, nodes), *_versions(ranks, nodes), *_clocks(ranks, nodes)]
    checks += _shared(Path(config.output_dir), ranks, nodes)
    checks += [*_run(config, run, ranks, resume_anyway=resume_anyway), *_links(ranks, nodes)]
    distributed.stop_at_exit()
    return {"ended": "finished", "fit": all(check.state != "bad" for check in checks), "checks": [check.to_dict() for check in checks]}


def _nodes(ranks: Ranks) -> list[str]:
    """Of each rank the node's name; of several with one name (containers, machines that are all called localhost) with its first rank."""
    everywhere = ranks.gather((socket.gethostname(), networks.machine()))
    first = {machine: rank for rank, (_, machine) in reversed(list(enumerate(everywhere)))}
    shared = {host for host, machine in everywhere if any(host == other and machine != another for other, another in everywhere)}
    return [f"{host} (rank {first[machine]})" if host in shared else host for host, machine in everywhere]


def _each_node(config: Config, ranks: Ranks, nodes: list[str]) -> Iterator[Check]:
    mine = [] if ranks.local_rank else [check for check in examine(config) if check.name != "launcher"]
    for rank, (where, checks) in enumerate(zip(nodes, ranks.gather(mine), strict=True)):
        for check in checks:
            if check.state != "ok":
                yield Check(f"{where}: {check.name}", check.state, check.found, check.fix)
        if checks:
            yield Check(where, "ok", f"doctor found {sum(check.state == 'bad' for check in checks)} bad of {len(checks)}, rank {rank}")


def _versions(ranks: Ranks, nodes: list[str]) -> Iterator[Check]:
    import torch

    mine = {name: version(name) for name in (*PACKAGES, "vlm_dist")} | {"cuda": torch.version.cuda}
    everywhere = ranks.gather(mine)
    apart = [name for name in mine if len({versions[name] for versions in everywhere}) > 1]
    for name in apart:
        found = ", ".join(sorted({f"{node} {versions[name]}" for node, versions in zip(nodes, everywhere, strict=True)}))
        yield Check(f"version of {name}", "bad", found, "the same environment on all nodes")
    if not apart:
        yield Check("versions", "ok", f"the same on {len(set(nodes))} nodes")


def _clocks(ranks: Ranks, nodes: list[str]) -> Iterator[Check]:
    ranks.barrier()
    times = list(zip(ranks.gather(time.time()), nodes, strict=True))
    (first, early), (last, late) = min(times), max(times)
    good = last - first <= MOST_APART
    found = f"within {max(last - first, 0.1):.1f} s of one another" if good else f"{early} is {last - first:.1f} s behind {late}"
    yield Check("clocks", "ok" if good else "bad", found, "" if good else "set them by NTP (chrony) on every node")


def _shared(folder: Path, ranks: Ranks, nodes: list[str]) -> Iterator[Check]:
    """A word that the first rank writes, all must read."""
    word, name = ranks.gather((secrets.token_hex(16), str(folder.absolute() / f".preflight-{os.getpid()}")))[0]
    path = Path(name)
    with removed(path) if ranks.is_first else nullcontext():
        problem = ranks.gather(_write(path, word) if ranks.is_first else "")[0]
        read = ranks.gather(None if problem else _read(path))
    if problem:
        yield Check("output_dir", "bad", problem, "choose another output_dir")
    elif blind := sorted({node for node, found in zip(nodes, read, strict=True) if found != word}):
        found = f"{', '.join(blind)} does not see what the first rank writes to {folder.absolute()}"
        yield Check("output_dir", "bad", found, "give a folder that all nodes share")
    else:
        yield Check("output_dir", "ok", f"{folder.absolute()} is the same folder on all ranks")


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """A file that is gone after this context, also where a signal ends this process in it. Another thread hears the signal: the main one
    may stand still in a collective."""
    if threading.current_thread() is not threading.main_thread():  # as on Ray, whose workers no signal reaches
        with _unlinked(path):
            yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen() -> None:
        with heard:
            while number := heard.recv(1):
                if number[0] in before:
                    path.unlink(missing_ok=True)
                    os._exit(128 + number[0])

    before = {number: signal.getsignal(number) for number in ENDS}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}  # as under nohup
    threading.Thread(target=listen, name="preflight", daemon=True).start()
    for number in before:
        signal.signal(number, lambda *_: None)
    waker = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        with _unlinked(path):
            yield
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler)
        told.close()  # ends the thread


@contextmanager
def _unlinked(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _run(config: Config, run: RunDir, ranks: Ranks, *, resume_anyway: bool) -> Iterator[Check]:
    """The run's own directory, where one is: the first rank looks, and changes nothing."""
    found, fix = ranks.gather(refusal(config, run, resume_anyway=resume_anyway) if ranks.is_first else ("", ""))[0]
    if found:
        yield Check("run directory", "bad", found, fix)


def refusal(config: Config, run: RunDir, *, resume_anyway: bool) -> tuple[str, str]:
    """Why a start would be refused there, and what to do; empty: it would not."""
    if not os.path.lexists(run.path):
        return "", ""
    if not run.path.is_dir():
        return f"{run.path} is a file or a link to nowhere", "move it away, or another name (name=...)"
    if who := trains_there(run):
        return f"{run.path}: {who} trains there now", "wait for its end, stop it, or another name (name=...)"
    if not os.access(run.path, os.W_OK | os.X_OK):
        return f"{run.path} cannot be written", "run as its owner, or another name (name=...)"
    if resume_anyway or not run.is_begun or not run.config.exists():
        return "", ""
    try:
        changed = run.changed(settle(config))
    except UserError:  # told by the start, which mends what is damaged
        return "", ""
    return (f"{run.path} holds a run of another configuration ({'; '.join(changed)})" if changed else ""), "another name (name=...)"


def _write(path: Path, word: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(word)
    except OSError as error:
        return f"{path.parent} cannot be written ({error.strerror})"
    return ""


def _read(path: Path) -> str | None:
    try:
        os.listdir(path.parent)  # asks a file server anew
        return path.read_text()
    except OSError:
        return None


def _links(ranks: Ranks, nodes: list[str]) -> Iterator[Check]:
    """An all-reduce between two ranks of each pair of nodes (on one node: of its first two ranks)."""
    firsts = sorted({node: nodes.index(node) for node in nodes}.values())
    if len(firsts) == 1:
        firsts = list(range(min(2, ranks.world_size)))
    pairs = list(itertools.combinations(firsts, 2)) if len(firsts) <= MOST_NODES else list(itertools.pairwise(firsts))
    speeds = [_bandwidth(pair, ranks) for pair in pairs]
    usual = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
    for (a, b), speed in zip(pairs, speeds, strict=True):
        names = f"{nodes[a]} - {nodes[b]}" if nodes[a] != nodes[b] else f"ranks {a} - {b}"
        found = f"{speed / 1e6:,.0f} MB/s of gradients (all-reduce of {MB} MB)"
        slow = speed < SLOW * usual
        yield Check(names, "warn" if slow else "ok", found, f"half of the others' {usual / 1e6:,.0f}: look at this link" if slow else "")


def _bandwidth(pair: tuple[int, int], ranks: Ranks) -> float:
    """Bytes a second, as every rank hears it."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(pair))
    seconds = 0.0
    if ranks.rank in pair:
        data = torch.ones(MB * 250_000, device=ranks.device)
        dist.all_reduce(data, group=group)  # the first one connects
        start = time.perf_counter()
        for _ in range(ROUNDS):
            dist.all_reduce(data, group=group)
        data[0].item()  # waits for the device
        seconds = time.perf_counter() - start
    return MB * 1e6 * ROUNDS / max(1e-9, ranks.gather(seconds)[pair[0]])
