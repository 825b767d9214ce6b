"""Configuration files that are no configuration: one line, and soon."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_dist.cli.main import main
from vlm_dist.config_load import load_config, parse_config
from vlm_dist.errors import ConfigError

WHOLE = "name: a\nmodel: {name: m}\ndata: {train: x.tar}\ntraining: {steps: 1, global_batch: 1}\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
BAD = {
    "utf-16": (WHOLE.encode("utf-16"), "is written in UTF-16, expected UTF-8"),
    "utf-16 without a mark": (WHOLE.encode("utf-16-le"), "save it as UTF-8"),
    "utf-32": (WHOLE.encode("utf-32"), "is written in UTF-32"),
    "latin-1": (WHOLE.encode() + "# größe\n".encode("latin-1"), ":5: byte"),
    "bytes": (bytes(range(1, 256)), "no UTF-8"),
    "10 MB of comments": (b"# hello\n" * 1_300_000 + WHOLE.encode(), "is larger than 1,048,576 bytes"),
    "alias bomb": (BOMB, "more than 100,000 values once its aliases"),
    "alias of itself": ("seed: &a [*a]\n" + WHOLE, "seed"),
    "deep flow": ("a: " + "[" * 500_000, "nested more than 32 deep"),
    "deep mappings": ("a: " + "{a: " * 5_000, "nested more than 32 deep"),
    "deep block": ("\n".join(" " * depth + "a:" for depth in range(900)), "nested more than 32 deep"),
    "date": ("name: 2001-99-99", "not valid YAML"),
    "number of 5,000 digits": ("seed: " + "9" * 5_000, "not valid YAML"),
    "merge of a number": ("data:\n  <<: 3\n", ":2: not valid YAML"),
    "unknown key beside a merge": (WHOLE + "optim:\n  <<: {lr: 1}\n  bogus: 1\n", ":7: unknown key 'optim.bogus'"),
    "unknown key by a merge": (WHOLE + "optim:\n  <<: {bogus: 1}\n", "unknown key 'optim.bogus'"),
    "lone surrogate": ('name: "\\ud800"\n', ":1: name holds half a character"),
    "key is a number": ("1: x\n" + WHOLE, "the key 1 is no word"),
    "key is a list": ("? [1, 2]\n: x\n", "the key a list or mapping is no word"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "nul": ("a: \0\n", "UTF-8"),
    "empty": ("", "found nothing"),
    "infinity": (WHOLE + "optim: {lr: 1e999999}\n", "should be a finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_and_soon(name, tmp_path, capsys):
    content, expected = BAD[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    assert main(["train", str(path)]) == 2
    assert time.process_time() - start < 10
    told = capsys.readouterr().err.strip().splitlines()
    assert any(expected in line for line in told), told
    assert all(line.startswith(("vlm-dist: ", str(path))) and len(line) < 600 for line in told), told


def test_good_files_stay_good(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert load_config(path).name == "a"
    assert parse_config(WHOLE + "optim:\n  <<: {lr: 0.5}\n  weight_decay: 0.25\n").optim.lr == 0.5
    shards = ", ".join(f"/data/shards/number-{number:06d}.tar" for number in range(2_000))
    path.write_text(WHOLE.replace("x.tar", f"[{shards}]"))
    assert len(load_config(path).data.train_shards) == 2_000
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        load_config(folder)


@pytest.mark.parametrize("value", ["[" * 100_000, "2001-99-99", "9" * 5_000, '"\\ud800"', "{1: 2}", "{a: &a [*a]}", "a: b: c"])
def test_bad_override_is_one_line(value):
    with pytest.raises(ConfigError) as error:
        parse_config(WHOLE, [f"seed={value}"])
    assert str(error.value).startswith("command line: ") and len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from([*"[]{}:,-?&*!|>'\"#%@`~ \n\t", "a", "1", "<<: ", "&x ", "*x ", "!!set ", "!!binary ", "\\ud800", "2001-1-99"]),
        max_size=30,
    )
)
def test_any_text_is_a_configuration_or_an_error_of_ours(parts):
    try:
        parse_config("".join(parts))
    except ConfigError as error:
        assert str(error)
