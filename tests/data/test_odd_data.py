"""Data as people have it: odd samples are named and left out, what nothing reads is told, a run that learns nothing fails."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data.encode import Encoder
from vlm_dist.data.index import scan_shards
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.storage import Storage
from vlm_dist.data.tally import Tally, in_words, summed
from vlm_dist.errors import BadSample, DataError

COLOURS = ["red", "green", "blue", "orange"]


def picture(colour: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def conversation(*turns: tuple[str, object], **more: object) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more}).encode()


def sample(key: str, answer: str = "red", size: tuple[int, int] = (64, 48), **more: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(size=size)), (f"{key}.json", conversation(("user", "<image>Which?"), ("assistant", answer), **more))]


def good(count: int = 8) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in sample(f"s{number}", COLOURS[number % 4])]


@pytest.fixture
def run(settings, tmp_path):
    """Train on these members for a few steps; returns the summary and the quarantine's rows."""

    def go(members: list[tuple[str, bytes]], *overrides: str) -> tuple[dict, list[dict]]:
        settings["data"] = {"train": [write(tmp_path / "x.tar", members)], "max_seq_length": 512, "workers": 0}
        settings["training"] = {"steps": 4, "global_batch": 3, "micro_batch": 1}
        summary = train(load_config(write_config(settings, tmp_path), [*overrides]))
        quarantine = tmp_path / "runs" / "tiny" / "quarantine.jsonl"
        return summary, [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []

    return go


ODD = {
    "lone surrogate": (conversation(("user", "Which \ud800?"), ("assistant", "red")), "half a character"),
    "a list for a role": (json.dumps({"messages": [{"role": ["user"], "content": "x"}]}).encode(), "a turn's 'role' is"),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json: "),
    "a long number": (b'{"messages": [], "n": ' + b"1" * 5_000 + b"}", "json: "),
    "no words": (conversation(("user", "<image>Which?"), ("assistant", "  ")), "the assistant says nothing"),
    "a weight that is none": (json.dumps({"messages": [{"role": "assistant", "content": "x", "weight": -1}]}).encode(), "'weight' is '-1'"),
}


def test_an_odd_sample_is_named_and_left_out(run, qwen):
    """On a processor that raises for pictures of one row."""
    members = good()
    for number, (content, _) in enumerate(ODD.values()):
        members += [(f"odd{number}.jpg", picture()), (f"odd{number}.json", content)]
    summary, quarantined = run([*members, *sample("wide", size=(2400, 8))], f"model.name={qwen}", "training.steps=8")
    reasons = {row["key"]: row["reason"] for row in quarantined}
    assert summary["ended"] == "finished" and reasons.keys() == {"wide", *(f"odd{number}" for number in range(len(ODD)))}
    assert reasons["wide"].startswith("processor: absolute aspect ratio must be smaller than 200")
    for number, (_, words) in enumerate(ODD.values()):
        assert words in reasons[f"odd{number}"]


def test_packing_leaves_out_a_picture_that_the_processor_refuses(qwen):
    """Its size alone is asked about there, by the processor's own rule."""
    from transformers import AutoProcessor

    ruler = Ruler(Encoder(AutoProcessor.from_pretrained(qwen), max_seq_length=512))
    with pytest.raises(BadSample, match=r"^processor: absolute aspect ratio must be smaller than 200"):
        ruler.measure([{"role": "user", "content": [{"type": "image"}]}], [(3000, 2)])


@pytest.mark.parametrize("usable", [0, 2])
def test_a_run_that_learns_from_little_fails(run, usable, tmp_path):
    bad = [member for number in range(6) for member in sample(f"t{number}", size=(9000, 9000 // 2000))]
    bad = [(name, b"no picture" if name.endswith("jpg") else content) for name, content in bad]
    with pytest.raises(DataError, match=r"(6 of the first \d samples are unusable|none of the first 6 samples can be used)"):
        run([*good(usable), *bad])
    assert not (tmp_path / "runs" / "tiny" / "adapter").exists()


def test_what_nothing_reads_is_told_with_its_number(run, capsys, settings, tmp_path):
    members = good(6)
    members += [("s9.jpg", picture()), ("s9.npy", b"x"), ("s9.json", conversation(("user", "<image>?"), ("assistant", "a"), tone="kind"))]
    odd_turn = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "b </s>\n", "mood": 1}]}
    members += [("t.jpg", picture()), ("t.json", json.dumps(odd_turn).encode())]
    summary, quarantined = run(members)
    expected = {"key": {"tone": 1}, "turn key": {"mood": 1}, "member": {".npy": 1}, "split": {"</s>": 1}, "stripped": {"line breaks": 1}}
    assert summary["notes"] == expected and not quarantined
    said = capsys.readouterr().out
    assert "data: keys of the JSON that nothing reads: tone (1 sample)" in said
    config = str(write_config(settings, tmp_path))
    assert main(["data", "verify", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == expected
    assert main(["inspect", config, "-n", "12"]) == 0
    assert "files beside a sample that nothing reads: .npy (1 sample)" in capsys.readouterr().out


def test_verify_encodes_with_the_processor_of_a_configuration(settings, tmp_path, capsys, qwen):
    settings["data"] = {"train": [write(tmp_path / "x.tar", [*good(), *sample("wide", size=(2400, 8))])], "max_seq_length": 512}
    settings["model"]["name"] = qwen
    config = str(write_config(settings, tmp_path))
    assert main(["data", "verify", settings["data"]["train"][0]]) == 0
    capsys.readouterr()
    assert main(["data", "verify", config, "--json"]) == DataError.exit_code
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["key"] == "wide" and problem["reason"].startswith("processor: ")


def test_verify_looks_at_the_answers(tmp_path, capsys):
    members = [member for number in range(6) for member in sample(f"a{number}", "It is a red square.")]
    members += [member for number in range(3) for member in sample(f"b{number}", f"I see {number} red squares{'!' * number}")]
    shard = write(tmp_path / "x.tar", members)
    main(["data", "verify", shard, "--json"])
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers["different"] == 4 and answers["most_common"] == {"text": "It is a red square.", "share": 0.6667}
    assert answers["near_identical"] == [["i see # red squares", 3, 3]]
    main(["data", "verify", shard])
    said = " ".join(capsys.readouterr().out.split())
    assert "one answer for most: 67% of the training samples are answered 'It is a red square.'" in said
    assert "near-identical answers: 3 samples in 3 forms of 'i see # red squares'" in said


def test_samples_whose_members_stand_apart(tmp_path):
    members = sorted(good(), key=lambda member: member[0].rsplit(".", 1)[1])
    with pytest.raises(DataError, match=r"the members of 's0' stand apart in shard '.*x\.tar' \(\.jpg and later \.json\)"):
        scan_shards([write(tmp_path / "x.tar", members)], "data.train", Storage())
    twice = scan_shards([write(tmp_path / "y.tar", [*good(2), *good(2)])], "data.train", Storage())
    assert len(twice) == 4


def test_the_reason_names_the_files_that_were_found(tmp_path, capsys):
    members = [(f"v1.{number}.{kind}", b"x") for number in range(2) for kind in ("jpg", "txt")]
    main(["data", "verify", write(tmp_path / "x.tar", members), "--json"])
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "(the files of 'v1': 0.jpg, 0.txt, 1.jpg, 1.txt; a name's key ends at its first dot)" in problem["reason"]


def test_a_byte_order_mark_is_no_text(encoded_caption):
    assert encoded_caption("\ufeffa red square".encode()) == "a red square"


@pytest.fixture
def encoded_caption():
    from vlm_dist.data.samples import parse_sample

    def caption(text: bytes) -> str:
        raw = {"__key__": "s", "__url__": "x.tar", "jpg": picture(), "txt": text}
        return parse_sample(raw, max_image_pixels=10_000, caption_prompt="?").messages[1]["content"][0]["text"]

    return caption


def test_a_tally_is_told_in_words():
    tally = Tally()
    tally.add([("key", "b"), ("key", "b"), ("key", "a"), ("cut", "too long")])
    tally.add([("key", "a")])
    assert tally.to_dict() == {"key": {"a": 2, "b": 1}, "cut": {"too long": 1}}
    assert summed([tally.to_dict(), {"key": {"b": 1200}}]) == {"key": {"b": 1201, "a": 2}, "cut": {"too long": 1}}
    assert in_words({"key": {"b": 1201, "a": 2}}) == ["keys of the JSON that nothing reads: b (1,201 samples), a (2 samples)"]
    assert in_words({"key": {str(number): 1 for number in range(14)}})[0].endswith("11 (1 sample) and 2 more")


def test_every_sample_is_too_long_before_the_first_step(run, tmp_path):
    with pytest.raises(DataError, match=r"none of the first 8 samples can be used; s.*too long"):
        run(good(), "data.max_seq_length=8")
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_turns_as_json_alone_and_shares_for_boxes(tmp_path, capsys):
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    members = [("a.jpg", picture()), ("a.json", json.dumps(turns).encode())]
    box = {"messages": turns, "objects": [{"bbox": [0.1, 0.1, 0.5, 0.5], "label": "x"}]}
    members += [("b.jpg", picture("blue")), ("b.json", json.dumps(box).encode())]
    main(["data", "verify", write(tmp_path / "x.tar", members), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] == 1 and "are shares of the picture, not pixels" in found["problems"][0]["reason"]
