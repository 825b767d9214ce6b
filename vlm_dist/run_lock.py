"""One training at a time in a run directory: a lock that dies with its owner, on this machine at once, on another within a minute.

Two things hold it. flock, which the kernel drops when the process ends, however it ends; file servers pass it on, or know it on each
machine alone, or not at all. So the owner also touches the file every few seconds: a start on another machine takes over when
the file has not changed for `dead_s`, by the file server's own clock. An owner that finds another's name in the file was taken
for dead (it was suspended, or cut off), and ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError, warn
from vlm_dist.run_dir import RunDir, json_row

BEAT_S = 5.0
DEAD_S = 60.0
EXIT_CODE = 5
NOT_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without flock


class RunLock:
    """Args:
    dead_s: an owner on another machine that has not been heard of for so long is dead.
    use_flock: False: as on a file server that does not know it.
    """

    def __init__(self, run: RunDir, *, beat_s: float = BEAT_S, dead_s: float = DEAD_S, use_flock: bool = True):
        self.path, self.beat_s, self.dead_s, self.use_flock = run.lock, beat_s, dead_s, use_flock
        self._file: int | None = None
        self._mine = {**_here(), "token": os.urandom(8).hex()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def acquire(self) -> None:
        """Hold the directory until `release`, or until this process ends. Waits, if it must, for a sign of life of an owner elsewhere.

        Raises:
            ConfigError: another process trains there; names its machine, process, and since when.
            OSError: the directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not self._flock():
                raise self._refusal(self._owner())
            self._see_owner_dead()
            self._write({**self._mine, "since": time.time()})
            if not self._is_mine():
                raise self._refusal(self._owner())
        except BaseException:
            self._close()
            raise
        self._thread.start()

    def release(self) -> None:
        """Let the next start begin at once. Releasing what is not held does nothing."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._file is not None and self._is_mine():
            os.ftruncate(self._file, 0)
        self._close()

    def _flock(self) -> bool:
        if not self.use_flock:
            return True
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            self.use_flock = False
        return True

    def _see_owner_dead(self) -> None:
        """Return when whoever the file names is dead; on another machine, when its last sign of life is old enough."""
        owner = self._owner()
        if owner is None:
            return
        here = _here()
        if all(owner.get(key) == here[key] for key in ("host", "boot", "space")):
            if not self.use_flock and _born(owner["pid"]) == owner.get("born") != "":  # flock would have told
                raise self._refusal(owner)
            return
        seen = os.stat(self.path).st_mtime_ns
        age = (self._now_ns() - seen) / 1e9
        if age < self.dead_s:
            warn(f"{self.path}: {_named(owner)} was alive {max(age, 0):.0f} s ago; waiting up to {self.dead_s:g} s for a sign of life")
        ends = time.monotonic() + min(self.dead_s, self.dead_s - age)
        while time.monotonic() < ends:
            time.sleep(min(1.0, self.beat_s / 2))
            if self._stamp() != seen:
                raise self._refusal(self._owner() or owner)

    def _stamp(self) -> int:
        with self.path.open("rb"):  # opening asks the file server anew
            return os.stat(self.path).st_mtime_ns

    def _now_ns(self) -> int:
        """The file server's clock."""
        probe = self.path.with_name(f".lock.{os.getpid()}.{self._mine['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _owner(self) -> dict[str, Any] | None:
        """Who the file names; None: nobody, or what cannot be read."""
        return _owner_in(self.path)

    def _is_mine(self) -> bool:
        """Whether the file still names this process; where flock is not known, two that began together see here who came last."""
        if not self.use_flock and not self._thread.is_alive() and not self._stop.is_set():
            time.sleep(min(1.0, self.beat_s / 2))
        try:
            return (self._owner() or {}).get("token") == self._mine["token"]
        except OSError:
            return False

    def _write(self, content: dict[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(content).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            assert self._file is not None
            try:
                owner = self._owner()
                os.utime(self._file)
            except OSError:
                continue  # the folder is gone, or its server is away: told by whoever writes there next
            if owner is not None and owner.get("token") != self._mine["token"]:
                warn(f"{self.path}: this process was not heard of for too long, and {_named(owner)} has taken the run over; this one ends")
                os._exit(EXIT_CODE)  # two must not write there

    def _refusal(self, owner: dict[str, Any] | None) -> ConfigError:
        who = "another process" if owner is None else _named(owner)
        return ConfigError(
            f"{self.path.parent.parent}: {who} trains there now; wait for its end, stop it, or give this one another name (name=...)"
        )

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def trains_there(run: RunDir) -> str | None:
    """Who trains in this directory, in words, without holding or changing anything; None: nobody, as far as the file tells. An owner on
    another machine counts while its last sign of life is no older than three of its beats."""
    try:
        found, age = _owner_in(run.lock), time.time() - run.lock.stat().st_mtime
    except OSError:
        return None
    if found is None:
        return None
    here = _here()
    is_here = all(found.get(key) == here[key] for key in ("host", "boot", "space"))
    lives = _born(found["pid"]) == found.get("born") != "" if is_here else age <= 3 * BEAT_S
    return _named(found) if lives else None


def _owner_in(path: Path) -> dict[str, Any] | None:
    found = json_row(path.read_bytes())
    whole = isinstance(found, dict) and isinstance(found.get("host"), str) and isinstance(found.get("pid"), int)
    return found if whole else None


def _here() -> dict[str, Any]:
    """What tells this process from all others."""
    pid = os.getpid()
    machine = {"host": socket.gethostname(), "boot": _read("/proc/sys/kernel/random/boot_id"), "space": _space()}
    return {**machine, "pid": pid, "born": _born(pid)}


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; empty if there is none."""
    return " ".join(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20])


def _named(owner: dict[str, Any]) -> str:
    since = owner.get("since")
    when = time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, int | float) else ""
    return f"process {owner['pid']} on {owner['host']}{when}"
