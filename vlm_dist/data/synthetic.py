"""Pictures whose right answers are known by construction: coloured shapes in the four corners, and short texts to read.

Three tasks share the scenes' pictures: `caption` (say everything), `qa` (what colour, how many, where) and `boxes` (where in pixels); a
fourth, `reading`, has a word or a number; a fifth, `video`, has shapes that move (synthetic_video.py). Which split a scene belongs to is a
hash of the scene itself, so that train and held-out shards never share one, whatever the seed and the size. A sample is a pure function of
(seed, split, task, number).
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.data.shards import write_shards
from vlm_dist.data.synthetic_shapes import COLOURS, SCALE, SHAPES, background, draw_shape, split_of
from vlm_dist.data.synthetic_video import video_sample
from vlm_dist.errors import DataError
from vlm_dist.run_dir import write_text

PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
COUNTS = ("zero", "one", "two", "three")
WORDS = ("cat", "dog", "sun", "map", "red", "box", "key", "cup", "hat", "tea", "bus", "pen", "ice", "owl", "jam", "fig")
TASKS = ("caption", "qa", "reading")
"""Those that are made unless others are asked for."""
BOXES, VIDEO = "boxes", "video"
SPLITS = ("train", "heldout")
CAPTION_PROMPT = "Describe the picture."
READING_PROMPT = "What is written in the picture?"


@dataclass(frozen=True, order=True)
class Shape:
    """One coloured shape in one corner."""

    place: str
    colour: str
    shape: str


def random_scene(rng: random.Random) -> tuple[Shape, ...]:
    """One to three shapes, each in a corner of its own, in reading order (top left first)."""
    places = rng.sample(list(PLACES), rng.choice((1, 2, 2, 3)))
    places.sort(key=lambda place: (PLACES[place][1], PLACES[place][0]))
    return tuple(Shape(place, rng.choice(list(COLOURS)), rng.choice(SHAPES)) for place in places)


def caption(scene: tuple[Shape, ...]) -> str:
    """Everything there is to say: "two shapes: top left a red circle and bottom right a blue square"."""
    noun = "shape" if len(scene) == 1 else "shapes"
    return f"{COUNTS[len(scene)]} {noun}: " + " and ".join(f"{s.place} {_article(s.colour)} {s.colour} {s.shape}" for s in scene)


def questions(scene: tuple[Shape, ...]) -> list[tuple[str, str, str]]:
    """Every (kind, question, answer) whose answer the scene fixes without doubt."""
    asked = []
    for s in scene:
        if sum(other.shape == s.shape for other in scene) == 1:
            asked.append(("where", f"Where is the {s.shape}?", s.place))
        asked.append(("colour", f"What colour is the shape {s.place}?", s.colour))
        asked.append(("shape", f"What shape is {s.place}?", s.shape))
    asked.append(("count", "How many shapes are there?", COUNTS[len(scene)]))
    return asked


def draw_scene(scene: tuple[Shape, ...], size: int, rng: random.Random, objects: list[dict] | None = None):
    """The scene as a PIL picture of size x size pixels; sizes, positions and the background vary with rng.

    Args:
        objects: gets the shapes as a record's `objects`, their boxes as they are drawn, to a quarter of a pixel.
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size * SCALE, size * SCALE), background(rng))
    draw = ImageDraw.Draw(picture)
    cell = size * SCALE / 2
    for s in scene:
        column, row = PLACES[s.place]
        radius = cell * rng.uniform(0.38, 0.46)
        slack = cell / 2 - radius
        x = (column + 0.5) * cell + rng.uniform(-slack, slack) * 0.9
        y = (row + 0.5) * cell + rng.uniform(-slack, slack) * 0.9
        draw_shape(draw, s.shape, x, y, radius, COLOURS[s.colour])
        if objects is not None:
            alone = Image.new("L", picture.size)
            draw_shape(ImageDraw.Draw(alone), s.shape, x, y, radius, 255)
            objects.append({"bbox": [edge / SCALE for edge in alone.getbbox() or ()], "label": f"{s.colour} {s.shape}"})
    return picture.reduce(SCALE)


