"""The rooms of the project and who imports whom, drawn from the source as docs/architecture.svg.

    python scripts/draw_architecture.py

A room is a package or a top-level module of vlm_dist, its public API, launch/ or vlm_kernels. Rooms stand in layers, so that every arrow
points down; an arrow that a path of others already tells is left out. Captions are the first words of the docstrings.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "architecture.svg"
HEIGHT, GAP_X, GAP_Y, MARGIN = 96, 26, 52, 26
THREAD, STIFF = 14, 8  # the width of an arrow that passes a layer, and how much it wants to be straight
LEGEND = (
    "An arrow: imports. Imports that a path of arrows already tells are left out. Boxes grow with their lines.",
    "Blue: packages of vlm_dist; grey: its modules; green: what stands outside, and the public API.",
)
STYLE = """
  svg { --paper: #ffffff; --ink: #1f2933; --soft: #5b6875; --line: #7d8a97; --package: #e8eefb; --edge: #4a6fc4; --module: #f4f5f7; --rim: #b3bcc6; --outer: #e5f4ee; --brim: #2f8f6b; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #1b1f27; --ink: #e8ebf0; --soft: #a6b0bd; --line: #8b97a5; --package: #26324d; --edge: #7fa0ef; --module: #272c35; --rim: #56606d; --outer: #1f3a32; --brim: #5cc39b; }
  }
  text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--soft); font-size: 13.5px; }
  .name { fill: var(--ink); font-size: 17.5px; font-weight: 600; }
  .size { font-size: 12px; text-anchor: end; }
  .paper { fill: var(--paper); }
  .package { fill: var(--package); stroke: var(--edge); }
  .module { fill: var(--module); stroke: var(--rim); }
  .outer { fill: var(--outer); stroke: var(--brim); }
  .arrow { fill: none; stroke: var(--line); stroke-width: 1.6; }
  .head { fill: var(--line); }
"""  # noqa: E501


@dataclass
class Room:
    name: str
    kind: str  # package, module or outer
    caption: str
    lines: int
    imports: set[str] = field(default_factory=set)

    @property
    def width(self) -> int:
        return max(190 + round(2.4 * self.lines**0.5), 100 + 11 * len(self.title))

    @property
    def title(self) -> str:
        return "import vlm_dist" if self.name == "vlm_dist" else self.name


def source_files() -> list[Path]:
    return sorted(path for folder in ("vlm_dist", "launch", "kernels/vlm_kernels") for path in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "vlm_dist":
        return "vlm_dist" if parts[1] == "__init__" else parts[1]
    return parts[1] if parts[0] == "kernels" else parts[0]


def find_rooms() -> dict[str, Room]:
    """All rooms by name, with the rooms that each imports."""
    grouped: dict[str, list[Path]] = {}
    for path in source_files():
        grouped.setdefault(room_of(path), []).append(path)
    rooms = {}
    for name, paths in grouped.items():
        inside = paths[0].is_relative_to(ROOT / "vlm_dist")
        kind = "outer" if not inside or name == "vlm_dist" else "module" if paths[0].parent.name == "vlm_dist" else "package"
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        room = rooms[name] = Room(name, kind, caption(paths), rounded(lines))
        room.imports = {used for path in paths for used in imported_rooms(path, set(grouped))} - {name}
    return rooms


def imported_rooms(path: Path, rooms: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, second = [*name.split("."), ""][:2]
            if first == "vlm_dist":
                found.add(second if second in rooms else first)
            elif first in rooms:
                found.add(first)
    return found


def rounded(lines: int) -> int:
    """So coarse that the drawing does not change with every edit."""
    step = 500 if lines >= 1000 else 100
    return max(step, round(lines / step) * step)


def caption(paths: list[Path]) -> str:
    """The first words of the room's docstring; for a folder that has none, its files."""
    main = next((path for path in paths if path.name == "__init__.py"), paths[0] if len(paths) == 1 else None)
    words = " ".join(((main and ast.get_docstring(ast.parse(main.read_text(encoding="utf-8")))) or "").split()).replace("`", "")
    words = re.split(r"[.:;](?: |$)", re.sub(r"^vlm_dist: ", "", words))[0].replace("->", "→")
    return words[:1].upper() + words[1:] or ", ".join(path.stem for path in paths if path.stem != "__init__")


