#!/usr/bin/env bash
# The documentation as a site.
#   scripts/docs.sh           make the pages that come from the code and from raw results, then build the site into site/
#   scripts/docs.sh serve     show it on http://127.0.0.1:8000 and follow what you write
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/kernels NO_MKDOCS_2_WARNING=1
python=.venv/bin/python

$python -m vlm_dist.cli.main config --markdown > docs/configuration.md
$python scripts/cli_page.py
$python scripts/layouts_page.py
$python scripts/testing_page.py
$python scripts/benchmarks_page.py
$python scripts/gpu_page.py
$python scripts/draw_architecture.py
case "${1:-build}" in
    build) $python -m mkdocs build --strict ;;
    serve) $python -m mkdocs serve --strict ;;
    *) echo "docs: '$1' is neither build nor serve" >&2; exit 2 ;;
esac
