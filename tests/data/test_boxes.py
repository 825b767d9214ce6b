"""Objects: read, turned and scaled; written as each model writes them, at the numbers that its processor's pixels have; and read back."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image, ImageDraw

from vlm_dist.data.boxes import Marked, read_objects, upright
from vlm_dist.data.conventions import CONVENTIONS, convention_of
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.frames import Frame, Frames, _by_rule, _by_trying
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.pictures import ORIENTATION
from vlm_dist.data.placing import Placing, objects_answered
from vlm_dist.data.samples import Sample, outline, parse_sample
from vlm_dist.data.view import pictures_as_seen, shows_pictures_whole
from vlm_dist.errors import BadSample, ConfigError
from vlm_dist.families import FAMILIES

OPTIONS = {"max_image_pixels": 10**7, "caption_prompt": "?"}
CAT = {"bbox": [10, 20, 30, 40], "label": "cat"}
DOG = {"bbox": [50, 5, 90, 35], "label": "dog"}
SHARES = (0.3, 0.25, 0.7, 0.6)  # of the rectangle that is drawn


def drawn(size, box) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    x1, y1, x2, y2 = box
    ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), fill="red")
    return picture


def raw(record, size=(100, 60), picture=None, **options) -> dict:
    buffer = io.BytesIO()
    (picture or Image.new("RGB", size)).save(buffer, "PNG", **options)
    return {"__key__": "k", "__url__": "s.tar", "png": buffer.getvalue(), "json": json.dumps(record).encode()}


def read(*objects, size=(100, 60), **record) -> list[Marked]:
    return read_objects({"objects": list(objects), **record}, [size])


def said(sample: Sample) -> list[str]:
    return ["".join(part.get("text", "") for part in message["content"]) for message in sample.messages]


@pytest.fixture(scope="module")
def processor_of(checkpoint):
    from transformers import AutoProcessor

    made = {}

    def get(family):
        if family not in made:
            made[family] = AutoProcessor.from_pretrained(checkpoint(family))
        return made[family]

    return get


def test_objects_are_read():
    point, polygon = {"point": [5, 6.5]}, {"polygon": [[0, 0], [10, 0], [10, 8]], "label": " roof "}
    box, dot, roof = read(CAT, point, polygon)
    assert box == Marked("bbox", ((10, 20), (30, 40)), "cat") and box.centre == (20, 30)
    assert dot.points == ((5, 6.5),) and (roof.box, roof.label) == ((0, 0, 10, 8), "roof")
    assert read({"polygon": [0, 0, 10, 0, 10, 8]})[0].points == roof.points  # COCO's
    assert read({"bbox": [-1, 0, 100.9, 60]})[0].box == (0, 0, 100, 60)
    assert [one.to_dict() for one in (box, dot)] == [CAT, point]
    assert read_objects({"objects": ["cat"]}, [(9, 9)]) == [] == read_objects({"objects": {"bbox": [], "category": []}}, [])


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ({"bbox": [30, 20, 10, 40]}, "inverted or empty"), ({"bbox": [10, 20, 10, 40]}, "inverted or empty"),
        ({"bbox": [0, 0, 102, 60]}, r"\[0, 0, 102, 60\] lies outside of its picture, which has 100 x 60"),
        ({"bbox": [0, 0, float("nan"), 60]}, "all of them numbers"), ({"bbox": [0, 0, 5]}, "all of them numbers"),
        ({"bbox": "0 0 5 5"}, "all of them numbers"), ({"bbox": [0, 0, True, 5]}, "all of them numbers"), ({"point": [1]}, r"\[x, y\]"),
        ({"polygon": [[0, 0], [1, 1]]}, "three corners"), ({"bbox": [0, 0, 5, 5], "point": [1, 1]}, "bbox and point"),
        ({**CAT, "label": 3}, "label is '3'"), ({**CAT, "image": 1}, "the sample has 1 pictures"), ({**CAT, "size": [50]}, "size is"),
        ({**CAT, "size": [60, 100]}, "another shape"), ({**CAT, "size": [50, 40]}, "another shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_numbers(one, words):
    with pytest.raises(BadSample, match=rf"objects\[0\].*{words}"):
        read(one)


def test_numbers_of_another_size_are_scaled():
    assert read(CAT, objects_size=[200, 120])[0].box == (5, 10, 15, 20)  # before --max-side 100
    assert read({**CAT, "size": [100, 60]}, objects_size=[200, 120])[0].box == (10, 20, 30, 40)
    assert read({"bbox": [0.1, 0.5, 0.2, 1], "size": [1, 1]})[0].box == pytest.approx((10, 30, 20, 60))
    assert read({"bbox": [0, 0, 1022, 767]}, size=(640, 480), objects_size=[1023, 767])[0].box == pytest.approx(
        (0, 0, 639.37, 480), abs=0.01
    )
    swift = {"objects": {"ref": ["cat"], "bbox": [[100, 500, 200, 1000], [100, 100]], "bbox_type": "norm1000"}}
    assert [one.to_dict() for one in read_objects(swift, [(100, 60)])] == [
        {"bbox": [10, 30, 20, 60], "label": "cat"}, {"point": [10, 6], "label": "cat"},
    ]  # fmt: skip


def test_names_and_forms_that_others_use():
    for key in ("label", "category", "name", "class", "text"):
        assert read({"bbox": [1, 2, 3, 4], key: "cat"})[0].label == "cat"
    for form in ({"format": "xywh"}, {"bbox_format": "coco"}):
        assert read({"bbox": [10, 20, 5, 6], **form})[0].box == (10, 20, 15, 26)
    assert read({"bbox": [10, 20, 5, 6]}, bbox_format="xywh")[0].box == (10, 20, 15, 26)
    with pytest.raises(BadSample, match=r"objects\[0\]: the form of its bbox is 'cxcywh'; expected one of xyxy, voc"):
        read({"bbox": [1, 2, 3, 4], "format": "cxcywh"})
    record = {"messages": chat("<image>Where?", "There."), "objects": [{**CAT, "score": 0.9}], "bbox_format": "xyxy"}
    assert parse_sample(raw(record), max_image_pixels=10**6, caption_prompt="?").notes == {("object key", "score")}


@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_pictures(turn):
    """Numbers are those of the upright picture; those of the picture before the turn say so by its size."""
    stored, box = (60, 40), (5, 10, 25, 18)
    picture = drawn(stored, box)
    picture.getexif()[ORIENTATION] = turn
    found = parse_sample(raw({}, picture=picture, exif=picture.getexif()) | {"txt": b"a"}, **OPTIONS).images[0]
    corners = [upright(point, stored, turn) for point in ((5, 10), (25, 18))]
    red = Image.eval(found.getchannel("G"), lambda value: 255 - value).getbbox()
    assert red == (*map(min, *corners), *map(max, *corners))
    for objects in ({"objects": [{"bbox": red}]}, {"objects": [{"bbox": box}], "objects_size": stored}):
        if turn >= 5 or "objects_size" not in objects:
            sample = raw(objects, picture=picture, exif=picture.getexif())
            assert parse_sample(sample, **OPTIONS).objects[0].box == red == outline(sample, **OPTIONS).objects[0].box


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("size", [(100, 60), (61, 97), (320, 200), (33, 33)])
def test_the_numbers_hit_the_pixels_that_the_model_sees(processor_of, family, size):
    """By an oracle of its own: the red rectangle in the processor's tensors, measured there."""
    box = tuple(round(share * side) for share, side in zip(SHARES, size * 2, strict=True))
    encoder = Encoder(processor_of(family), 4096)
    record = {"objects": [{"bbox": box, "label": "square"}]}
    sample = parse_sample(raw(record, picture=drawn(size, box)), **OPTIONS)
    encoded = encoder.encode(sample)
    answer = encoder.processor.tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED])
    convention, frame = encoder.placing.convention, encoder.placing.frames([size])[0]
    numbers = next(iter(convention._places(answer)))[0]
    if convention.y_first:
        numbers = [numbers[place] for place in (1, 0, 3, 2)]
    shares, pixel = red_shares(encoder, encoded, box, size)
    whole = (frame.shown or (convention.scale, convention.scale)) * 2
    step = 10.0**-convention.decimals
    for number, share, scale in zip(numbers, shares, whole, strict=True):
        assert abs(number / scale - share) <= 0.5 * step / scale + pixel + 1e-6
    back = encoder.placing.read(answer, [size])
    assert [(one.kind, one.box) for one in back] == [("bbox", pytest.approx(box, abs=0.51 * step * max(size) / min(whole)))]


