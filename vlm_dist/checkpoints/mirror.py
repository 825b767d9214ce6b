"""A copy of each checkpoint at a URL (s3://, gs://, another disk), through fsspec: for machines whose disk does not outlive them.

Several runs may share the URL that a configuration names: each has a folder of its name there, with the configuration that it belongs to.

    URL/NAME/config.yaml
    URL/NAME/step-00000100/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.form import MANIFEST, verify_checkpoint
from vlm_dist.config import Config
from vlm_dist.config_load import differences, dump_config, parse_config
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.run_dir import DECISIVE_SECTIONS, HARMLESS, RunDir

CONFIG = "config.yaml"


def place_of(url: str, run: RunDir) -> str:
    """The folder of a run in a mirror."""
    return f"{url.rstrip('/')}/{run.path.name}"


def check(url: str, config: Config, *, insist: bool = False) -> None:
    """See that a run's folder in a mirror can be used, and that the checkpoints there are of this configuration.

    Args:
        url: what `place_of` gave.
        insist: though they are of another one.

    Raises:
        ConfigError: they are not, or what they belong to cannot be read.
        CheckpointError: the URL cannot be used.
    """
    try:
        files, root = _open(url)
        files.makedirs(root, exist_ok=True)  # so that a URL that cannot be written is told now
        begun = not insist and files.glob(f"{root}/step-*/{MANIFEST}") and files.exists(f"{root}/{CONFIG}")
        stored = files.cat_file(f"{root}/{CONFIG}").decode("utf-8", "replace") if begun else None
    except Exception as error:  # each file system of fsspec has errors of its own
        raise _unusable(url, error) from None
    if stored is not None:
        _compare(url, stored, config)


def _compare(url: str, stored: str, now: Config) -> None:
    insist = "continue that one all the same with --resume-anyway"
    try:
        then = parse_config(stored, source=f"{url}/{CONFIG}")
    except ConfigError as error:
        raise ConfigError(f"checkpoint.mirror: {str(error).splitlines()[0]}; put the run's own {CONFIG} there, or {insist}") from None
    if changed := differences(then, now, DECISIVE_SECTIONS, HARMLESS):
        raise ConfigError(
            f"checkpoint.mirror: '{url}' holds checkpoints of a run of another configuration ({'; '.join(changed)}); give this run another "
            f"name (name=...), or {insist}"
        )


def _unusable(url: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.mirror: '{url}' cannot be used ({type(error).__name__}: {error}); give a URL that fsspec can write, or remove it"
    )


def send(path: Path, url: str, config: Config, gone: Sequence[Path] = ()) -> None:
    """Copy a checkpoint to `url/NAME`, its manifest last, with the configuration that it belongs to; delete there those in `gone`.

    Raises:
        CheckpointError: the URL cannot be written.
    """
    try:
        files, root = _open(url)
        target = f"{root}/{path.name}"
        if files.exists(target):
            files.rm(target, recursive=True)
        files.makedirs(target, exist_ok=True)
        files.pipe_file(f"{root}/{CONFIG}", dump_config(config).encode())
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
        raise _unusable(url, error) from None
    return None


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)
    return files, root.rstrip("/")
