"""A rank that only joins and adds up: rank R gives R + 1, and the sum is written below FOLDER.

    LAUNCHER ... tests/launch/rank.py FOLDER RUN [--lost] [--stays SECONDS]

--lost: rank 1 is killed before it joins at its first start and after it at its second; rank 0 does not end by itself before its third.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from vlm_dist import distributed
from vlm_dist.cli.main import run_reporting
from vlm_dist.launched import announced


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run")
    parser.add_argument("--lost", action="store_true")
    parser.add_argument("--stays", type=float, default=0.0)
    parser.add_argument("--local_rank", help="given by the deepspeed launcher")
    return run_reporting(lambda: work(parser.parse_args()), among_ranks=True)


def work(given: argparse.Namespace) -> int:
    rank = announced().rank
    number = len(list(given.folder.glob(f"start-{rank}-*"))) + 1
    (given.folder / f"start-{rank}-{number}").write_text(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))
    if given.lost and rank == 1 and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks = distributed.start(given.run, 60)
    if given.lost and number < 3:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    (given.folder / f"sum-{rank}").write_text(str(ranks.sum(rank + 1)))
    time.sleep(given.stays)
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
