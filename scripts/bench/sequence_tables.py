"""Comparisons, tables and plots of the rows that sequence.py measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RATIOS = ("of_dp2", "of_single", "of_dp2_same_sequence")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 380, 70, 34, 260, 46


SAID = (  # keys of a row that are printed while sequence.py runs
    "ms",
    "tokens_per_second_per_gpu",
    "peak_gib",
    "seconds",
    "differences",
    "hidden",
    "exposed",
    "transfer_ms",
    "transfer_hidden",
    "skipped",
    "failed",
)


def row_of(job: Any, results: Any) -> Row:
    """Makes the row of a Job of sequence.py from its entry in the `results` of a launcher.Group."""
    config = job.config()
    model, training = config.model, config.training
    row: dict[str, Any] = {
        "model": job.model,
        "layout": job.layout,
        "gpus": job.ranks,
        "length": job.length,
        "rows": job.rows,
    }
    row |= {
        "overrides": list(job.overrides),
        "preset": job.preset,
        "layers": 1 if job.model == "layer" else model.num_layers,
    }
    row |= {
        "mixer": model.mixer.type,
        "pattern": model.pattern,
        "dtype": training.dtype,
        "hidden_size": model.hidden_size,
    }
    row |= {
        "sequence_length": training.sequence_length,
        "global_batch": training.global_batch,
        "recompute": training.recompute,
    }
    row |= {"parallel": {k: v for k, v in vars(config.parallel).items() if k.startswith("sequence")}}
    if isinstance(results, dict):
        return row | {"failed": results["failed"]}
    first = results[0]
    if "skipped" in first:
        return row | first
    if job.model == "layer":
        row |= {
            "ms": max(rank["milliseconds"] for rank in results),
            "ms_of_passes": [rank["ms_of_passes"] for rank in results],
        }
        row |= {key: first[key] for key in ("differences", "agrees") if key in first}
        row |= {"peak_gib": [rank["peak_gib"] for rank in results]}
    else:
        steps = first["seconds"][first["warmup"] :]
        row |= {
            "ms": 1e3 * statistics.median(steps),
            "ms_of_steps": [1e3 * s for s in first["seconds"]],
            "warmup": first["warmup"],
        }
        row |= {key: [rank[key] for rank in results] for key in ("peak_gib", "state_gib", "plan_gib")}
        beside = max(rank["peak_gib"] - rank["state_gib"] for rank in results)
        row |= {"losses": first["losses"], "mib_per_1k_tokens": beside * 1024 * 1024 / (job.rows * job.length)}
        if first.get("overlap"):
            row |= {"overlap": [rank["overlap"] for rank in results]}
            span, purposes = first["overlap"]["span_ms"], first["overlap"]["purposes"].items()
            row |= {"hidden": {k: round(v["hidden"], 4) for k, v in purposes}}
            row |= {"exposed": {k: round(v["exposed_ms"] / span, 4) for k, v in purposes}}
            sent = [rank["overlap"]["purposes"].get("sequence", {}) for rank in results]
            if all("transfer_ms" in rank for rank in sent):
                row |= {"transfer_ms": max(rank["transfer_ms"] for rank in sent)}
                row |= {"transfer_hidden": round(min(rank["transfer_hidden"] for rank in sent), 4)}
    return row | {
        "tokens_per_second_per_gpu": 1e3 * job.rows * job.length / row["ms"],
        "seconds": first["total_seconds"],
    }


def short(tokens: int) -> str:
    """Formats a number of tokens: 32768 -> 32K."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)


def shared(row: Row) -> tuple[Any, ...]:
    """Key of a row's work, without its spread over GPUs: rows with equal keys may be compared."""
    work = tuple(text for text in row["overrides"] if not text.startswith("parallel."))
    return tuple(row[key] for key in ("model", "length", "rows", "preset", "layers", "recompute", "hidden_size")) + work


def ways(row: Row) -> list[str]:
    """Overrides of a row that change the spread of its work over GPUs."""
    return [text for text in row["overrides"] if text.startswith("parallel.")]


def own(row: Row) -> tuple[Any, ...]:
    """Key of a measurement: rows with equal keys are repetitions of one measurement."""
    return *shared(row), row["layout"], *row["overrides"]


