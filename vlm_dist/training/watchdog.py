"""A hung rank ends the run, by name and with everybody's stacks, instead of blocking it for ever.

Every rank's thread writes `logs/rank-R.alive.json` every few seconds: that it lives, and how far its main thread is. When a rank's
main thread has made no progress for `health.timeout_s`, its thread reads the others' files: whoever has stopped writing is not running
any more (stopped, swapped out, its machine gone); else whoever is furthest behind is what the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vlm_dist.distributed import Ranks
from vlm_dist.run_dir import RunDir, write_json
from vlm_dist.training.lost import EXIT_CODE, beat_of, born, is_dead, other_beats, told_by_one

logger = logging.getLogger(__name__)
LONGEST_INTERVAL = 10.0
LOOK_S = 1.0  # seconds between two looks at the others
STUCK_S = 10.0  # without progress, after which they are looked at


class Watchdog:
    """Use it as a context around the training loop. `beat` says that the main thread goes on.

    Args:
        started: when this start of the run began (time.monotonic).
        timeout_s: without progress for so long, the process ends with exit code 8; None: never.
    """

    def __init__(self, run: RunDir, ranks: Ranks, timeout_s: float | None, started: float):
        self.run, self.ranks, self.timeout_s = run, ranks, timeout_s
        self.interval = beat_interval(timeout_s)
        self._started = time.time() - (time.monotonic() - started)
        self._beats, self._doing, self._step, self._last = 0, "starting", 0, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write(ended=True)

    def beat(self, doing: str, step: int | None = None) -> None:
        """The main thread goes on, now with `doing`; `step`: a new step begins, in which all ranks do the same things."""
        if step is not None:
            self._step, self._beats = step, 0
        self._beats += 1
        self._doing, self._last = doing, time.monotonic()

    def _watch(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(min(self.interval, LOOK_S)):
            if time.monotonic() - written >= self.interval:
                written = time.monotonic()
                self._write()
            if self.ranks.world_size > 1 and time.monotonic() - self._last > STUCK_S:
                self._end_if_alone()
            if self.timeout_s is not None and time.monotonic() - self._last > self.timeout_s:
                self._end()

    def _write(self, *, ended: bool = False) -> None:
        said = beat_of(self.ranks.rank, self._started, self._step, self._doing, self._beats, ended=ended)
        try:
            write_json(self.run.beat(self.ranks.rank), said)
        except OSError as error:  # a full disk: told by whoever needs it more
            logger.warning("%s cannot be written: %s", self.run.beat(self.ranks.rank), error)

    def _end_if_alone(self) -> None:
        """Waiting in a collective for a process of this machine that is gone: on a GPU nothing else ends that wait."""
        others = other_beats(self.run, self.ranks)
        if not (gone := [rank for rank in others if is_dead(rank)]):
            return
        try:
            self._write()
            error = told_by_one(self.run, self.ranks, gone, others)
            if not error.told:
                print(f"vlm-dist: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_CODE)

    def _end(self) -> None:
        try:
            self._tell()
        finally:
            os._exit(EXIT_CODE)  # whatever went wrong in telling

    def _tell(self) -> None:
        """Say who hangs, keep the stacks, stop what no longer answers."""
        others = self._others()
        silent = self._silent(others)
        here = [rank for rank in silent if rank["host"] == socket.gethostname()]
        reason = self._reason(silent or self._behind(others), bool(silent))
        print(f"vlm-dist: {reason}", file=sys.stderr, flush=True)
        with self.run.stacks(self.ranks.rank).open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            _dump_collectives(file)
        for rank in here:
            _dump_with_py_spy(rank["pid"], self.run.stacks(rank["rank"]))
        alive = {rank["rank"] for rank in others} - {rank["rank"] for rank in silent} | {self.ranks.rank}
        if self.ranks.rank == min(alive):
            write_json(self.run.summary, {"ended": "failed", "reason": reason, "step": self._step})
        else:
            time.sleep(min(2.0, self.interval))  # its words first
        for rank in here:
            _kill(rank)  # a stopped process hears nothing else, and would keep its memory

    def _silent(self, others: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rank for rank in others if rank["silent_s"] > max(3 * self.interval, 2.0)]

    def _behind(self, others: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that are furthest back, if further than this rank."""
        places = [(rank["step"], rank["beats"]) for rank in others]
        least = min(places, default=(self._step, self._beats))
        return [rank for rank, place in zip(others, places, strict=True) if place == least < (self._step, self._beats)]

    def _reason(self, suspects: list[dict[str, Any]], silent: bool) -> str:
        what = "; ".join(
            f"rank {rank['rank']} ({rank['host']}, process {rank['pid']}) "
            + (f"has not been heard of for {rank['silent_s']:.0f} s" if silent else "is what the others wait for")
            + f", last in '{rank['doing']}' of step {rank['step']}"
            for rank in suspects[:8]
        )
        return (
            f"training: no progress for {self.timeout_s:g} s (health.timeout_s) in '{self._doing}' of step {self._step} on rank "
            f"{self.ranks.rank}: {what or 'no other rank is behind'}; stacks are in {self.run.stacks(0).parent}. "
            "Run the same command again to continue from the last checkpoint"
        )

    def _others(self) -> list[dict[str, Any]]:
        """The other ranks' last words, and for how long they have been silent by the file system's clock."""
        now = self.run.beat(self.ranks.rank).stat().st_mtime
        found = []
        for number in range(self.ranks.world_size):
            path = self.run.beat(number)
            if number != self.ranks.rank and path.exists():
                found.append({**json.loads(path.read_text()), "silent_s": now - path.stat().st_mtime})
        return found


def beat_interval(timeout_s: float | None) -> float:
    """Seconds between two lines of a rank."""
    return min(LONGEST_INTERVAL, (timeout_s or 600) / 10)


def first_beat(run: RunDir, ranks: Ranks) -> None:
    """Say where this rank runs, before anything is loaded."""
    write_json(run.beat(ranks.rank), beat_of(ranks.rank, time.time(), 0, "loading", 0))


def note_earlier_start(run: RunDir) -> None:
    """Move what an earlier start left in rank 0's file to `logs/starts.jsonl`. Call it on the first rank, before the new start."""
    path = run.beat(0)
    if path.exists():
        beat = json.loads(path.read_text())
        with run.starts.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"started": beat["started"], "ended": beat["now"], "step": beat["step"]}) + "\n")
    for left in path.parent.glob("rank-*.alive.json"):
        left.unlink()


def _dump_collectives(file: Any) -> None:
    from vlm_dist.upstream.torch import flight_record

    if (record := flight_record()) is not None:
        file.write(f"\nNCCL flight recorder: {record}\n")


def _dump_with_py_spy(pid: int, path: Path) -> None:
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        path.write_text("py-spy is not installed; nobody else can look into a stopped process\n")
        return
    with path.open("w") as file:
        subprocess.run([program, "dump", "--nonblocking", "--pid", str(pid)], stdout=file, stderr=file, timeout=20, check=False)


def _kill(rank: dict[str, Any]) -> None:
    if born(rank["pid"]) == rank["born"] != "":  # not another process that has its number now
        try:
            os.kill(rank["pid"], signal.SIGKILL)
        except OSError:
            return  # gone in between, or another user's
