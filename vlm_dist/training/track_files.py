"""TensorBoard and MLflow; each is a package of its own, which need not be there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.redaction import redacted_tree
from vlm_dist.run_dir import RunDir, read_json, write_json
from vlm_dist.training.tracker import COLUMNS


class TensorBoard:
    """Event files in RUN/tensorboard; each start of a run adds one."""

    def __init__(self, run: RunDir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError("the package tensorboard is not installed; pip install tensorboard") from None
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, rows: list[dict[str, Any]]) -> None:
        import numpy as np
        from PIL import Image

        for number, row in enumerate(rows):
            if row["picture"] is not None:
                with Image.open(row["picture"]) as picture:
                    self._writer.add_image(f"held-out/{number:03d}", np.asarray(picture.convert("RGB")), dataformats="HWC")
            text = "\n".join(f"| {name} | {_cell(row[name])} |" for name in COLUMNS)
            self._writer.add_text(f"held-out/{number:03d}", f"| | |\n|---|---|\n{text}")

    def finish(self, numbers: dict[str, float], result: Path | None) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


class Mlflow:
    """An MLflow run for a run directory; its id is kept there, and each start goes on with it."""

    def __init__(self, config: Config, run: RunDir):
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise RuntimeError("the package mlflow is not installed; pip install mlflow") from None
        address = config.log.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.path.resolve()}/mlflow.db"
        self._client: Any = MlflowClient(tracking_uri=address)
        known = read_json(run.tracking) or {}
        self._id = known.get("mlflow", {}).get("id") or self._begin(config, run)
        write_json(run.tracking, {**known, "mlflow": {"id": self._id}})
        self._client.update_run(self._id, status="RUNNING")

    def _begin(self, config: Config, run: RunDir) -> str:
        name = config.log.mlflow_experiment
        found = self._client.get_experiment_by_name(name)
        place = None if config.log.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") else f"file://{run.path.resolve()}/mlflow"
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
        number = self._client.create_run(experiment, run_name=config.name).info.run_id
        self._client.log_dict(number, redacted_tree(config.model_dump(mode="json")), "config.json")
        return number

    def log(self, step: int, numbers: dict[str, float]) -> None:

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in numbers.items()])

    def pictures(self, rows: list[dict[str, Any]]) -> None:
        listed = []
        for row in rows:
            if row["picture"] is not None:
                self._client.log_artifact(self._id, str(row["picture"]), "held-out")
            listed.append({"picture": row["picture"].name if row["picture"] else None, **{name: row[name] for name in COLUMNS}})
        self._client.log_dict(self._id, {"rows": listed}, "held-out/answers.json")

    def finish(self, numbers: dict[str, float], result: Path | None) -> None:
        self.log(0, numbers)
        self._client.set_terminated(self._id, "FINISHED" if result else "KILLED")

    def close(self) -> None:
        return None
