"""Training under any launcher that starts one process a rank:

python launch/train.py --config configs/quickstart.yaml optim.lr=1e-3
deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
torchrun --nproc-per-node 2 launch/train.py --config configs/quickstart.yaml
"""

from __future__ import annotations

import sys

from vlm_dist.cli.main import launch
from vlm_dist.cli.train import run

if __name__ == "__main__":
    sys.exit(launch(__doc__, run))
