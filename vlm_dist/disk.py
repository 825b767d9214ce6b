"""Errors of files in true words: why something cannot be written or read, and what helps; where the cache is, and what files take."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vlm_dist.errors import CheckpointError, MachineError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(FULL, "make room"),
    errno.EROFS: "mount it writable, or give a folder elsewhere",
    errno.EACCES: "give yourself the right to write there, or give a folder elsewhere",
    errno.EPERM: "give yourself the right to write there, or give a folder elsewhere",
    errno.EIO: "look at the disk (dmesg) or at the file server",
    errno.ESTALE: "mount the file system again",
    errno.ENOENT: "the folder is gone or its link leads nowhere: restore it, or give one elsewhere",
    errno.ENOTDIR: "a part of the path is a file: move it away, or give a folder elsewhere",
    errno.EEXIST: "a file, or a link to nowhere, is where a folder must be: move it away",
    errno.EISDIR: "a folder is where a file must be: move it away",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle: remove one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def cache_folder() -> Path:
    """Where this project keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_dist"


def sizes(files: Iterable[Path]) -> list[int]:
    """Bytes of each that is still there."""
    found = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append(file.stat().st_size)
    return found


def why(error: BaseException) -> str:
    """The reason in words. safetensors hides the error number in its message."""
    if _number(error) in FULL:
        return "the disk is full"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def remedy(error: BaseException) -> str:
    """What helps, as an order that begins small."""
    return _REMEDIES.get(_number(error) or 0, "look at the reason")


def again(error: BaseException) -> str:
    """What helps, and how to go on: a sentence."""
    words = remedy(error)
    return f"{words[0].upper()}{words[1:]}, then run the same command again to continue"


def is_of_disk(error: OSError, below: Path | None = None) -> bool:
    """Whether a file or a file system failed, not a connection or a library of ours that says OSError; with `below` also a file there."""
    if error.errno in (*FULL, errno.EROFS, errno.EIO, errno.ESTALE):
        return True
    named = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if named is None or error.errno not in _REMEDIES:
        return False
    return below is None or Path(os.path.abspath(named)).is_relative_to(os.path.abspath(below))


def disk_error(error: BaseException | None) -> BaseException | None:
    """What of an error and its causes says that a file or a file system failed; also as libraries in Rust and C++ tell it: in words."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and is_of_disk(error)) or _number(error) in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def cannot_begin(path: Path, error: OSError) -> UserError:
    """The error of a run whose directory cannot be made; of one that is there, another user's for instance, that it cannot go on."""
    kind = CheckpointError if os.path.isdir(path) else MachineError
    return kind(f"output_dir: {_short(path)} cannot be written ({why(error)}); {remedy(error)} (output_dir=..., name=...)")


def cannot_go_on(path: Path, error: OSError) -> UserError:
    """The error of a run whose directory fails on the way."""
    return CheckpointError(f"{_short(error.filename or path)}: cannot be written ({why(error)}); {again(error)}")


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
        if os.strerror(number) in str(error):
            return number
    return None


def _short(path: object) -> str:
    text = str(path)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-40:]}"


def readable_as_others(folder: Path) -> None:
    """Give files that only their owner may read (safetensors writes them so) the mode of any other new file there."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(mode)
