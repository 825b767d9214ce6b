"""Before a long start: doctor on every node, through the launcher itself, and what only all nodes together can tell."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_dist import distributed
from vlm_dist.checking.doctor import MOST_APART, Check, examine
from vlm_dist.config import Config
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.distributed import Ranks
from vlm_dist.environment import PACKAGES, version
from vlm_dist.errors import UserError
from vlm_dist.models.going_on import settle
from vlm_dist.run_dir import RunDir

MB = 16
ROUNDS = 3
MOST_NODES = 8  # of more only neighbours are measured against one another
SLOW = 0.5  # of the median bandwidth


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
    checks = [*_each_node(config, ranks), *_versions(ranks), *_clocks(ranks), *_shared(Path(config.output_dir), ranks)]
    checks += [*_run(config, run, ranks, resume_anyway=resume_anyway), *_links(ranks)]
    return {"ended": "finished", "fit": all(check.state != "bad" for check in checks), "checks": [check.to_dict() for check in checks]}


def _each_node(config: Config, ranks: Ranks) -> Iterator[Check]:
    host = socket.gethostname()
    mine = [] if ranks.local_rank else [check for check in examine(config) if check.name != "launcher"]
    for rank, (where, checks) in enumerate(ranks.gather((host, mine))):
        for check in checks:
            if check.state != "ok":
                yield Check(f"{where}: {check.name}", check.state, check.found, check.fix)
        if checks:
            yield Check(where, "ok", f"doctor found {sum(check.state == 'bad' for check in checks)} bad of {len(checks)}, rank {rank}")


def _versions(ranks: Ranks) -> Iterator[Check]:
    import torch

    mine = {name: version(name) for name in (*PACKAGES, "vlm_dist")} | {"cuda": torch.version.cuda}
    everywhere = ranks.gather((socket.gethostname(), mine))
    apart = [name for name in mine if len({versions[name] for _, versions in everywhere}) > 1]
    for name in apart:
        found = ", ".join(sorted({f"{host} {versions[name]}" for host, versions in everywhere}))
        yield Check(f"version of {name}", "bad", found, "the same environment on all nodes")
    if not apart:
        yield Check("versions", "ok", f"the same on {len({host for host, _ in everywhere})} nodes")


def _clocks(ranks: Ranks) -> Iterator[Check]:
    ranks.barrier()
    times = ranks.gather((time.time(), socket.gethostname()))
    (first, early), (last, late) = min(times), max(times)
    good = last - first <= MOST_APART
    found = f"within {max(last - first, 0.1):.1f} s of one another" if good else f"{early} is {last - first:.1f} s behind {late}"
    yield Check("clocks", "ok" if good else "bad", found, "" if good else "set them by NTP (chrony) on every node")


def _shared(folder: Path, ranks: Ranks) -> Iterator[Check]:
    """A word that the first rank writes, all must read."""
    word, path = ranks.gather((secrets.token_hex(16), str(folder.absolute() / f".preflight-{os.getpid()}")))[0]
    problem = _write(Path(path), word) if ranks.is_first else ""
    if problem := ranks.gather(problem)[0]:
        yield Check("output_dir", "bad", problem, "choose another output_dir")
        return
    blind = [host for host, read in ranks.gather((socket.gethostname(), _read(Path(path)))) if read != word]
    if ranks.is_first:
        Path(path).unlink(missing_ok=True)
    if blind:
        found = f"{', '.join(sorted(set(blind)))} does not see what the first rank writes to {folder.absolute()}"
        yield Check("output_dir", "bad", found, "give a folder that all nodes share")
    else:
        yield Check("output_dir", "ok", f"{folder.absolute()} is the same folder on all ranks")


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
        with suppress(OSError):
            path.unlink()
        return f"{path.parent} cannot be written ({error.strerror})"
    return ""


def _read(path: Path) -> str | None:
    try:
        os.listdir(path.parent)  # asks a file server anew
        return path.read_text()
    except OSError:
        return None


def _links(ranks: Ranks) -> Iterator[Check]:
    """An all-reduce between two ranks of each pair of nodes (on one node: of its first two ranks)."""
    hosts = ranks.gather(socket.gethostname())
    firsts = sorted({host: hosts.index(host) for host in hosts}.values())
    if len(firsts) == 1:
        firsts = list(range(min(2, ranks.world_size)))
    pairs = list(itertools.combinations(firsts, 2)) if len(firsts) <= MOST_NODES else list(itertools.pairwise(firsts))
    speeds = [_bandwidth(pair, ranks) for pair in pairs]
    usual = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
    for (a, b), speed in zip(pairs, speeds, strict=True):
        names = f"{hosts[a]} - {hosts[b]}" if hosts[a] != hosts[b] else f"ranks {a} - {b}"
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
