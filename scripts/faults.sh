#!/usr/bin/env bash
# What breaks a run on purpose, and what must become of it (docs/reliability.md).
#   scripts/faults.sh --quick     the tests of faults without the slow ones
#   scripts/faults.sh             all of them, 1,250 tries of odd samples a family, and a run under chaos
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ "${1:-}" = --quick ]; then
    .venv/bin/python -m pytest tests/faults -m "not slow and not gpu"
else
    .venv/bin/python -m pytest tests/faults -m "not gpu"
    FUZZ_TRIES=1250 .venv/bin/python -m pytest tests/data/test_fuzz.py
    .venv/bin/python scripts/chaos.py --steps 60 --faults 6
fi
echo "faults: done in $((SECONDS - started)) s"
