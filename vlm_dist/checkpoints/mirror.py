"""A copy of each checkpoint at a URL (s3://, gs://, another disk), through fsspec: for machines whose disk does not outlive them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.form import MANIFEST, verify_checkpoint
from vlm_dist.errors import CheckpointError


def send(path: Path, url: str, gone: Sequence[Path] = ()) -> None:
    """Copy a checkpoint to `url/NAME`, its manifest last, and delete there those in `gone`.

    Raises:
        CheckpointError: the URL cannot be written.
    """
    try:
        files, root = _open(url)
        target = f"{root}/{path.name}"
        if files.exists(target):
            files.rm(target, recursive=True)
        files.makedirs(target, exist_ok=True)
        for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
            files.put_file(str(file), f"{target}/{file.name}")
        for old in gone:
            if files.exists(f"{root}/{old.name}"):
                files.rm(f"{root}/{old.name}", recursive=True)
    except Exception as error:  # each file system of fsspec has errors of its own
        raise CheckpointError(f"checkpoint.mirror: '{url}' cannot be written ({type(error).__name__}: {error}); {path} is whole") from None


def send_file(file: Path, url: str) -> None:
    """Copy one file of a checkpoint that is there already.

    Raises:
        CheckpointError: the URL cannot be written.
    """
    try:
        files, root = _open(url)
        files.put_file(str(file), f"{root}/{file.parent.name}/{file.name}")
    except Exception as error:  # each file system of fsspec has errors of its own
        raise CheckpointError(
            f"checkpoint.mirror: '{url}' cannot be written ({type(error).__name__}: {error}); {file.parent} is whole"
        ) from None


def fetch_newest(url: str, folder: Path) -> Path | None:
    """Copy the newest whole checkpoint of the mirror into `folder`; None if there is none.

    Raises:
        CheckpointError: the URL cannot be used.
    """
    try:
        files, root = _open(url)
        files.makedirs(root, exist_ok=True)  # so that a URL that cannot be written is told now
        names = sorted({Path(name).parent.name for name in files.glob(f"{root}/step-*/{MANIFEST}")}, reverse=True)
        for name in names:
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for source in files.ls(f"{root}/{name}", detail=False):
                files.get_file(source, str(partial / Path(source).name))
            if verify_checkpoint(partial) is None:
                os.replace(partial, folder / name)
                return folder / name
            shutil.rmtree(partial)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint.mirror: '{url}' cannot be used ({type(error).__name__}: {error}); give a URL that fsspec can write, or remove it"
        ) from None
    return None


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)
    return files, root.rstrip("/")
