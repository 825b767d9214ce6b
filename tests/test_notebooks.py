"""docs/notebooks: each runs from top to bottom on tiny checkpoints, its files are what it says, and what the committed page shows is what
a run gives."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from tests.conftest import OF_A_RANK, ROOT, child_environment

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST_FILE = 100 * 1024
PLACE_OF_A_MACHINE = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|work|usr|opt|var|mnt|Users)/|site-packages|C:\\\\")
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "run_notebooks.py"))


def read(path: Path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def text_of(output) -> str:
    """What a reader sees, without the digits that differ between machines."""
    text = output.text if output.output_type == "stream" else output.data.get("text/plain", "")
    return re.sub(r"\d+\.\d+", "#", text)


def kinds(cell) -> list:
    return [(output.output_type, output.get("name"), sorted(output.get("data", {}))) for output in cell.outputs]


def test_the_script_runs_them_all():
    assert [path.stem for path in NOTEBOOKS] == sorted(SCRIPT["SETTINGS"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    """Valid, small, of one whole run, and of no machine; the names that a run changes are those of the settings cell."""
    import nbformat

    nbformat.validate(read(path))
    assert path.stat().st_size < LARGEST_FILE
    assert not (found := PLACE_OF_A_MACHINE.search(path.read_text())), found
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"]
    (settings,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assigned = {target.id for node in ast.parse(settings.source).body for target in node.targets}
    assert set(SCRIPT["SETTINGS"][path.stem]) <= assigned
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", "\n".join(cell.source for cell in read(path).cells)):
        assert (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of the executed notebooks, folder that they ran in)"""
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        for name in OF_A_RANK:  # a training in this process leaves them
            patch.delenv(name, raising=False)
        for name, value in (child_environment() | SCRIPT["ENVIRONMENT"]).items():
            patch.setenv(name, value)
        SCRIPT["prepare"](work)
        for path in NOTEBOOKS:
            SCRIPT["run"](path.stem, out, work)
    return out, work


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_shows_what_a_run_gives(executed, path):
    """If not: python scripts/run_notebooks.py"""
    for committed, found in zip(code_cells(path), code_cells(executed[0] / path.name), strict=True):
        assert committed.source == found.source and kinds(committed) == kinds(found), committed.source
        if "varies" not in committed.metadata.get("tags", []):
            assert list(map(text_of, committed.outputs)) == list(map(text_of, found.outputs)), committed.source


@pytest.mark.slow
def test_unsloth_vision(executed):
    """The loss falls, every question gets its answer, and the merged folder gives it with plain transformers too."""
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out, work = executed
    (state,) = (work / "vision_outputs").glob("checkpoint-*/trainer_state.json")
    losses = [row["loss"] for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    assert len(losses) == 30 and losses[-1] < 0.1 * losses[0]
    (asked,) = (cell for cell in code_cells(out / "unsloth_vision.ipynb") if cell.source.startswith("FastVisionModel.for_inference"))
    lines = "".join(output.text for output in asked.outputs)
    answers = re.findall(r"What colour is it\? (\w+) -> (\w+)", lines)
    assert len(answers) == 4 and all(right == said for right, said in answers), lines

    base = AutoModelForImageTextToText.from_pretrained(work / "tiny-qwen2.5-vl")
    for folder, model in {
        "vision_merged_model": AutoModelForImageTextToText.from_pretrained(work / "vision_merged_model"),
        "vision_lora_model": PeftModel.from_pretrained(base, work / "vision_lora_model"),
    }.items():
        processor = AutoProcessor.from_pretrained(work / folder)
        content = [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=Image.open(work / "1.png"), return_tensors="pt")
        answer = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(answer, skip_special_tokens=True).strip() == "blue", folder


@pytest.mark.slow
def test_mini_vlm(executed):
    """The loss falls over the interruption, and the saved folder says what a picture shows."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlm_dist.models.mini_vlm  # noqa: F401  (makes the Auto classes know it)

    _, work = executed
    losses = torch.load(work / "vlm_caption_checkpoint.pt")["losses"]
    assert len(losses) == SCRIPT["SETTINGS"]["mini_vlm"]["num_epochs"] and losses[-1] < 0.1 * losses[0], losses
    model = AutoModelForImageTextToText.from_pretrained(work / "mini-vlm-flickr8k").eval()
    processor = AutoProcessor.from_pretrained(work / "mini-vlm-flickr8k")
    for picture, words in list(SCRIPT["pictures"]())[: len(SCRIPT["COLOURS"])]:
        inputs = processor(text="<image>This image shows", images=picture, return_tensors="pt")
        caption = processor.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
        assert words.split()[0] in caption, (words, caption)
