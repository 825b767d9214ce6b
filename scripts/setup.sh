#!/usr/bin/env bash
# Make .venv with everything at the versions of constraints.txt. Seconds when nothing has changed.
#   scripts/setup.sh          needs Python 3.11 or newer and gcc; uv is fetched with pip where it is missing
set -euo pipefail
cd "$(dirname "$0")/.."

find_uv() {
    for candidate in "${UV:-}" uv .venv/uv/bin/uv; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1; then command -v "$candidate"; return; fi
    done
    return 1
}

wanted=$(cat setup.py constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/vlm-dist ] && [ "$(cat .venv/installed 2>/dev/null || true)" = "$wanted" ]; then
    echo "setup: .venv is up to date"
    exit 0
fi

started=$SECONDS
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: '$python' is missing or older than 3.11; install Python 3.11, or name one with PYTHON=..." >&2
    exit 2
fi
if ! uv=$(find_uv); then
    echo "setup: fetching uv with pip"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    "$python" -m venv .venv/uv
    .venv/uv/bin/python -m pip install -qq --disable-pip-version-check uv
    uv=$PWD/.venv/uv/bin/uv
fi
[ -x .venv/bin/python ] || "$uv" venv -q --python "$python" .venv
echo "setup: installing the packages of constraints.txt into .venv"
# DeepSpeed builds its wheel against the installed torch, so it comes last and without build isolation
grep -v '^deepspeed==' constraints.txt > .venv/first.txt
"$uv" pip install -q --python .venv/bin/python -r .venv/first.txt
DS_BUILD_OPS=0 "$uv" pip install -q --python .venv/bin/python --no-build-isolation -r constraints.txt
"$uv" pip install -q --python .venv/bin/python --no-build-isolation --no-deps -e .
echo "$wanted" > .venv/installed
echo "setup: done in $((SECONDS - started)) s"
