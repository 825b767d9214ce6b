#!/usr/bin/env bash
# Everything from nothing: packages, a synthetic data set, a small base model, then the main job: QLoRA on it.
#   scripts/quickstart.sh       about five minutes on two CPU cores; running it again continues or shows the result
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
export TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # or every command compiles its libraries anew

part() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - started)); }

part "1 of 4: packages into .venv"
scripts/setup.sh
vlm=.venv/bin/vlm-dist

part "2 of 4: a synthetic data set: pictures to describe, to ask about and to read"
$vlm data synth data/quickstart --train 8000 --heldout 200

part "3 of 4: the base: a small LLaVA learns from scratch to describe pictures (stands in for a downloaded checkpoint)"
$vlm train configs/quickstart_base.yaml

part "4 of 4: the main job: the base in 4 bit, LoRA on vision and language, learns to answer questions"
$vlm train configs/quickstart.yaml
$vlm report runs/quickstart >/dev/null

.venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

run = Path("runs/quickstart")
scores = json.loads((run / "summary.json").read_text())["eval"]
captions = json.loads(Path("runs/quickstart-base/summary.json").read_text())["eval"]["after"]["exact_match"]
example = json.loads((run / "samples" / "after.jsonl").read_text().splitlines()[0])
print(f"""
Held-out answers that are exactly right
  base model, describing pictures      {captions:6.1%}
  questions, before QLoRA              {scores['before']['exact_match']:6.1%}
  questions, after QLoRA               {scores['after']['exact_match']:6.1%}

Where things are
  {run}/report.html            curves, and held-out pictures with answers before and after: open it in a browser
  {run}/adapter/               the trained adapter; loads with plain PEFT
  {run}/metrics.jsonl          every step; summary.json, checkpoints/ and logs/ are beside it
  data/quickstart/                       the shards

Ask the trained model about a picture
  .venv/bin/vlm-dist generate {run} --image {run}/samples/{example['thumbnail']} --prompt "{example['prompt']}"
""")
PYTHON
echo "quickstart: done in $((SECONDS - started)) s"
