"""What this machine lacks, and what Megatron-Core needs to run on it all the same."""

from __future__ import annotations

import logging
import warnings
from functools import cache

import torch


@cache
def install() -> None:
    """Make Megatron-Core usable here; call it before anything imports `megatron.core`. Idempotent."""
    from linear_moe.training.platform import cpu

    quiet()
    if not torch.cuda.is_available():
        cpu.install()

    from linear_moe.training.platform import megatron

    megatron.install()


def quiet() -> None:
    """Megatron-Core warns on every start of what it would do with packages that we do without (Transformer Engine,
    Apex), and of its own deprecated defaults; a user can do nothing about either.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Megatron's DDP holds on to the nodes that add up gradients, from before a shared expert's stream is known.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    logging.getLogger("megatron").setLevel(logging.ERROR)
