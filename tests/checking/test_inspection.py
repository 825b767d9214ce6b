"""`vlm-dist inspect` shows what the model is fed, and names planted mistakes and no others."""

from __future__ import annotations

import base64
import io
import json
import shutil

import pytest
import torch
from PIL import Image, ImageChops

from tests.conftest import write_config
from tests.videos import clip
from vlm_dist import load_config
from vlm_dist.checking.inspection import inspect
from vlm_dist.cli.main import main
from vlm_dist.config import ModelConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.data.shards import read_in_order, write_shards
from vlm_dist.data.view import pictures_as_seen
from vlm_dist.models.processor import load_processor


def look(settings, tmp_path, *overrides: str, count: int = 6):
    return inspect(load_config(write_config(settings, tmp_path), overrides), count)


def samples_of(found: dict) -> list[dict]:
    return [sample for row in found["rows"] for sample in row]


def test_pictures_are_put_together_again(any_checkpoint):
    """Tensors -> pictures: a gradient comes back as it was, up to the resizing that the processor did."""
    processor = load_processor(ModelConfig(name=any_checkpoint), any_checkpoint)
    ramp = torch.linspace(0, 255, 96).round().byte()
    pixels = torch.stack([ramp.expand(96, 96), ramp[:, None].expand(96, 96), torch.full((96, 96), 40, dtype=torch.uint8)])
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
    encoded = Encoder(processor, 4096).encode_prompt([message], [picture])
    views = pictures_as_seen(encoded, processor)
    if encoded.inputs["pixel_values"].ndim == 3:
        assert not views  # patches without a grid: nothing is shown rather than something wrong
        return
    whole = views[-1] if type(processor).__name__.startswith(("Idefics3", "SmolVLM")) else views[0]  # tiles first there
    expected = picture.resize(whole.size, Image.Resampling.BICUBIC)
    difference = ImageChops.difference(whole.convert("RGB"), expected).resize((8, 8), Image.Resampling.BOX)
    assert max(high for _, high in difference.getextrema()) < 40, any_checkpoint


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_sound_set_up(settings, tmp_path, request, family):
    settings["model"]["name"] = request.getfixturevalue(family)
    found = look(settings, tmp_path)
    enlarged = ["6 of 6 samples: enlarged"] if family == "qwen" else []  # 32 pixels to its least, 56
    assert found["flags"] == enlarged and not found["refused"] and len(found["rows"]) == 6
    for sample in samples_of(found):
        parts = sample["segments"]
        assert sum(part["tokens"] for part in parts) == sample["tokens"]
        assert sum(part["tokens"] for part in parts if part["kind"] == "picture") == sample["picture_tokens"] > 0
        learnt = [part["text"] for part in parts if part["kind"] == "supervised"]
        assert learnt and all(text.endswith(("</s>", "<|im_end|>")) for text in learnt)
        image = Image.open(io.BytesIO(base64.b64decode(sample["pictures"][0]["url"].split(",")[1])))
        assert max(image.size) >= 64
    keys = [sample["key"] for sample in samples_of(found)]
    code = main(["data", "order", str(write_config(settings, tmp_path)), "--steps", "2", "--json"])
    assert code == 0 and len(keys) == len(set(keys)) == 6


