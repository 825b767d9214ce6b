"""Run docs/notebooks/*.ipynb from top to bottom on tiny checkpoints and drawn pictures, on a CPU without a network, and write what they
print into them.

    python scripts/run_notebooks.py                          # in place: what is committed
    python scripts/run_notebooks.py --out OUT --work WORK    # elsewhere; the files that the cells write stay in WORK

A notebook's settings cell (tagged `parameters`) shows real names; for the run, `SETTINGS` below come after it. Warnings and progress bars
(stderr) are not kept: they name paths of one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
SETTINGS: dict[str, dict[str, Any]] = {
    "unsloth_vision": {
        "model_name": "tiny-qwen2.5-vl", "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    },
    "mini_vlm": {
        "vision_model_name": "tiny-vit", "lm_model_name": "tiny-llama", "dataset_name": "tiny-flickr8k", "num_samples": 24,
        "sample_images": ["new-0.png", "new-1.png", "new-2.png"], "test_indices": [0, 1, 2, 3], "num_epochs": 20, "lr": 3e-3,
    },
}  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "warning", "HF_HUB_DISABLE_PROGRESS_BARS": "0",
}  # fmt: skip
COLOURS = ("red", "blue", "yellow", "white")
FORMS = ("a {} .", "one {} .", "there is a {} .", "a big {} .", "a {} in the middle .")


def run(name: str, out: Path, work: Path) -> None:
    """Run one notebook in the folder `work`, and write it with its outputs into the folder `out`."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    shown = cell.source
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in SETTINGS[name].items())
    NotebookClient(
        notebook, kernel_name="python3", timeout=600, record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(work)}},
    ).execute()  # fmt: skip
    cell.source = shown
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / f"{name}.ipynb")


def prepare(work: Path) -> None:
    """Everything that `SETTINGS` name: checkpoints and data sets with the columns of the real ones."""
    from vlm_dist.testing import tiny_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    tiny_checkpoint("qwen2_5_vl", work / "tiny-qwen2.5-vl")
    _write_parts(work)
    rows = []
    for number, (picture, words) in enumerate(pictures()):
        if "circle" in words and number < 8:
            picture.save(work / f"{number}.png")
            rows.append({"image": f"{number}.png", "instruction": "What colour is it?", "response": words.split()[0]})
    (work / "vision_train.json").write_text(json.dumps(rows, indent=1))
    _write_captions(work)


def pictures(margins: tuple[int, ...] = (10, 16, 22)) -> Iterator[tuple[Any, str]]:
    """Eight pictures of one shape for each margin around it, and what they show: "red circle", ..."""
    from PIL import Image, ImageDraw

    for margin in margins:
        for shape in ("circle", "square"):
            for colour in COLOURS:
                picture = Image.new("RGB", (96, 96), "black")
                draw = ImageDraw.Draw(picture)
                corners = (margin, margin, 96 - margin, 96 - margin)
                (draw.ellipse if shape == "circle" else draw.rectangle)(corners, fill=colour)
                yield picture, f"{colour} {shape}"


def _write_parts(work: Path) -> None:
    """A ViT with its image processor, and a Llama (SmolLM's architecture) with its tokenizer."""
    import torch
    import transformers as hf

    from vlm_dist.testing.parts import CLIP, small_text, small_tokenizer

    torch.manual_seed(0)
    vision = hf.ViTModel(hf.ViTConfig(**{**CLIP, "image_size": 64, "patch_size": 8}))
    torch.nn.init.uniform_(vision.layernorm.weight, 0, 2)  # with equal weights, all features would have one magnitude
    vision.save_pretrained(work / "tiny-vit")
    hf.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(work / "tiny-vit")
    tokenizer, ids = small_tokenizer()
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**small_text(len(ids)), tie_word_embeddings=True))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)  # with the usual 0.02, no logit could rise above the others
    model.save_pretrained(work / "tiny-llama")
    tokenizer.save_pretrained(work / "tiny-llama")


def _write_captions(work: Path) -> None:
    """The columns of jxie/flickr8k: image, caption_0 ... caption_4."""
    from datasets import Dataset, Image

    rows = [
        {"image": picture, **{f"caption_{number}": form.format(words) for number, form in enumerate(FORMS)}}
        for picture, words in pictures()
    ]
    for number, (picture, _) in enumerate(pictures(margins=(13,))):
        picture.save(work / f"new-{number}.png")
    (work / "tiny-flickr8k").mkdir(exist_ok=True)
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(work / "tiny-flickr8k" / "train.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETTINGS), help="which notebooks (default: all)")
    parser.add_argument("--out", type=Path, default=NOTEBOOKS, help="folder for the executed notebooks (default: in place)")
    parser.add_argument("--work", type=Path, help="folder to run in (default: a temporary one)")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        prepare(work)
        for name in options.names:
            run(name, options.out, work)
            print(options.out / f"{name}.ipynb")


if __name__ == "__main__":
    main()
