"""The parts of the configuration that say how a training is watched: evaluation, and what is told. `config.py` puts the tree together."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from vlm_dist.config_model import Section


class EvaluationConfig(Section):
    """Answers are generated for held-out questions and compared with the truth: before, during and after training."""

    every: NonNegativeInt = 0
    """Evaluate every so many steps during training; 0: only before and after."""
    samples: PositiveInt | None = 200
    """Use the first so many held-out samples; null: all."""
    batch_size: PositiveInt = 16
    """Samples that one rank answers at a time."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    metrics: list[str] = []
    """Scores besides exact_match: token_f1, anls, vqa_accuracy, relaxed_accuracy, cer, wer, bleu, chrf, cider, or module:function of your
    own, called with an answer and the list of right ones."""
    without_pictures: bool = True
    """After training ask the same questions once more with the pictures greyed out: how much of the score needs eyes."""
    patience: PositiveInt | None = None
    """Stop when checkpoint.best_metric has not become better in so many evaluations; null: train to the end."""


class LogConfig(Section):
    """What is written while training runs. metrics.jsonl always is."""

    every: PositiveInt = 10
    """One log line every so many steps where there is no terminal for a progress bar."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online where an API key is set, else disabled. Its failures never stop a run."""
    trackers: list[Literal["wandb", "tensorboard", "mlflow"]] = ["wandb"]
    """What is told besides: Weights & Biases (see wandb), TensorBoard (files in RUN/tensorboard), MLflow. Their failures never stop a
    run."""
    wandb_project: str = "vlm_dist"
    """Project name in Weights & Biases."""
    wandb_entity: str | None = None
    """User or team there; null: the key's own."""
    wandb_group: str | None = None
    """Runs of one group are shown together."""
    wandb_tags: list[str] = []
    """Words to find a run by."""
    wandb_artifacts: list[Literal["result", "samples"]] = []
    """What is uploaded at the end: result (the adapter or model), samples (held-out answers and their pictures)."""
    mlflow_uri: str | None = None
    """An MLflow server, or sqlite:///FILE; null: MLFLOW_TRACKING_URI, else RUN/mlflow.db."""
    mlflow_experiment: str = "vlm_dist"
    """The experiment that the run belongs to there."""
