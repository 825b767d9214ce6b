"""The files of a sample in a tar, by what stands behind the first dot of their names."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.data.clips import is_of_video

PICTURE_MEMBER = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp)$")
TEXT_MEMBERS = ("txt", "text", "caption")


def picture_members(raw: dict[str, Any]) -> list[str]:
    """Names of the picture members, by number."""
    found = [(int(match[1] or 0), name) for name in raw if (match := PICTURE_MEMBER.fullmatch(name))]
    return [name for _, name in sorted(found)]


def members_found(raw: dict[str, Any]) -> str:
    """A sample's members in words, and the rule that made them one sample."""
    members = [name for name in raw if not name.startswith("__")]
    shown = ", ".join(members[:8]) + (f" and {len(members) - 8} more" if len(members) > 8 else "")
    is_dotted = any("." in name and not PICTURE_MEMBER.fullmatch(name) and not is_of_video(name) for name in members)
    dots = "; a name's key ends at its first dot" if is_dotted else ""
    return f" (the files of '{raw.get('__key__', '')}': {shown or 'none'}{dots})"
