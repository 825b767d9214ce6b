"""What trackers were told, read back from what they wrote."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.run_dir import RunDir, read_jsonl
from vlm_dist.training.tracker import COLUMNS
from vlm_dist.training.tracking import Trackers, numbers_of

BLOCK, FULL, LAST = 32 * 2**10, 1, 4


def start(settings: dict, folder: Path, *overrides: str, **log) -> Path:
    settings["log"] |= log
    config = load_config(write_config(settings, folder), list(overrides))
    train(config)
    return Path(config.output_dir) / config.name


def expected(run: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> every number of metrics.jsonl."""
    found = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        numbers = numbers_of(row["eval"], "eval/") if "eval" in row else numbers_of(row)
        found |= {(name, row["step"]): value for name, value in numbers.items() if name != "step"}
    return found


def records_of(run: Path) -> list:
    """What lies in W&B's offline files of a run directory, in order, start after start."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in chunks_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def chunks_of(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form: blocks of 32 KiB, in them pieces of (checksum, length, type), after seven bytes that say
    whose it is."""
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def values_of(items) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_weights_and_biases(settings, tmp_path, monkeypatch):
    """A run of its own for each run directory; every number, the answers with their pictures, and artifacts; nothing secret."""
    monkeypatch.delenv("WANDB_MODE")
    settings["evaluation"] |= {"metrics": ["token_f1"], "every": 2}
    about = {"wandb": "offline", "wandb_entity": "team", "wandb_group": "night", "wandb_tags": ["a", "b"], "wandb_project": "p"}
    run = start(settings, tmp_path, wandb_artifacts=["result", "samples"], **about)
    records = records_of(run)
    (made,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    number = json.loads((run / "tracking.json").read_text())["wandb"]["id"]
    assert (made.run_id, made.project, made.entity, made.run_group, list(made.tags), made.job_type, made.display_name) == (
        number, "p", "team", "night", ["a", "b"], "train", "tiny",
    )  # fmt: skip
    assert number != "tiny" and len(number) == 16
    told: dict[tuple[str, int], float] = {}
    table = None
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = values_of(record.history.item)
            table = row.get("held-out answers/path", table)
            told |= {
                (name, row["step"]): value for name, value in row.items() if "step" in row and not name.startswith("_") and name != "step"
            }
    assert told.items() >= expected(run).items()
    assert ("eval/token_f1", 0) in told and ("eval/without_pictures/exact_match", 4) in told
    (file,) = run.glob(f"wandb/offline-run-*/files/{table}")
    content = json.loads(file.read_text())
    assert content["columns"] == ["picture", *COLUMNS] and len(content["data"]) == 4
    tables = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "run_table"]
    stored = {file.path for table in tables for file in table.manifest.contents}
    assert any(path.startswith("media/images/") and path.endswith(".png") for path in stored), stored  # the table's pictures
    rows = read_jsonl(run / "samples" / "after.jsonl")
    assert [line[3] for line in content["data"]] == [row["answer"] for row in rows]
    summaries = [values_of(record.summary.update) for record in records if record.WhichOneof("record_type") == "summary"]
    assert any("summary/goodput" in summary for summary in summaries)
    artifacts = {record.artifact.type for record in records if record.WhichOneof("record_type") == "artifact"}
    assert {"model", "answers"} <= artifacts


def test_two_runs_of_one_name_are_two_and_a_restart_is_one(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    settings["data"]["heldout"] = []
    first = start(settings, tmp_path, wandb="offline")
    second = start(settings, tmp_path, f"output_dir={tmp_path / 'others'}", wandb="offline")
    ids = [json.loads((run / "tracking.json").read_text())["wandb"]["id"] for run in (first, second)]
    assert ids[0] != ids[1]
    (first / "summary.json").unlink()
    time.sleep(1.1)  # W&B's folder of an offline run is named by the second
    start(settings, tmp_path, wandb="offline")
    runs = [record.run for record in records_of(first) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {ids[0]} and [run.job_type for run in runs] == ["train", "resume"]


def test_tensorboard(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(settings, tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    told = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    for place, value in expected(run).items():
        assert told[place] == pytest.approx(value, rel=1e-6), place
    assert ("summary/goodput", 0) in told
    assert sorted(events.Tags()["images"]) == [f"held-out/{number:03d}" for number in range(4)]
    text = events.Tensors("held-out/000/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| question |" in text and read_jsonl(run / "samples" / "after.jsonl")[0]["truth"] in text


def test_mlflow(settings, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    pytest.importorskip("sqlalchemy")  # of mlflow itself; mlflow-skinny speaks with servers only
    address = f"sqlite:///{tmp_path}/mlflow.db"
    run = start(settings, tmp_path, trackers=["mlflow"], mlflow_uri=address, mlflow_experiment="shapes")
    client = MlflowClient(tracking_uri=address)
    number = json.loads((run / "tracking.json").read_text())["mlflow"]["id"]
    found = client.get_run(number)
    assert found.info.run_name == "tiny" and found.info.status == "FINISHED"
    assert client.get_experiment(found.info.experiment_id).name == "shapes"
    for (name, step), value in expected(run).items():
        assert {one.step: one.value for one in client.get_metric_history(number, name)}[step] == pytest.approx(value), name
    names = {file.path for file in client.list_artifacts(number, "held-out")}
    assert "held-out/answers.json" in names and "held-out/00000.png" in names
    (run / "summary.json").unlink()
    start(settings, tmp_path)
    assert json.loads((run / "tracking.json").read_text())["mlflow"]["id"] == number


def test_a_package_that_is_not_there_ends_nothing(settings, tmp_path, monkeypatch, caplog):
    """Told once, with what to install; the run's own files are all there."""
    import sys

    for name in ("tensorboard", "torch.utils.tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    config = load_config(write_config(settings, tmp_path), ["log.trackers=[tensorboard, mlflow]"])
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(config, run)
        trackers.log({"step": 1, "loss": 1.0})
        trackers.finish({"ended": "finished", "wall_s": 1.0})
        trackers.close()
    words = [record.message for record in caplog.records]
    assert words == [
        "TensorBoard failed (the package tensorboard is not installed; pip install tensorboard); training goes on without it",
        "MLflow failed (the package mlflow is not installed; pip install mlflow); training goes on without it",
    ]


def test_numbers_of_a_row():
    row = {"step": 3, "loss": None, "ok": True, "name": "x", "busy_s": {"mean": 1.0, "max": 2}, "lr": 1e-3}
    assert numbers_of(row) == {"step": 3, "busy_s/mean": 1.0, "busy_s/max": 2, "lr": 1e-3}
