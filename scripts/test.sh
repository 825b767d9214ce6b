#!/usr/bin/env bash
# Set up and run the tests.
#   scripts/test.sh                     everything but the GPU tests; what CI runs
#   scripts/test.sh --quick             the quick ones: what to run before a commit
#   scripts/test.sh --changed [BASE]    what the changed files can break, by imports; against HEAD, or a branch
#   scripts/test.sh tests/data -x       further arguments go to pytest
#   scripts/test.sh -m gpu              the GPU tests, on a machine that has one
#   TEST_PROCESSES=8 scripts/test.sh    as many test files at a time
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS

mode=all base=HEAD
case "${1:-}" in
    --quick) mode=quick && shift ;;
    --changed)
        mode=changed && shift
        if [ $# -gt 0 ] && git rev-parse --verify -q "$1^{commit}" >/dev/null; then base=$1 && shift; fi
        ;;
esac

echo "== packages"
scripts/setup.sh
if [ "$mode" != quick ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null \
    && ! (command -v chromium && command -v chromedriver && command -v slurmctld) >/dev/null; then
    echo "== chromium, for the tests of pages, SLURM, for those of its launcher, and libaio, for offloading to a disk"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        chromium chromium-driver fonts-dejavu-core slurm-wlm munge libaio-dev >/dev/null
fi

echo "== lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

unset PYTHONDONTWRITEBYTECODE # every process would compile torch and all the others anew: three times as long to start
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 CXX="${CXX:-$PWD/tests/cxx}"
pytest=(.venv/bin/python -m pytest)
several=(-n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
case "$mode: $* " in
    quick:*)
        echo "== quick tests"
        "${pytest[@]}" --quick "${several[@]}" "$@"
        ;;
    changed:*)
        mapfile -t files < <(.venv/bin/python scripts/affected_tests.py --base "$base")
        if [ ${#files[@]} -eq 0 ]; then
            echo "tests: nothing has changed against $base"
            exit 0
        fi
        [ "${files[0]}" = all ] && files=(tests)
        echo "== tests that the changes against $base can break: ${files[*]}"
        "${pytest[@]}" -m "not gpu" "${several[@]}" "${files[@]}" "$@"
        ;;
    *" -m "*) "${pytest[@]}" "$@" ;; # the GPU is not shared between processes
    *)
        echo "== tests"
        "${pytest[@]}" -m "not gpu" "${several[@]}" --durations 15 "$@"
        ;;
esac
echo "tests: done in $((SECONDS - started)) s"
