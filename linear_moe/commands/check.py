"""`linear-moe check`: run all checks that `train` makes before it starts."""

from __future__ import annotations

import argparse

from linear_moe.commands import arguments

HELP = "run all checks that `train` makes before it starts"
EXAMPLE = r"""linear-moe check configs/train/a0.3b_2b.yaml --world 8 \
      data.corpus=/data/slimpajama data.tokenizer.path=/data/qwen2-tokenizer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.with_world(parser)


def main(args: argparse.Namespace) -> int:
    from linear_moe.config.load import load_config
    from linear_moe.layout.processes import parallel_layout, smallest_world
    from linear_moe.training.preflight import check_run

    config = load_config(args.config, args.overrides)
    world = smallest_world(config.parallel) if args.world is None else args.world
    check_run(config, world)
    layout = parallel_layout(config, world)
    print(
        f"{args.config}: ok on {world} ranks (tensor {layout.tensor}, sequence {layout.sequence}, "
        f"pipeline {layout.pipeline}, data {layout.data}; "
        f"experts: expert {layout.expert}, expert_tensor {layout.expert_tensor}, data {layout.expert_data})"
    )
    return 0