def test_the_order_is_that_of_training(settings, tmp_path, capsys):
    settings["training"] = {"steps": 2, "global_batch": 3, "micro_batch": 1}
    keys = [sample["key"] for sample in samples_of(look(settings, tmp_path))]
    assert main(["data", "order", str(write_config(settings, tmp_path)), "--steps", "2", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [key for step in steps for rank in step["ranks"] for key in rank] == keys


def planted(tmp_path, checkpoint: str, change) -> str:
    """A copy of a checkpoint whose chat template went through `change`."""
    folder = shutil.copytree(checkpoint, tmp_path / "planted")
    template = folder / "chat_template.jinja"
    changed = change(template.read_text())
    assert changed != template.read_text()
    template.write_text(changed)
    return str(folder)


def test_an_end_of_turn_that_is_not_learnt(settings, tmp_path, llava):
    settings["model"]["name"] = planted(tmp_path, llava, lambda text: text.replace("{{ eos_token }}", "").replace("</s>", ""))
    assert any("ends without an end-of-turn token" in flag for flag in look(settings, tmp_path)["flags"])


def test_a_system_prompt_that_is_left_out(settings, tmp_path, shards, qwen):
    raws = []
    for raw in list(read_in_order(shards["qa-train"][:1]))[:8]:
        record = json.loads(raw["json"])
        record["messages"].insert(0, {"role": "system", "content": "Zebras answer briefly."})
        raws.append({"__key__": raw["__key__"], "jpg": raw["jpg"], "json": json.dumps(record).encode()})
    (path,) = write_shards(tmp_path, "system", raws, samples_per_shard=9)
    settings["data"] |= {"train": [str(path)]}
    settings["model"]["name"] = qwen
    assert look(settings, tmp_path)["flags"] == ["6 of 6 samples: enlarged"]
    skip = "{% for message in messages %}"
    name = planted(tmp_path, qwen, lambda text: text.replace(skip, "{% for message in messages if message.role != 'system' %}"))
    found = look(settings, tmp_path, f"model.name={name}")
    assert "6 of 6 samples: the chat template leaves the system prompt out" in found["flags"]


def test_too_long_enlarged_and_broken(settings, tmp_path, shards):
    members = ("__key__", "jpg", "json")
    raws = [{name: raw[name] for name in members} for raw in read_in_order(shards["qa-train"][:1])]
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    raws[3] = {"__key__": "small", "png": small.getvalue(), "txt": b"a dot"}
    raws[5] |= {"jpg": b"no picture"}
    (path,) = write_shards(tmp_path, "mixed", raws, samples_per_shard=99)
    settings["data"] |= {"train": [str(path)], "max_seq_length": 60}
    found = look(settings, tmp_path, count=20)
    assert any(one["reason"].startswith("jpg: no picture that is known here") for one in found["refused"])
    assert any(flag.endswith("are longer than data.max_seq_length=60") for flag in found["flags"])
    assert "1 of" in next(flag for flag in found["flags"] if "enlarged" in flag)


def test_the_page_and_the_terminal(settings, tmp_path, capsys):
    config, page = str(write_config(settings, tmp_path)), tmp_path / "page.html"
    assert main(["inspect", config, "-n", "3", "--html", str(page), "data.packing=true", "data.max_seq_length=200"]) == 0
    shown, html = capsys.readouterr().out, page.read_text()
    assert "<picture x 4>" in shown and "nothing stands out" in shown and "of 200 tokens" in shown
    assert "&lt;picture &times; 4&gt;" in html and html.count('class="row"') == 3 and "http" not in html.replace("http-equiv", "")
    assert main(["inspect", config, "-n", "2", "--json"]) == 0
    assert "url" not in json.loads(capsys.readouterr().out)["rows"][0][0]["pictures"][0]
    assert main(["inspect", config, "-n", "0"]) == 2


def test_a_video_beside_a_picture(settings, tmp_path, qwen, capsys):
    text, picture = {"type": "text", "text": "Which?"}, io.BytesIO()
    Image.new("RGB", (56, 56)).save(picture, "PNG")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video", "end": 1.5}, text]},
        {"role": "assistant", "content": "this"},
    ]
    raw = {"png": picture.getvalue(), "mp4": clip(size=(56, 56)), "json": json.dumps({"messages": turns}).encode()}
    (path,) = write_shards(tmp_path, "video", [{"__key__": f"s{number}", **raw} for number in range(4)], samples_per_shard=9)
    settings["model"]["name"], settings["data"] = qwen, settings["data"] | {"train": [str(path)], "video": {"fps": 2}}
    config = str(write_config(settings, tmp_path))
    assert main(["inspect", config, "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "<picture x 4>" in shown and "<video x 8>" in " ".join(shown.split())  # 3 frames of 56 x 56, two of them a step of time
    assert main(["inspect", config, "-n", "1", "--json"]) == 0
    sample = json.loads(capsys.readouterr().out)["rows"][0][0]
    assert [part["of"] for part in sample["segments"] if part["kind"] == "picture"] == ["picture", "video"]
    assert sample["videos"][0]["seconds"] == 1.5 and sample["picture_tokens"] == 12


def test_flow_and_heat(settings, tmp_path, capsys):
    config, page = str(write_config(settings, tmp_path)), tmp_path / "page.html"
    assert main(["inspect", config, "-n", "2", "--html", str(page), "--heat"]) == 0
    shown, html = capsys.readouterr().out, page.read_text()
    assert "vision tower" in shown and "model.multi_modal_projector" in shown
    assert html.count("norm of the vision feature of each patch") == 2 and "<td>model.vision_tower</td>" in html
    found = look(settings, tmp_path, count=1)
    assert found["flow"][0]["shape"] == (1, 3, 32, 32) and "heat" not in found["rows"][0][0]["pictures"][0]
    assert main(["inspect", config, "--heat"]) == 2
    assert "add --html" in capsys.readouterr().err


def test_nothing_is_written(settings, tmp_path):
    look(settings, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_sample_is_described_by_its_conversation(llava):
    """What the segments are made of is the encoder's own masks."""
    encoder = Encoder(load_processor(ModelConfig(name=llava), llava), 512)
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
    ]
    encoded = encoder.encode(Sample("k", "s", turns, []))
    from vlm_dist.checking.inspection import _segments

    assert [part["kind"] for part in _segments(encoded, encoder.processor)][:2] == ["other", "supervised"]
