"""`vlm-dist data verify` finds what is planted and nothing else; `vlm-dist data order` is one order whatever the ranks and threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data.shards import read_in_order, write_shards


def plain(raw: dict) -> dict:
    return {name: value for name, value in raw.items() if name not in ("__url__", "__local_path__")}


@pytest.fixture
def sound(tmp_path, shards) -> dict[str, list[dict]]:
    """Samples whose pictures are all different: raw samples of a training and a held-out part."""
    kept, pictures = [], set()
    for raw in read_in_order([*shards["caption-train"], *shards["reading-train"]]):
        if raw["jpg"] not in pictures:
            pictures.add(raw["jpg"])
            kept.append(plain(raw))
    return {"train": kept[:30], "heldout": kept[30:40]}


def write(folder: Path, parts: dict[str, list[dict]]) -> list[str]:
    for name, samples in parts.items():
        write_shards(folder, name, samples, samples_per_shard=8)
    return [f"{folder}/train-*.tar", "--heldout", f"{folder}/heldout-*.tar"]


def verify(capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["data", "verify", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_nothing_is_found_where_nothing_is_wrong(tmp_path, sound, capsys, processes):
    code, found = verify(capsys, *write(tmp_path, sound), "--processes", processes)
    assert code == 0 and found["sound"] and (found["shards"], found["samples"], found["usable"]) == (6, 40, 40)
    assert not found["problems"] and not found["duplicates"] and not found["in_training"] and found["repeated_pictures"] == 0


def test_what_is_planted_is_found(tmp_path, sound, capsys):
    training = sound["train"]
    other_text = {**training[3], "__key__": "other-text", "json": json.dumps({"captions": ["something else"]}).encode()}
    training += [
        {**training[0], "__key__": "again"},
        other_text,
        {**training[1], "__key__": "no-picture", "jpg": b"not a picture"},
        {"__key__": "no-words", "jpg": training[2]["jpg"]},
    ]
    sound["heldout"].append({**training[5], "__key__": "leak"})
    code, found = verify(capsys, *write(tmp_path, sound))
    assert code == 3 and not found["sound"] and (found["samples"], found["usable"]) == (45, 43)
    assert {row["key"]: row["reason"].split(" ")[0] for row in found["problems"]} == {"no-picture": "jpg:", "no-words": "no"}
    assert [(row["key"], row["earlier_key"]) for row in found["duplicates"]] == [("again", training[0]["__key__"])]
    assert found["repeated_pictures"] == 1
    leak = found["in_training"][0]
    assert (leak["key"], leak["earlier_key"], leak["same_text"]) == ("leak", training[5]["__key__"], True)
    assert len(found["in_training"]) == 1 and Path(leak["shard"]).name.startswith("heldout-")
    assert main(["data", "verify", *write(tmp_path, sound)]) == 3
    shown = capsys.readouterr().out
    assert "45 samples in 7 shards, 43 usable" in shown and "held out, but trained on: 1" in shown and "no-picture" in shown


def test_text_without_a_picture_is_compared_by_its_words(tmp_path, capsys):
    def talk(key: str, words: str) -> dict:
        turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": words}]
        return {"__key__": key, "json": json.dumps({"messages": turns}).encode()}

    parts = {"train": [talk("a", "one"), talk("b", "two"), talk("c", "one")], "heldout": [talk("d", "two"), talk("e", "three")]}
    _, found = verify(capsys, *write(tmp_path, parts))
    assert [row["key"] for row in found["duplicates"]] == ["c"] and [row["key"] for row in found["in_training"]] == ["d"]


def test_a_damaged_shard_does_not_hide_the_others(tmp_path, sound, capsys):
    arguments = write(tmp_path, sound)
    whole = (tmp_path / "train-000001.tar").read_bytes()
    (tmp_path / "train-000001.tar").write_bytes(whole[: len(whole) // 2])
    code, found = verify(capsys, *arguments)
    assert code == 3 and found["samples"] == 32
    assert [(Path(row["shard"]).name, row["key"]) for row in found["problems"]] == [("train-000001.tar", "")]
    assert "cut short" in found["problems"][0]["reason"]


def test_a_configuration_names_the_shards(settings, tmp_path, sound, capsys):
    write(tmp_path, sound)
    settings["data"] |= {"train": f"{tmp_path}/train-*.tar", "heldout": f"{tmp_path}/train-000000.tar", "max_image_pixels": 10}
    code, found = verify(capsys, str(write_config(settings, tmp_path)))
    assert code == 3 and found["samples"] == 38 and all("max_image_pixels=10" in row["reason"] for row in found["problems"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing-*.tar"], "no shard matches"),
        (["a.yaml", "b.tar"], "found 'b.tar' after a configuration"),
        (["pipe:ls"], "would run a command"),
        (["x.tar", "--processes", "0"], "expected 1 or more"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    assert main(["data", "verify", *arguments]) != 0
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


@pytest.fixture
def order(settings, tmp_path, capsys):
    settings["training"] = {"steps": 4, "global_batch": 8, "micro_batch": 1}

    def run(*arguments: str) -> list[dict]:
        assert main(["data", "order", str(write_config(settings, tmp_path)), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["steps"]

    return run


def flat(steps: list[dict]) -> list[list[str]]:
    return [[key for keys in step["ranks"] for key in keys] for step in steps]


def test_one_order_whatever_the_ranks_and_threads(order, shards):
    plain = order("--steps", "8", "--workers", "0")
    assert [step["step"] for step in plain] == list(range(8))
    for ranks, workers in (("2", "1"), ("4", "3"), ("8", "0")):
        steps = order("--steps", "8", "--world-size", ranks, "--workers", workers)
        assert all(len(step["ranks"]) == int(ranks) for step in steps) and flat(steps) == flat(plain)
    assert flat(order("--start", "5", "--steps", "3")) == flat(plain)[5:]
    epoch = [key for step in flat(plain) for key in step][:60]
    assert set(epoch) == {raw["__key__"] for raw in read_in_order(shards["qa-train"])} and len(set(epoch)) == 60


def test_an_unusable_sample_holds_its_place(order, settings, tmp_path, shards):
    before = flat(order("--steps", "4"))
    for path in shards["qa-train"]:
        shutil.copy(path, tmp_path)
    broken = Path(tmp_path / Path(shards["qa-train"][0]).name)
    samples = [plain(raw) for raw in read_in_order([str(broken)])]
    samples[7]["jpg"] = b"broken"
    write_shards(tmp_path, "made", samples, samples_per_shard=100)[0].rename(broken)
    settings["data"]["train"] = [str(tmp_path / Path(path).name) for path in shards["qa-train"]]
    settings["data"]["max_bad_fraction"] = 0.5
    after = flat(order("--steps", "4"))
    assert after == [[key for key in step if key != samples[7]["__key__"]] for step in before]


@pytest.mark.slow
def test_the_order_is_what_trains(order, settings, tmp_path, monkeypatch):
    from vlm_dist.data.stream import Stream

    seen = []
    take = Stream.next_step

    def noted(stream):
        step = take(stream)
        seen.append([key for keys in step.keys for key in keys])
        return step

    monkeypatch.setattr(Stream, "next_step", noted)
    settings["data"]["heldout"] = []
    expected = flat(order("--steps", "4"))
    train(load_config(write_config(settings, tmp_path)))
    assert seen == expected


def test_a_model_that_is_made_first(order, settings):
    """Its tokenizer comes from the shards; nothing is left behind."""
    settings["model"], settings["lora"] = {"scratch": {}, "load_in_4bit": False}, None
    assert len(order("--steps", "2")) == 2 and not Path(settings["output_dir"]).exists()


def test_a_batch_that_cannot_be_cut(settings, tmp_path, capsys):
    assert main(["data", "order", str(write_config(settings, tmp_path)), "--world-size", "3"]) == 2
    assert "is not a multiple of micro_batch x ranks" in capsys.readouterr().err
