"""A rank that is gone (killed, or its machine failed) is named by one of those that are left, instead of by a library's traceback.

Every rank's `logs/rank-R.alive.json` says where it runs. On the same machine /proc tells whether it still does; of another machine, that
the file is not rewritten any more. A rank that ended by itself has said so in its file, and why in its own output.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.form import find_checkpoints
from vlm_dist.distributed import Ranks
from vlm_dist.errors import UserError
from vlm_dist.run_dir import RunDir, write_json

EXIT_CODE = 8
OF_A_PEER = (
    "onnection closed by peer", "onnection reset by peer", "Broken pipe", "onnection refused", "Socket closed", "remote process exited",
    "ncclRemoteError", "ncclSystemError", "NCCL", "Gloo", "gloo", "store->get", "TCPStore", "recvValue failed",
)  # fmt: skip
SETTLE_S = 2.0  # until a rank that fails has said so
MARGIN_S = 3.0  # longer than between two lines of a rank that lives


class RankLost(UserError):
    """Another rank is gone. The lowest of those that are left tells it; on the others `told` is set."""

    exit_code = EXIT_CODE
    of_one = True


def beat_of(rank: int, started: float, step: int, doing: str, beats: int, *, ended: bool = False) -> dict[str, Any]:
    """What a rank says of itself.

    Args:
        started: when this start of the run began (time.time).
        ended: this process leaves by itself.
    """
    place = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()), "machine": machine()}
    said = {**place, "started": started, "now": time.time(), "step": step, "doing": doing, "beats": beats}
    return said | ({"ended": True} if ended else {})


def let_speak(ranks: Ranks) -> None:
    """A rank ends now: the launcher's SIGTERM must not come before its words."""
    if ranks.world_size > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def lost_rank(run: RunDir, ranks: Ranks, error: BaseException, interval_s: float) -> RankLost | None:
    """What to say where a collective failed; None: not because a rank is gone.

    Args:
        interval_s: seconds between two lines of a rank that lives.
    """
    if ranks.world_size == 1:
        return None
    failed = time.time()
    is_of_peer = any(words in str(error) for words in OF_A_PEER)
    until = failed + (interval_s + MARGIN_S if is_of_peer else SETTLE_S)
    while True:
        others, now = other_beats(run, ranks), time.time()
        gone = [rank for rank in others if is_dead(rank)]
        if not gone and is_of_peer and now > failed + SETTLE_S:  # one that failed itself; the others follow it
            gone = sorted((rank for rank in others if rank.get("ended")), key=lambda rank: rank["now"])[:1]
        if not gone and now > until and is_of_peer:
            gone = [rank for rank in others if not is_here(rank) and rank["written"] < failed]
        if gone:
            return told_by_one(run, ranks, gone, others)
        if now > until:
            return None
        time.sleep(0.2)


def told_by_one(run: RunDir, ranks: Ranks, gone: list[dict[str, Any]], others: list[dict[str, Any]]) -> RankLost:
    """The error of this rank. The lowest that lives also leaves it in summary.json."""
    own = _read(run.beat(ranks.rank)) or {"step": 0}
    error = RankLost(in_words(run, gone, own["step"]))
    left = {rank["rank"] for rank in others if rank not in gone and not is_dead(rank)} | {ranks.rank}
    error.told = ranks.rank != min(left)
    if not error.told:
        nothing = {"before": None, "during": [], "after": None}
        write_json(run.summary, {"ended": "failed", "reason": str(error), "step": own["step"], "eval": nothing, "wall_s": None})
    return error


def in_words(run: RunDir, gone: list[dict[str, Any]], step: int) -> str:
    what = "; ".join(
        f"rank {rank['rank']} ({rank['host']}, process {rank['pid']}) "
        + (f"ended by itself: its own words are above, or in {run.log(rank['rank'])}" if rank.get("ended") else "is gone: it was killed "
           "(by the kernel where memory ran out: see dmesg), or its machine failed")
        for rank in gone[:8]
    )  # fmt: skip
    found = find_checkpoints(run.checkpoints)
    again = f"to continue from {found[0].name}" if found else "to begin again: no checkpoint was saved yet"
    return f"training: {what}. It was step {step}. Run the same command again {again}"


def is_dead(beat: dict[str, Any]) -> bool:
    """Whether a rank of this machine was ended by something else; of other machines nobody here can tell."""
    return not beat.get("ended") and is_here(beat) and born(beat["pid"]) != beat["born"]


def is_here(beat: dict[str, Any]) -> bool:
    """Whether its process number means something to this process."""
    return beat.get("machine") == machine()


def other_beats(run: RunDir, ranks: Ranks) -> list[dict[str, Any]]:
    """The last words of the other ranks of this start; `written`: when, by the file system's clock."""
    found = []
    for number in range(ranks.world_size):
        said = _read(run.beat(number)) if number != ranks.rank else None
        if said is not None:
            found.append(said)
    return found


def machine() -> str:
    """This start of this machine, and the container: two may have one name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def born(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; empty if it does not run (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {**said, "rank": said["rank"], "host": said["host"], "pid": said["pid"], "born": said["born"],
                "step": said["step"], "now": said["now"], "written": path.stat().st_mtime}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or one that is being replaced
