"""A save, an addition to it and a pruning, with each call on a file in turn failing or being the last of the process.

Run by test_save_calls.py below the layer of calls.c; prints what was done as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import peft
import torch

from vlm_dist.checkpoints.form import (
    Snapshot,
    amend_state,
    find_checkpoints,
    newest_good_checkpoint,
    prune,
    verify_checkpoint,
    write_checkpoint,
)
from vlm_dist.errors import CheckpointError

FOLDER = Path(os.environ["FAULTY_FOLDER"])
LAYER = ctypes.CDLL(None)
KINDS = {"kill": 0, "disk full": errno.ENOSPC, "input/output error": errno.EIO}


def state(step: int) -> dict:
    return {
        "base_fingerprint": "base", "progress": {"step": step, "updates": step}, "health": {"skipped": 0, "rollbacks": 0, "losses": []},
        "data": {"step": step, "global_batch": 1, "packing": False, "digests": {"data": "x"}, "lanes": {"0": {"counts": [step]}}},
        "patience": {"best": None, "since": 0},
    }  # fmt: skip


def save(step: int) -> None:
    weights = {"a.weight": torch.full((64, 8), float(step))}
    moments = {"a.weight/exp_avg": torch.zeros(64, 8), "a.weight/exp_avg_sq": torch.zeros(64, 8)}
    write_checkpoint(FOLDER, step, Snapshot(weights, moments, peft.LoraConfig(r=2)), state(step))
    amend_state(FOLDER / f"step-{step:08d}", {"scores": {"exact_match": 0.5}})
    prune(FOLDER, keep_last=2)


def in_child(at: int, number: int) -> int:
    """The save with its `at`-th call failing; the child's exit status: 0 saved, 5 told in our words, 1 anything else, -9 killed."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 0
        LAYER.fault_set(at, number)
        try:
            save(3)
        except CheckpointError as error:
            code = 5 if "\n" not in str(error) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        LAYER.fault_set(0, 0)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    save(1)
    save(2)
    shutil.copytree(FOLDER, kept := FOLDER.with_name("kept"))
    LAYER.fault_set(0, 0)
    save(3)
    calls, found = LAYER.fault_count(), {}
    for kind, number in KINDS.items():
        codes = found[kind] = {}
        for at in range(1, calls + 1):
            shutil.rmtree(FOLDER)
            shutil.copytree(kept, FOLDER)
            code = in_child(at, number)
            codes[code] = codes.get(code, 0) + 1
            left = newest_good_checkpoint(FOLDER)
            assert left is not None and left.name in ("step-00000002", "step-00000003"), (kind, at, left)
            assert code not in (0,) or left.name == "step-00000003", (kind, at)
            wrong = [(path.name, problem) for path in find_checkpoints(FOLDER) if (problem := verify_checkpoint(path))]
            assert not wrong, (kind, at, wrong)
            save(3)
            assert [path.name for path in find_checkpoints(FOLDER)] == ["step-00000003", "step-00000002"], (kind, at)
            assert verify_checkpoint(FOLDER / "step-00000003") is None, (kind, at)
    print(json.dumps({"calls": calls, "ends": found}))


if __name__ == "__main__":
    main()
