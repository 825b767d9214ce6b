"""VisionDataCollator: rows of data sets, in the shapes that people have them, give the batches of `vlm-dist train`."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_dist
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.pictures import decode_picture
from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample, DataError
from vlm_dist.unsloth.collator import as_sample

PICTURE = Image.new("RGB", (40, 30), "red")


def row(image=PICTURE):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What colour?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]}


@pytest.fixture
def collator(any_checkpoint):
    from transformers import AutoProcessor

    return vlm_dist.VisionDataCollator(None, AutoProcessor.from_pretrained(any_checkpoint), max_seq_length=512)


def reference(collator, copies=1):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    encoded = Encoder(collator.encoder.processor, 512).encode(Sample("", "", messages, [PICTURE]))
    return collate([encoded] * copies, collator.encoder.processor.tokenizer.pad_token_id)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_every_form_of_a_row(collator, tmp_path):
    PICTURE.save(tmp_path / "p.png")
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    data = buffer.getvalue()
    no_image = row()
    del no_image["messages"][0]["content"][0]["image"]
    plain = {"messages": [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}], "image": PICTURE}
    rows = [
        row(), row(str(tmp_path / "p.png")), row(data), row({"bytes": data, "path": None}), {"formatted": row(), "instruction": "x"},
        {**no_image, "images": [PICTURE]}, plain,
    ]  # fmt: skip
    assert_same(collator(rows), reference(collator, len(rows)))


def test_other_layouts_and_other_pictures(collator, tmp_path):
    """A question and its answer, turns of other trainers, OpenAI's data address, arrays and tensors."""
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    asked = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What colour?"}]
    rows = [
        {"image": np.asarray(PICTURE), "query": "What colour?", "label": ["red"]},
        {"images": [torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)], "question": "What colour?", "answers": [{"answer": "red"}]},
        {"image": PICTURE, "conversations": [{"from": "Human", "value": "<image>What colour?"}, {"from": "GPT", "value": "red"}]},
        {"messages": [{"role": "user", "content": asked}, {"role": "model", "content": "red"}]},
        {
            "prompt": [{"role": "user", "content": "What colour?"}],
            "completion": [{"role": "assistant", "content": "red"}],
            "image": address,
        },
        {"image": {"bytes": buffer.getvalue(), "path": None}, "texts": [{"user": "What colour?", "assistant": "red"}]},
    ]
    assert_same(collator(rows), reference(collator, len(rows)))


def odd_pictures(folder):
    turned = Image.new("RGB", (60, 40), "white")
    turned.paste("red", (0, 0, 20, 20))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "exif.jpg", exif=turned.getexif())
    logo = Image.new("RGBA", (40, 30))
    logo.paste((255, 0, 0, 255), (0, 0, 20, 20))
    logo.save(folder / "logo.png")
    palette = Image.new("P", (40, 30))
    palette.putpalette([0, 0, 0] * 256)
    palette.save(folder / "palette.png", transparency=0)
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "wide.png")
    return sorted(folder.glob("*.*"))


def test_pictures_are_those_that_training_sees(tmp_path):
    for path in odd_pictures(tmp_path):
        expected = np.asarray(decode_picture(path.read_bytes(), path.name, 10_000))
        for source in (str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
            (seen,) = as_sample(row(source)).images
            assert np.array_equal(np.asarray(seen), expected), (path.name, type(source))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "exif.jpg").read_bytes()[:-80])
    with pytest.raises(BadSample, match="cannot be decoded"):
        as_sample(row(str(tmp_path / "cut.jpg")))


def test_objects_are_written_as_in_training_and_what_is_dropped_is_told(collator, caplog):
    """In the model's own convention, with placeholders and without words; an unknown column is told once."""
    cat = {"bbox": [10, 10, 30, 20], "label": "a cat"}
    turns = [{"role": "user", "content": "<image>Where is <ref-object>?"}, {"role": "assistant", "content": "At <bbox>."}]
    mood = {"images": [PICTURE], "messages": turns, "objects": [cat], "mood": "fine"}
    for _ in range(2):
        batch = collator([mood])
    text = collator.encoder.processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert "<bbox>" not in text and collator.encoder.placing.convention.place is not None and any(char.isdigit() for char in text)
    assert [record.getMessage() for record in caplog.records if "mood" in record.getMessage()] == [
        "row of a batch: keys of the JSON that nothing reads: mood; told once"
    ]
    alone = as_sample({"image": PICTURE, "objects": [cat]})
    assert alone.messages[-1]["role"] == "assistant" and alone.objects[0].box == (10, 10, 30, 20)
    turned = PICTURE.copy()
    turned.getexif()[0x0112] = 6
    sized = {"image": turned, "objects": [cat], "objects_size": list(PICTURE.size)}
    assert as_sample(sized).sizes == [PICTURE.size[::-1]] and as_sample(sized).objects[0].box == (
        PICTURE.height - 20,
        10,
        PICTURE.height - 10,
        30,
    )
    with pytest.raises(DataError, match=r"row 0 of the batch: objects\[0\]"):
        collator([{**mood, "objects": [{"bbox": [0, 0, 9_000, 9_000], "label": "x"}]}])


def test_a_row_with_a_video_is_refused_by_name(collator):
    turns = [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", "content": "A ball."}]
    with pytest.raises(DataError, match=r"row 0 of the batch: it has videos, which this collator does not take; `vlm-dist data pack`"):
        collator([{"video": "ball.mp4", "messages": turns}])


def test_rows_of_a_real_data_set(collator, tmp_path):
    """Through `datasets`, which gives every part every key."""
    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra for TRL")
    PICTURE.save(tmp_path / "p.png")
    made = datasets.Dataset.from_list([{"formatted": row(str(tmp_path / "p.png"))}] * 2)
    assert_same(collator([made[0], made[1]]), reference(collator, 2))


def test_pictures_at_an_address(llava, tmp_path):
    """From a server that knows no ranges; one that it does not have is named."""
    from transformers import AutoProcessor

    PICTURE.save(tmp_path / "p.png")
    collator = vlm_dist.VisionDataCollator(None, AutoProcessor.from_pretrained(llava), max_seq_length=512)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert_same(collator([row(f"{address}/p.png")]), reference(collator))
        with pytest.raises(DataError, match=f"row 1 of the batch: a picture cannot be fetched: .*{address}/none.png"):
            collator([row(), row(f"{address}/none.png")])
        server.shutdown()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"text": "x"}, "row 1 of the batch: no 'messages' in it; its columns are text"),
        (row("nowhere.png"), "a picture cannot be read"),
        ({"messages": row()["messages"][:1]}, "no assistant turn"),
    ],
)
def test_a_bad_row_is_named(collator, bad, reason):
    with pytest.raises(DataError, match=reason):
        collator([row(), bad])


def test_names_that_users_know():
    assert vlm_dist.UnslothVisionDataCollator is vlm_dist.VisionDataCollator
