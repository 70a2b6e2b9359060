"""`linear-moe import`: begin a run with the weights of another model."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from linear_moe.commands import arguments

HELP = "begin a run with the weights of another model: an equal one, or a dense one, which is upcycled to experts"
EXAMPLE = "linear-moe import runs/dense moe.yaml run=runs/moe --upcycle\n  linear-moe train runs/moe/config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder, or folder that `linear-moe export` wrote")
    arguments.with_config(parser)
    parser.add_argument(
        "--upcycle",
        action="store_true",
        help="where SOURCE has a dense FFN and the config has experts, make the experts from the dense FFN: each is a "
        "copy, or a part of a copy",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: the latest complete one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs `linear-moe import`; returns the exit code."""
    from linear_moe.checks.validate import validate
    from linear_moe.config.load import load_config
    from linear_moe.training.import_weights import import_weights

    start = time.perf_counter()
    config = load_config(args.config, args.overrides)
    validate(config)
    record = import_weights(args.source, config, upcycle=args.upcycle, step=args.step)
    if args.json:
        print(json.dumps(record))
        return 0
    imported = f"{record['parameters']:,} parameters of {record['source']}"
    if record["upcycled"]:
        cut = f", each cut into {record['granularity']}" if record["granularity"] > 1 else ""
        imported += f", {len(record['upcycled'])} FFNs upcycled to {config.model.moe.num_experts} experts{cut}"
    size, seconds = record["bytes"] / 2**20, time.perf_counter() - start
    print(f"{record['checkpoint']}: {imported}, {size:,.1f} MiB, {seconds:.1f} s")
    if not record["exact"]:
        print(
            "the experts' weights have no fixed sum: the layers equal the dense ones on average only; "
            "model.moe.normalize_top_k=true would make them equal"
        )
    print(f"train it with: linear-moe train {config.run}/config.yaml")
    return 0
