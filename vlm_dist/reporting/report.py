"""report.html: one self-contained page about a run, from the files of its directory."""

from __future__ import annotations

import base64
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.reporting.plots import curves_plot, line_plot
from vlm_dist.run_dir import RunDir, read_jsonl, write_text

MOST_PICTURES = 48
MOST_EVENTS = 100
OF_EVERY_SCORE = ("phase", "step", "exact_match", "samples", "by_kind")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page to `out`, or to `run_dir/report.html`, and return its path.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    out = out or RunDir(run_dir).report
    write_text(out, render_report(run_dir))
    return out


def render_report(run_dir: Path, refresh: int | None = None) -> str:
    """The page.

    Args:
        refresh: seconds until it loads itself again.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    from jinja2 import Environment, PackageLoader

    run = RunDir(run_dir)
    rows, steps = read_rows(run)
    template = Environment(loader=PackageLoader("vlm_dist.reporting", "."), autoescape=True).get_template("report.html")
    return template.render(
        refresh=refresh,
        name=run_dir.resolve().name,
        facts=facts_of(run, steps),
        scores=scores_of(rows),
        metrics=list(dict.fromkeys(name for score in scores_of(rows) for name in score if name not in OF_EVERY_SCORE)),
        plots=_plots(steps, rows),
        answers=(answers := _answers(run)),
        kinds=sorted({answer["kind"] for answer in answers if answer.get("kind")}),
        events=_events(run),
        quarantined=read_jsonl(run.quarantine)[:100],
        config=run.config.read_text(encoding="utf-8"),
        environment=run.environment.read_text(encoding="utf-8") if run.environment.exists() else "",
    )


def read_rows(run: RunDir) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All lines of metrics.jsonl, and those of steps.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    rows = read_jsonl(run.metrics)
    steps = [row for row in rows if "loss" in row]
    if not run.config.exists() or not steps:
        raise ConfigError(f"{run.path}: no run with at least one step (needs config.yaml and metrics.jsonl); train first")
    return rows, steps


def facts_of(run: RunDir, steps: list[dict[str, Any]]) -> dict[str, str]:
    summary = run.read_summary() or {}
    last = steps[-1]
    seconds = sum(row["step_s"] for row in steps)
    facts = {
        "ended": summary.get("ended", "running, or killed"),
        "steps": f"{last['step']:,}",
        "samples": f"{last['samples']:,}",
        "tokens": f"{last['tokens']:,}",
        "tokens per second": f"{last['tokens'] / seconds:,.0f}",
        "waiting for data": f"{sum(row['data_wait_s'] for row in steps) / seconds:.1%}",
        "padding": f"{sum(row['padding_fraction'] for row in steps) / len(steps):.1%}",
        "peak memory": f"{max(row['peak_memory_bytes'] for row in steps) / 2**30:.2f} GiB",
    }
    if summary.get("wall_s"):
        facts["wall time"] = f"{summary['wall_s']:.0f} s"
    if summary.get("goodput") is not None:
        facts["goodput"] = f"{summary['goodput']:.0%}"
    if summary.get("reason"):
        facts["reason"] = summary["reason"]
    return facts


def scores_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"phase": row["phase"], "step": row["step"], **row["eval"]} for row in rows if "eval" in row]


def _plots(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    at = [row["step"] for row in steps]
    whole = [row for row in steps if row["loss"] is not None and row["grad_norm"] is not None]  # not those that were left out
    at_whole = [row["step"] for row in whole]
    plots = [
        ("Loss", line_plot(at_whole, [row["loss"] for row in whole], "mean over supervised tokens", log=True, smooth=True)),
        ("Learning rate", line_plot(at, [row["lr"] for row in steps], "")),
        ("Throughput", line_plot(at, [row["tokens_per_s"] for row in steps], "tokens per second", smooth=True)),
        ("Gradient norm", line_plot(at_whole, [row["grad_norm"] for row in whole], "before clipping", log=True, smooth=True)),
    ]
    plots += _more_plots(steps, whole)
    scores = scores_of(rows)
    if scores:
        shares = [100 * score["exact_match"] for score in scores]
        plots.append(("Held-out exact match", line_plot([score["step"] for score in scores], shares, "%", marks=True)))
    return plots


def _more_plots(steps: list[dict[str, Any]], whole: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Waiting, memory, evenness of the ranks, and the loss of each data set of a mixture."""

    def plot(rows: list[dict[str, Any]], values: list[float], label: str, **options: Any) -> str:
        return line_plot([row["step"] for row in rows], values, label, **options)

    waits = [100 * row["data_wait_s"] / max(row["step_s"], 1e-9) for row in steps]
    plots = [("Waiting for data", plot(steps, waits, "% of a step", smooth=True))]
    plots.append(("Memory", plot(steps, [row["peak_memory_bytes"] / 2**30 for row in steps], "most held at once, GiB")))
    ranks = [row for row in steps if row.get("busy_s", {}).get("slowest_rank") is not None]
    if any(row["busy_s"]["max"] > row["busy_s"]["mean"] for row in ranks):
        curves = [([row["step"] for row in ranks], [row["busy_s"][part] for row in ranks]) for part in ("mean", "max")]
        plots.append(("Own work of the ranks: mean, slowest", curves_plot(curves, "seconds of a step", smooth=True)))
    if any(any(row.get("imbalance", {}).values()) for row in steps):
        uneven = [row for row in steps if "imbalance" in row]
        for part, title in (("tokens", "Uneven tokens"), ("patches", "Uneven vision patches")):
            excess = [100 * row["imbalance"][part] for row in uneven]
            plots.append((title, plot(uneven, excess, "rank with most above the mean, %", smooth=True)))
    if routed := [row for row in steps if "experts" in row]:
        busiest, dead = ([100 * row["experts"][part] for row in routed] for part in ("busiest", "dead"))
        plots.append(("Busiest expert", plot(routed, busiest, "of its layer's tokens, %", smooth=True)))
        plots.append(("Experts without a token", plot(routed, [share / routed[0]["experts"]["of"] for share in dead], "of all, %")))
    for name in next((list(row["loss_by_dataset"]) for row in steps if "loss_by_dataset" in row), []):
        known = [row for row in whole if row.get("loss_by_dataset", {}).get(name) is not None]
        losses = [row["loss_by_dataset"][name] for row in known]
        plots.append((f"Loss of {name}", plot(known, losses, "mean over its supervised tokens", log=True, smooth=True)))
    return plots