def red_shares(encoder, encoded, box, size):
    """Edges of the red rectangle as shares of the picture that is seen, and a pixel of it as a share; where it is cut into tiles, shares
    of the whole, as their makers have it."""
    seen = pictures_as_seen(encoded, encoder.processor)
    if not shows_pictures_whole(encoded, seen, 1):
        return [value / side for value, side in zip(box, size * 2, strict=True)], 0.0
    red = Image.eval(seen[0].getchannel("G"), lambda value: 255 if value < 128 else 0).getbbox()
    return [value / side for value, side in zip(red, seen[0].size * 2, strict=True)], 1.01 / min(seen[0].size)


def test_absolute_is_the_size_that_the_processor_gives(processor_of):
    processor = processor_of("qwen2_5_vl").image_processor
    frames = Frames(processor, absolute=True)
    assert frames._by_rule
    for size in ((100, 60), (61, 97), (1000, 300), (28, 28), (29, 31)):
        rows, columns = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0].tolist()[1:]
        assert frames.of(size).shown == (columns * processor.patch_size, rows * processor.patch_size) == _by_trying(processor, size)
        assert _by_rule(processor, size) == frames.of(size).shown
    with pytest.raises(ConfigError, match=r"data\.boxes: absolute"):
        Frames(processor_of("llava").image_processor, absolute=True)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (77, 31)])
