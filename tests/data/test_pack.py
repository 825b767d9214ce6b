"""Data sets as people have them become shards that training reads; of five captions each epoch draws one."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from tests.conftest import run_command
from vlm_dist.cli.main import main
from vlm_dist.data.pack import pack_flickr8k
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import read_in_order
from vlm_dist.errors import BadSample, DataError

NAMES = [f"{number}_ab.1.jpg" for number in range(6)]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (40 * number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def captions_of(number: int) -> list[str]:
    return [f'picture {number}, "caption" {which} .' for which in range(5)]


@pytest.fixture
def parquet(tmp_path):
    """The layout of the hub's data set: parquet files a split, pictures as bytes, five columns of captions."""
    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra for data sets")
    for split, numbers in (("train", range(4)), ("validation", [4]), ("test", [5])):
        rows = [
            {"image": {"bytes": jpeg(n), "path": None}, **{f"caption_{i}": text for i, text in enumerate(captions_of(n))}} for n in numbers
        ]
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"))
    return tmp_path / "hub"


@pytest.fixture(params=["csv", "token"])
def folder(tmp_path, request):
    """The two layouts of the original: captions.txt with Images/, and Flickr8k.token.txt with lists of the splits."""
    out = tmp_path / request.param
    (out / "Images").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (out / "Images" / name).write_bytes(jpeg(number))
    if request.param == "csv":
        lines = ["image,caption"]
        lines += ['{},"{}"'.format(name, text.replace('"', '""')) for n, name in enumerate(NAMES) for text in captions_of(n)]
        (out / "captions.txt").write_text("\n".join([*lines, "gone.jpg,a picture that is not there"]) + "\n")
    else:
        lines = [f"{name}#{i}\t{text}" for n, name in enumerate(NAMES) for i, text in enumerate(captions_of(n))]
        (out / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
        for split, names in (("train", NAMES[:4]), ("dev", NAMES[4:5]), ("test", NAMES[5:])):
            (out / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    return out


def read(made) -> list[dict]:
    return list(read_in_order([str(path) for path in made.shards]))


def check(made):
    numbers = []
    for split in made.values():
        for raw in read(split):
            captions = json.loads(raw["json"])["captions"]
            number = int(captions[0].split()[1].rstrip(","))
            assert captions == captions_of(number) and raw["jpg"] == jpeg(number)  # the file's own bytes
            numbers.append(number)
    assert sorted(numbers) == list(range(6))


def test_hub_layout(parquet, tmp_path):
    made = pack_flickr8k(str(parquet), tmp_path / "out", samples_per_shard=3)
    assert {split: (packed.samples, len(packed.shards)) for split, packed in made.items()} == {
        "train": (4, 2), "validation": (1, 1), "test": (1, 1),
    }  # fmt: skip
    check(made)


def test_original_layouts(folder, tmp_path):
    made = pack_flickr8k(str(folder), tmp_path / "out", heldout=2)
    expected = {"train": 4, "heldout": 2} if folder.name == "csv" else {"train": 4, "validation": 1, "test": 1}
    assert {split: packed.samples for split, packed in made.items()} == expected
    check(made)


def test_limit_draws_by_seed(folder, tmp_path):
    keys = [
        [raw["__key__"] for raw in read(pack_flickr8k(str(folder), tmp_path / str(n), limit=2, heldout=1, seed=seed)["train"])]
        for n, seed in enumerate((0, 0, 1, 2, 3))
    ]
    assert keys[0] == keys[1] and len(keys[0]) == 2 and any(other != keys[0] for other in keys[2:])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds neither captions.txt"),
        ({"captions.txt": "name,text\na.jpg,b\n"}, "expected the columns image and caption, found name, text"),
        ({"captions.txt": "image,caption\na.jpg,b\n"}, "none of the 1 pictures"),
    ],
)
def test_a_source_that_is_none_says_why(tmp_path, files, reason):
    (tmp_path / "source").mkdir()
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        pack_flickr8k(str(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(folder, tmp_path, capsys):
    assert main(["data", "pack", "--format", "flickr8k", str(folder), str(tmp_path / "out"), "--heldout", "2", "--shard-size", "2"]) == 0
    assert "train        4 samples in 2 shards" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "flickr8k-train-000000.tar") as tar:
        assert [name.rpartition(".")[2] for name in tar.getnames()] == ["jpg", "json", "jpg", "json"]
    assert main(["data", "pack", "--format", "flickr8k", str(folder), str(tmp_path / "out"), "--limit", "0"]) == 3
    assert "--limit: found 0" in capsys.readouterr().err


def test_no_such_source():
    result = run_command("data", "pack", "--format", "flickr8k", "nobody/nothing", "out")
    assert result.returncode == 3 and result.stderr.count("\n") == 1 and "cannot be read as a data set" in result.stderr


def test_each_epoch_draws_a_caption():
    raw = {"__key__": "k", "jpg": jpeg(1), "json": json.dumps({"captions": captions_of(1)}).encode()}

    def caption(draw=None, **changes) -> str:
        sample = parse_sample({**raw, **changes}, max_image_pixels=10_000, caption_prompt="This image shows", draw=draw)
        return sample.messages[1]["content"][0]["text"]

    assert caption() == captions_of(1)[0]
    drawn = [caption(f"0/{epoch}") for epoch in range(40)]
    assert set(drawn) == set(captions_of(1)) and drawn == [caption(f"0/{epoch}") for epoch in range(40)]
    assert len({caption("0/0", __key__=f"k{n}") for n in range(20)}) > 1
    assert caption(json=b'{"captions": "a"}') == caption(json=b'{"captions": [" ", "a", 3]}') == "a"
    for bad in ([], [None], [" "]):
        with pytest.raises(BadSample, match="its keys are captions"):
            caption(json=json.dumps({"captions": bad}).encode())