def compare(rows: list[Row]) -> None:
    """Adds to each row the ratio of its speed to that of other layouts with the same work.

    The ratios are `of_dp2`, `of_single`, `of_alone`, and for sp2 `of_dp2_same_sequence`: the ratio to dp2 with
    sequences as long as the one that sp2 shares out. There a hybrid has equally many attention scores per token, but
    twice the tokens per GPU.
    """
    plain = {(shared(row), row["layout"]): row for row in rows if "ms" in row and not ways(row)}
    for row in rows:
        for layout in ("dp2", "single", "alone"):
            base = plain.get((shared(row), layout))
            if "ms" in row and base is not None and base is not row:
                row[f"of_{layout}"] = base["ms"] / row["ms"]
        same = plain.get((shared(row | {"length": 2 * row["length"]}), "dp2"))
        if "ms" in row and row["layout"] == "sp2" and same is not None:
            row["of_dp2_same_sequence"] = row["tokens_per_second_per_gpu"] / same["tokens_per_second_per_gpu"]


def merge(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Merges results of several runs; of a repeated measurement, the last that succeeded, or else the last, is kept.

    `runs[row["run"]]` is the run that measured a row.
    """
    runs: list[dict[str, Any]] = []
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        top = {key: value for key, value in result.items() if key not in ("rows", "runs")}
        first = len(runs)
        runs += result.get("runs", [top])
        for row in result["rows"]:
            if "ms" in row or "ms" not in rows.get(own(row), {}):
                rows[own(row)] = row | {"run": first + row.get("run", 0)}
    return runs[-1] | {"name": name, "runs": runs, "rows": list(rows.values())}


# -- tables ------------------------------------------------------------------------------------------------------------
def markdown(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(titles)
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]) + "\n"


def label(row: Row) -> str:
    return " ".join([row["model"], *row["overrides"]])


def cell(row: Row | None, key: str, form: str) -> str:
    if row is None:
        return ""
    if key not in row:
        return row.get("failed") or row.get("skipped") or ""
    value = max(row[key]) if isinstance(row[key], list) else row[key]
    return format(value, form)


def speed_table(rows: list[Row]) -> str:
    """Table with a line for each case in sp2, and for each work that was not measured in sp2."""
    plain = [row for row in rows if not ways(row)]
    by_layout = {layout: {shared(r): r for r in plain if r["layout"] == layout} for layout in ("dp2", "single")}
    leading = [row for row in rows if row["layout"] == "sp2"]
    seen = {shared(row) for row in leading}
    leading += [row for key, row in by_layout["dp2"].items() if key not in seen]
    lines = []
    for row in leading:
        sp, dp, one = (
            (row if row["layout"] == "sp2" else None),
            *(by_layout[x].get(shared(row)) for x in ("dp2", "single")),
        )
        speeds = [cell(x, "tokens_per_second_per_gpu", ",.0f") for x in (one, dp, sp)]
        ratios = ["" if sp is None or key not in sp else f"{sp[key]:.3f}" for key in RATIOS]
        peaks = ["" if x is None or "ms" not in x else cell(x, "peak_gib", ".1f") for x in (one, dp, sp)]
        hidden = (sp or {}).get("hidden", {})
        shares = ["" if key not in hidden else f"{hidden[key]:.0%}" for key in ("sequence", "gradients")]
        traced = sp is not None and "transfer_ms" in sp
        shares += [f"{sp['transfer_ms']:.1f}", f"{sp['transfer_hidden']:.0%}"] if sp and traced else ["", ""]
        lines.append([label(row), short(row["length"]), *speeds, *ratios, *peaks, *shares])
    titles = ("case", "tokens per GPU", "single", "dp2", "sp2: tokens/s/GPU", "sp2 / dp2", "sp2 / single",
              "sp2 / dp2, same sequence",
              "GiB single", "dp2", "sp2", "sequence's hidden", "gradients' hidden",
              "of the sequence's, ms of transfer", "hidden")  # fmt: skip
    return markdown(titles, lines)


def longest_table(rows: list[Row]) -> str:
    """Table of the longest length that trained, and the result of the next length, for each case and layout."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((label(row), row["layout"]), []).append(row)
    lines = []
    for (name, layout), own_rows in cases.items():
        trained = [row["length"] for row in own_rows if "ms" in row and row["rows"] == 1]
        if not trained:
            continue
        beyond = min((r for r in own_rows if r["length"] > max(trained)), key=lambda r: r["length"], default=None)
        sequence = max(trained) * (2 if layout == "sp2" else 1)
        why = "" if beyond is None else f"{short(beyond['length'])}: {cell(beyond, 'ms', '')}"
        lines.append([name, layout, short(max(trained)), short(sequence), why])
    return markdown(("case", "layout", "longest per GPU", "of a sequence of", "next"), lines)


def layer_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        errors = row.get("differences", {})
        said = [f"{errors[key]:.1e}" if key in errors else "" for key in ("output", "tokens", "parameters")]
        verdict = {True: "yes", False: "**no**"}.get(row.get("agrees"), "")  # type: ignore[arg-type]
        alone = f"{row['of_alone']:.3f}" if "of_alone" in row else ""
        speed = cell(row, "tokens_per_second_per_gpu", ",.0f") if "ms" in row else ""
        peak = cell(row, "peak_gib", ".2f") if "ms" in row else ""
        way = " ".join([row["layout"], *row["overrides"]])
        lines.append([way, short(row["length"]), cell(row, "ms", ".2f"), speed, alone, peak, *said, verdict])
    titles = ("layer", "tokens per GPU", "ms", "tokens/s/GPU", "of alone", "GiB", "output", "tokens' gradient",
              "parameters'", "as on one GPU")  # fmt: skip
    return markdown(titles, lines)


def same_tokens(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Groups the rows measured on one GPU by case and tokens per step, if there are at least two.

    Rows with whole sequences come first in a group, then rows with sequences in several pieces.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    alone = (row for row in rows if row["layout"] == "single" and "ms" in row)
    for row in sorted(alone, key=lambda r: (len(ways(r)), r["length"])):
        plain = label(row | {"overrides": [text for text in row["overrides"] if text not in ways(row)]})
        groups.setdefault((plain, row["length"] * row["rows"]), []).append(row)
    return {key: group for key, group in groups.items() if len(group) > 1}


def lengths_table(rows: list[Row]) -> str:
    lines = []
    for (_, tokens), group in same_tokens(rows).items():
        speeds = [row["tokens_per_second_per_gpu"] for row in group]
        for row, speed in zip(group, speeds, strict=True):
            sizes = [label(row), short(tokens), short(row["length"]), str(row["rows"])]
            figures = [f"{speed:,.0f}", f"{speed / max(speeds):.3f}", f"{row['mib_per_1k_tokens']:.1f}"]
            lines.append([*sizes, *figures, cell(row, "peak_gib", ".1f")])
    titles = (
        "case",
        "tokens a step",
        "length",
        "rows",
        "tokens/s",
        "of the fastest",
        "MiB / 1K tokens beside the state",
        "GiB",
    )
    return markdown(titles, lines)


def tables(rows: list[Row]) -> str:
    """Writes all tables in Markdown; tables without rows are left out."""
    layers, models = ([r for r in rows if (r["model"] == "layer") == kind] for kind in (True, False))
    parts = []
    if any(row["gpus"] > 1 for row in models):
        parts += ["Two GPUs: tokens per second and GPU", speed_table(models)]
    if models:
        parts += ["Longest that trained", longest_table(models)]
    if same_tokens(models):
        parts += ["One GPU, the same tokens in every step", lengths_table(models)]
    if layers:
        parts += ["A Gated DeltaNet layer, forward and backward", layer_table(layers)]
    failed = [row for row in rows if "ms" not in row and row["layout"] == "single"]
    lines = [
        [label(row), row["layout"], f"{short(row['length'])} x {row['rows']}", cell(row, "ms", "")] for row in failed
    ]
    if lines:
        parts += ["One GPU, not measured", markdown(("case", "layout", "length", "why"), lines)]
    return "\n".join(parts)


# -- plots -------------------------------------------------------------------------------------------------------------
Curve = tuple[str, str, bool, list[tuple[float, float]]]
"""Curve of a plot: name, colour, whether it is dashed, and points (length in tokens, value)."""


def chart(title: str, y_title: str, curves: list[Curve], logarithmic: bool = False) -> str:
    """Draws curves over a length in tokens, on a logarithmic axis, as SVG."""
    xs = sorted({x for *_, points in curves for x, _ in points})
    ys = [y for *_, points in curves for _, y in points]
    low, high = (min(ys) / 1.3, max(ys) * 1.3) if logarithmic else (0.0, max(ys) * 1.1)
    scale: Callable[[float], float] = math.log if logarithmic else float
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / (math.log(xs[-1] / xs[0]) or 1.0)
        return LEFT + width * across, TOP + height * (scale(high) - scale(y)) / (scale(high) - scale(low))

    def text(x: float, y: float, content: str, anchor: str = "middle", colour: str = "black") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'

    def line(points: list[tuple[float, float]], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'

    bottom = TOP + height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" style="font: 12px sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT + width / 2, 18, title),
        text(LEFT + width / 2, HEIGHT - 8, "tokens per GPU"),
        f'<g transform="rotate(-90 14 {TOP + height / 2})">{text(14, TOP + height / 2, y_title)}</g>',
        line([(LEFT, TOP), (LEFT, bottom), (LEFT + width, bottom)], 'stroke="black"'),
    ]
    parts += [text(place(x, high)[0], bottom + 16, short(int(x))) for x in xs]
    for y in ticks(low, high, logarithmic):
        parts.append(text(LEFT - 6, place(xs[0], y)[1] + 4, f"{y / 1e6:g}M" if high >= 1e6 else f"{y:,.0f}", "end"))
        parts.append(line([(LEFT, place(xs[0], y)[1]), (LEFT + width, place(xs[0], y)[1])], 'stroke="#dddddd"'))
    for i, (name, colour, dashed, points) in enumerate(curves):
        style = f'stroke="{colour}" stroke-width="1.5"' + (' stroke-dasharray="5 4"' if dashed else "")
        placed = [place(*point) for point in sorted(points)]
        parts.append(line(placed, style))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed]
        right = LEFT + width + 12
        parts.append(line([(right, TOP + 16 * i), (right + 22, TOP + 16 * i)], style))
        parts.append(text(right + 28, TOP + 16 * i + 4, name, "start"))
    return "\n".join([*parts, "</svg>\n"])


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values from `low` to `high` for the marks of an axis, at most about eight."""
    if not logarithmic:
        step = 10 ** math.floor(math.log10(high))
        step = next(step / n for n in (1, 2, 5, 10) if high / step * n >= 4)
        return [i * step for i in range(int(high / step) + 1)]
    marks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for m in (1, 2, 5)]
    return [y for y in marks if low <= y <= high]


def curves(groups: dict[tuple[str, bool], list[Row]], key: str = "tokens_per_second_per_gpu") -> list[Curve]:
    """Makes curves from groups of rows; a group's key has the name that gets a colour, and whether it is dashed."""
    names = list(dict.fromkeys(name for name, _ in groups))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    return [
        (f"{name} (data parallel)" if dashed else name, colour[name], dashed, [(r["length"], r[key]) for r in rows])
        for (name, dashed), rows in groups.items()
    ]


def plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Writes FOLDER/NAME_speed.svg, _layer.svg and _lengths.svg, as far as there are rows; returns their paths."""
    measured = [row for row in result["rows"] if "ms" in row]
    device, charts = result["device"], {}
    two: dict[tuple[str, bool], list[Row]] = {}
    layer: dict[tuple[str, bool], list[Row]] = {}
    for row in measured:
        if row["layout"] in ("sp2", "dp2"):
            two.setdefault((label(row), row["layout"] == "dp2"), []).append(row)
        elif row["model"] == "layer":
            layer.setdefault((" ".join([row["layout"], *row["overrides"]]), False), []).append(row)
    whole = same_tokens([row for row in measured if not ways(row)])
    one = {(f"{name}, {short(n)} a step", False): rows for (name, n), rows in whole.items()}
    speed = "tokens/s/GPU"
    if two:
        title = f"A sequence of twice the length on two {device}, and one on each"
        charts["speed"] = chart(title, speed, curves(two))
    if layer:
        charts["layer"] = chart(f"Gated DeltaNet layer, forward and backward, two {device}", speed, curves(layer))
    if one:
        charts["lengths"] = chart(
            f"One {device}, the same tokens in every step, over the length of sequences", speed, curves(one), True
        )
    written = []
    for name, text in charts.items():
        written.append(path.with_name(f"{path.stem}_{name}.svg"))
        written[-1].write_text(text)
    return written
