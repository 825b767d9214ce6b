"""One self-contained page of what `vlm-dist inspect` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_dist.run_dir import write_text


def write_inspection(found: dict[str, Any], path: Path) -> None:
    """Write the page; `found` is what `training.inspection.inspect` returns."""
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("vlm_dist.reporting", "."), autoescape=True).get_template("inspect.html")
    write_text(path, template.render(found=found))
