"""Two ranks of one node that need the same file: `Ranks.first_on_node`.

python tests/launch/fetching.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from vlm_dist import distributed


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = distributed.start()

    def fetch() -> str:
        if ranks.local_rank == 0:
            time.sleep(1)
            (folder / "file").write_text("fetched")
        return (folder / "file").read_text()

    content = ranks.first_on_node(fetch)
    if ranks.rank == 1:
        (folder / "found").write_text(content)
    try:
        ranks.first_on_node(lambda: (folder / "nothing").read_text())
    except FileNotFoundError:
        (folder / f"failed-{ranks.rank}").write_text("")
    ranks.barrier()


if __name__ == "__main__":
    main()