def draw_text(text: str, size: int, rng: random.Random):
    """A short text in dark letters on a light ground, size x size pixels."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (size, size), background(rng))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=round(size * rng.uniform(0.34, 0.42)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = rng.uniform(0, max(0, size - (right - left))) - left
    y = rng.uniform(0, max(0, size - (bottom - top))) - top
    draw.text((x, y), text, font=font, fill=tuple(rng.randrange(0, 90) for _ in range(3)))
    return picture


def samples(
    task: str, split: str, count: int, *, seed: int, size: int, image_format: str, questions_per_picture: int = 1
) -> Iterator[dict]:
    """`count` webdataset samples: `__key__`, the encoded picture, and `json` with `messages`, `task`, `kind`, and `objects` of task boxes.

    Args:
        questions_per_picture: most turns of a training sample of task qa; held-out samples have one.
    """
    turns = questions_per_picture if split == "train" else 1
    for number in range(count):
        rng = random.Random(f"{seed}/{split}/{task}/{number}")
        objects: list[dict] = []
        if task == VIDEO:
            yield _video_sample(rng, split, size, f"{task}-{split}-{number:07d}")
            continue
        if task == BOXES:
            picture, asked, objects = _boxes_sample(rng, split, size)
        else:
            picture, asked = _reading_sample(rng, split, size) if task == "reading" else _scene_sample(rng, task, split, size, turns)
        messages = []
        for turn, (_, prompt, answer) in enumerate(asked):
            image = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": prompt}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        kind = asked[-1][0]
        yield {
            "__key__": f"{task}-{split}-{number:07d}",
            image_format: _encode_picture(picture, image_format),
            "json": json.dumps({"messages": messages, "task": task, "kind": kind} | ({"objects": objects} if objects else {})).encode(),
        }


def synthesise(
    out: Path,
    *,
    train: int,
    heldout: int,
    tasks: tuple[str, ...] = TASKS,
    seed: int = 0,
    size: int = 64,
    image_format: str = "jpg",
    shard_size: int = 1000,
    questions_per_picture: int = 3,
) -> dict[str, list[Path]]:
    """Write `out/TASK-SPLIT-000000.tar`, ... and return the shards by "TASK-SPLIT".

    A second call with the same settings changes nothing: `out/synthetic.json`, written last, holds them.

    Raises:
        DataError: the folder holds shards made with other settings.
    """
    settings = {
        "version": 1, "train": train, "heldout": heldout, "tasks": list(tasks), "seed": seed, "size": size,
        "image_format": image_format, "shard_size": shard_size, "questions_per_picture": questions_per_picture,
    }  # fmt: skip
    record = out / "synthetic.json"
    if record.exists():
        found = json.loads(record.read_text())
        if found != settings:
            raise DataError(f"{out}: holds a synthetic data set made with {_difference(found, settings)}; use another folder or delete it")
    counts = {"train": train, "heldout": heldout}
    made = {}
    for task in tasks:
        for split in SPLITS:
            name = f"{task}-{split}"
            if not record.exists():
                drawing = {"seed": seed, "size": size, "image_format": image_format, "questions_per_picture": questions_per_picture}
                stream = samples(task, split, counts[split], **drawing)
                write_shards(out, name, stream, samples_per_shard=shard_size, total=counts[split])
            made[name] = sorted(path for path in out.glob(f"{name}-*.tar") if re.fullmatch(rf"{name}-\d+\.tar", path.name))
    write_text(record, json.dumps(settings, indent=1) + "\n")
    return made


def _video_sample(rng: random.Random, split: str, size: int, key: str) -> dict:
    """A whole sample: the clip, one question and its answer."""
    clip, (kind, asked, answer) = video_sample(rng, split, size + size % 2)
    content = [{"type": "video"}, {"type": "text", "text": asked}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"__key__": key, "mp4": clip, "json": json.dumps({"messages": messages, "task": VIDEO, "kind": kind}).encode()}


def _scene_of(rng: random.Random, split: str) -> tuple[Shape, ...]:
    while True:
        scene = random_scene(rng)
        if split_of(scene) == split:
            return scene


def _boxes_sample(rng: random.Random, split: str, size: int):
    """A picture, (kind, prompt, answer) with placeholders, and the objects that stand for them."""
    scene = _scene_of(rng, split)
    objects: list[dict] = []
    picture = draw_scene(scene, size, rng, objects)
    labels = [one["label"] for one in objects]
    single = [one for one in objects if labels.count(one["label"]) == 1]
    kind = rng.choice(("where", "point", "region", "detect") if single else ("detect",))
    if kind == "detect":
        return picture, [(kind, "Detect all shapes.", "<objects>")], objects
    one = rng.choice(single)
    if kind == "region":
        label = one["label"]
        return picture, [(kind, "What is in <bbox>?", f"{_article(label)} {label}")], [one]
    prompt, answer = {"where": ("Where is the <ref-object>?", "<objects>"), "point": ("Point to the <ref-object>.", "<point>")}[kind]
    return picture, [(kind, prompt, answer)], [one]


def _scene_sample(rng: random.Random, task: str, split: str, size: int, turns: int):
    """A picture, and (kind, prompt, answer) of each turn."""
    scene = _scene_of(rng, split)
    picture = draw_scene(scene, size, rng)
    if task == "caption":
        return picture, [("caption", CAPTION_PROMPT, caption(scene))]
    asked = questions(scene)
    chosen = []
    while asked and len(chosen) < turns:  # the kinds of question are equally likely, however many a scene allows
        kind = rng.choice(sorted({kind for kind, _, _ in asked}))
        chosen.append(rng.choice([question for question in asked if question[0] == kind]))
        asked.remove(chosen[-1])
    return picture, chosen


def _reading_sample(rng: random.Random, split: str, size: int):
    while True:
        kind = rng.choice(("word", "number"))
        text = rng.choice(WORDS) if kind == "word" else str(rng.randrange(10, 1000))
        if split_of(text) == split:
            break
    return draw_text(text, size, rng), [(kind, READING_PROMPT, text)]


def _encode_picture(picture, image_format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image_format], quality=92)
    return buffer.getvalue()


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _difference(found: dict, asked: dict) -> str:
    keys = [key for key in asked if found.get(key) != asked[key]]
    return ", ".join(f"{key}={found.get(key)} (asked: {asked[key]})" for key in keys)
