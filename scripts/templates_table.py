"""What becomes of conversations in the chat templates that models are released with, as a table of docs/models.md.

    python scripts/templates_table.py --page docs/models.md

The templates are read from TRL's package, which collects them; each is put on the tiny checkpoint of its family.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.messages import read_messages
from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_text
from vlm_dist.testing import tiny_checkpoint

RELEASED = {
    "gemma3": ["gemma3"],
    "gemma4": ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"],
    "idefics3": ["idefics3"],
    "llava_next": ["llava_next"],
    "qwen2_5_vl": ["qwen2_5_vl"],
    "qwen2_vl": ["qwen2_5_vl"],
    "qwen3_5": ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"],
    "qwen3_vl": ["qwen3_vl"],
    "smolvlm": ["smolvlm"],
}
BEGIN, END = "<!-- made by scripts/templates_table.py -->", "<!-- end of templates -->"
PICTURE = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
TOOLS = [{"type": "function", "function": {"name": "zoom", "description": "Look.", "parameters": {"type": "object", "properties": {}}}}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}
CASES: dict[str, list[dict[str, Any]]] = {
    "turns": [user(PICTURE), assistant("red"), user("Sure?"), assistant("yes")],
    "system": [{"role": "system", "content": "Be short."}, user(PICTURE), assistant("red")],
    "two answers in a row": [user(PICTURE), assistant("red"), assistant("yes")],
    "assistant first": [assistant("Hello."), user(PICTURE), assistant("red")],
    "reasoning": [user(PICTURE), assistant("red", reasoning_content="I look.")],
    "tools": [user(PICTURE), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "closer"}, assistant("red")],
}


def template(name: str) -> str:
    """A released template's text."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def outcome(encoder: Encoder, case: str) -> str:
    """What is learnt of a conversation, end-of-turns as ⏎; or why it is refused."""
    turns = CASES[case]
    images = [Image.new("RGB", (64, 48), "red")] * sum("image" in json.dumps(turn) for turn in turns)
    try:
        encoded = encoder.encode(Sample("k", "s", read_messages(turns), images, tools=TOOLS if case == "tools" else None))
    except BadSample as reason:
        return f"refused: {str(reason)[:80]}"
    text = encoder.processor.tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED])
    left_out = [name for kind, name in sorted(encoded.notes) if kind == "template"]
    return f"`{text.replace(encoder.habits.tail, '⏎').strip()}`" + (f" (left out, told: {', '.join(left_out)})" if left_out else "")


def table() -> str:
    """As Markdown."""
    from transformers import AutoProcessor

    lines = ["| family | template | " + " | ".join(CASES) + " |", "|" + "---|" * (len(CASES) + 2)]
    for family, names in RELEASED.items():
        with tempfile.TemporaryDirectory() as folder:
            processor = AutoProcessor.from_pretrained(str(tiny_checkpoint(family, folder)))
            for name in names:
                processor.chat_template = template(name)
                encoder = Encoder(processor, 8192)
                cells = [outcome(encoder, case).replace("\n", " ").replace("|", "\\|") for case in CASES]
                lines.append("| " + " | ".join([family, name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    arguments = parser.parse_args()
    quiet_libraries()
    made = f"{BEGIN}\nTemplates of TRL {version('trl')}; what is learnt of each conversation, an end-of-turn as ⏎:\n\n{table()}\n{END}"
    if arguments.page is None:
        print(made)
        return
    text = arguments.page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(arguments.page, before + made + after)


if __name__ == "__main__":
    main()
