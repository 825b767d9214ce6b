"""The curves of a run's page over its steps, and what of metrics.jsonl they leave out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlm_dist.reporting.plots import curves_plot, line_plot
from vlm_dist.reporting.thinning import Metrics


def left_out_of(metrics: Metrics) -> list[str]:
    """What of metrics.jsonl the page does not show, in words."""
    words = []
    if metrics.width > 1:
        words.append(
            f"Of {metrics.count:,} steps each curve goes through the lowest and the highest value of every {metrics.width:,}; the clear "
            "line is their mean. Totals are of all steps."
        )
    if metrics.odd:
        words.append(f"{metrics.odd:,} lines of metrics.jsonl hold neither a whole step nor an evaluation and are left out.")
    return words


def _curve(metrics: Metrics, value: Callable[[dict[str, Any]], float | None], label: str, **options: Any) -> str:
    """`value` of each step; where it is None the step has no point."""

    def points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        known = [(row["step"], found) for row in rows if (found := value(row)) is not None]
        return [step for step, _ in known], [found for _, found in known]

    return line_plot(*points(metrics.rows), label, means=points(metrics.means), **options)


def _of_whole(name: str) -> Callable[[dict[str, Any]], float | None]:
    """A number of the steps that were not left out."""
    return lambda row: None if row["loss"] is None or row["grad_norm"] is None else row[name]


def plots_of(metrics: Metrics) -> list[tuple[str, str]]:
    """(title, `<svg>`) of each curve over the steps."""
    plots = [
        ("Loss", _curve(metrics, _of_whole("loss"), "mean over supervised tokens", log=True, smooth=True)),
        ("Learning rate", _curve(metrics, lambda row: row["lr"], "")),
        ("Throughput", _curve(metrics, lambda row: row["tokens_per_s"], "tokens per second", smooth=True)),
        ("Gradient norm", _curve(metrics, _of_whole("grad_norm"), "before clipping", log=True, smooth=True)),
    ]
    return [*plots, *_more_plots(metrics)]


def _more_plots(metrics: Metrics) -> list[tuple[str, str]]:
    """Waiting, memory, evenness of the ranks, and the loss of each data set of a mixture."""
    share: Callable[[dict[str, Any]], float] = lambda row: 100 * row["data_wait_s"] / max(row["step_s"], 1e-9)  # noqa: E731
    plots = [("Waiting for data", _curve(metrics, share, "% of a step", smooth=True))]
    plots.append(("Memory", _curve(metrics, lambda row: row["peak_memory_bytes"] / 2**30, "most held at once, GiB")))
    ranks = [row for row in metrics.means if row.get("busy_s", {}).get("slowest_rank") is not None]
    if any(row["busy_s"]["max"] > row["busy_s"]["mean"] for row in ranks):
        curves = [([row["step"] for row in ranks], [row["busy_s"][part] for row in ranks]) for part in ("mean", "max")]
        plots.append(("Own work of the ranks: mean, slowest", curves_plot(curves, "seconds of a step", smooth=True)))
    rows = metrics.rows
    if any(any(row.get("imbalance", {}).values()) for row in rows):
        for part, title in (("tokens", "Uneven tokens"), ("patches", "Uneven vision patches")):
            excess = partial(_excess, part)
            plots.append((title, _curve(metrics, excess, "rank with most above the mean, %", smooth=True)))
    if any("experts" in row for row in rows):
        busiest, dead = partial(_of_experts, lambda one: one["busiest"]), partial(_of_experts, lambda one: one["dead"] / one["of"])
        plots.append(("Busiest expert", _curve(metrics, busiest, "of a layer's tokens, %", smooth=True)))
        plots.append(("Experts without a token", _curve(metrics, dead, "of all experts, %", smooth=True)))
    for name in dict.fromkeys(name for row in rows for name in row.get("loss_by_dataset", {})):
        losses = partial(_loss_of, name)
        plots.append((f"Loss of {name}", _curve(metrics, losses, "mean over its supervised tokens", log=True, smooth=True)))
    return plots


def _excess(part: str, row: dict[str, Any]) -> float | None:
    return 100 * row["imbalance"][part] if part in row.get("imbalance", {}) else None


def _of_experts(share: Callable[[dict[str, Any]], float], row: dict[str, Any]) -> float | None:
    return 100 * share(row["experts"]) if "experts" in row else None


def _loss_of(name: str, row: dict[str, Any]) -> float | None:
    return row.get("loss_by_dataset", {}).get(name) if _of_whole("loss")(row) is not None else None
