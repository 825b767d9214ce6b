"""The configuration: strict, explained, and clear about what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, write_config
from vlm_dist.config import Config
from vlm_dist.config_load import differences, dump_config, explain, json_schema, load_config, parse_config
from vlm_dist.errors import ConfigError

GOOD = """
name: run
model: {name: somewhere}
data: {train: "a.tar"}
optim:
  lr: 1e-4
training: {steps: 3}
"""


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, source="x.yaml")
    return str(caught.value)


def test_good_values_arrive():
    config = parse_config(GOOD, ["optim.lr=3e-4", "data.heldout=[b.tar, c.tar]", "lora=null", "model.load_in_4bit=false"])
    assert config.optim.lr == 3e-4
    assert config.data.train == ["a.tar"]
    assert config.data.heldout == ["b.tar", "c.tar"]
    assert config.lora is None


def test_yaml_1_2_numbers_and_words():
    assert parse_config(GOOD).optim.lr == 1e-4  # YAML 1.1 reads a string
    assert "model.load_in_4bit" in problem(GOOD.replace("somewhere", "a, load_in_4bit: maybe"))


def test_unknown_key_names_the_nearest():
    text = problem(GOOD.replace("lr: 1e-4", "lrr: 1e-4"))
    assert text == "x.yaml:6: unknown key 'optim.lrr'; did you mean 'optim.lr'?"
    assert "did you mean 'lora.r'" in problem(GOOD, "r=8")


def test_wrong_type_names_path_and_value():
    text = problem(GOOD.replace("1e-4", "fast"))
    assert text.startswith('x.yaml:6: optim.lr="fast": ')
    assert problem(GOOD, "training.steps=ten").startswith('command line: training.steps="ten": ')


def test_all_problems_are_told_at_once():
    text = problem(GOOD.replace("lr: 1e-4", "lr: fast\n  beta: 3"), "seeed=1")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "x.yaml:2: found duplicate key"),
        ("a: [1\nb: 2", "not valid YAML"),
        ("- 3", "expected keys and values such as 'name: my-run', found a list"),
        (GOOD.replace("training: {steps: 3}", ""), "'training' is missing"),
        (GOOD.replace("steps: 3", "steps: 3, epochs: 2"), "exactly one of training.steps and training.epochs"),
        (GOOD.replace("steps: 3", "steps: 3, global_batch: 6, micro_batch: 4"), "global_batch=6 is not a multiple of micro_batch=4"),
        (GOOD + "lora: null\n", "4-bit weights cannot be trained"),
        (GOOD.replace("name: somewhere", "name: a, scratch: {}"), "exactly one of model.name"),
        (GOOD.replace("name: run", "name: ../run"), "name="),
    ],
)
def test_what_contradicts_itself(text, expected):
    assert expected in problem(text)


def test_override_without_value():
    assert "expected KEY=VALUE" in problem(GOOD, "optim.lr")


def test_missing_file():
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nowhere.yaml")


def test_resolved_config_reads_back_the_same():
    config = parse_config(GOOD)
    assert parse_config(dump_config(config)) == config


def test_differences_name_old_and_new():
    old, new = parse_config(GOOD), parse_config(GOOD, ["optim.lr=1e-3", "log.every=3"])
    assert differences(old, new, ["optim", "training"]) == ["optim.lr: 0.0001 -> 0.001"]
    assert differences(old, new, ["optim"], ["optim.lr"]) == []


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(GOOD).optim.lr = 3.0  # type: ignore[misc]


def test_every_field_is_explained():
    rows = list(explain())
    assert [key for key, _, _, meaning in rows if not meaning] == []
    assert {"optim.lr", "model.scratch.image_size", "lora.r"} <= {key for key, _, _, _ in rows}


def test_schema_holds_every_section():
    schema = json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert json.dumps(schema)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.name
    text = path.read_text()
    assert text.startswith("#"), "a config begins with what it is, its command and its hardware"
    assert "vlm-dist train configs/" in text
    assert "Hardware:" in text


def test_config_needs_no_torch():
    code = "import sys, vlm_dist.config, vlm_dist.config_load; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_overrides_may_stand_anywhere(tmp_path, settings, capsys):
    from vlm_dist.cli.main import main

    path = str(write_config(settings, tmp_path))
    assert main(["train", path, "training.steps=8", "--dry-run", "--json", "training.global_batch=8"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 8 and plan["global_batch"] == 8
    for words in (["--oops"], ["more"], ["--oops=1"]):
        with pytest.raises(SystemExit):
            main(["train", path, "--dry-run", "training.steps=8", *words, "--json"])


def test_command_line_prints_the_resolved_config(tmp_path, settings, capsys):
    from vlm_dist.cli.main import main

    assert main(["config", str(write_config(settings, tmp_path)), "optim.lr=0.5"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
    assert main(["config", "--explain"]) == 0
    assert "optim.lr" in capsys.readouterr().out
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"
