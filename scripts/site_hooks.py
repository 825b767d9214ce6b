"""What the site needs beyond plain MkDocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that leaves docs/ works in the repository only: on the site it is the path of the file, which must exist."""
    folder = Path(page.file.abs_src_path).parent

    def replace(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link[0]  # MkDocs checks it
        path = f"`{target.relative_to(ROOT).as_posix()}`"
        return path if link[1].strip("`") == path.strip("`") else f"{link[1]} ({path})"

    return OUTSIDE.sub(replace, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """A notebook's page brings a script that would fetch Mermaid from the network, for diagrams that it has none of; and its links to
    pages are those of the repository."""
    if not page.file.src_path.endswith(".ipynb"):
        return output
    output = re.sub(r'<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', "", output, flags=re.DOTALL)
    return re.sub(r'href="((?:\.\./)?[\w/-]+)\.(?:md|ipynb)(["#])', r'href="\1.html\2', output)
