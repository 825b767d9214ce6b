"""TRL's SFTConfig and SFTTrainer, which also take the names that TRL has since changed: scripts written for them run as they are.

TRL comes with the extra `vlm_dist[trl]`; nothing else in the project imports it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from vlm_dist.errors import ConfigError

try:
    from trl.trainer.sft_config import SFTConfig as TrlConfig
    from trl.trainer.sft_trainer import SFTTrainer as TrlTrainer
except ImportError:
    raise ConfigError("vlm_dist.SFTTrainer and SFTConfig need TRL; install it with: pip install 'vlm_dist[trl]'") from None


class SFTConfig(TrlConfig):
    """`trl.SFTConfig` that also takes `max_seq_length` (now `max_length`), and trains in float32 where fp16 or bf16 is asked of a
    machine without a GPU, and with fp16 where bf16 is asked of a card that only emulates it, each with a warning."""

    def __init__(self, *arguments: Any, max_seq_length: int | None = None, **settings: Any):
        if max_seq_length is not None:
            if settings.get("max_length", max_seq_length) != max_seq_length:
                raise ConfigError(
                    f"max_seq_length={max_seq_length} and max_length={settings['max_length']} contradict each other; give one"
                )
            settings["max_length"] = max_seq_length
        super().__init__(*arguments, **_as_the_machine_can(settings))


class SFTTrainer(TrlTrainer):
    """`trl.SFTTrainer` that also takes `tokenizer` (now `processing_class`), and lists of rows as data sets. With fp16 what trains stays in
    float32: TRL turns it into bfloat16 where the model is quantised, which a GradScaler does not take."""

    def __init__(self, *arguments: Any, tokenizer: Any = None, **settings: Any):
        import torch

        if tokenizer is not None:
            if settings.get("processing_class") not in (None, tokenizer):
                raise ConfigError("tokenizer and processing_class are two names of one thing; give one")
            settings["processing_class"] = tokenizer
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(settings.get(name), list):
                settings[name] = _as_dataset(settings[name])
        model = settings.get("model", arguments[0] if arguments else None)
        before = {id(one): one.data for one in model.parameters()} if hasattr(model, "parameters") else {}
        super().__init__(*arguments, **settings)
        for parameter in self.model.parameters() if self.args.fp16 else ():
            if parameter.requires_grad and parameter.dtype is torch.bfloat16:
                parameter.data = before.get(id(parameter), parameter.data).to(parameter.device, torch.float32)


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A data set that gives the rows themselves: Arrow would turn their pictures into bytes."""
    from datasets import Dataset

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {key: [rows[number][key] for number in batch["row"]] for key in rows[0]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(look_up)


def _as_the_machine_can(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the precision that this machine trains in."""
    import torch

    asked = [name for name in ("fp16", "bf16") if settings.get(name)]
    if torch.cuda.is_available():
        is_default = settings.get("bf16") is None and not settings.get("fp16")  # TRL's own is bf16
        if (asked != ["bf16"] and not is_default) or torch.cuda.is_bf16_supported(including_emulation=False):
            return settings
        card = torch.cuda.get_device_name()
        warnings.warn(f"{card} only emulates bfloat16; training with fp16=True, its loss scaled, instead of bf16=True", stacklevel=3)
        return {**settings, "fp16": True, "bf16": False}
    words = f"{asked[0]}=True needs a GPU" if asked else "there is no GPU"
    cores = len(os.sched_getaffinity(0))
    warnings.warn(
        f"{words}; training in float32 on {cores} CPU cores: for trials with tiny models; billions of parameters take minutes a step",
        stacklevel=3,
    )
    return {**settings, "fp16": False, "bf16": False}
