"""TODO commands.import_."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any
from torch import nn
from linear_moe.options.errors import ConfigError
from linear_moe.config.load import load_config, save_config
from linear_moe.config.schema import Config
from linear_moe.checks.validate import validate
from linear_moe.config.vocabulary import vocab_size
from linear_moe.checkpoints.reader import LATEST, complete_checkpoints
from linear_moe.checkpoints.run import EMBEDDING
from linear_moe.checkpoints.weights import Weights, open_weights
from linear_moe.modeling.host import DTYPES, Host, ParameterSpec
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.modeling.upcycle import DENSE, Upcycler, granularity, is_exact
from linear_moe.training import platform
from linear_moe.training.supervision.faults import lock_run
from linear_moe.training.import_weights import import_weights


def main(args: argparse.Namespace) -> int:
    """`linear-moe import`. Returns the exit code."""
    start = time.perf_counter()
    config = load_config(args.config, args.overrides)
    validate(config)
    record = import_weights(args.source, config, upcycle=args.upcycle, step=args.step)
    if args.json:
        print(json.dumps(record))
        return 0
    what = f"{record['parameters']:,} parameters of {record['source']}"
    if record["upcycled"]:
        cut = f", each cut into {record['granularity']}" if record["granularity"] > 1 else ""
        what += f", {len(record['upcycled'])} FFNs upcycled to {config.model.moe.num_experts} experts{cut}"
    print(f"{record['checkpoint']}: {what}, {record['bytes'] / 2**20:,.1f} MiB, {time.perf_counter() - start:.1f} s")
    if not record["exact"]:
        print(
            "the experts' weights have no fixed sum: the layers equal the dense ones on average only; "
            "model.moe.normalize_top_k=true would make them equal"
        )
    print(f"train it with: linear-moe train {config.run}/config.yaml")
    return 0
