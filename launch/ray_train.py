"""Training on a Ray cluster; on a new one on this machine where none is running.

python launch/ray_train.py --config configs/quickstart.yaml ray.workers=2
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python launch/ray_train.py --config configs/quickstart.yaml ray.workers=2

Paths in the configuration are meant from the current folder, which every node must see: give output_dir and the shards as absolute paths
on shared storage when there are several nodes, or when `ray job submit` ships the working directory.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "kernels")]  # a shipped working directory is installed nowhere
    from vlm_dist.cli.main import launch
    from vlm_dist.cli.train import run_on_ray

    return launch(__doc__, run_on_ray, among_ranks=False)


if __name__ == "__main__":
    sys.exit(main())
