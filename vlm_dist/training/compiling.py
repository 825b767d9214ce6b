"""DeepSpeed's operators, which torch compiles when they are first used: a lock that a killed compilation has left ends no later one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from vlm_dist.errors import tell
from vlm_dist.waiting import waiting

ABANDONED_S = 600.0  # nothing of a compilation has been written for so long; a file of DeepSpeed's takes one to two minutes


def wait_for_compilation(name: str, abandoned_s: float = ABANDONED_S) -> None:
    """Return when operator `name` can be compiled or loaded. torch waits for its lock file for ever, whoever made it. Here a lock that no
    process of this machine has open, in a folder where nothing was written for `abandoned_s` seconds (another machine may compile into
    a home that is shared), is taken away, told."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).resolve()
    for lock in root.glob(f"**/{name}/lock"):
        with waiting(f"waiting for '{lock}': another machine compiles {name}, or was killed while it did; delete it if none does"):
            while (quiet := _quiet_for(lock)) is not None and not _is_open(lock):
                if quiet >= abandoned_s:
                    lock.unlink(missing_ok=True)
                    tell(f"'{lock}' was left by a compilation of {name} that was killed: no process has it open, and nothing was "
                         f"written for {quiet:.0f} s; it is deleted, and {name} compiled anew")  # fmt: skip
                    break
                time.sleep(1.0)


def _quiet_for(lock: Path) -> float | None:
    """Seconds since something was written beside the lock, or None where it is gone."""
    if not lock.exists():
        return None
    return time.time() - max((_written(file) for file in lock.parent.iterdir()), default=0.0)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_open(file: Path) -> bool:
    """Whether a process of this machine that this user may look into has the file open."""
    return any(target == str(file) for target in _open_files())


def _open_files() -> Iterator[str]:
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            yield from filter(None, map(_target, os.scandir(f"/proc/{process}/fd")))


def _target(link: os.DirEntry[str]) -> str | None:
    try:
        return os.readlink(link.path)
    except FileNotFoundError:  # closed meanwhile
        return None
