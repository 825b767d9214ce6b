"""Line plots as SVG text whose ink takes the page's colours, light or dark."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlm_dist.reporting.thinning import extremes

INK, LINE, FAINT = "#010203", "#040506", "#070809"  # stand-ins, replaced by the page's own colours
CURVES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")


def line_plot(
    x: Sequence[float], y: Sequence[float], unit: str, *, log: bool = False, smooth: bool = False, marks: bool = False,
    means: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:  # fmt: skip
    """An `<svg>` element of one curve; of one of very many points those that are extreme are drawn.

    Args:
        unit: label of the vertical axis.
        log: logarithmic vertical axis, where all values are positive.
        smooth: draw the values faintly and their moving average over 5 % of the points clearly.
        marks: mark the points.
        means: what the moving average is taken of, where x and y are not every point.
    """
    x, y = extremes(list(x), list(y))
    with _axes(unit, list(y), log=log) as (axes, svg):
        if smooth and len(y) >= 20:
            axes.plot(x, y, color=FAINT, linewidth=0.8)
            at, mean = means or (x, y)
            axes.plot(at, _moving_average(mean, max(2, len(mean) // 20)), color=LINE, linewidth=1.6)
        else:
            axes.plot(x, y, color=LINE, linewidth=1.6, marker="o" if marks or len(y) == 1 else None, markersize=4)
    return svg[0]


def curves_plot(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]], unit: str, *, log: bool = False, smooth: bool = False, marks: bool = False
) -> str:
    """An `<svg>` element of several curves (x, y), in the page's colours --curve-1, --curve-2, ... ; the arguments of `line_plot`."""
    with _axes(unit, [value for _, y in curves for value in y], log=log) as (axes, svg):
        for number, (x, y) in enumerate(curves):
            y = _moving_average(y, max(2, len(y) // 20)) if smooth and len(y) >= 20 else y
            axes.plot(x, y, color=CURVES[number % len(CURVES)], linewidth=1.5, marker="o" if marks or len(y) == 1 else None, markersize=4)
    return svg[0]


@contextmanager
def _axes(unit: str, values: list[float], *, log: bool) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw into; on leaving, the SVG is in the list."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    made: list[str] = []
    with pyplot.rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "vlm_dist"}):
        figure, axes = pyplot.subplots(figsize=(4.6, 2.6), layout="constrained")
        yield axes, made
        if log and values and min(values) > 0:
            axes.set_yscale("log")
        elif not values or min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(unit, color=INK)
        axes.tick_params(which="both", colors=INK, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, linewidth=0.3, alpha=0.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    curves = [(colour, f"var(--curve-{number})") for number, colour in enumerate(CURVES, start=1)]
    for stand_in, colour in ((INK, "currentColor"), (LINE, "var(--line)"), (FAINT, "var(--faint)"), *curves):
        svg = svg.replace(stand_in, colour)
    made.append(svg)


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each point (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
