"""Training under any launcher that starts one process a rank:

python launch/train.py --config configs/quickstart.yaml optim.lr=1e-3
deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
torchrun --nproc-per-node 2 launch/train.py --config configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import sys

from vlm_dist.cli.main import run_reporting
from vlm_dist.cli.parsers import parse
from vlm_dist.cli.train import add_options, run
from vlm_dist.quiet import quiet_libraries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as optim.lr=2e-4")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_options(parser)
    arguments = parse(parser)
    quiet_libraries()
    return run_reporting(lambda: run(arguments), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
