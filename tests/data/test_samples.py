"""Every input form becomes one form; what cannot be used says why."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm_dist.data.pictures import decode_picture
from vlm_dist.data.samples import outline, parse_sample
from vlm_dist.errors import BadSample


def picture(mode="RGB", size=(8, 6), form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, **({"color": 1} if mode in ("P", "L") else {})).save(buffer, form, **options)
    return buffer.getvalue()


def parse(**members):
    raw = {"__key__": "k", "__url__": "s.tar", **{name.replace("_", "."): value for name, value in members.items()}}
    return parse_sample(raw, max_image_pixels=10_000, caption_prompt="Describe.")


def as_json(value) -> bytes:
    return json.dumps(value).encode()


TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


def test_caption():
    sample = parse(jpg=picture(form="JPEG"), txt=b" a cat \n")
    assert sample.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    assert sample.images[0].mode == "RGB"


def test_img2dataset_metadata_does_not_hide_the_caption():
    assert parse(jpg=picture(form="JPEG"), txt=b"a cat", json=as_json({"url": "u", "width": 3})).meta == {"url": "u", "width": 3}


def test_messages_with_typed_parts():
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "This"}, {"type": "image"}, {"type": "text", "text": "or this?"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
    ]
    sample = parse(**{"1_png": picture(size=(2, 2)), "0_png": picture(size=(4, 4)), "json": as_json({"messages": turns, "task": "t"})})
    assert [image.width for image in sample.images] == [4, 2]  # by number, not by name in the tar
    assert [part["type"] for part in sample.messages[1]["content"]] == ["text", "image", "text", "image"]
    assert sample.meta == {"task": "t"}


def test_pictures_without_a_place_stand_first():
    sample = parse(webp=picture(form="WEBP"), json=as_json({"messages": TURNS}))
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]


def test_llava_conversations():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    sample = parse(jpg=picture(form="JPEG"), json=as_json({"conversations": turns}))
    assert sample.messages[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    assert sample.messages[1]["role"] == "assistant"


def test_text_only():
    assert parse(json=as_json({"messages": TURNS})).images == []


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b"x"}, "no text"),
        ({"txt": b"a cat"}, "speaks of 1 pictures, the sample has 0"),
        ({"json": b"{"}, "json: "),
        ({"json": b"[1]"}, "expected an object"),
        ({"json": as_json({"messages": []})}, "list of turns"),
        ({"json": as_json({"messages": [{"role": "judge", "content": "x"}]})}, "'judge'"),
        ({"json": as_json({"messages": [{"role": "user", "content": [{"type": "video"}]}]})}, "speaks of 1 videos, the sample has 0"),
        ({"json": as_json({"messages": TURNS[:1]})}, "no assistant turn"),
        ({"jpg": b"not a picture", "txt": b"a cat"}, "jpg: no picture that is known here; expected a JPEG, PNG or WebP file"),
        ({"jpg": picture(form="GIF"), "txt": b"a cat"}, "jpg: a GIF; expected a JPEG, PNG or WebP file"),
        ({"jpg": b"", "txt": b"a cat"}, "jpg: empty"),
        ({"png": picture(size=(200, 200)), "txt": b"a cat"}, "200 x 200 pixels"),
        ({"txt": b"\xff\xfe", "jpg": b""}, "txt: "),
    ],
)
def test_what_cannot_be_used_says_why(members, reason):
    with pytest.raises(BadSample, match=reason):
        parse(**members)


def test_truncated_picture():
    data = picture(size=(64, 64), form="JPEG")
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_picture(data[: len(data) // 2], "jpg", 10_000)


def test_a_pixel_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="9000 x 9000"):
        decode_picture(picture("1", (9000, 9000)), "png", 64_000_000)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "1"])
def test_every_mode_becomes_rgb(mode):
    assert decode_picture(picture(mode), "png", 10_000).mode == "RGB"


def test_cmyk_and_transparency():
    assert decode_picture(picture("CMYK", form="JPEG"), "jpg", 10_000).mode == "RGB"
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_picture(buffer.getvalue(), "png", 10_000).getpixel((0, 0)) == (255, 255, 255)


def test_rotation_in_exif_is_applied():
    buffer = io.BytesIO()
    upright = Image.new("RGB", (8, 6))
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue(), "jpg", 10_000).size == (6, 8)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_levels(form):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, form)
    decoded = np.asarray(decode_picture(buffer.getvalue(), "x", 10_000, formats=None))
    assert (decoded == (ramp >> 8)[..., None]).all()


def test_numbers_without_a_white_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(buffer, "TIFF")
    with pytest.raises(BadSample, match="a picture of floating-point numbers; make it one of 8 or 16 bits"):
        decode_picture(buffer.getvalue(), "x", 10_000, formats=None)


def photo(mode: str = "RGB", quality: int = 90) -> bytes:
    """Something with detail, so that its JPEG has much in it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 97), dtype=np.uint8))
    buffer = io.BytesIO()
    Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]).convert(mode).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_as_pillow_does(mode):
    data = photo(mode)
    assert decode_picture(data, "jpg", 10_000).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("length", [10, 100, 400, 1000])
def test_damage_inside_a_jpeg_is_seen(length):
    """Zeros in the middle of the scan: Pillow gives a picture that is grey from there on."""
    data = bytearray(photo())
    middle = len(data) // 2
    data[middle : middle + length] = bytes(length)
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(BadSample, match="jpg: cannot be decoded"):
        decode_picture(bytes(data), "jpg", 10_000)


def test_filler_between_segments_does_no_harm():
    data = photo()
    assert data.endswith(b"\xff\xd9")
    filled = data[:-2] + bytes(12) + data[-2:]
    assert decode_picture(filled, "jpg", 10_000).tobytes() == decode_picture(data, "jpg", 10_000).tobytes()


def test_an_outline_tells_what_decoding_would_give():
    upright = Image.new("RGB", (8, 6))
    exif = upright.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", exif=exif)
    raw = {"__key__": "k", "0.png": picture(size=(30, 20)), "1.jpg": buffer.getvalue(), "txt": b"two"}
    raw["json"] = as_json({"messages": TURNS})
    raw = {name: value for name, value in raw.items() if name != "txt"}
    messages, sizes, *_ = outline(raw, max_image_pixels=10_000, caption_prompt="")
    sample = parse_sample(raw, max_image_pixels=10_000, caption_prompt="")
    assert messages == sample.messages and sizes == [image.size for image in sample.images] == [(30, 20), (6, 8)]


def test_two_pictures_of_one_number_are_told():
    found = parse(jpg=picture(form="JPEG"), png=picture(), json=as_json({"messages": TURNS}))
    assert len(found.images) == 2 and ("pictures", ".jpg and .png") in found.notes


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_a_record_that_is_not_to_be_learnt_from_is_not(key):
    with pytest.raises(BadSample, match=f"json: '{key}' of the whole record is false: not learnt from, as it says"):
        parse(png=picture(), json=as_json({"messages": TURNS, key: False}))
