"""Emoji -> questions that only the picture answers, as records for `vlm-dist data pack`.

    python scripts/real_pictures/questions.py FOLDER

reads FOLDER/packages/emoji (npm emoji-datasource-twitter) and writes FOLDER/pictures and FOLDER/train.jsonl, heldout.jsonl, grey.jsonl.

Every question names four options and is put to four pictures, in the same words, and each option is right of one of them. Whoever sees no
picture, or a grey one, can so be right once in four, whatever they know of names. No held-out picture, nor one that looks nearly like it
(see `distance`), nor the same for another sex, is trained on. grey.jsonl is heldout.jsonl with a grey picture in every place.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GROUPS = {
    "Animals & Nature": "animals and plants", "Food & Drink": "food and drink", "Flags": "flags", "Smileys & Emotion": "smileys",
    "People & Body": "people", "Travel & Places": "travel and places", "Objects": "things", "Activities": "sports and games",
    "Symbols": "signs",
}  # fmt: skip
KINDS = {
    "name": "Which name fits the picture: {}?",
    "close name": "Which name fits the picture: {}?",
    "group": "What does the picture show: {}?",
    "colour": "Which colour is most of it: {}?",
}
HUES = ((0.04, "red"), (0.105, "orange"), (0.19, "yellow"), (0.45, "green"), (0.7, "blue"), (0.85, "purple"), (0.95, "pink"))
"""Where each colour ends on the circle of hues, 0 to 1."""
NEAR = 14.0  # of 255: pictures less apart than that count as the same
SEXES = {"2640", "2642", "1F468", "1F469", "1F9D1"}  # code points: female, male, man, woman, adult
GREY = "grey.png"


@dataclass(frozen=True)
class Emoji:
    file: str
    name: str
    """Empty where Unicode's name is no name that a person would say."""
    group: str
    colour: str
    """Of at least half of what is drawn; empty where no colour is."""
    small: np.ndarray
    """[16, 16, 3], 0 to 255, on white."""
    family: str
    """The same for man, woman and person of one occupation or doing."""