def layers_of(graph: nx.DiGraph) -> dict[str, int]:
    """A layer for every room, below all that import it, and as near to its neighbours as that allows."""
    layer = {room: depth for depth, rooms in enumerate(nx.topological_generations(graph)) for room in rooms}
    moved = True
    while moved:
        moved = False
        for room in sorted(graph):
            above, below = [layer[other] for other in graph.predecessors(room)], [layer[other] for other in graph.successors(room)]
            highest, lowest = max(above, default=-1) + 1, min(below, default=max(layer.values()) + 1) - 1
            best = lowest if len(below) > len(above) else highest if above else layer[room]
            moved, layer[room] = moved or best != layer[room], best
    return layer


def with_threads(graph: nx.DiGraph, layer: dict[str, int]) -> tuple[nx.DiGraph, dict[tuple[str, str], list[str]]]:
    """The graph with a thread in each layer that an arrow passes, and each arrow's way."""
    threaded, ways = nx.DiGraph(), {}
    threaded.add_nodes_from(sorted(graph))
    for start, end in sorted(graph.edges):
        threads = [f"{start}>{end}@{depth}" for depth in range(layer[start] + 1, layer[end])]
        layer |= {thread: int(thread.rpartition("@")[2]) for thread in threads}
        ways[start, end] = [start, *threads, end]
        threaded.add_edges_from(pairwise(ways[start, end]))
    return threaded, ways


def crossings(graph: nx.DiGraph, rows: list[list[str]]) -> int:
    place = {node: number for row in rows for number, node in enumerate(row)}
    total = 0
    for row in rows:
        ends = [(place[start], place[end]) for start in row for end in graph.successors(start)]
        total += sum((a - c) * (b - d) < 0 for number, (a, b) in enumerate(ends) for c, d in ends[:number])
    return total


def ordered(graph: nx.DiGraph, layer: dict[str, int]) -> list[list[str]]:
    """The nodes of each layer from left to right with few crossings: each goes where its neighbours are, down and up again."""
    rows = [sorted((node for node in graph if layer[node] == depth), key=str) for depth in range(max(layer.values()) + 1)]
    best = [list(row) for row in rows]
    for sweep in range(60):
        neighbours = graph.predecessors if sweep % 2 == 0 else graph.successors
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place = {node: (number + 0.5) / len(other) for other in rows for number, node in enumerate(other)}
            wanted = {node: [place[other] for other in neighbours(node)] or [place[node]] for node in row}
            row.sort(key=lambda node: (sum(wanted[node]) / len(wanted[node]), node))
        if crossings(graph, rows) < crossings(graph, best):
            best = [list(row) for row in rows]
    return best


