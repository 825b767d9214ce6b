#!/usr/bin/env bash
# What breaks a run on purpose, and what must become of it (docs/reliability.md).
#   scripts/faults.sh --quick     the tests of faults without the slow ones
#   scripts/faults.sh             all of them, fuzzing of samples and files, a run under chaos; and the page's tables made anew
#   FUZZ_TRIES=20000 CHAOS_MINUTES=60 scripts/faults.sh    as long as one likes
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
    export FUZZ_TRIES="${FUZZ_TRIES:-1250}"
    .venv/bin/python -m pytest tests/data/test_fuzz.py tests/faults/test_fuzz.py
    .venv/bin/python scripts/chaos.py --minutes "${CHAOS_MINUTES:-10}" --out docs/benchmarks/chaos.json
    .venv/bin/python scripts/faults_table.py
fi
echo "faults: done in $((SECONDS - started)) s"
