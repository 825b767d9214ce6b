"""One self-contained page about several runs: their curves in one picture, their scores, and how their configurations differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.config_load import differing, load_config
from vlm_dist.errors import ConfigError
from vlm_dist.reporting.curves import left_out_of
from vlm_dist.reporting.plots import CURVES, curves_plot
from vlm_dist.reporting.report import facts_of, metrics_of, read_metrics, scores_of
from vlm_dist.run_dir import RunDir, read_jsonl, write_text

NOT_COMPARED = ("name", "output_dir")
CURVE_OF: tuple[tuple[str, str, str, bool], ...] = (
    ("Loss", "loss", "mean over supervised tokens", True),
    ("Gradient norm", "grad_norm", "before clipping", True),
    ("Learning rate", "lr", "", False),
    ("Throughput", "tokens_per_s", "tokens per second", False),
)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        ConfigError: one of them is no run with at least one step, or they are too many to tell apart.
    """
    from jinja2 import Environment, PackageLoader

    if len(run_dirs) > len(CURVES):
        raise ConfigError(f"report: {len(run_dirs)} runs; at most {len(CURVES)} can be told apart in one picture")
    runs = [RunDir(run_dir) for run_dir in run_dirs]
    read = [read_metrics(run) for run in runs]
    names = _names(run_dirs)
    scores = [scores_of(metrics.scores) for metrics in read]
    template = Environment(loader=PackageLoader("vlm_dist.reporting", "."), autoescape=True).get_template("compare.html")
    page = template.render(
        names=names,
        facts=_as_table([facts_of(run, metrics) for run, metrics in zip(runs, read, strict=True)]),
        left_out=[f"{name}: {words}" for name, metrics in zip(names, read, strict=True) for words in left_out_of(metrics)],
        scores=_last_scores(scores),
        apart=_asked_otherwise(runs),
        plots=[*_plots([metrics.means for metrics in read]), *_score_plots(scores)],
        differences=differing([load_config(run.config) for run in runs], [key for key in Config.model_fields if key not in NOT_COMPARED]),
    )
    write_text(out, page)
    return out


def _asked_otherwise(runs: Sequence[RunDir]) -> str:
    """Whether the scores are of different held-out questions, in words; empty where they are not, or no run has answers."""
    asked = []
    for run in runs:
        rows = read_jsonl(run.samples / "after.jsonl") or read_jsonl(run.samples / "before.jsonl")
        asked.append({(row["key"], row["prompt"], row["truth"]) for row in rows})
    known = [each for each in asked if each]
    if not known or all(each == known[0] for each in known):
        return ""
    common = len(set.intersection(*known))
    return f"{', '.join(f'{len(each):,}' for each in known)} questions, of which {common:,} are the same"


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names; with the folder above where two are alike."""
    short = [run_dir.resolve().name for run_dir in run_dirs]
    long = [f"{run_dir.resolve().parent.name}/{run_dir.resolve().name}" for run_dir in run_dirs]
    return [name if short.count(name) == 1 else more for name, more in zip(short, long, strict=True)]


def _as_table(columns: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, "") for column in columns]) for key in keys]


def _plots(runs: list[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    def curves(key: str) -> list[tuple[list[float], list[float]]]:
        known = [[row for row in steps if row[key] is not None] for steps in runs]
        return [([row["step"] for row in steps], [row[key] for row in steps]) for steps in known]

    return [(title, curves_plot(curves(key), unit, log=log, smooth=key != "lr")) for title, key, unit, log in CURVE_OF]


def _score_plots(scores: list[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    if not all(scores):
        return []
    curves = [([score["step"] for score in run], [100 * score["exact_match"] for score in run]) for run in scores]
    plots = [("Held-out exact match", curves_plot(curves, "%", marks=True))]
    for name in metrics_of([score for run in scores for score in run]):
        known = [[score for score in run if name in score] for run in scores]
        plots.append(
            (f"Held-out {name}", curves_plot([([one["step"] for one in run], [one[name] for one in run]) for run in known], "", marks=True))
        )
    return plots


def _last_scores(scores: list[list[dict[str, Any]]]) -> list[tuple[str, list[str]]]:
    """The last score of each run, metric by metric and kind by kind."""
    last = [run[-1] if run else {} for run in scores]
    if not any(last):
        return []
    shares: Callable[[float | None], str] = lambda value: "" if value is None else f"{100 * value:.1f} %"  # noqa: E731
    table = [("at step", [str(one.get("step", "")) for one in last]), ("exact match", [shares(one.get("exact_match")) for one in last])]
    table += [(name, ["" if name not in one else f"{one[name]:.3f}" for one in last]) for name in metrics_of(last)]
    blind = [one.get("without_pictures") or {} for one in last]
    if any(blind):
        table.append(("exact match, pictures greyed out", [shares(one.get("exact_match")) for one in blind]))
        table.append(("right with the picture alone", [shares(one.get("needs_eyes")) for one in blind]))
    kinds = dict.fromkeys(kind for one in last for kind in one.get("by_kind", {}))
    return table + [(f"{kind}, exact", [shares(one.get("by_kind", {}).get(kind)) for one in last]) for kind in kinds]
