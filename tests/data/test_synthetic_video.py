"""Synthetic videos: what is seen in the decoded frames is what the answer says, and the first frame does not give it away."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
from collections import Counter

import pytest
import torch

from tests.data.test_synthetic import SETTINGS, digests
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.synthetic import synthesise
from vlm_dist.data.synthetic_shapes import COLOURS, split_of
from vlm_dist.data.synthetic_video import DIRECTIONS, FPS, FRAMES, KINDS, ORDINALS, TIMES, draw, encode, frames_of, question, random_scene


def test_answers_are_what_the_decoded_frames_show(tmp_path):
    made = synthesise(tmp_path, train=40, heldout=4, tasks=("video",), **{**SETTINGS, "size": 48})
    kinds = Counter()
    for raw in read_in_order(map(str, made["video-train"] + made["video-heldout"])):
        sample = parse_sample(raw, max_image_pixels=10**6, caption_prompt="?")
        assert sample.notes == set() and sample.videos[0].duration == FRAMES / FPS
        frames = sample.videos[0].shown(VideoConfig(fps=FPS)).frames.float()
        ground = frames.flatten(2).median(2).values.mean(0)
        inks = [frame - ground[:, None, None] for frame in frames]
        seen = [float(ink.abs().sum(0).max()) > 120 for ink in inks]
        kind, answer = sample.meta["kind"], sample.messages[1]["content"][0]["text"]
        kinds[kind] += 1
        if kind == "flashes":
            assert TIMES[sum(now and not before for before, now in zip([False, *seen], seen, strict=False)) - 1] == answer
        elif kind == "second":
            assert ORDINALS[seen.index(True) // FPS] == answer
        elif kind == "order":
            first = frames[seen.index(True)]
            place = (first - ground[:, None, None]).abs().sum(0).flatten().argmax()
            colour = first.flatten(1)[:, place]
            assert min(COLOURS, key=lambda name: sum(abs(float(a) - b) for a, b in zip(colour, COLOURS[name], strict=True))) == answer
        else:
            assert answer in DIRECTIONS
            weights = [ink.abs().sum(0).clamp(min=40) - 40 for ink in inks]
            axis = 1 if DIRECTIONS[answer][0] else 0
            places = [float((w.sum(1 - axis) * torch.arange(48)).sum() / w.sum()) for w in weights if w.sum() > 2000]
            steps = sorted(after - before for before, after in itertools.pairwise(places))
            assert steps[len(steps) // 2] * sum(DIRECTIONS[answer]) > 0.5
    assert set(kinds) == set(KINDS)


def test_what_lies_in_fresh_memory_changes_no_byte():
    """glibc fills what it hands out with a byte of ours (mallopt, M_PERTURB), as other processes' leavings would."""
    dice = random.Random(1)
    films = [[draw(seen, 32, (200, 210, 220)) for seen in frames_of(random_scene(dice), dice)] for _ in range(10)]
    libc, made = ctypes.CDLL(None), []
    for byte in (0, 77, 165):
        libc.mallopt(-6, byte)
        try:
            made.append([encode(film, FPS) for film in films])
        finally:
            libc.mallopt(-6, 0)
    assert made[0] == made[1] == made[2]


def test_the_first_frame_gives_nothing_away():
    dice = random.Random(0)
    for _ in range(300):
        scene = random_scene(dice)
        first = frames_of(scene, dice)[0]
        assert (first is not None) == (scene.kind == "direction") and len(frames_of(scene, dice)) == FRAMES
        assert scene.shapes[0][0] in question(scene)
    starts = {answer: [] for answer in DIRECTIONS}
    while min(map(len, starts.values())) < 100:
        scene = random_scene(dice, ("direction",))
        first = frames_of(scene, dice)[0]
        starts[scene.answer].append(first.x if DIRECTIONS[scene.answer][0] else first.y)
    means = [sum(places) / len(places) for places in starts.values()]
    assert means == pytest.approx([0.5] * 4, abs=0.12)


def test_the_same_bytes_and_splits_apart(tmp_path):
    for name in ("a", "b"):
        synthesise(tmp_path / name, train=6, heldout=2, tasks=("video",), **SETTINGS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    dice, shares, answers = random.Random(1), Counter(), {}
    for _ in range(4000):
        scene = random_scene(dice)
        shares[split := split_of(scene[:2])] += 1
        answers.setdefault((split, scene.kind), {}).setdefault(scene.shapes, set()).add(scene.answer)
    assert 200 < shares["heldout"] < 1200
    for (_, kind), found in answers.items():  # what training has of some shapes does not tell what the others cannot do
        assert kind == "order" or len({len(one) for one in found.values()}) == 1
    raws = list(read_in_order([str(path) for path in (tmp_path / "a").glob("*.tar")]))
    assert all(json.loads(raw["json"])["task"] == "video" for raw in raws)
