"""`linear-moe check`: everything that `linear-moe train` checks before it starts, for launch scripts to call first."""

from __future__ import annotations

import argparse

from linear_moe.config.load import load_config
from linear_moe.config.validate import parallel_layout, smallest_world, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to it")
    parser.add_argument("--world", type=int, help="number of ranks; default: the fewest that the parallel sizes allow")


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    world = smallest_world(config.parallel) if args.world is None else args.world
    validate(config, world)
    layout = parallel_layout(config, world)
    print(
        f"{args.config}: ok on {world} ranks (tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}; "
        f"experts: expert {layout.expert}, expert_tensor {layout.expert_tensor}, data {layout.expert_data})"
    )
    return 0
