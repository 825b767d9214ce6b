"""A pytest plugin of scripts/mutation.py: tests of every architecture run on a few of them, and tiny checkpoints are made once for all
mutants."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    families = os.environ["MUTATION_FAMILIES"].split()

    def wanted(item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return all(given.get(name, families[0]) in families for name in ("any_checkpoint", "family"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_sessionstart() -> None:
    from vlm_dist import testing

    make = testing.tiny_checkpoint
    if make.__name__ == "copied":
        return

    def copied(family: str, path: str | Path, seed: int = 0) -> Path:
        kept = Path(os.environ["MUTATION_CHECKPOINTS"]) / f"{family}-{seed}"
        if not kept.exists():
            make(family, f"{kept}.made", seed).rename(kept)
        return Path(shutil.copytree(kept, path, dirs_exist_ok=True))

    testing.tiny_checkpoint = copied
