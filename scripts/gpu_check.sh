#!/usr/bin/env bash
# The first minutes on any NVIDIA card: what is right, wrong, slow. Planned for 9 minutes on an H100; docs/gpu.md says what each part does.
#   scripts/gpu_check.sh [--name NAME] [--parts machine tested ...] [--out FOLDER]     # goes on where it stopped
#   scripts/gpu_check.sh --dry-run                                                       # all of it, tiny, on a CPU
# Needs no scripts/setup.sh: the environment's Python if there is one, else the system's (PYTHON=... names another).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled PYTHONUNBUFFERED=1
exec "$python" scripts/gpu_check/run.py "$@"
