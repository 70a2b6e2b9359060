"""What this machine lacks, and what Megatron-Core needs to run on it all the same."""

from __future__ import annotations

from functools import cache

import torch


@cache
def install() -> None:
    """Make Megatron-Core usable here; call it before anything imports `megatron.core`. Idempotent."""
    from linear_moe.training.platform import cpu

    if not torch.cuda.is_available():
        cpu.install()

    from linear_moe.training.platform import megatron

    megatron.install()
