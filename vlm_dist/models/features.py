"""A frozen vision tower is computed once a picture: what it gives is kept on disk and read instead, in later epochs and later runs.

The name of a picture's file is the hash of its pixels as the processor made them, and that of its folder the hash of the tower's weights,
of the layer that the model reads and of the number type: a picture, processor, tower or type that changes is computed anew. What is read
is what was computed, to the bit; a batch computed in other company may differ from it in the last place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config, DataConfig
from vlm_dist.deepspeed_config import zero_stage
from vlm_dist.disk import cache_folder, sizes
from vlm_dist.errors import ConfigError
from vlm_dist.families import FAMILIES, Family
from vlm_dist.models.patches import bind

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
WRITTEN_BEHIND = 64  # pictures whose features wait to be written, at most
FORM = 2  # of the files; others lie in folders of their own
LAYERED = ("hidden_states", "feature_maps")


class TowerFeatures:
    """Between a vision tower and the model that reads it. The stream calls `ahead` in the background, the loss `of`.

    Args:
        limit: bytes that this rank may add to the folder.
    """

    def __init__(self, tower: Any, folder: Path, limit: int):
        self.tower, self.folder, self.room = tower, folder, limit
        self.found = self.asked = 0
        """Pictures since `metrics` was called: read instead of computed, and all."""
        self._compute, self._now, self._unreadable = tower.forward, None, False
        self._writer, self._behind = ThreadPoolExecutor(1, "features"), threading.BoundedSemaphore(WRITTEN_BEHIND)
        tower.forward = bind(tower, self._forward)

    def __deepcopy__(self, memo: Any) -> TowerFeatures:
        return self

    def ahead(self, batch: dict[str, Any]) -> dict[str, Any]:
        """From a micro-batch with `pixel_values` [N, 3, height, width] to one with those of the M pictures alone that are to be computed,
        their file names `picture_keys`, and what is known of the others: `known_features` [N - M, ...] and `known_field`, which of the
        tower's outputs that is; `known_places` and `missing_places` say where each stands among the N."""
        import torch

        if "pixel_values" not in batch:
            return batch
        keys = [_digest(pixels) for pixels in batch["pixel_values"]]
        known = {place: found for place, key in enumerate(keys) if (found := self._read(key)) is not None}
        missing = [place for place in range(len(keys)) if place not in known]
        batch = {**batch, "pixel_values": batch["pixel_values"][missing], "picture_keys": [keys[place] for place in missing]}
        if known:
            batch["known_field"] = next(iter(known.values()))[0]
            batch["known_features"] = torch.stack([feature for _, feature in known.values()])
            batch["known_places"], batch["missing_places"] = torch.tensor(list(known)), torch.tensor(missing, dtype=torch.long)
        return batch

    @contextmanager
    def of(self, batch: dict[str, Any]) -> Iterator[None]:
        """Inside, the tower gives what the batch brings along and computes the rest; without a batch from `ahead` it computes all."""
        self._now = batch if "picture_keys" in batch else None
        if self._now:
            read = len(batch.get("known_features", ()))
            self.found, self.asked = self.found + read, self.asked + read + len(batch["picture_keys"])
        try:
            yield
        finally:
            self._now = None

    def metrics(self) -> dict[str, float]:
        """For a line of metrics.jsonl: the share of this rank's pictures that were read since the last call."""
        share = round(self.found / self.asked, 4) if self.asked else 0.0
        self.found = self.asked = 0
        return {"features_read": share}

    def __str__(self) -> str:
        known = sizes(self.folder.glob("*/*.safetensors"))
        return f"features of the frozen vision tower: {len(known):,} pictures known ({sum(known) / 1e9:.2f} GB in {self.folder})"

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.shutdown()

    def _forward(self, _: Any, pixel_values: torch.Tensor, *given: Any, **named: Any) -> Any:
        batch = self._now
        if batch is None:
            return self._compute(pixel_values, *given, **named)
        computed = self._compute(pixel_values, *given, **named) if batch["picture_keys"] else None
        return _Given(computed, batch, self._write)

    def _read(self, key: str) -> tuple[str, torch.Tensor] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self._file(key)
        try:
            ((name, feature),) = load(file.read_bytes()).items()
            field, _, known = name.rpartition(" ")
            if known != _checksum(feature):
                raise ValueError("its checksum is another")
        except FileNotFoundError:
            return None
        except OSError as error:  # the file may be whole
            if not self._unreadable:
                logger.warning("data.cache_features: '%s' cannot be read (%s); such pictures are computed again", file, error.strerror)
            self._unreadable = True
            return None
        except (SafetensorError, ValueError) as error:
            logger.warning("data.cache_features: '%s' cannot be read (%s); it is deleted, its picture computed again", file, error)
            with suppress(OSError):
                file.unlink()
            return None
        return field, feature

    def _write(self, field: str, features: torch.Tensor, keys: list[str]) -> None:
        for key, feature in zip(keys, features.detach().clone(), strict=True):  # the model may write into its own
            self._behind.acquire()
            self._writer.submit(self._put, self._file(key), field, feature)

    def _put(self, file: Path, field: str, feature: torch.Tensor) -> None:
        from safetensors.torch import save

        try:
            if self.room < 0 or file.exists():
                return
            feature = feature.cpu().contiguous()
            data = save({f"{field} {_checksum(feature)}": feature})
            self.room -= len(data)
            if self.room < 0:
                logger.warning(
                    "data.cache_features: '%s' is full; features of further pictures are computed each time (data.features_gb says how "
                    "much it may hold; folders of other towers in it may be deleted)", self.folder.parent
                )  # fmt: skip
                return
            _write_whole(file, data)
        except OSError as error:
            self.room = -1
            logger.warning("data.cache_features: '%s' cannot be written (%s); going on without it", file, error.strerror)
        finally:
            self._behind.release()

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class _Given:
    """In place of what a tower gives: the first of its outputs that is read, of all N pictures; the model may write into it."""

    def __init__(self, computed: Any, batch: dict[str, Any], keep: Any):
        self._computed, self._batch, self._keep, self._whole = computed, batch, keep, {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in LAYERED and (self._computed is None or getattr(self._computed, name, None) is not None):
            return _Layers(self, name)
        return self._field(name, None if self._computed is None else getattr(self._computed, name, None))

    def _field(self, name: str, computed: torch.Tensor | None) -> torch.Tensor | None:
        batch, known = self._batch, self._batch.get("known_field")
        if computed is None:
            return batch["known_features"] if name == known else None
        if name not in self._whole:
            if self._whole or (known or name) != name:
                raise ConfigError(f"data.cache_features: this model reads several outputs of its tower ({known or [*self._whole]}, {name})")
            self._keep(name, computed, batch["picture_keys"])
            self._whole[name] = computed if known is None else _joined(computed, batch)
        return self._whole[name]


class _Layers:
    """Outputs by number."""

    def __init__(self, given: _Given, name: str):
        self._given, self._name = given, name

    def __getitem__(self, number: int) -> Any:
        given = self._given
        return given._field(f"{self._name}.{number}", None if given._computed is None else getattr(given._computed, self._name)[number])

    def __bool__(self) -> bool:
        return self._given._computed is not None or str(self._given._batch.get("known_field")).startswith(self._name)


def _joined(computed: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    known = batch["known_features"]
    whole = computed.new_empty(len(computed) + len(known), *computed.shape[1:])
    return whole.index_copy(0, batch["known_places"], known.to(computed.dtype)).index_copy(0, batch["missing_places"], computed)


def _digest(pixels: torch.Tensor) -> str:
    import torch

    digest = hashlib.blake2b(f"{pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=20)
    digest.update(pixels.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _checksum(feature: torch.Tensor) -> str:
    import torch

    return f"{zlib.crc32(feature.flatten().view(torch.uint8).numpy()):08x}"


def _write_whole(file: Path, data: bytes) -> None:
    """A reader finds all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_features(config: Config, family: Family, hf_config: Any, world_size: int) -> None:
    """
    Raises:
        ConfigError: features are to be kept, and those of this architecture, or with these settings, cannot be.
    """
    if not config.data.cache_features:
        return
    if not family.caches:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.caches))
        raise ConfigError(
            f"data.cache_features: the vision tower of {family.model_type} takes its pictures in another form than one of one size a row; "
            f"features are kept of {known}. Set data.cache_features: false"
        )
    if isinstance(getattr(hf_config, "vision_feature_layer", None), list | tuple):
        raise ConfigError("data.cache_features: this model reads several layers of its tower; features of one are kept; set it to false")
    if zero_stage(config, world_size) == 3:
        raise ConfigError(
            "data.cache_features: at ZeRO stage 3 all ranks compute the tower together, and with what is kept they would not; "
            "set engine.zero_stage to 2 or less, or data.cache_features: false"
        )


def keep_features(model: Any, family: Family, config: DataConfig, dtype: torch.dtype, ranks: int) -> TowerFeatures:
    """Let a model that is ready to train read its frozen tower's features, and keep those that it computes.

    Args:
        dtype: of the computation.
        ranks: that write into the folder; each may add its part of what is left of `data.features_gb`.

    Raises:
        ConfigError: the tower trains, or the folder cannot be made.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = base.get_submodule(family.vision)
    training = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    if training:
        raise ConfigError(
            f"data.cache_features: {training:,} weights of the vision tower train, so what it gives changes; freeze it "
            "(lora.vision: false, or model.freeze: [vision]), or set data.cache_features: false"
        )
    of_all = (Path(config.cache_dir) if config.cache_dir else cache_folder()) / "features"
    folder = of_all / _fingerprint(tower, base.config, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir: '{folder}' cannot be made ({error.strerror}); give a folder that can be written") from None
    left = int(config.features_gb * 1e9) - sum(sizes(of_all.glob("*/*/*.safetensors")))
    model.tower_features = TowerFeatures(tower, folder, max(0, left) // ranks)
    return model.tower_features


def _fingerprint(tower: Any, config: Any, dtype: torch.dtype) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=12)
    layer = getattr(config, "vision_feature_layer", None)
    digest.update(repr((FORM, type(tower).__name__, layer, str(dtype), sorted(tower.config.to_dict().items(), key=str))).encode())
    for name, value in tower.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