def _events(run: RunDir) -> list[dict[str, Any]]:
    """What happened besides steps; of the checkpoints only the last."""
    rows = read_jsonl(run.events)
    saves = [row for row in rows if row["event"] == "checkpoint"]
    shown = [row for row in rows if row["event"] != "checkpoint" or row is saves[-1]]
    return [{**row, "clock": datetime.fromtimestamp(row["time"]).strftime("%Y-%m-%d %H:%M:%S")} for row in shown[-MOST_EVENTS:]]


def _answers(run: RunDir) -> list[dict[str, Any]]:
    """Held-out samples with their answers before and after."""
    before, after = (_by_place(read_jsonl(run.samples / f"{phase}.jsonl")) for phase in ("before", "after"))
    pairs = []
    for key, row in (after or before).items():
        thumbnail = run.samples / row["thumbnail"] if row.get("thumbnail") else None
        picture = base64.b64encode(thumbnail.read_bytes()).decode() if thumbnail and thumbnail.exists() else ""
        pairs.append({**row, "picture": picture, "marks": row.get("objects"), "before": before.get(key), "after": after.get(key)})
    return pairs[:MOST_PICTURES]


def _by_place(rows: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Answers by the place of their sample among the held-out ones, and its key: several shards may have equal keys, and another start
    may have asked others. Runs of an earlier vlm_dist have no places, but the same order."""
    return {(row.get("number", line), row["key"]): row for line, row in enumerate(rows)}
