#!/usr/bin/env bash
# Set up and run the tests.
#   scripts/test.sh                     everything but the GPU tests
#   scripts/test.sh tests/data -x       further arguments go to pytest
#   scripts/test.sh -m gpu              the GPU tests, on a machine that has one
#   TEST_PROCESSES=8 scripts/test.sh    as many test files at a time
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS

echo "== packages"
scripts/setup.sh
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! (command -v chromium && command -v chromedriver && command -v slurmctld) >/dev/null; then
    echo "== chromium, for the tests of pages, SLURM, for those of its launcher, and libaio, for offloading to a disk"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        chromium chromium-driver fonts-dejavu-core slurm-wlm munge libaio-dev >/dev/null
fi

echo "== lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

echo "== tests"
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
case " $* " in
    *" -m "*) .venv/bin/python -m pytest "$@" ;; # the GPU is not shared between processes
    *) .venv/bin/python -m pytest -m "not gpu" -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 15 "$@" ;;
esac
echo "tests: done in $((SECONDS - started)) s"
