"""report.html: one self-contained page about a run, from the files of its directory."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.reporting.plots import curves_plot, line_plot
from vlm_dist.reporting.thinning import Metrics
from vlm_dist.run_dir import RunDir, read_jsonl, write_text

MOST_PICTURES = 48
MOST_EVENTS = 100
OF_EVERY_SCORE = ("phase", "step", "exact_match", "samples", "by_kind", "without_pictures")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page to `out`, or to `run_dir/report.html`, and return its path.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    out = out or RunDir(run_dir).report
    write_text(out, render_report(run_dir))
    return out


def render_report(run_dir: Path, refresh: int | None = None, known: Metrics | None = None) -> str:
    """The page.

    Args:
        refresh: seconds until it loads itself again.
        known: what was read of metrics.jsonl before.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    from jinja2 import Environment, PackageLoader

    run = RunDir(run_dir)
    metrics = read_metrics(run, known)
    rows = metrics.scores
    template = Environment(loader=PackageLoader("vlm_dist.reporting", "."), autoescape=True).get_template("report.html")
    return template.render(
        refresh=refresh,
        name=run_dir.resolve().name,
        facts=facts_of(run, metrics),
        left_out=left_out_of(metrics),
        scores=scores_of(rows),
        metrics=metrics_of(scores_of(rows)),
        lead=_lead(run, scores_of(rows)),
        plots=_plots(metrics, rows),
        answers=(answers := _answers(run)),
        answered=max(len(read_jsonl(run.samples / f"{phase}.jsonl")) for phase in ("before", "after")),
        kinds=sorted({answer["kind"] for answer in answers if answer.get("kind")}),
        events=_events(run),
        quarantined=read_jsonl(run.quarantine)[:100],
        config=run.config.read_text(encoding="utf-8"),
        environment=run.environment.read_text(encoding="utf-8") if run.environment.exists() else "",
    )


def read_metrics(run: RunDir, known: Metrics | None = None) -> Metrics:
    """metrics.jsonl; with `known` only what was written since.

    Raises:
        ConfigError: it is no run directory, or nothing has been trained yet.
    """
    metrics = (known or Metrics(run.metrics)).update()
    if not run.config.exists() or not metrics.count:
        raise ConfigError(f"{run.path}: no run with at least one step (needs config.yaml and metrics.jsonl); train first")
    return metrics


def facts_of(run: RunDir, metrics: Metrics) -> dict[str, str]:
    summary = run.read_summary() or {}
    last, seconds = metrics.last, max(metrics.seconds, 1e-9)
    facts = {
        "ended": summary.get("ended", "running, or killed"),
        "steps": f"{last['step']:,}",
        "samples": f"{last['samples']:,}",
        "tokens": f"{last['tokens']:,}",
        "tokens per second": f"{last['tokens'] / seconds:,.0f}",
        "waiting for data": f"{metrics.waited / seconds:.1%}",
        "padding": f"{metrics.padding / metrics.count:.1%}",
        "peak memory": f"{metrics.peak_bytes / 2**30:.2f} GiB",
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


def metrics_of(scores: list[dict[str, Any]]) -> list[str]:
    """The metrics besides exact match, in the order in which they came."""
    return list(dict.fromkeys(name for score in scores for name in score if name not in OF_EVERY_SCORE))


def shown(name: str, value: float) -> str:
    """A score in words: exact match in per cent."""
    return f"{100 * value:.1f} %" if name == "exact_match" else f"{value:.3f}"


def _lead(run: RunDir, scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The headline: the score that the run goes by, before and after training, and what is right without the pictures too."""
    first, last = (next((score for score in scores if score["phase"] == phase), None) for phase in ("before", "after"))
    if first is None or last is None:
        return None
    name = _best_metric(run)
    name = name if name in first and name in last else "exact_match"
    others = [f"exact match {shown('exact_match', first['exact_match'])} before, {shown('exact_match', last['exact_match'])} after"]
    blind = last.get("without_pictures")
    return {
        "what": "answers exactly right" if name == "exact_match" else name,
        "before": shown(name, first[name]),
        "after": shown(name, last[name]),
        "samples": last["samples"],
        "more": others if name != "exact_match" else [],
        "blind": blind and {
            "share": shown(name, blind.get(name, blind["exact_match"])), "seen": shown(name, blind["with_pictures"].get(name, 0.0)),
            "needs_eyes": shown("exact_match", blind["needs_eyes"]), "samples": blind["samples"],
        },
    }  # fmt: skip


def _best_metric(run: RunDir) -> str:
    """checkpoint.best_metric, of a configuration of any version."""
    from ruamel.yaml import YAML, YAMLError

    try:
        return (YAML(typ="safe", pure=True).load(run.config.read_text(encoding="utf-8")).get("checkpoint") or {})["best_metric"]
    except (YAMLError, KeyError, AttributeError):
        return "exact_match"


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


def _plots(metrics: Metrics, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    plots = [
        ("Loss", _curve(metrics, _of_whole("loss"), "mean over supervised tokens", log=True, smooth=True)),
        ("Learning rate", _curve(metrics, lambda row: row["lr"], "")),
        ("Throughput", _curve(metrics, lambda row: row["tokens_per_s"], "tokens per second", smooth=True)),
        ("Gradient norm", _curve(metrics, _of_whole("grad_norm"), "before clipping", log=True, smooth=True)),
    ]
    plots += _more_plots(metrics)
    scores = scores_of(rows)
    if scores:
        shares = [100 * score["exact_match"] for score in scores]
        plots.append(("Held-out exact match", line_plot([score["step"] for score in scores], shares, "%", marks=True)))
    for name in metrics_of(scores):
        known = [score for score in scores if name in score]
        plots.append((f"Held-out {name}", line_plot([one["step"] for one in known], [one[name] for one in known], "", marks=True)))
    return plots


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
