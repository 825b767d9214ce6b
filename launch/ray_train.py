"""Training on a Ray cluster; on a new one on this machine where none is running.

python launch/ray_train.py --config configs/quickstart.yaml ray.workers=2
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python launch/ray_train.py --config configs/quickstart.yaml ray.workers=2

Paths in the configuration are meant from the current folder, which every node must see: give output_dir and the shards as absolute paths
on shared storage when there are several nodes, or when `ray job submit` ships the working directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "kernels")]  # a shipped working directory is installed nowhere
    from vlm_dist.cli.main import run_reporting
    from vlm_dist.cli.parsers import parse
    from vlm_dist.cli.train import add_options, run_on_ray
    from vlm_dist.quiet import quiet_libraries

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as ray.workers=4")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_options(parser)
    arguments = parse(parser)
    quiet_libraries()
    return run_reporting(lambda: run_on_ray(arguments), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
