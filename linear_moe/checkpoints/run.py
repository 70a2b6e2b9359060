"""TODO checkpoints.run."""

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
if TYPE_CHECKING:
    from linear_moe.inference.hf import LinearMoEForCausalLM


EMBEDDING = "embedding.weight"


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run folder."""
    return (path / "config.yaml").is_file()


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The complete checkpoint of `step`, or the latest; ConfigError if there is none."""
    folder = run / "checkpoints"
    if step is None:
        if (latest := latest_checkpoint(folder)) is None:
            raise ConfigError("run", str(run), "has no complete checkpoint yet")
        return latest
    complete = {read_info(path)["step"]: path for path in complete_checkpoints(folder)}
    if step not in complete:
        steps = ", ".join(map(str, complete)) or "none"
        raise ConfigError("--step", step, f"no complete checkpoint of this step in {run}", fix=f"complete are: {steps}")
    return complete[step]