def read_emoji(package: Path, pictures: Path) -> list[Emoji]:
    """Every emoji of the package, its picture laid on white and written to `pictures`."""
    pictures.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in json.loads((package / "emoji.json").read_text()):
        if entry["category"] not in GROUPS or not entry["has_img_twitter"]:
            continue
        drawn = Image.open(package / "img" / "twitter" / "64" / entry["image"]).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        white.alpha_composite(drawn)
        shown = white.convert("RGB")
        shown.save(pictures / entry["image"])
        family = " ".join(code for code in entry["unified"].split("-") if code not in SEXES | {"200D", "FE0F"}) or entry["unified"]
        small = np.asarray(shown.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        found.append(Emoji(entry["image"], spoken(entry["name"]), GROUPS[entry["category"]], colour_of(drawn), small, family))
    Image.new("RGB", (64, 64), (128, 128, 128)).save(pictures / GREY)
    return found


def spoken(name: str) -> str:
    """A name of Unicode as one says it: "WOMANS SANDAL" -> "womans sandal"; empty where it is long, or of signs and numbers."""
    said = re.sub(r" (face|symbol|sign)$", "", name.lower().replace(":", "")) if "," not in name else ""
    odd = re.search(r"[^a-z' -]|squared|cjk|katakana|ideograph|latin|negative|clock face|arrow|keycap|medium", said)
    return "" if odd or len(said.split()) > 4 else said


def colour_of(drawn: Image.Image) -> str:
    """The colour that at least half of the opaque pixels have, or ''.

    Args:
        drawn: RGBA.
    """
    pixels = np.asarray(drawn).reshape(-1, 4)
    counts = Counter(_colour(*map(int, pixel[:3])) for pixel in pixels[pixels[:, 3] > 200][::3])
    (colour, count), total = counts.most_common(1)[0], sum(counts.values())
    return colour if 2 * count >= total and colour != "white" else ""


def _colour(red: int, green: int, blue: int) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.85 else "grey"
    if value < 0.7 and hue < 0.12:
        return "brown"
    return next((colour for end, colour in HUES if hue < end), "red")


def distance(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far a picture [16, 16, 3] is from others [N, 16, 16, 3]: the mean difference of a number of a pixel, of 255."""
    return np.abs(others - one).mean((1, 2, 3))


def split(emoji: list[Emoji], heldout: int, rng: random.Random) -> tuple[list[Emoji], list[Emoji], int]:
    """(train, held-out, number left out): so many held out at random; what looks like one of these, or is of its family, is left out."""
    chosen = set(rng.sample(range(len(emoji)), heldout))
    kept, rest = [emoji[i] for i in sorted(chosen)], [one for i, one in enumerate(emoji) if i not in chosen]
    seen = np.stack([one.small for one in kept])
    families = {one.family for one in kept}
    train = [one for one in rest if one.family not in families and distance(one.small, seen).min() >= NEAR]
    return train, kept, len(rest) - len(train)


def quads(emoji: list[Emoji], kind: str, rng: random.Random) -> list[list[Emoji]]:
    """Fours of pictures that answer one question differently; each picture is in one of them at most."""
    answer = "colour" if kind == "colour" else "group" if kind == "group" else "name"
    usable = [one for one in emoji if getattr(one, answer)]
    if kind == "close name":
        return [four for group in GROUPS.values() for four in _fours([one for one in usable if one.group == group], "name", rng)]
    return _fours(usable, "group" if kind == "name" else answer, rng)


def _fours(emoji: list[Emoji], apart: str, rng: random.Random) -> list[list[Emoji]]:
    """Fours with four different values of `apart`, drawn in proportion to how many are left of each."""
    left: dict[str, list[Emoji]] = {}
    for one in rng.sample(emoji, len(emoji)):
        left.setdefault(getattr(one, apart), []).append(one)
    fours = []
    while len(left) >= 4:
        names = sorted(left, key=lambda name: rng.random() ** (1 / len(left[name])))[-4:]
        fours.append([left[name].pop() for name in names])
        left = {name: rest for name, rest in left.items() if rest}
    return [four for four in fours if len({one.name for one in four}) == 4 or apart != "name"]


def questions(emoji: list[Emoji], kinds: Iterable[str], rng: random.Random, limit: int | None = None) -> list[dict[str, Any]]:
    """Each picture is asked about once a kind, at most; the four pictures of a question one after another, questions in random order.

    Args:
        limit: questions of a kind, at most; one question to four pictures counts four.
    """
    fours = [(kind, four) for kind in kinds for four in quads(emoji, kind, rng)[: limit // 4 if limit else None]]
    return [record for kind, four in rng.sample(fours, len(fours)) for record in ask(kind, four, rng)]


def tell(one: Emoji) -> dict[str, Any]:
    """What is known of a picture, to be said without options; for the training only."""
    return _record(one.file, "tell", "Describe the picture.", ": ".join(filter(None, (f"{one.colour} {one.group}".strip(), one.name))))


def ask(kind: str, four: list[Emoji], rng: random.Random) -> list[dict[str, Any]]:
    """One question, put to four pictures."""
    answers = [getattr(one, kind.removeprefix("close ")) for one in four]
    options = rng.sample(answers, 4)
    question = KINDS[kind].format(", ".join(options[:3]) + " or " + options[3])
    return [_record(one.file, kind, question, answer) for one, answer in zip(four, answers, strict=True)]


def _record(file: str, kind: str, question: str, answer: str) -> dict[str, Any]:
    turns = [("system", "Answer."), ("user", f"<image>{question}"), ("assistant", answer)]
    return {"image": file, "kind": kind, "messages": [{"role": role, "content": text} for role, text in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions about emoji")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heldout", type=int, default=300, metavar="N", help="pictures held out")
    parser.add_argument("--asked", type=int, default=100, metavar="N", help="held-out questions of a kind, at most")
    parser.add_argument("--trained", type=int, metavar="N", help="training questions of a kind, at most (default: all)")
    arguments = parser.parse_args()
    rng = random.Random(0)
    emoji = read_emoji(arguments.folder / "packages" / "emoji", arguments.folder / "pictures")
    train, heldout, left_out = split(emoji, arguments.heldout, rng)
    asked = questions(heldout, KINDS, rng, arguments.asked)
    trained = questions(train, ("name", "group", "colour"), rng, arguments.trained) + [tell(one) for one in train[: arguments.trained]]
    sets = {"train": rng.sample(trained, len(trained)), "heldout": asked, "grey": [record | {"image": GREY} for record in asked]}
    for name, made in sets.items():
        (arguments.folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    why = "nearly like one held out, or the same for another sex"
    print(f"{len(emoji)} emoji: {len(train)} to train on, {len(heldout)} held out, {left_out} left out: {why}")
    for name, made in sets.items():
        print(f"{name}: {len(made)} questions, {dict(Counter(record['kind'] for record in made))}")


if __name__ == "__main__":
    main()
