"""The table of layouts in docs/data.md: one of each is packed, and what came out stands in the table.

python scripts/layouts_page.py
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dist.data.pack_records import pack_records
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.synthetic_video import encode

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
BEGIN, END = "<!-- layouts: python scripts/layouts_page.py -->", "<!-- /layouts -->"
HEAD = ["| layout | a record | becomes `KEY.json` |", "|---|---|---|"]


def picture(kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(data, kind)
    return data.getvalue()


def video() -> bytes:
    return encode([Image.new("RGB", (64, 48), "red")] * 8, fps=8)


DATA = "data:image/jpeg;base64," + base64.b64encode(picture()).decode()
Q, A = "Which colour?", "red"
TURNS = [{"role": "user", "content": f"<image>{Q}"}, {"role": "assistant", "content": A}]
SHAREGPT = [{"from": "human", "value": f"<image>\n{Q}"}, {"from": "gpt", "value": A}]


def asked(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": Q}]}, {"role": "assistant", "content": A}]


RECORDS: list[tuple[str, Any]] = [
    ("messages (TRL, ms-swift)", {"messages": TURNS, "images": ["0.jpg"]}),
    ("a bare list of messages", asked({"type": "image", "path": "0.jpg"})),
    ("OpenAI's chat", {"messages": asked({"type": "image_url", "image_url": {"url": DATA}})}),
    ("Qwen's parts", {"messages": asked({"type": "image", "image": "file://0.jpg"})}),
    ("Anthropic's parts", {"messages": asked({"type": "image", "source": {"type": "base64", "data": DATA.partition(",")[2]}})}),
    ("conversations (LLaVA, ShareGPT)", {"image": "0.jpg", "conversations": SHAREGPT}),
    (
        "... with what changes the meaning",
        {"image": "0.jpg", "system": "Be brief.", "conversations": [SHAREGPT[0], {**SHAREGPT[1], "weight": 0}]},
    ),
    ("Qwen's packed lists", [{"image": "0.jpg", "conversations": SHAREGPT}]),
    ("prompt and completion (TRL)", {"images": ["0.jpg"], "prompt": [{"role": "user", "content": Q}], "completion": [TURNS[1]]}),
    ("a prompt of turns and an answer", {"image": "0.jpg", "prompt": [{"role": "user", "content": Q}], "answer": A}),
    ("XTuner", {"image": "0.jpg", "conversation": [{"system": "Be brief.", "input": f"<image>{Q}", "output": A}]}),
    (
        "MiniCPM-V",
        {
            "image": {"<image_00>": "0.jpg"},
            "conversations": [{"role": "user", "content": f"<image_00>{Q}"}, {"role": "assistant", "content": A}],
        },
    ),
    ("PaliGemma", {"image": "0.jpg", "prefix": Q, "suffix": A}),
    ("Donut", {"image": "0.jpg", "ground_truth": json.dumps({"gt_parse": {"menu": [{"nm": "tea"}]}})}),
    ("Alpaca", {"instruction": f"<image>{Q}", "input": "One word.", "output": A, "images": ["0.jpg"]}),
    ("query and response (ms-swift)", {"query": f"<image>{Q}", "response": A, "history": [["Hi.", "Hello."]], "images": ["0.jpg"]}),
    ("the Cauldron", {"images": ["0.jpg"], "texts": [{"user": Q, "assistant": A, "source": "x"}]}),
    ("ChartQA", {"image": "0.jpg", "query": Q, "label": ["red"]}),
    ("DocVQA, TextVQA", {"image": "0.jpg", "question": Q, "answers": ["red", "Red"]}),
    ("VQA", {"image": "0.jpg", "question": Q, "multiple_choice_answer": A, "answers": [{"answer": "red"}, {"answer": "dark red"}]}),
    ("multiple choice (ScienceQA, AI2D)", {"image": "0.jpg", "question": Q, "choices": ["blue", "red"], "answer": 1}),
    ("... with letters of its own", {"image": "0.jpg", "Question": Q, "options": {"A": "blue", "B": "red"}, "Answer": "B"}),
    ("image and text", {"image": "0.jpg", "text": "A box."}),
    ("captions (Flickr30k)", {"image": "0.jpg", "caption": ["A box.", "Red."], "filename": "0.jpg"}),
    ("boxes", {"image": "0.jpg", "question": Q, "answer": A, "objects": [{"bbox": [1, 2, 9, 9], "label": "box"}]}),
    ("RefCOCO", {"image": "0.jpg", "bbox": [4, 2, 20, 10], "sentences": [{"sent": "the left box"}]}),
    ("detection sets of the hub", {"image": "0.jpg", "objects": {"bbox": [[4, 2, 20, 10]], "area": [200], "category": ["box"]}}),
    ("Qwen's boxes", {"image": "0.jpg", "bbox_format": "xyxy/1000", "objects": [{"bbox_2d": [62, 41, 375, 250], "label": "box"}]}),
    ("Molmo's points", {"image": "0.jpg", "bbox_format": "xy/100", "points": [{"x": 21.5, "y": 12.5}], "label": "box"}),
    ("LLaVA-Video", {"video": "0.mp4", "data_source": "x", "conversations": SHAREGPT}),
    (
        "ShareGPT4Video",
        {"video_id": "0", "video_path": "0.mp4", "captions": [{"idx": "0", "content": "Grey."}, {"idx": "-1", "content": "A box."}]},
    ),
    ("Video-ChatGPT", {"video_id": "0", "q": Q, "a": A}),
    ("MSVD-QA, MSR-VTT-QA, ActivityNet-QA", {"video_id": 0, "question": Q, "answer": A}),
    ("a part of a video", {"video": "0.mp4", "start": 0.5, "end": 0.9, "question": Q, "answer": A}),
]
IMAGES = [{"id": 7, "file_name": "0.jpg", "width": 64, "height": 48}]
CAPTIONED = [{"image_id": 7, "caption": "A box."}, {"image_id": 7, "caption": "Red."}]
BOXED = [{"image_id": 7, "category_id": 3, "bbox": [4, 2, 20, 10]}]
TEXTS: list[tuple[str, str, str]] = [
    ("COCO's captions", "c.json", json.dumps({"images": IMAGES, "annotations": CAPTIONED})),
    (
        "COCO's instances",
        "i.json",
        json.dumps({"images": IMAGES, "annotations": BOXED, "categories": [{"id": 3, "name": "box"}]}),
    ),
    ("an object that wraps a list", "w.json", json.dumps({"data": [{"image": "0.jpg", "caption": "A box."}]})),
    ("captions by picture", "k.json", json.dumps({"0.jpg": ["A box.", "Red."]})),
    ("CSV", "a.csv", f"image,question,answer\n0.jpg,{Q},{A}\n"),
    ("VLMEvalKit's TSV", "b.tsv", f"index\timage\tquestion\tA\tB\tanswer\n1\t{DATA.partition(',')[2]}\t{Q}\tblue\tred\tB\n"),
]  # fmt: skip
FOLDERS: list[tuple[str, str, dict[str, bytes]]] = [
    ("pictures with texts beside them", "`0.jpg`, `0.txt`", {"0.jpg": picture(), "0.txt": b"A box."}),
    ("metadata.csv", "`file_name,text`", {"0.jpg": picture(), "metadata.csv": b"file_name,text\n0.jpg,A box.\n"}),
    ("folders named by class", "`box/0.jpg`", {"box/0.jpg": picture()}),
]


def packed(make: Callable[[Path], Path]) -> str:
    """What the first sample's KEY.json holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0.jpg").write_bytes(picture())
        (folder / "0.mp4").write_bytes(video())
        made = pack_records(make(folder), folder / "out", processes=1)
        (raw,) = read_in_order([str(path) for path in made["train"].shards])
        return raw["json"].decode()


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def filled(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "f" / name).write_bytes(data)
    return folder / "f"


def cell(text: str) -> str:
    code = text.replace(DATA, "data:image/jpeg;base64,...").replace(DATA.partition(",")[2], "...").replace("|", "\\|")
    return f"`{' '.join(code.split())}`"


def table() -> str:
    rows = []
    for name, record in RECORDS:
        made = packed(lambda folder, record=record: written(folder, "r.json", json.dumps([record])))
        rows.append((name, cell(json.dumps(record)), cell(made)))
    for name, file, text in TEXTS:
        shown = cell(text.replace("\t", "→").strip().replace("\n", " ⏎ "))
        rows.append((name, shown, cell(packed(lambda folder, file=file, text=text: written(folder, file, text)))))
    for name, shown, files in FOLDERS:
        rows.append((name, shown, cell(packed(lambda folder, files=files: filled(folder, files)))))
    return "\n".join([*HEAD, *(f"| {' | '.join(row)} |" for row in rows)])


def page(text: str) -> str:
    """docs/data.md with the table anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
