"""Two ranks of one node that need the same file: `Ranks.first_on_node`.

python tests/launch/fetching.py FOLDER
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vlm_dist import distributed
from vlm_dist.upstream.torch import let_collectives_wait


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = distributed.start()

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))

    def fetch() -> str:
        if ranks.local_rank == 0:
            time.sleep(2)  # longer than the group gives a collective
            (folder / "file").write_text("fetched")
        return (folder / "file").read_text()

    content = ranks.first_on_node(fetch)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
    if ranks.rank == 1:
        (folder / "found").write_text(content)
    try:
        ranks.first_on_node(lambda: (folder / "nothing").read_text())
    except FileNotFoundError:
        (folder / f"failed-{ranks.rank}").write_text("")
    library = dist.new_group()  # as DeepSpeed makes one
    let_collectives_wait(1800)
    for group in (dist.group.WORLD, library):
        assert group is not None and group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=1800)
    ranks.barrier()


if __name__ == "__main__":
    main()
