"""Metrics of boxes and points by hand-made values; in a run, on the pages of it, and what cannot be asked for."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.checking.inspection import inspect
from vlm_dist.data.boxes import Marked
from vlm_dist.data.synthetic import synthesise
from vlm_dist.errors import ConfigError
from vlm_dist.reporting.inspect_page import write_inspection
from vlm_dist.reporting.report import write_report
from vlm_dist.scoring.boxes import Marks, box_accuracy, iou, overlap_of, pointing
from vlm_dist.scoring.metrics import find_metric, value_of


def box(x1, y1, x2, y2, label="", image=0) -> Marked:
    return Marked("bbox", ((x1, y1), (x2, y2)), label, image)


def point(x, y) -> Marked:
    return Marked("point", ((x, y),))


TRIANGLE = Marked("polygon", ((0, 0), (10, 0), (0, 10)))
A, B = box(0, 0, 10, 10, "a"), box(20, 0, 30, 10, "b")


@pytest.mark.parametrize(
    ("metric", "answered", "truth", "expected"),
    [
        (iou, [box(0, 0, 10, 5)], [box(0, 0, 10, 10)], 0.5), (iou, [box(5, 0, 15, 10)], [A], 1 / 3), (iou, [], [A], 0),
        (iou, [A, B], [B, A], 1), (iou, [A, B], [A], 0.5), (iou, [A], [A, B], 0.5), (iou, [A._replace(image=1)], [A], 0),
        (iou, [A._replace(label="b"), B], [A, B], 0.5), (iou, [A._replace(label=""), B._replace(label="")], [A, B], 1),
        (iou, [A._replace(label="c")], [A], 1), (iou, [TRIANGLE], [A], 1), (iou, [point(3, 3)], [A], 0),
        (box_accuracy, [box(0, 0, 10, 5)], [A], 1), (box_accuracy, [box(0, 0, 10, 4.9)], [A], 0), (box_accuracy, [A, A], [A], 0.5),
        (pointing, [point(3, 3)], [A], 1), (pointing, [point(11, 3)], [A], 0), (pointing, [box(2, 2, 6, 6)], [A], 1),
        (pointing, [point(3, 3)], [TRIANGLE], 1), (pointing, [point(8, 8)], [TRIANGLE], 0), (pointing, [point(3, 3)], [A, B], 0.5),
        (pointing, [point(25, 3), point(3, 3)], [A, B], 1), (pointing, [point(3, 3), point(4, 4)], [A, B], 0.5),
        (pointing, [point(54, 50)], [point(50, 50)], 1), (pointing, [point(56, 50)], [point(50, 50)], 0),
    ],
)  # fmt: skip
def test_by_hand(metric, answered, truth, expected):
    assert metric("", [], Marks(answered, truth, [(100, 60), (100, 60)])) == pytest.approx(expected)
    assert overlap_of(A, A) == 1


def edges(answer: str, truths: list[str], marks: Marks) -> float:
    return float(len(marks.answered) + 10 * len(marks.truth))


def test_of_ones_own():
    mine, strict = find_metric(f"{__name__}:edges"), find_metric("box_accuracy@0.75")
    assert mine is not None and value_of(mine, "", [], Marks([A], [A, B], [])) == 21 and value_of(mine, "", [], Marks([A], [], [])) is None
    assert strict is not None and value_of(strict, "", [], Marks([box(0, 0, 10, 7)], [A], [])) == 0


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("boxes")
    made = synthesise(out, train=12, heldout=8, tasks=("boxes",), size=48, image_format="png")
    return {name.split("-")[1]: str(paths[0]) for name, paths in made.items()}


def test_in_a_run(settings, tmp_path, boxes):
    """Scored, drawn in the report and in inspect; the truth of every box is a box that gets full marks."""
    settings["data"] |= {"train": boxes["train"], "heldout": boxes["heldout"], "max_seq_length": 1024}
    settings["training"] = {"steps": 1, "global_batch": 2, "micro_batch": 1}
    settings["evaluation"] = {"samples": 8, "max_new_tokens": 2, "metrics": ["iou", "box_accuracy@0.5", "pointing"]}
    path = write_config(settings, tmp_path)
    summary = train(load_config(path))
    assert {"iou", "box_accuracy@0.5", "pointing"} <= set(summary["eval"]["after"])
    rows = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "samples" / "after.jsonl").read_text().splitlines()]
    assert all(("iou" in row["metrics"]) == ("objects" in row) == (row["kind"] != "region") for row in rows)
    page = write_report(tmp_path / "runs" / "tiny").read_text()
    assert page.count('<svg class="marked"') == sum("objects" in row for row in rows) > 0 and '<rect class="truth"' in page
    found = inspect(load_config(path), 4)
    samples = [sample for row in found["rows"] for sample in row]
    assert all(sample["objects"] and sample["convention"] == "unit" for sample in samples)
    image = Image.open(io.BytesIO(base64.b64decode(samples[0]["pictures"][0]["url"].split(",")[1]))).convert("RGB")
    x1, _, x2, y2 = samples[0]["objects"][0]["bbox"]
    red, green, blue = image.getpixel((round((x1 + x2) / 96 * image.width), min(round(y2 / 48 * image.height), image.height - 1)))
    assert green > 150 and red < 120 and blue < 170, "the lower edge of the first box is not drawn"
    write_inspection(found, tmp_path / "inspect.html")
    assert "written as &ldquo;unit&rdquo;" in (tmp_path / "inspect.html").read_text()


def test_tiles_are_drawn_apart(settings, tmp_path, boxes, checkpoint):
    settings["model"]["name"] = checkpoint("idefics3")
    settings["data"] |= {"train": boxes["train"], "heldout": [], "max_seq_length": 4096}
    samples = [sample for row in inspect(load_config(write_config(settings, tmp_path)), 2)["rows"] for sample in row]
    assert all(len(sample["marked"]) == 1 for sample in samples)


def test_without_objects_it_says_so(settings, tmp_path):
    settings["evaluation"] = {"samples": 4, "max_new_tokens": 2, "metrics": ["iou"]}
    settings["training"] = {"steps": 1, "global_batch": 2, "micro_batch": 1}
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: iou: none of the 4 held-out samples has objects"):
        train(load_config(write_config(settings, tmp_path)))
