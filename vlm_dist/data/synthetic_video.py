"""Videos whose right answers are known by construction, and that no single frame can give: which way a shape moves, which of two comes
first, how often one flashes, in which second it appears.

The first frame says nothing: what moves begins anywhere on its way and comes in again where it has left, and of the other kinds nothing is
seen yet. Later ones say nothing alone: paths are the same to and fro, and of two shapes one is seen at a time.
"""

from __future__ import annotations

import io
import random
from fractions import Fraction
from typing import Any, NamedTuple

from vlm_dist.data.synthetic_shapes import COLOURS, SCALE, SHAPES, background, draw_shape, split_of

FPS, SECONDS = 4, 4
FRAMES = FPS * SECONDS
EDGE = -0.16  # where a shape is just out of sight
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
TIMES = ("once", "twice", "three times")
ORDINALS = ("first", "second", "third", "fourth")
KINDS = ("direction", "order", "flashes", "second")


class Scene(NamedTuple):
    """What happens."""

    kind: str
    shapes: tuple[tuple[str, str], ...]
    """(colour, shape) of each, in the order in which a question names them."""
    answer: str


class Seen(NamedTuple):
    """A shape in one frame; place and radius as shares of the side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float = 0.16


def random_scene(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Scene:
    """Every answer of a kind is equally likely."""
    kind = rng.choice(kinds)
    if kind == "order":
        named = tuple((colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), 2))
        return Scene(kind, named, rng.choice(named)[0])
    answers = {"direction": tuple(DIRECTIONS), "flashes": TIMES, "second": ORDINALS}[kind]
    return Scene(kind, ((rng.choice(list(COLOURS)), rng.choice(SHAPES)),), rng.choice(answers))


def question(scene: Scene) -> str:
    names = [f"the {colour} {shape}" for colour, shape in scene.shapes]
    return {
        "direction": f"Which way does {names[0]} move?",
        "order": f"Which colour is seen first, {' or '.join(colour for colour, _ in scene.shapes)}?",
        "flashes": f"How often does {names[0]} appear?",
        "second": f"In which second does {names[0]} appear?",
    }[scene.kind]


def frames_of(scene: Scene, rng: random.Random) -> list[Seen | None]:
    """What is seen in each of `FRAMES` frames."""
    colour, shape = scene.shapes[0]
    x, y = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
    if scene.kind == "direction":
        across, down = DIRECTIONS[scene.answer]
        phase = rng.random()
        way = [EDGE + (1 - 2 * EDGE) * ((phase + (across + down) * number / FRAMES) % 1) for number in range(FRAMES)]
        return [Seen(colour, shape, place if across else x, place if down else y) for place in way]
    if scene.kind == "order":
        first, second = sorted(scene.shapes, key=lambda one: one[0] != scene.answer)
        before, between = rng.randrange(1, 6), rng.randrange(1, 4)
        seen = [None] * before + [Seen(*first, x, y)] * 3 + [None] * between + [Seen(*second, x, y)] * 3
        return [*seen, *[None] * (FRAMES - len(seen))]
    shown = Seen(colour, shape, x, y)
    if scene.kind == "second":
        begins = ORDINALS.index(scene.answer) * FPS + 1
        return [shown if number >= begins else None for number in range(FRAMES)]
    times = TIMES.index(scene.answer) + 1
    starts = [round((number + 0.5) * FRAMES / times) - 1 for number in range(times)]
    return [shown if any(start <= number < start + 2 for start in starts) else None for number in range(FRAMES)]


def video_sample(rng: random.Random, split: str, size: int, kinds: tuple[str, ...] = KINDS) -> tuple[bytes, tuple[str, str, str]]:
    """An mp4 of a scene of this split, and (kind, question, answer)."""
    while True:
        scene = random_scene(rng, kinds)
        if split_of(scene[:2]) == split:  # not by the answer: else training would tell which answers the others cannot have
            break
    ground = background(rng)
    return encode([draw(seen, size, ground) for seen in frames_of(scene, rng)], FPS), (scene.kind, question(scene), scene.answer)


def draw(seen: Seen | None, size: int, ground: tuple[int, int, int]) -> Any:
    """A frame as a picture of size x size pixels."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size * SCALE, size * SCALE), ground)
    if seen is not None:
        side = size * SCALE
        draw_shape(ImageDraw.Draw(picture), seen.shape, seen.x * side, seen.y * side, seen.radius * side, COLOURS[seen.colour])
    return picture.reduce(SCALE)


def encode(pictures: list[Any], fps: int) -> bytes:
    """Pictures of one even size -> an mp4 (H.264), the same bytes each time."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # x264's own assembly reads memory that nobody wrote to where frames are as small as here, and chooses other motion by it
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "x264-params": "asm=0"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
