"""The samples of `data.heldout`, which are held in memory."""

from __future__ import annotations

from vlm_dist.config import DataConfig
from vlm_dist.data.dataset import open_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import Sample, parse_sample
from vlm_dist.errors import BadSample


def read_heldout(config: DataConfig, limit: int | None, quarantine: Quarantine) -> list[Sample]:
    """Held-out samples, spread evenly over all shards when there are more than `limit`."""
    heldout = open_heldout(config)
    if heldout is None:
        return []
    total = len(heldout.index)
    wanted = range(total) if limit is None or total <= limit else [number * total // limit for number in range(limit)]
    samples = []
    for number in wanted:
        raw = heldout.raw(number)
        try:
            samples.append(parse_sample(raw, max_image_pixels=config.max_image_pixels, caption_prompt=config.caption_prompt))
        except BadSample as reason:
            quarantine.add(raw, str(reason))
    return samples
