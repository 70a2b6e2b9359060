"""TODO commands.export."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
import torch
from torch import Tensor
from linear_moe.options.errors import ConfigError
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.modeling.config import ModelConfig
from linear_moe.checks.experts import check_grouped_gemm
from linear_moe.inference.card import model_card
from linear_moe.checkpoints.reader import complete_checkpoints, latest_checkpoint, load_full_weights, read_info
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.inference.export import export
if TYPE_CHECKING:
    from linear_moe.inference.hf import LinearMoEForCausalLM


def main(args: argparse.Namespace) -> int:
    """`linear-moe export`. Returns the exit code."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.perf_counter()
    record = export(
        args.run,
        args.out,
        step=args.step,
        dtype=args.dtype,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        say=(lambda text: None) if args.json else print,
    )
    if args.json:
        print(json.dumps(record))
    else:
        print(
            f"{args.out}: {record['parameters']:,} parameters in {record['dtype']}, verified bit for bit, "
            f"{time.perf_counter() - start:.1f} s"
        )
    return 0
