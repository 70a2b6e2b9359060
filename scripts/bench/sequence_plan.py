#!/usr/bin/env python3
"""Simulated cost of sequence parallelism, which docs/parallelism.md shows: docs/results/NAME.json and NAME.svg.

    python scripts/bench/sequence_plan.py

also prints the tables. Run it again after a change of `linear_moe/plan/cost.py` or `linear_moe/plan/traffic.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from linear_moe.cli import main as linear_moe

# NVLink's bandwidth between two H200s, measured with keys and values of 128K tokens (docs/results/sequence_gpu.json)
LINKS = ["--intra-node-bandwidth", "250"]
COMMAND = ["plan", "configs/models/a0.3b_2b.yaml", "--tokens-per-gpu", "32K", "--gpu", "h200", *LINKS]
CASES = {
    "sequence_plan_pure": ["model.pattern=L*12", "parallel.sequence_layout=contiguous"],
    "sequence_plan_hybrid": [],
}


def output(words: list[str]) -> str:
    """Runs `linear-moe` with these arguments; returns what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        if linear_moe(words):
            raise SystemExit(1)
    return text.getvalue()


def rounded(value: Any) -> Any:
    """Rounds every float in a nested value to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ["COLUMNS"] = "110"
    for name, overrides in CASES.items():
        words = [*COMMAND, *overrides]
        command = " ".join(["linear-moe", *words])
        print("$", command)
        print(output(words))
        simulation = json.loads(output([*words, "--json", "--plot", str(args.folder / f"{name}.svg")]))
        result = {"name": name, "command": f"{command} --json", "measured": "bandwidth within a node"} | rounded(
            simulation
        )
        (args.folder / f"{name}.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
