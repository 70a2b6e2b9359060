"""`linear-moe check`: everything that `linear-moe train` checks before it starts, for launch scripts to call first."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from linear_moe.checks.validate import validate
from linear_moe.config.schema import Config
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.moe.experts import check_quack
from linear_moe.modeling.pattern import resolve_layers


def check_run(config: Config, world: int) -> None:
    """Raises ConfigError for anything that would stop `train` on `world` ranks before its first step."""
    validate(config, world)
    if config.model.moe.experts == "quack" and any(layer.ffn == "moe" for layer in resolve_layers(config.model)):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        check_quack(DTYPES[config.training.dtype], torch.device(device))

    from linear_moe.training.data import check_data

    check_data(config)
    if (Path(config.run) / "checkpoints").exists():  # without checkpoints, Megatron-Core need not be imported (seconds)
        from linear_moe.training import platform

        platform.install()

        from linear_moe.training.checkpointing import check_resume

        check_resume(config)
