#!/usr/bin/env python3
"""Balance of the experts' load in training runs, from their records: docs/results/NAME.json and NAME.svg.

    common="parallel.expert=1 logging.routing_every=1 training.steps=200 training.eval_every=0"
    linear-moe train configs/train/quickstart.yaml $common run=runs/aux
    linear-moe train configs/train/quickstart.yaml $common run=runs/bias \\
        model.moe.aux_loss=0 model.moe.expert_bias=true model.moe.bias_update_rate=0.01
    python scripts/bench/balance.py runs/aux runs/bias

The figure of a layer is the largest expert's load over the mean load, in the last WINDOW steps together, because the
figure of a single step depends mostly on the tokens that happen to be in the step. (The JSON has the largest figure of
a single step over all layers as `step`.) The plot shows the worst layer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml
from pretrain import commit, versions

LIMIT = 1.5
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
WIDTH, HEIGHT, LEFT, TOP = 640, 320, 50, 30


def read(run: Path, window: int) -> dict[str, Any]:
    """Reads a run: its settings of balance, its last loss, and for each step the figure of every layer."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [r for r in records if r.get("event") == "routing"]
    steps = [event["step"] for event in events]
    if steps != list(range(1, len(steps) + 1)):
        raise SystemExit(f"{run}: needs the routing of every step, in one session: train with logging.routing_every=1")
    loads = [{layer: r["load"] for layer, r in event["layers"].items()} for event in events]
    over_window, single = [], []
    for end in range(1, len(loads) + 1):
        recent = loads[max(0, end - window) : end]
        layers = {layer: zip(*(step[layer] for step in recent), strict=True) for layer in loads[0]}
        over_window.append([max(sum(expert) / len(recent) for expert in experts) for experts in layers.values()])
        single.append(max(max(load) for load in loads[end - 1].values()))
    config = yaml.safe_load((run / "config.yaml").read_text())
    names = ("num_experts", "top_k", "score", "aux_loss", "expert_bias", "bias_update_rate")
    tokens = config["training"]["global_batch"] * config["training"]["sequence_length"]
    return {
        "run": run.name,
        "tokens_per_step": tokens,
        "corpus": config["data"]["corpus"],
        "learning_rate": config["optimizer"]["lr"],
        "moe": {name: config["model"]["moe"][name] for name in names},
        "loss": [r["loss"] for r in records if "loss" in r and "event" not in r][-1],
        "last_step_over_limit": max((i + 1 for i, m in enumerate(over_window) if max(m) >= LIMIT), default=0),
        "final": {"by_layer": over_window[-1], "step": single[-1]},
        "max_over_mean_load": [[round(x, 3) for x in layers] for layers in over_window],
        "step": [round(x, 3) for x in single],
    }


def title(run: dict[str, Any]) -> str:
    moe = run["moe"]
    how = f"loss-free bias, rate {moe['bias_update_rate']:g}" if moe["expert_bias"] else "no bias"
    return f"{run['run']}: {how}, aux_loss {moe['aux_loss']:g}"


def svg(runs: list[dict[str, Any]], window: int) -> str:
    """Draws a line for each run: the figure of its worst layer over steps."""
    curves = [[max(layers) for layers in run["max_over_mean_load"]] for run in runs]
    steps, top = max(map(len, curves)), max(2.0, *map(max, curves))
    plot_width, plot_height = WIDTH - LEFT - 10, HEIGHT - TOP - 40

    def x(step: float) -> float:
        return LEFT + plot_width * step / steps

    def y(load: float) -> float:
        return TOP + plot_height * (top - load) / (top - 1)

    def text(at: tuple[float, float], content: str, anchor: str = "middle", colour: str = "black") -> str:
        return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'

    def line(points: list[tuple[float, float]], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" style="font: 12px sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        text((LEFT + plot_width / 2, 18), f"Largest expert's load / mean, worst layer, last {window} steps"),
        text((LEFT + plot_width / 2, HEIGHT - 8), "step"),
        line([(LEFT, TOP), (LEFT, y(1)), (x(steps), y(1))], 'stroke="black"'),
        line([(LEFT, y(LIMIT)), (x(steps), y(LIMIT))], 'stroke="gray" stroke-dasharray="4"'),
    ]  # fmt: skip
    parts += [text((LEFT - 6, y(load / 2) + 4), f"{load / 2:g}", "end") for load in range(2, int(2 * top) + 1)]
    parts += [text((x(steps * i / 4), y(1) + 16), f"{steps * i // 4}") for i in range(5)]
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(line([(x(step + 1), y(load)) for step, load in enumerate(curve)], f'stroke="{colour}"'))
        parts.append(text((WIDTH - 16, TOP + 16 * (i + 1)), title(run), "end", colour))
    return "\n".join([*parts, "</svg>\n"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--window", type=int, default=10, help="steps whose load is added up")
    parser.add_argument("--name", default="moe_balance", help="FOLDER/NAME.json and .svg")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    runs = [read(run, args.window) for run in args.runs]
    result = {
        "name": args.name,
        "device": platform.processor() or "cpu",
        **versions(),
        "commit": commit(),
        "command": shlex.join(["scripts/bench/balance.py", *map(str, args.runs)]),
        "date": datetime.date.today().isoformat(),
        "window": args.window,
        "rows": runs,
    }
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / f"{args.name}.json").write_text(json.dumps(result) + "\n")
    (args.folder / f"{args.name}.svg").write_text(svg(runs, args.window))
    for run in runs:
        worst, over = max(run["final"]["by_layer"]), run["last_step_over_limit"]
        print(f"{title(run)}: {worst:.2f}; last over {LIMIT} in step {over}; loss {run['loss']:.3f}")


if __name__ == "__main__":
    main()
