"""Line plots as SVG text whose ink takes the page's colours, light or dark."""

from __future__ import annotations

import io
from collections.abc import Sequence

INK, LINE, FAINT = "#010203", "#040506", "#070809"  # stand-ins, replaced by the page's own colours


def line_plot(x: Sequence[float], y: Sequence[float], unit: str, *, log: bool = False, smooth: bool = False, marks: bool = False) -> str:
    """An `<svg>` element of one curve.

    Args:
        unit: label of the vertical axis.
        log: logarithmic vertical axis, where all values are positive.
        smooth: draw the values faintly and their moving average over 5 % of the points clearly.
        marks: mark the points.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "vlm_dist"}):
        figure, axes = pyplot.subplots(figsize=(4.6, 2.6), layout="constrained")
        if smooth and len(y) >= 20:
            axes.plot(x, y, color=FAINT, linewidth=0.8)
            axes.plot(x, _moving_average(y, max(2, len(y) // 20)), color=LINE, linewidth=1.6)
        else:
            axes.plot(x, y, color=LINE, linewidth=1.6, marker="o" if marks or len(y) == 1 else None, markersize=4)
        if log and min(y) > 0:
            axes.set_yscale("log")
        elif min(y) >= 0:
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
    for stand_in, colour in ((INK, "currentColor"), (LINE, "var(--line)"), (FAINT, "var(--faint)")):
        svg = svg.replace(stand_in, colour)
    return svg


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each point (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
