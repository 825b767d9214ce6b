"""The figures of docs/gpu.md that were taken on cards, from the raw results of scripts/gpu_check.sh.

python scripts/gpu_page.py          # writes the part between the two marks
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "gpu.md", ROOT / "docs" / "benchmarks" / "gpu"
BEGIN, END = "<!-- made by scripts/gpu_page.py -->", "<!-- end of what scripts/gpu_page.py made -->"

VERDICTS = ("right", "wrong", "slow", "skipped")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)] + [""]


def parts(results: dict[str, Any]) -> Iterator[list[str]]:
    for name, content in results.items():
        counts = [str(sum(check["verdict"] == verdict for check in content["checks"])) for verdict in VERDICTS]
        ended = "stopped before its end" if content.get("unfinished") or content.get("failed") else f"{content['seconds']:.0f} s"
        yield [f"[{name}](benchmarks/gpu/{content['card']}/{name}.json)", *counts, ended]


def speed(raw: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in raw["results"].items():
        if isinstance(found, dict) and "step_s" in found:
            mfu = f"{found['mfu']:.1%}" if "mfu" in found else ""
            yield [name, f"{found['tokens_per_s']:,.0f}", f"{1000 * found['step_s']:.0f} ms", f"{found['peak_bytes'] / 1e9:.1f} GB", mfu]


def planned(raw: dict[str, Any]) -> Iterator[list[str]]:
    for line in raw["results"].get("plan against the card", []):
        setting, plan, card = re.fullmatch(r"(.*): planned ([\d,]+), measured ([\d,]+) bytes", line).groups()  # type: ignore[union-attr]
        bytes_ = [int(number.replace(",", "")) for number in (plan, card)]
        yield [setting, *(f"{number / 1e9:.2f} GB" for number in bytes_), f"{bytes_[0] / bytes_[1] - 1:+.1%}"]


def kernels(raw: dict[str, Any]) -> Iterator[list[str]]:
    for row in raw["results"]["kernels"]["results"]:
        others = {name: value["ms"] for name, value in row.items() if isinstance(value, dict) and name != "ours"}
        yield [row["kernel"], row["shape"], f"{row['ours']['ms']:.3f}", ", ".join(f"{name} {value:.3f}" for name, value in others.items())]


def step(raw: dict[str, Any]) -> str:
    found = raw["results"]["profile"]
    wall, host, busy = (f"{found[f'{name}_us'] / 1000:.0f} ms" for name in ("wall", "host", "busy"))
    return (
        f"A micro-batch of Qwen2.5-VL-7B (a row of 2,048 tokens, nothing recomputed): {wall}, in which the host is busy for {host} and the "
        f"card for {busy}, in {found['launches']:,} kernels; the host waits for the card {len(raw['results']['syncs'])} times.\n"
    )


def of_card(folder: Path) -> list[str]:
    raw = {path.stem: {**json.loads(path.read_text()), "card": folder.name} for path in sorted(folder.glob("*.json"))}
    machine = next(iter(raw.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"### {machine['gpus'][0].split(',')[0]}", "", f"Python {machine['python']}, {versions}.", ""]
    lines += table(["part", *VERDICTS, "took"], list(parts(raw)))
    if "speed" in raw:
        lines += ["Qwen2.5-VL-7B, random weights in NF4, adapters of rank 16, rows of 2,048 tokens with a picture of 896 x 896:", ""]
        lines += table(["", "tokens/s", "a step", "peak", "MFU"], list(speed(raw["speed"])))
    if "profiled" in raw:
        lines += [step(raw["profiled"])]
    if "memory" in raw:
        lines += ["What a plan says that a step takes, beside the card (Qwen2.5-VL-3B with few layers):", ""]
        lines += table(["kernels", "planned", "measured", ""], list(planned(raw["memory"])))
    if "pieces" in raw:
        lines += ["Milliseconds of the card, forward and backward:", ""]
        lines += table(["kernel", "shape", "ours", "others"], list(kernels(raw["pieces"])))
    return lines


def page(text: str) -> str:
    found = [line for folder in sorted(FOLDER.iterdir()) for line in of_card(folder)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return "\n".join([before + BEGIN, "", *found, END]) + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
