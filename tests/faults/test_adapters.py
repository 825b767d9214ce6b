"""Adapters and models whose files were damaged, cut or lost: one line, wherever they are used; and answers that stand beside their own
picture though keys are equal."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.models.files import problem_of
from vlm_dist.models.record import write_record
from vlm_dist.run_dir import read_jsonl

WEIGHTS = "adapter_model.safetensors"


def settings_of(folder: Path, base: str, shards: dict, **more: object) -> dict:
    return {
        "name": "tiny", "output_dir": str(folder / "runs"), "model": {"name": base}, "lora": {"r": 4},
        "data": {"train": shards["qa-train"], "heldout": shards["qa-heldout"], "max_seq_length": 256},
        "training": {"steps": 1, "global_batch": 2}, "evaluation": {"samples": 2, "max_new_tokens": 2},
        "log": {"wandb": "disabled"}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llava, shards) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(load_config(write_config(settings_of(folder, llava, shards), folder)))
    return folder / "runs" / "tiny"


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))


@pytest.fixture
def picture(tmp_path) -> str:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def fails(capsys, *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code != 0 and lines and lines[-1].startswith("vlm-dist: ") and "Traceback" not in "".join(lines), lines
    return code, lines[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [flip, halve, empty, Path.unlink]


def test_one_bit_is_refused_by_every_use(adapter, picture, tmp_path, llava, shards, capsys):
    flip(adapter / WEIGHTS)
    asked = ["generate", str(adapter), "--image", picture, "--prompt", "?"]
    second = write_config(settings_of(tmp_path, str(adapter), shards, name="second"), tmp_path)
    uses = (
        asked, [*asked, "--json"], ["export", str(adapter), "--to", "adapter", "--out", str(tmp_path / "out")],
        ["export", str(adapter), "--to", "merged-16bit", "--out", str(tmp_path / "out")],
        ["eval", str(adapter), "--data", shards["qa-heldout"][0]], ["train", str(second)],
        ["chat", str(adapter), "--terminal"],
    )  # fmt: skip
    for words in uses:
        code, line = fails(capsys, *words)
        assert code == 4 and f"{WEIGHTS}: is damaged" in line, words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_file_of_an_adapter(adapter, picture, capsys, damage):
    """vlm_dist.json itself apart: without it nothing is compared."""
    for file in sorted(adapter.iterdir()):
        if file.name == "README.md" or (file.name == "vlm_dist.json" and damage is Path.unlink):
            continue
        whole = file.read_bytes()
        damage(file)
        code, line = fails(capsys, "generate", str(adapter), "--image", picture, "--prompt", "?")
        assert code in (2, 4), (file.name, line)
        assert file.name in line or "adapter" in line, (file.name, line)
        file.write_bytes(whole)
    assert problem_of(adapter) is None


@pytest.mark.parametrize("damage", DAMAGES[1:], ids=lambda damage: damage.__name__)
def test_an_adapter_without_a_record_has_one_line_too(adapter, picture, tmp_path, shards, capsys, damage):
    """Of others, or of an earlier vlm_dist: nothing to compare with, but what cannot be read is said."""
    (adapter / "vlm_dist.json").unlink()
    second = write_config(settings_of(tmp_path, str(adapter), shards, name="second"), tmp_path)
    for name in (WEIGHTS, "adapter_config.json", "tokenizer.json"):
        if damage is Path.unlink and name == "adapter_config.json":
            continue  # then it is no adapter at all
        whole = (adapter / name).read_bytes()
        damage(adapter / name)
        for words in (["generate", str(adapter), "--image", picture, "--prompt", "?"], ["train", str(second)]):
            code, line = fails(capsys, *words)
            assert code in (2, 4), (name, line)
        (adapter / name).write_bytes(whole)


def test_records_without_the_field_and_corrected_bases_load(adapter, picture, llava, tmp_path, capsys):
    asked = ["generate", str(adapter), "--image", picture, "--prompt", "?"]
    config = adapter / "adapter_config.json"
    moved = shutil.copytree(llava, tmp_path / "moved")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(moved)}))
    assert main(asked) == 0
    record = json.loads((adapter / "vlm_dist.json").read_text())
    (adapter / "vlm_dist.json").write_text(json.dumps({name: record[name] for name in record if "sha256" not in name}))
    assert main(asked) == 0


def test_a_record_that_was_changed(adapter, picture, capsys):
    record = json.loads((adapter / "vlm_dist.json").read_text())
    for changed in ({**record, "system_prompt": "Lie."}, {**record, "sha256": {}}, {**record, "sha256": 1}, [record]):
        (adapter / "vlm_dist.json").write_text(json.dumps(changed))
        assert "vlm_dist.json: is damaged" in fails(capsys, "generate", str(adapter), "--image", picture, "--prompt", "?")[1]
    (adapter / "vlm_dist.json").write_text(json.dumps({**record, "sha256": {**record["sha256"], "../x": "0"}, "record_sha256": None}))
    assert "is missing" in (problem_of(adapter) or "")


def test_models_have_the_digests_too(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    write_record({"version": 1, "system_prompt": None}, tmp_path)
    assert problem_of(tmp_path) is None
    flip(tmp_path / "model.safetensors")
    assert "model.safetensors: is damaged" in (problem_of(tmp_path) or "")


@pytest.mark.slow
def test_a_model_that_was_trained_whole(tmp_path, llava, shards, picture, capsys):
    model = {"name": llava, "load_in_4bit": False}
    settings = settings_of(tmp_path, llava, shards, lora=None, model=model)
    config = str(write_config(settings, tmp_path))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    flip(run / "model" / "model.safetensors")
    code, line = fails(capsys, "generate", str(run), "--image", picture, "--prompt", "?")
    assert code == 4 and "model.safetensors: is damaged" in line
    assert main(["train", config]) == 0 and "exporting it again" in capsys.readouterr().out
    assert main(["generate", str(run), "--image", picture, "--prompt", "?"]) == 0


def test_equal_keys_keep_their_own_pictures(trained, tmp_path, llava, shards, capsys):
    """Two held-out shards with the same keys, in another order: before, after, thumbnail and report go by the place in the list."""
    import io

    from PIL import Image

    from vlm_dist.data.shards import write_shard

    colours = ("red", "lime", "blue", "white")

    def sample(colour: str) -> dict:
        out = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(out, "PNG")
        talk = [{"role": "user", "content": f"<image>\nIs it {colour}?"}, {"role": "assistant", "content": colour}]
        return {"png": out.getvalue(), "json": json.dumps({"messages": talk}).encode()}

    heldout = []
    for number in range(2):
        rows = [{"__key__": f"{place:04d}", **sample(colours[2 * number + place])} for place in range(2)]
        heldout.append(tmp_path / f"heldout-{number}.tar")
        write_shard(heldout[-1], rows)
    data = {"train": shards["qa-train"], "heldout": [str(path) for path in heldout], "max_seq_length": 256}
    config = str(write_config(settings_of(tmp_path, llava, shards, data=data, evaluation={"samples": 4, "max_new_tokens": 2}), tmp_path))
    assert main(["train", config]) == 0
    run = tmp_path / "runs" / "tiny"
    for phase in ("before", "after"):
        rows = read_jsonl(run / "samples" / f"{phase}.jsonl")
        assert [row["number"] for row in rows] == [0, 1, 2, 3] and [row["truth"] for row in rows] == list(colours)
        for row in rows:
            with Image.open(run / "samples" / row["thumbnail"]) as shown:
                assert shown.convert("RGB").getpixel((3, 3)) == Image.new("RGB", (1, 1), row["truth"]).getpixel((0, 0))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    cards = re.findall(r'<div class="answer".*?base64,([^"]+)".*?<dt>truth</dt><dd>(\w+)</dd>', page, re.DOTALL)
    assert [truth for _, truth in cards] == list(colours)
    for picture, truth in cards:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
            assert shown.convert("RGB").getpixel((3, 3)) == Image.new("RGB", (1, 1), truth).getpixel((0, 0))
