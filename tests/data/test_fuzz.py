"""Records of any shape and pictures of any size, for every family: a sample is encoded or bad, and nothing else ever happens.

FUZZ_TRIES=1250 pytest tests/data/test_fuzz.py       20,000 tries over 16 families; what the suite runs is a small part
"""

from __future__ import annotations

import io
import json
import os
import resource
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_dist.data.encode import Encoder
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.samples import outline, parse_sample
from vlm_dist.errors import BadSample

TRIES = int(os.environ.get("FUZZ_TRIES", "10"))
LONGEST_S = 30.0  # of one sample: what takes longer hangs
MOST_GROWN = 2 * 2**30  # bytes of the process over all tries
OPTIONS: dict[str, Any] = {"max_image_pixels": 2_000_000, "caption_prompt": "What is it?"}

ODD_WORDS = [
    "red", "<image>", "<image>\nWhat?", "", " ", "<|im_start|>", "</s>", "<think>so</think>yes", "<bbox>", "<ref-object>", "\ud800",
    "\ue0000\ue001", "e\u0301\u2060", "a" * 300, "</think>", "{{ 7 }}", "{% raise %}", "\x00",
]  # fmt: skip
WORDS = st.text(max_size=8) | st.sampled_from(ODD_WORDS)
KEYS = st.sampled_from(["type", "text", "image", "role", "content", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "GPT", "model", "judge"])
TEXTS = st.builds(lambda text: {"type": "text", "text": text}, WORDS)
PARTS = st.just({"type": "image"}) | TEXTS | st.just({"type": "image_url", "image_url": {"url": "x"}}) | VALUES
CALLS = st.sampled_from([{"function": {"name": "f", "arguments": "{}"}}, {"name": "f"}, 3])
TURNS = st.fixed_dictionaries(
    {"role": ROLES | VALUES, "content": WORDS | st.lists(PARTS, max_size=3) | VALUES},
    optional={
        "weight": st.sampled_from([0, 0.5, 1, -1, float("nan"), "x", True]),
        "loss": st.booleans(),
        "reasoning_content": WORDS | VALUES,
        "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
        "name": VALUES,
    },
)
PAIRS = st.tuples(WORDS, WORDS).map(lambda said: [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}])
GOOD_TURNS = st.lists(PAIRS, min_size=1, max_size=2).map(lambda pairs: [turn for pair in pairs for turn in pair])
BOX = st.lists(st.integers(-2, 70), min_size=3, max_size=4)
OBJECTS = st.lists(
    st.fixed_dictionaries({}, optional={"bbox": BOX, "point": st.lists(st.integers(0, 9), max_size=2), "label": WORDS}), max_size=2
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "messages": GOOD_TURNS | st.lists(TURNS, max_size=4) | VALUES,
        "conversations": st.lists(TURNS, max_size=2),
        "captions": st.lists(WORDS, max_size=2),
        "question": WORDS,
        "answer": WORDS | VALUES,
        "answers": VALUES,
        "system": WORDS | VALUES,
        "objects": OBJECTS | VALUES,
        "tools": VALUES,
    },
)
SIDES = st.sampled_from([1, 2, 3, 15, 64, 65, 333, 1025])
SIZES = st.tuples(SIDES, SIDES) | st.sampled_from([(8000, 1), (1, 8000), (2400, 8), (4000, 20), (600, 3), (2000, 1001)])
KINDS = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGBA", "P", "1", "I;16"), "WEBP": ("RGB",), "GIF": ("P",), "TIFF": ("F",)}
MODES = st.sampled_from([(mode, kind) for kind, modes in KINDS.items() for mode in modes])


@st.composite
def pictures(draw: Any) -> bytes:
    size, (mode, kind) = draw(SIZES), draw(MODES)
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    data = buffer.getvalue()
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


@st.composite
def raws(draw: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"__key__": "k", "__url__": "x.tar"}
    several = draw(st.integers(0, 2))
    names = ["jpg"] if several == 1 else [f"{number}.png" for number in range(several)]
    raw |= {name: draw(pictures()) for name in names}
    if draw(st.integers(0, 4)):
        raw["json"] = json.dumps(draw(RECORDS)).encode("utf-8", "surrogatepass")
    else:
        raw["txt"] = draw(st.sampled_from([b"a box", b"\xff", b"", "\ufeffa box".encode()]))
    return raw


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sample_is_encoded_or_bad(any_checkpoint):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(any_checkpoint), 100_000)
    ruler, counts = Ruler(encoder), {"encoded": 0, "bad": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @settings(max_examples=TRIES, deadline=None, database=None, derandomize=TRIES < 100, suppress_health_check=list(HealthCheck))
    @given(raws())
    def tries(raw: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            encoded = encoder.encode(parse_sample(raw, as_pixels=encoder.takes_pixels, **OPTIONS))
            found = outline(raw, **OPTIONS)
            measured = ruler.measure(encoder.placing.written(found.messages, found.objects, found.sizes), found.sizes, found.tools)
            assert abs(measured.tokens - encoded.length) <= 2 + 2 * len(found.sizes), (measured, encoded.length)
            counts["encoded"] += 1
        except BadSample as reason:
            assert str(reason) and "\n" not in str(reason)
            counts["bad"] += 1
        assert time.monotonic() - started < LONGEST_S

    tries()
    assert sum(counts.values()) >= TRIES and (counts["encoded"] > 0 or TRIES < 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_GROWN
