"""The quarantine of a run, which others may read."""

from __future__ import annotations

from typing import Any

from vlm_dist.data.quarantine import Quarantine
from vlm_dist.redaction import redacted


class RedactedQuarantine(Quarantine):
    """Notes the addresses of shards without their secrets."""

    def note(self, raw: dict[str, Any], reason: str) -> tuple[str, str]:
        return super().note({**raw, "__url__": redacted(str(raw.get("__url__", "")))}, redacted(reason))