def spread(row: list[str], wanted: dict[str, float], width: dict[str, float]) -> dict[str, float]:
    """Middles as near as possible to the wanted ones, in this order and without touching (pool adjacent violators)."""
    offset, offsets = 0.0, []
    blocks: list[list[float]] = []  # nodes that touch: the weighted sum of their wanted places, their weight, their number
    for number, node in enumerate(row):
        if number:
            offset += (width[row[number - 1]] + width[node]) / 2 + GAP_X
        offsets.append(offset)
        weight = STIFF if width[node] == THREAD else 1
        blocks.append([(wanted[node] - offset) * weight, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [mine + its for mine, its in zip(blocks[-1], last, strict=True)]
    starts = [total / weight for total, weight, count in blocks for _ in range(int(count))]
    return {node: start + place for node, start, place in zip(row, starts, offsets, strict=True)}


def placed(graph: nx.DiGraph, rows: list[list[str]], width: dict[str, float]) -> dict[str, float]:
    """The middle of every node, from left to right."""
    x = {node: 0.0 for row in rows for node in row}
    for row in rows:
        x |= spread(row, x, width)
    for sweep in range(200):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {}
            for node in row:
                pull = {node: 0.01}
                for other in (*graph.predecessors(node), *graph.successors(node)):
                    pull[other] = STIFF if width[node] == width[other] == THREAD else 1
                wanted[node] = sum(x[other] * weight for other, weight in pull.items()) / sum(pull.values())
            x |= spread(row, wanted, width)
    left = min(x[node] - width[node] / 2 for node in x)
    return {node: round(place - left + MARGIN, 1) for node, place in x.items()}


def port(node: str, others: list[str], this: str, x: dict[str, float], width: dict[str, float]) -> float:
    """Where on its side a node's arrow to `this` begins or ends: side by side, in the order of their other ends."""
    order = sorted(others, key=lambda other: (x[other], other))
    step = min(26, width[node] * 0.7 / len(order))
    return x[node] + (order.index(this) - (len(order) - 1) / 2) * step


def draw() -> str:
    """The drawing as SVG."""
    rooms = find_rooms()
    graph = nx.DiGraph([(room.name, used) for room in rooms.values() for used in sorted(room.imports)])
    graph.add_nodes_from(rooms)
    if not nx.is_directed_acyclic_graph(graph):
        raise SystemExit(f"draw_architecture: the rooms import each other in a circle: {nx.find_cycle(graph)}; break it")
    reduced = nx.transitive_reduction(graph)
    layer = layers_of(reduced)
    threaded, ways = with_threads(reduced, layer)
    rows = ordered(threaded, layer)
    width = {node: float(rooms[node].width) if node in rooms else THREAD for node in threaded}
    x = placed(threaded, rows, width)
    top = {node: MARGIN + layer[node] * (HEIGHT + GAP_Y) for node in threaded}
    right = max(x[node] + width[node] / 2 for node in threaded) + MARGIN
    bottom = max(top.values()) + HEIGHT + MARGIN + 46
    parts = [arrow(way, threaded, x, top, width) for way in ways.values()] + [
        box(rooms[name], x[name], top[name]) for name in sorted(rooms)
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {bottom:.0f}" role="img" aria-labelledby="title">',
        '<title id="title">The rooms of vlm_dist and who imports whom</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{right:.0f}" height="{bottom:.0f}" rx="10"/>',
        *parts,
        *(f'<text x="{MARGIN}" y="{bottom - 34 + 18 * number:.0f}">{line}</text>' for number, line in enumerate(LEGEND)),
        "</svg>",
    ]) + "\n"  # fmt: skip


def box(room: Room, middle: float, top: float) -> str:
    left = middle - room.width / 2
    text = textwrap.wrap(room.caption, int((room.width - 22) / 7.2), max_lines=3, placeholder=" …")
    return "\n".join([
        f'<g data-room="{room.name}">',
        f'<rect class="{room.kind}" x="{left:.1f}" y="{top}" width="{room.width}" height="{HEIGHT}" rx="9"/>',
        f'<text class="name" x="{left + 12:.1f}" y="{top + 25}">{escape(room.title)}</text>',
        f'<text class="size" x="{left + room.width - 11:.1f}" y="{top + 24}">{room.lines:,} lines</text>',
        *(f'<text x="{left + 12:.1f}" y="{top + 48 + 17 * number}">{escape(line)}</text>' for number, line in enumerate(text)),
        "</g>",
    ])  # fmt: skip


def arrow(way: list[str], graph: nx.DiGraph, x: dict[str, float], top: dict[str, int], width: dict[str, float]) -> str:
    start, end = way[0], way[-1]
    at, y = port(start, list(graph.successors(start)), way[1], x, width), top[start] + HEIGHT
    path = f"M{at:.1f} {y}"
    for step in way[1:]:
        goal = port(end, list(graph.predecessors(end)), way[-2], x, width) if step == end else x[step]
        low = top[step] - (8 if step == end else 0)
        bend = (low - y) * 0.55
        path += f" C{at:.1f} {y + bend:.1f} {goal:.1f} {low - bend:.1f} {goal:.1f} {low}"
        at, y = goal, low
        if step != end:
            y += HEIGHT
            path += f" V{y}"
    head = f'<path class="head" d="M{at - 4.5:.1f} {y - 1} h9 L{at:.1f} {y + 8} Z"/>'
    return f'<g data-from="{start}" data-to="{end}"><path class="arrow" d="{path}"/>{head}</g>'


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT.relative_to(ROOT))
