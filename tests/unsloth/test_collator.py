"""VisionDataCollator: rows of data sets, in the shapes that people have them, give the batches of `vlm-dist train`."""

from __future__ import annotations

import functools
import http.server
import io
import threading

import pytest
import torch
from PIL import Image

import vlm_dist
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.errors import DataError

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
