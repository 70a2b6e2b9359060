"""Makes Megatron-Core run on this machine: stand-ins for a missing GPU, and repairs of Megatron-Core's defects."""

from __future__ import annotations

import logging
import warnings
from functools import cache

import torch


@cache
def install() -> None:
    """Makes Megatron-Core usable on this machine. Must run before anything imports `megatron.core`; idempotent."""
    from linear_moe.training.platform import cpu

    quiet()
    if not torch.cuda.is_available():
        cpu.install()

    from linear_moe.training.platform import megatron

    megatron.install()


def quiet() -> None:
    """Silences warnings that a user can do nothing about.

    At every start Megatron-Core warns of packages that we do without (Transformer Engine, Apex), and of its own
    deprecated defaults.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Megatron's DDP keeps the AccumulateGrad nodes of all parameters from its construction on, when autograd does not
    # know yet that a shared expert runs on another CUDA stream.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    logging.getLogger("megatron").setLevel(logging.ERROR)
