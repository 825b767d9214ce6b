"""Questions about pictures and videos, answered by a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.pictures import decode_picture, is_picture
from vlm_dist.data.video import Clip, Shown, open_clip
from vlm_dist.data.video_decode import container_of
from vlm_dist.errors import BadSample, ConfigError, DataError
from vlm_dist.models.generate import generate
from vlm_dist.serving.trained import Trained, open_trained
from vlm_dist.waiting import waiting

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
WEB = ("http://", "https://")


def answers(
    source: str, asked: Sequence[Sequence[str | Path]], prompt: str, *, max_new_tokens: int = 128, base: bool = False,
    base_model: str | None = None, system: str | None = None, reasoning: bool = False, sampling: dict[str, Any] | None = None,
    go_on: bool = False, videos: Sequence[str | Path] = (),
) -> Iterator[str | DataError]:  # fmt: skip
    """The model's answer about each group of pictures, as it comes.

    Args:
        source: a run directory, an adapter folder, a checkpoint folder or a hub id.
        asked: files or http(s) addresses.
        base: leave the adapter off.
        base_model: where the adapter's base is now, if not where its files say.
        system: the system prompt; None: that of the training, where all samples had the same; "": none.
        reasoning: let the model think first, where its chat template begins a thought.
        sampling: transformers' generation settings; None: greedily.
        videos: files or http(s) addresses, shown behind the pictures of each group.
        go_on: where a picture cannot be read, give the error in place of an answer, and go on with the others.

    Raises:
        DataError: a picture or video cannot be read, or the model takes no videos.
        ModelError: there is no such model, or its chat template takes no system prompt.
    """
    clips = [open_video(path) for path in videos]
    first = None if go_on else [open_picture(path) for path in asked[0]]  # what cannot be read is told before the model is loaded
    trained = open_trained(source, base=base, base_model=base_model, system=system, reasoning=reasoning)
    shown = [trained.watch(clip) for clip in clips]
    for number, images in enumerate(asked):
        try:
            pictures = first if first is not None and number == 0 else [open_picture(path) for path in images]
        except DataError as error:
            if not go_on:
                raise
            yield error
            continue
        with waiting("answering"):
            yield _answer(trained, pictures, shown, prompt, max_new_tokens, sampling or {})


def answer(source: str, images: Sequence[str | Path], prompt: str, **options: Any) -> str:
    """One answer about some pictures; see `answers`."""
    return str(next(answers(source, [images], prompt, **options)))


def _answer(
    trained: Trained, pictures: list[Image], videos: list[Shown], prompt: str, max_new_tokens: int, sampling: dict[str, Any]
) -> str:  # fmt: skip
    import torch

    content = [*[{"type": "image"}] * len(pictures), *[{"type": "video"}] * len(videos), {"type": "text", "text": prompt}]
    encoded = trained.encode([{"role": "user", "content": content}], pictures, videos)
    inputs = {**encoded.inputs, "attention_mask": torch.ones_like(encoded.inputs["input_ids"])}
    settings = {key: value for key, value in sampling.items() if key != "seed"}
    torch.manual_seed(sampling.get("seed", 0))
    return generate(trained.model, trained.processor, inputs, max_new_tokens, **settings)[0]


def sampling(temperature: float | None, top_p: float | None, seed: int = 0) -> dict[str, Any] | None:
    """Settings for `answers`; None: the likeliest word always.

    Raises:
        ConfigError: a temperature that is not above 0, a probability that is not between 0 and 1, or a seed that torch cannot take.
    """
    if temperature is not None and not 0 < temperature <= 100:
        raise ConfigError(f"--temperature: found {temperature:g}; expected a number above 0 (leave it away for the likeliest words)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p: found {top_p:g}; expected a number above 0, at most 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed: found {seed}; expected a whole number from 0 to 2^63 - 1")
    if temperature is None and top_p is None:
        return None
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "seed": seed}


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; what they are tells their content.

    Raises:
        DataError: there is none.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.is_file() and is_picture(_head(path)))
    except OSError as error:
        raise DataError(f"--folder: '{folder}' cannot be read: {error.strerror}; give a folder of pictures") from None
    if not found:
        raise DataError(f"--folder: '{folder}' holds no picture; give a folder of JPEG, PNG or WebP files")
    return found


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def open_picture(path: str | Path) -> Image:
    """A picture file that somebody named, or what lies at an http(s) address: fetched bounded in size and time, not from inside a network.

    Raises:
        DataError: it cannot be read.
    """
    with _told("--image", path, "a JPEG, PNG or WebP file"):
        return decode_picture(_bytes_of(path), str(path), MAX_PIXELS)


def open_video(path: str | Path) -> Clip:
    """A video likewise, opened by its header.

    Raises:
        DataError: it cannot be read.
    """
    with _told("--video", path, "an mp4, mov, webm, mkv, avi or gif file"):
        return open_clip(_bytes_of(path), str(path), MAX_PIXELS)


def is_video(path: Path) -> bool:
    """By its first bytes; not where it cannot be read."""
    try:
        return container_of(_head(path)) is not None
    except (BadSample, OSError):  # a gif that goes on behind its head
        return path.suffix.lower() == ".gif"


def _bytes_of(path: str | Path) -> bytes:
    return Fetcher().read(str(path)) if str(path).startswith(WEB) else Path(path).read_bytes()


@contextmanager
def _told(option: str, path: str | Path, expected: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{option}: '{path}' cannot be read: {error.strerror}; give {expected}") from None
    except BadSample as problem:
        raise DataError(f"{option}: {problem}{'' if '; expected ' in str(problem) else f'; give {expected}'}") from None
