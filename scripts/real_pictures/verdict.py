"""What a run of the demonstration shows: its score on held-out pictures beside that on grey ones, and chance.

    python scripts/real_pictures/verdict.py RUN SEEN.json GREY.json [--out RESULT.json] [--command COMMAND]

SEEN and GREY are what `vlm-dist eval --json` printed. Every question is put to four pictures with four different answers: whoever gives
one answer to one text is right in a quarter at most, so chance and the most that text can do are both 25 %.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

CHANCE = 0.25


def error_of(share: float, samples: int) -> float:
    """Standard error of a share of so many samples."""
    return math.sqrt(share * (1 - share) / samples)


def verdict(seen: dict[str, Any], grey: dict[str, Any], summary: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Args:
        seen, grey: scores of `vlm-dist eval --json`.
        summary, lines: summary.json and metrics.jsonl of the run.
    """
    share, samples = seen["exact_match"], seen["samples"]
    above = (share - CHANCE) / error_of(CHANCE, samples)
    steps = [line for line in lines if "loss" in line]
    return {
        "samples": samples, "held_out": share, "no_picture": grey["exact_match"], "chance": CHANCE,
        "standard_errors_above_chance": round(above, 1), "by_kind": {
            kind: {"held_out": value, "no_picture": grey["by_kind"].get(kind)} for kind, value in sorted(seen["by_kind"].items())
        }, "before": summary.get("eval", {}).get("before"), "steps": summary.get("step", len(steps)),
        "training_s": summary.get("wall_s"),
        "loss": [round(steps[0]["loss"], 3), round(sum(line["loss"] for line in steps[-20:]) / len(steps[-20:]), 3)] if steps else None,
    }  # fmt: skip


def told(found: dict[str, Any]) -> str:
    rows = [f"{'':12} held-out pictures   grey pictures   chance"]
    every = {"all": {"held_out": found["held_out"], "no_picture": found["no_picture"]}} | found["by_kind"]
    rows += [f"{kind:12} {row['held_out']:17.1%} {row['no_picture'] or 0:15.1%} {CHANCE:8.0%}" for kind, row in every.items()]
    above = found["standard_errors_above_chance"]
    seen = "it sees" if above > 4 and found["held_out"] > found["no_picture"] else "no sight shown"
    return "\n".join([*rows, f"{found['samples']} questions; {above} standard errors above chance: {seen}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="What a run shows")
    parser.add_argument("run", type=Path)
    parser.add_argument("seen", type=Path)
    parser.add_argument("grey", type=Path)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--command", default="scripts/real_pictures.sh", help="that made the run, for the JSON")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((arguments.run / "summary.json").read_text())
    found = verdict(json.loads(arguments.seen.read_text()), json.loads(arguments.grey.read_text()), summary, lines)
    print(told(found))
    if arguments.out:
        arguments.out.write_text(json.dumps({"command": arguments.command} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
