"""report.html: one self-contained page about a run, from the files of its directory."""

from __future__ import annotations

import base64
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.reporting.curves import left_out_of, plots_of
from vlm_dist.reporting.plots import line_plot
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
        plots=[*plots_of(metrics), *_score_plots(scores_of(rows))],
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


def _score_plots(scores: list[dict[str, Any]]) -> list[tuple[str, str]]:
    plots = []
    if scores:
        shares = [100 * score["exact_match"] for score in scores]
        plots.append(("Held-out exact match", line_plot([score["step"] for score in scores], shares, "%", marks=True)))
    for name in metrics_of(scores):
        known = [score for score in scores if name in score]
        plots.append((f"Held-out {name}", line_plot([one["step"] for one in known], [one[name] for one in known], "", marks=True)))
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
