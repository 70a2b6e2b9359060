"""Drawing of a simulation of sequence parallelism, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from linear_moe.plan.simulate import WAYS, LayerKind, SimulatedLayer, Simulation
from linear_moe.plan.traffic import HEADS

COLOURS = ("#1f77b4", "#d62728", "#2ca02c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480, 320, 60, 40, 50  # size and margins of one panel, in pixels


def svg(simulation: Simulation, title: str) -> str:
    """Draws a panel for each kind of layer: milliseconds over GPUs that each way adds, and the layer's compute."""
    kinds = simulation.kinds
    size = f'width="{WIDTH * len(kinds)}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="font: 12px sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, kind in enumerate(kinds):
        parts += [f'<g transform="translate({WIDTH * i})">', *panel(simulation, kind, title), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def panel(simulation: Simulation, kind: LayerKind, title: str) -> list[str]:
    """Draws one kind of layer, with both axes logarithmic; the curve of a way ends where the way is impossible."""
    curves = {way: possible(simulation.of(kind, way)) for way in WAYS[kind.by]}
    lines = {way: [(row.world, 1e3 * row.exchange.cost()) for row in rows] for way, rows in curves.items()}
    lines = {way: [(world, y) for world, y in points if y > 0] for way, points in lines.items()}
    compute = [(world, 1e3 * min(row.compute for row in rows)) for world, rows in by_world(curves).items()]
    values = [y for points in (*lines.values(), compute) for _, y in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    worlds = list(simulation.lengths)
    first, last = math.log2(worlds[0]), math.log2(worlds[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (math.log2(point[0]) - first) / max(last - first, 1)
        up = (math.log10(point[1]) - low) / max(high - low, 1)
        return LEFT + across * (WIDTH - LEFT - 15), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, anchor: str = "middle", colour: str = "black") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'

    def line(points: Sequence[tuple[float, float]], style: str) -> str:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        return f'<polyline fill="none" {style} points="{where}"/>'

    floor = 10.0**low
    parts = [
        text(WIDTH / 2, 16, title),
        text(WIDTH / 2, 32, f"a layer of {kind.mixer}: ms that its exchange adds, and its compute (dashed)"),
        text(WIDTH / 2, HEIGHT - 10, "GPUs that share out one sequence"),
        line([(worlds[0], 10.0**high), (worlds[0], floor), (worlds[-1], floor)], 'stroke="black"'),
        line(compute, 'stroke="gray" stroke-dasharray="4"'),
    ]
    for power in range(low, high + 1):
        x, y = place((worlds[0], 10.0**power))
        parts.append(text(x - 6, y + 4, f"{10.0**power:g}", "end"))
    for world in worlds:
        x, y = place((world, floor))
        parts.append(text(x, y + 16, str(world)))
    for i, (colour, (way, points)) in enumerate(zip(COLOURS, lines.items(), strict=True)):
        parts.append(text(LEFT + 10, TOP + 16 * (i + 1), legend(way, bool(curves[way]), bool(points)), "start", colour))
        if points:
            x, y = place(points[-1])
            parts += [line(points, f'stroke="{colour}"'), f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>']
    return parts


def legend(way: str, possible: bool, costs: bool) -> str:
    """Text of a way's curve; `costs`: the way adds time for some number of GPUs at which it is possible."""
    if way in HEADS.values():
        return f"{way}: at most as many GPUs as heads"
    return way if costs or not possible else f"{way}: all hidden"


def possible(rows: dict[int, SimulatedLayer]) -> list[SimulatedLayer]:
    """Rows of the numbers of GPUs at which a way is possible."""
    return [row for row in rows.values() if not row.reason]


def by_world(curves: dict[str, list[SimulatedLayer]]) -> dict[int, list[SimulatedLayer]]:
    """Groups the rows of all ways by the number of GPUs."""
    rows_of: dict[int, list[SimulatedLayer]] = {}
    for row in (row for rows in curves.values() for row in rows):
        rows_of.setdefault(row.world, []).append(row)
    return rows_of
