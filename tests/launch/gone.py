"""Two ranks of which one ends while the other waits without end: `Ranks.patient_barrier`.

python tests/launch/gone.py
"""

from __future__ import annotations

import os

from vlm_dist import distributed


def main() -> None:
    ranks = distributed.start()
    ranks.barrier()
    if ranks.rank == 1:
        os._exit(0)
    try:
        ranks.patient_barrier()
    except RuntimeError:
        print("the other is gone")
        os._exit(0)


if __name__ == "__main__":
    main()