def test_where_the_middle_is_cut_out(processor_of, size):
    """CLIP's processor in its released form: LLaVA's numbers are shares of what is shown (haotian-liu/LLaVA#606)."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    left, top, width, height, _ = Frames(processor).of(size)
    box = (round(left + 0.25 * width), round(top + 0.5 * height), round(left + 0.75 * width), round(top + 0.8 * height))
    pixels = processor(images=[drawn(size, box)], return_tensors="pt")["pixel_values"][0, 1]
    red = (pixels < 0).nonzero()
    seen = (red[:, 1].min(), red[:, 0].min(), red[:, 1].max() + 1, red[:, 0].max() + 1)
    frame = Frame(left, top, width, height)
    text = CONVENTIONS["unit"].place(read({"bbox": box}, size=size)[0], "bbox", frame)
    assert json.loads(text) == pytest.approx([int(edge) / 336 for edge in seen], abs=0.011)
    gone = Marked("bbox", ((0, 0), (2, 2)), "corner")
    with pytest.raises(BadSample, match=r"corner at \[0, 0, 2, 2\] lies outside of what the processor shows"):
        CONVENTIONS["unit"].place(gone, "bbox", frame)


@pytest.mark.parametrize("size", [(100, 60), (61, 97)])
def test_where_it_is_filled_up_to_a_square(processor_of, size):
    """LLaVA's processor with do_pad, as its makers trained it; OneVision's where there are several pictures."""
    from transformers import LlavaImageProcessor

    processor = LlavaImageProcessor(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    onevision = processor_of("llava_onevision").image_processor
    box = tuple(round(share * side) for share, side in zip(SHARES, size * 2, strict=True))
    padded = processor(images=[drawn(size, box)], return_tensors="pt")["pixel_values"][0, 1]
    tiles = onevision(images=[[drawn(size, box), drawn((9, 9), (1, 1, 3, 3))]], return_tensors="pt")["pixel_values"][0, 0, 1]
    for frame, pixels in ((Frames(processor).of(size), padded), (Frames(onevision).of(size, True), tiles)):
        red = (pixels < pixels.min() + 0.2).nonzero()
        seen = [int(edge) / pixels.shape[0] for edge in (red[:, 1].min(), red[:, 0].min(), red[:, 1].max() + 1, red[:, 0].max() + 1)]
        text = CONVENTIONS["unit"].place(read({"bbox": box}, size=size)[0], "bbox", frame)
        assert json.loads(text) == pytest.approx(seen, abs=0.006 + 1.01 / pixels.shape[0])


WRITTEN = {
    "absolute": '[{"bbox_2d": [20, 40, 60, 80], "label": "cat"}, {"point_2d": [100, 10], "label": "a \\"b\\""}]',
    "thousand": '[{"bbox_2d": [100, 333, 300, 667], "label": "cat"}, {"point_2d": [500, 83], "label": "a \\"b\\""}]',
    "gemma": '[{"box_2d": [333, 100, 667, 300], "label": "cat"}, {"point": [83, 500], "label": "a \\"b\\""}]',
    "qwen2": "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,333),(300,667)<|box_end|>"
    '<|object_ref_start|>a "b"<|object_ref_end|><|box_start|>(500,83)<|box_end|>',
    "internvl": '<ref>cat</ref><box>[[100, 333, 300, 667]]</box>\n<ref>a "b"</ref><point>[[500, 83]]</point>',
    "unit": 'cat [0.10, 0.33, 0.30, 0.67]; a "b" [0.50, 0.08]',
    "loc": '<loc0341><loc0102><loc0683><loc0307> cat ; <loc0085><loc0512> a "b"',
}


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_lists_as_each_convention_writes_them(name):
    objects = read(CAT, {"point": [50, 5], "label": 'a "b"'})
    frame = Frame(0, 0, 100, 60, (200, 120) if name == "absolute" else None)
    text = CONVENTIONS[name].list_of(objects, [frame, frame])
    assert text == WRITTEN[name]
    back = CONVENTIONS[name].read(f"Here they are:\n```json\n{text}\n```" if name in ("absolute", "gemma") else text, [frame])
    assert [(one.kind, one.label) for one in back] == [("bbox", "cat"), ("point", 'a "b"')]
    for one, other in zip(back, objects, strict=True):
        assert one.box == pytest.approx(other.box, abs=0.51 if name == "unit" else 0.26)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("unit", "It is at 0.1, 0.5, 0.2, 1.0.", [(10, 30, 20, 60)]), ("unit", "nothing", []), ("unit", "the 3 cats", []),
        ("internvl", "<box>[[100, 500, 200, 1000], [0, 0, 500, 500]]</box>", [(10, 30, 20, 60), (0, 0, 50, 30)]),
        ("qwen2", "(200,1000),(100,500)", [(10, 30, 20, 60)]), ("thousand", "[100, 500, 200]", []),
        ("thousand", '{"bbox_2d": [100, 500, 200, 1000]', [(10, 30, 20, 60)]), ("thousand", "[[0,0],[500,0],[500,500]]", [(0, 0, 50, 30)]),
        ("loc", "<loc0512><loc0102><loc1023><loc0205>cat", [(9.96, 30, 20.02, 59.94)]), ("loc", "<loc0512>", []),
        ("thousand", '[{"bbox_2d": [1, 2, 3, 4], "label": "\\x"}]', [(0.1, 0.12, 0.3, 0.24)]),
    ],
)  # fmt: skip
def test_answers_that_are_odd(name, answer, expected):
    found = CONVENTIONS[name].read(answer, [Frame(0, 0, 100, 60)])
    assert [one.box for one in found] == [pytest.approx(box, abs=0.01) for box in expected]


def test_labels_are_found_without_special_tokens():
    """`generate` gives answers without them."""
    for name in ("qwen2", "internvl"):
        text = WRITTEN[name]
        for token in CONVENTIONS[name].tokens:
            text = text.replace(token, "")
        back = CONVENTIONS[name].read(text, [Frame(0, 0, 100, 60)])
        assert [(one.kind, one.label) for one in back] == [("bbox", "cat"), ("point", 'a "b"')]


def chat(question, answer) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def written(processor, record) -> list[str]:
    sample = parse_sample(raw(record), **OPTIONS)
    return said(Sample("k", "s", Placing(processor, "thousand").written(sample.messages, sample.objects, sample.sizes), []))


def test_placeholders_are_filled_in_order(processor_of):
    llava = processor_of("llava")
    record = {"objects": [CAT, DOG], "messages": chat("Where are <ref-object> and <ref-object>?", "At <bbox>, and <point>.")}
    assert written(llava, record) == ["Where are cat and dog?", "At [100, 333, 300, 667], and [700, 333]."]
    record = {"objects": [CAT, CAT, DOG], "messages": chat("Find <ref-object> and <ref-object>.", "<objects>")}
    assert written(llava, record)[0] == "Find cat and dog." and written(llava, record)[1].count("bbox_2d") == 3
    record = {"objects": [{"polygon": [[0, 0], [50, 0], [50, 30]]}], "messages": chat("Outline it.", "<polygon>")}
    assert written(llava, record)[1] == "[[0, 0], [500, 0], [500, 500]]"
    assert written(llava, {**record, "messages": chat("Box?", "<bbox>")})[1] == "[0, 0, 500, 500]"
    kept = {"objects": [CAT], "messages": chat("What is it?", "A cat.")}
    assert written(llava, kept) == ["What is it?", "A cat."]


@pytest.mark.parametrize(
    ("objects", "texts", "words"),
    [
        ([CAT], ("Where?", "<bbox> <bbox>"), "the text has 2 of <bbox>, <point>, <polygon>; 'objects' has 1"),
        ([CAT, DOG, DOG], ("<ref-object>?", "<objects>"), "1 of <ref-object>; 'objects' has 3, with 2 labels"),
        ([{"bbox": [0, 0, 5, 5]}], ("Where is <ref-object>?", "<bbox>"), "an object has no label"),
    ],
)
def test_placeholders_that_do_not_agree_are_refused(objects, texts, words):
    for read_it in (parse_sample, outline):
        with pytest.raises(BadSample, match=words):
            read_it(raw({"objects": objects, "messages": chat(*texts)}), **OPTIONS)


def test_a_placeholder_for_another_kind_is_refused(processor_of):
    for kind, place in (("<bbox>", {"point": [1, 2]}), ("<polygon>", CAT)):
        with pytest.raises(BadSample, match=f"{kind} stands for a"):
            written(processor_of("llava"), {"objects": [place], "messages": chat("Where?", kind)})


def test_objects_alone_become_a_question():
    def asked(*objects, draw=None):
        return said(parse_sample(raw({"objects": list(objects)}), draw=draw, **OPTIONS))

    assert asked(CAT) == ["Where is <ref-object>?", "<objects>"]
    assert (
        asked({"point": [1, 2], "label": "cat"})[0] == "Point to <ref-object>."
        and asked({"bbox": [0, 0, 5, 5]})[0] == "Where is the object?"
    )
    assert asked(CAT, DOG, DOG)[0] == "Detect all of these: cat, dog."
    assert len({asked(CAT, draw=str(epoch))[0] for epoch in range(20)}) == 3 and asked(CAT, draw="1") == asked(CAT, draw="1")
    captioned = parse_sample(raw({"objects": [CAT]}) | {"txt": b"a cat"}, **OPTIONS)
    assert said(captioned)[1] == "a cat" and len(captioned.objects) == 1
    with pytest.raises(BadSample, match="the sample has 0 pictures"):
        parse_sample({key: value for key, value in raw({"objects": [CAT]}).items() if key != "png"}, **OPTIONS)


def test_what_the_last_answer_is_to_give():
    objects = read(CAT, DOG)
    parts = lambda *texts: [  # noqa: E731
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(("user", "assistant") * 2, texts, strict=False)
    ]
    assert objects_answered(parts("?", "a cat"), objects) == objects == objects_answered(parts("?", "<objects>"), objects)
    assert objects_answered(parts("?", "<bbox>", "?", "<bbox>"), objects) == objects[1:]
    assert objects_answered(parts("What is in <bbox> and <bbox>?", "both"), objects) == []


def test_what_is_not_read_is_noted():
    assert ("key", "objects (no list of {bbox | point | polygon, label})") in parse_sample(
        raw({"objects": ["cat"], "messages": chat("?", "a")}), **OPTIONS
    ).notes
    with pytest.raises(BadSample, match="the text has <bbox>, and 'objects' is no list"):
        parse_sample(raw({"objects": {"cats": 2}, "messages": chat("Where?", "<bbox>")}), **OPTIONS)
    columns = parse_sample(raw({"objects": {"bbox": [[1, 2, 3, 4]], "category": [1]}, "messages": chat("Where?", "<bbox>")}), **OPTIONS)
    assert columns.objects[0].box == (1, 2, 4, 6) and ("number", "label 1") in columns.notes
    none = parse_sample(raw({"objects": [], "messages": chat("Any cats?", "None.")}), **OPTIONS)
    assert not none.notes and not none.objects
    assert ("placeholder", "<bbox>") in parse_sample(raw({"messages": chat("Where?", "<bbox>")}), **OPTIONS).notes
    assert parse_sample(raw({"objects": [CAT], "objects_size": [100, 60]}), **OPTIONS).notes == set()


def test_measured_lengths_are_encoded_lengths(any_checkpoint):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(any_checkpoint), 4096)
    ruler = Ruler(encoder)
    for size in ((100, 60), (61, 97), (90, 90)):
        record = {"objects": [{"bbox": [10, 20, 30, 40], "label": "cat"}, {"point": [50, 55], "label": "<|im_end|>"}]}
        found = outline(raw(record, size), **OPTIONS)
        messages = encoder.placing.written(found.messages, found.objects, found.sizes)
        encoded = encoder.encode(parse_sample(raw(record, size), as_pixels=encoder.takes_pixels, **OPTIONS))
        assert ruler.measure(messages, found.sizes).tokens == encoded.length
        assert not any(kind == "kept" for kind, _ in encoded.notes)


def test_conventions_of_families(processor_of):
    for family, row in FAMILIES.items():
        assert convention_of(processor_of(family)).name == row.boxes in CONVENTIONS
    assert convention_of(processor_of("llava"), "gemma").name == "gemma"
    processor_of("llava").tokenizer.add_tokens(["<loc1023>"])
    assert convention_of(processor_of("llava")).name == "loc"


def test_several_pictures_of_several_sizes(processor_of):
    encoder = Encoder(processor_of("qwen2_5_vl"), 4096)
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "PNG")
    record = {"objects": [{**CAT, "image": 1}, DOG]}
    one = raw(record)
    sample = parse_sample({"0.png": one.pop("png"), "1.png": buffer.getvalue(), **one}, **OPTIONS)
    answer = said(Sample("k", "s", encoder.placing.written(sample.messages, sample.objects, sample.sizes), []))[1]
    back = encoder.placing.read(answer, sample.sizes, [1, 0])
    assert [one.image for one in back] == [1, 0]
    for found, truth in zip(back, sample.objects, strict=True):
        assert found.box == pytest.approx(truth.box, abs=1.5) and found.label == truth.label


def test_a_packed_stream_of_boxes(settings, tmp_path):
    """Lengths measured for packing are those of what is encoded, from shards, in several threads."""
    from tests.conftest import write_config
    from vlm_dist import load_config
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.inputs.opened import inputs_apart

    made = synthesise(tmp_path / "boxes", train=24, heldout=1, tasks=("boxes",), size=48)
    settings["data"] |= {"train": str(made["boxes-train"][0]), "heldout": [], "packing": True, "max_seq_length": 256}
    with inputs_apart(load_config(write_config(settings, tmp_path))) as inputs:
        stream = inputs.stream()
        rows = [next(iter(stream.preview())) for _ in range(2)]
        slots = [pair for row in rows for pair in row]
    assert slots and all(encoded is not None and slot.length.tokens == encoded.length for slot, encoded in slots)
