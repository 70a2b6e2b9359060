"""Expert capacity: what an expert takes of a micro-batch at most (Switch Transformer, arXiv 2101.03961)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linear_moe.modeling.moe.config import MoEConfig


def capacity(tokens: int, config: MoEConfig) -> int:
    """Tokens that one expert takes of a micro-batch of `tokens`: `capacity_factor` times the mean load, rounded up."""
    assert config.capacity_factor is not None
    return min(tokens, math.ceil(tokens * config.top_k / config.num_experts * config.capacity_factor))


def within_capacity(probs: Tensor, limit: int, drop_policy: str) -> Tensor:
    """Which tokens each expert takes: at most `limit` of those that chose it.

    Args:
        probs: `[N, E]` weights of the chosen experts, -1 where not chosen.
        limit: at most N.

    Returns:
        Boolean `[N, E]`. Ties go to the earlier token.
    """
    chosen = probs >= 0
    priority = probs if drop_policy == "probs" else chosen.to(probs.dtype)
    first = priority.sort(dim=0, descending=True, stable=True).indices[:limit]
    return torch.zeros_like(chosen).scatter(0, first, True) & chosen
