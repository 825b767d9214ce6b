"""What must not be read by others is in nothing that a run writes or says; and the run can be continued all the same."""

from __future__ import annotations

import json
import logging
import shutil
import stat
import threading

import pytest

from tests.conftest import write_config
from tests.data.test_remote import Server
from vlm_dist.cli.main import main
from vlm_dist.config_load import dump_config, load_config, refuse_without_secrets, without_secrets
from vlm_dist.data import storage as storing
from vlm_dist.data.quarantine_redacted import RedactedQuarantine
from vlm_dist.errors import ConfigError
from vlm_dist.models.card import model_card
from vlm_dist.redaction import RedactRecords, lacks_secret, redacted, redacted_tree, redacted_words
from vlm_dist.run_dir import RunDir, append_row, write_json

HIDDEN = {
    "https://user:pass-word@host/x.tar": "https://...@host/x.tar",
    "https://only-a-token@host:80/a@b.tar": "https://...@host:80/a@b.tar",
    "https://u:p/w?d#x@host/a.tar": "https://...@host/a.tar",
    "s3://b/p?X-Amz-Signature=abc&X-Amz-Date=1 cannot be read": "s3://b/p?X-Amz-Signature=...&X-Amz-Date=... cannot be read",
    "https://h/{000..009}.tar?sv=1&sig=a/b%2B": "https://h/{000..009}.tar?sv=...&sig=...",
    "URL('http://h/p?X=1')": "URL('http://h/p?X=...')",
    "GET /p.tar?X-Amz-Signature=abc failed": "GET /p.tar?X-Amz-Signature=... failed",
    "https://h/a#access_token=abc": "https://h/a#access_token=...",
    "pipe:curl -H 'Authorization: Bearer abcdefghijk' https://h/x": "pipe:curl -H 'Authorization: Bearer ...' https://h/x",
    "AWS_SECRET_ACCESS_KEY=abcdef rest": "AWS_SECRET_ACCESS_KEY=... rest",
    "--hf-token=abc rest": "--hf-token=... rest",
    'x {"password": "two words", "n": 1}': 'x {"password": "...", "n": 1}',
    "DefaultEndpointsProtocol=https;AccountKey=abc==;EndpointSuffix=x": "DefaultEndpointsProtocol=https;AccountKey=...;EndpointSuffix=x",
    **{
        f"got {token} there": "got ... there"
        for token in (
            "hf_" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2" * 8, "glpat-" + "a1B2" * 5, "AKIA" + "A1B2" * 4,
            "sk-proj-" + "a1B2" * 8, "xoxb-1234567890-abc", "AIza" + "a1B2c" * 7, "npm_" + "a1B2" * 9, "nvapi-" + "a1B2" * 8,
            "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        )
    },
}  # fmt: skip
KEPT = (
    "https://host:8080/a@b.tar", "https://h/data-?.tar", "s3://b/{000..099}.tar", "data/*.tar", "pad_token=<pad>", "key 'token': missing",
    "1,234 tokens/s", '{"key": "sample-000001"}', "config.token: str", "a/b@main", "revision 0123456789abcdef0123456789abcdef01234567",
    "hf://datasets/a/b/x.tar", "step 3: skipped: Samples: a=b",
)  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_are_left_out(text):
    assert redacted(text) == HIDDEN[text]
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text and not lacks_secret(text)


def test_values_of_known_variables_are_left_out_anywhere(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    assert redacted("it said 0123456789abcdef0123!") == "it said ...!"


def test_trees_and_command_lines():
    tree = {"pad_token": "<pad>", "api_key": "k", "deep": [{"url": "https://a:b@c", "password": "x"}], "https://a:b@c": 1}
    hidden = {"pad_token": "<pad>", "api_key": "...", "deep": [{"url": "https://...@c", "password": "..."}], "https://...@c": 1}
    assert redacted_tree(tree) == hidden == redacted_tree(hidden)
    assert redacted_words(["vlm-dist", "--token", "abc", "name=x"]) == ["vlm-dist", "--token", "...", "name=x"]


def test_it_takes_no_longer_than_the_text_is_long():
    for text in ("a" * 500_000, "abc-" * 50_000, "://" + "a:b" * 20_000, '"https://h:8x/aaaaaaa",' * 5_000, "'token" * 20_000):
        assert redacted(text) == text


ADDRESS = "http://someone:hidden-word@127.0.0.1:{port}/part-{{0..2}}.tar?X-Amz-Signature=hidden-{sign}&X-Amz-Date=2"


def _hidden_in(folder) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"hidden-" in path.read_bytes()]


@pytest.fixture
def signed(tmp_path, shards, settings, monkeypatch):
    """Settings of a run whose shards lie behind a signed address with a password."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storing, "FIRST_PAUSE_S", 0.01)
    folder = tmp_path / "served"
    folder.mkdir()
    for number, path in enumerate(shards["qa-train"]):
        shutil.copy(path, folder / f"part-{number}.tar")
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings["data"] |= {"train": ADDRESS.format(port=server.server_port, sign="one"), "heldout": []}
    settings["training"]["steps"] = 2
    settings["checkpoint"]["save_every"] = 1
    yield settings, server, tmp_path
    server.shutdown()


def test_nothing_that_a_run_leaves_or_says_holds_them(signed, capfd):
    settings, server, tmp_path = signed
    config, run = write_config(settings, tmp_path), tmp_path / "runs" / "tiny"
    assert main(["train", str(config), "training.steps=1"]) == 0
    assert _hidden_in(run) == []
    assert "X-Amz-Signature=..." in (run / "adapter" / "README.md").read_text()
    assert {stat.S_IMODE((run / name).stat().st_mode) for name in ("config.yaml", "environment.json")} == {0o600}
    said = capfd.readouterr()
    assert "hidden-" not in said.out + said.err

    # the result is gone, so that there is something to do; a signature is no part of what is compared
    shutil.rmtree(run / "adapter")
    assert main(["train", str(config), "training.steps=1"]) == 0
    assert "continuing from" in capfd.readouterr().out and _hidden_in(run) == []
    other = f"data.train={ADDRESS.format(port=server.server_port, sign='two')}"
    assert RunDir(run).changed(load_config(config, ["training.steps=1", other])) == []
    assert len(RunDir(run).changed(load_config(config, ["training.steps=1", "seed=9"]))) == 1
    # what the run keeps cannot fetch, and says so
    assert main(["train", str(run / "config.yaml"), "name=other"]) == 2
    assert "data.train: 'http://...@127.0.0.1" in capfd.readouterr().err

    server.faults = [404] * 50
    assert main(["train", str(config), "name=failing"]) == 3
    said = capfd.readouterr()
    assert "hidden-" not in said.out + said.err and "X-Amz-Signature=..." in said.err
    assert json.loads((tmp_path / "runs" / "failing" / "summary.json").read_text())["ended"] == "failed"
    assert _hidden_in(tmp_path / "runs") == []


def test_each_writer(settings, tmp_path, capsys):
    settings["data"]["train"] = ADDRESS.format(port=1, sign="one")
    config = load_config(write_config(settings, tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "a.json", {"reason": settings["data"]["train"], "api_key": "hidden-x"})
    append_row(out / "events.jsonl", {"text": settings["data"]["train"]})
    (out / "config.yaml").write_text(dump_config(config))
    (out / "README.md").write_text(model_card(without_secrets(config), "base", {}))
    RedactedQuarantine(out / "quarantine.jsonl", 0.1).note(
        {"__url__": settings["data"]["train"], "__key__": "k"}, settings["data"]["train"]
    )
    record = logging.LogRecord("vlm_dist", logging.WARNING, "", 0, "%s failed", (settings["data"]["train"],), None)
    RedactRecords().filter(record)
    (out / "log").write_text(record.getMessage())
    assert _hidden_in(out) == [] and len(list(out.iterdir())) == 6
    assert main(["config", str(tmp_path / "config.yaml")]) == 0
    assert "hidden-" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.train: .*lacks what a run's config.yaml leaves out"):
        refuse_without_secrets(load_config(out / "config.yaml"))
    refuse_without_secrets(config)


def test_a_job_of_ray_is_not_given_them(settings, tmp_path, capsys):
    config = write_config(settings, tmp_path)
    words = [
        "launch",
        str(config),
        f"data.train={ADDRESS.format(port=1, sign='one')}",
        "--ray",
        "--address",
        "http://127.0.0.1:1",
        "--print",
        "--gpus",
        "1",
    ]
    assert main(words) == 2
    told = capsys.readouterr()
    assert "Ray shows the command of a job" in told.err and "hidden-" not in told.out + told.err
