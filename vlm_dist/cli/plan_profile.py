"""The tables of `vlm-dist plan --profile`."""

from __future__ import annotations

from typing import Any

MOST = 14  # rows of a table


def show_profile(plan: dict[str, Any]) -> None:
    """Part by part and operation by operation; with `--against` both beside one another."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    mine, other = plan["profile"], plan.get("against")
    title = f"{plan['name']}: a micro-batch on {plan['gpu']['name']}, forward and backward, counted (operations at their roofline)"
    console.print(title, style="bold", markup=False)
    for line in _facts(mine, other):
        console.print(line, markup=False)
    for what, title in (("part", "part of the model"), ("operation", "operation")):
        console.print(_table(title, mine, other, what))
    for name, number in mine["waits"].items():
        console.print(f"  waits for the device: {number} x {name}", markup=False)


def _facts(mine: dict[str, Any], other: dict[str, Any] | None) -> list[str]:
    shown = [
        ("operations launched", lambda one: f"{one['launches']:,}"),
        ("bytes moved", lambda one: f"{one['moved_bytes'] / 1e9:,.1f} GB"),
        ("time", lambda one: f"{one['roofline_ms']:,.1f} ms"),
        ("of that, products", lambda one: f"{one['limit_ms']:,.1f} ms, {one['share']:.0%}"),
        ("kept a language token and layer", lambda one: f"{one['kept_bytes']['language_token_layer'] / 1e3:,.1f} kB"),
        ("kept a patch and vision block", lambda one: f"{one['kept_bytes']['vision_patch_block'] / 1e3:,.1f} kB"),
        ("waits for the device", lambda one: f"{one['device_waits']:,}"),
    ]
    beside = f"  (kernels {other['kernels']}: {{}})" if other else ""
    return [f"  {name:<32}{show(mine):>16}" + (beside.format(show(other)) if other else "") for name, show in shown]


def _table(title: str, mine: dict[str, Any], other: dict[str, Any] | None, what: str) -> Any:
    from rich.table import Table

    from vlm_dist.planning.profile import by

    rows, others = by(mine["rows"], what), by(other["rows"], what) if other else {}
    against = [f"ms, {other['kernels']}", f"launches, {other['kernels']}"] if other else []
    table = Table(title, "ms", "launches", "GB moved", *against, box=None, padding=(0, 2, 0, 2), header_style="")
    order = list(dict.fromkeys([*rows, *others]))
    for name in order[:MOST]:
        row, beside = rows.get(name, {}), others.get(name, {})
        cells = [f"{row.get('roofline_ms', 0):.2f}", f"{row.get('launches', 0):,.0f}", f"{row.get('moved_bytes', 0) / 1e9:.2f}"]
        cells += [f"{beside.get('roofline_ms', 0):.2f}", f"{beside.get('launches', 0):,.0f}"] if other else []
        table.add_row(name, *cells)
    if len(order) > MOST:
        rest = sum(rows.get(name, {}).get("roofline_ms", 0) for name in order[MOST:])
        table.add_row(f"{len(order) - MOST} more", f"{rest:.2f}", "", "", *([""] * len(against)))
    return table
