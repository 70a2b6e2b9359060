"""TODO commands.check."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import torch
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.layout.processes import parallel_layout, smallest_world
from linear_moe.checks.validate import validate
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.moe.experts import check_quack
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.training.preflight import check


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    world = smallest_world(config.parallel) if args.world is None else args.world
    check(config, world)
    layout = parallel_layout(config, world)
    print(
        f"{args.config}: ok on {world} ranks (tensor {layout.tensor}, sequence {layout.sequence}, "
        f"pipeline {layout.pipeline}, data {layout.data}; "
        f"experts: expert {layout.expert}, expert_tensor {layout.expert_tensor}, data {layout.expert_data})"
    )
    return 0
