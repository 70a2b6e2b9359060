"""Expert capacity: the most tokens of a micro-batch that an expert takes (Switch Transformer, arXiv 2101.03961)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linear_moe.modeling.moe.config import MoEConfig


def capacity(tokens: int, config: MoEConfig) -> int:
    """Capacity of an expert for a micro-batch of `tokens`: `capacity_factor` times the mean load, rounded up."""
    assert config.capacity_factor is not None
    return min(tokens, math.ceil(tokens * config.top_k / config.num_experts * config.capacity_factor))


def within_capacity(probs: Tensor, limit: int, drop_policy: str) -> Tensor:
    """Selects the tokens that each expert takes: at most `limit` of the tokens that chose the expert.

    Args:
        probs: `[N, E]` weights of the chosen experts; -1 where a token did not choose the expert.
        limit: capacity of an expert, at most N.
        drop_policy: "probs" takes the tokens with the largest weights, "position" the earliest tokens.

    Returns:
        `[N, E]` bool, whether the expert takes the token. Ties go to the earlier token.
    """
    chosen = probs >= 0
    priority = probs if drop_policy == "probs" else chosen.to(probs.dtype)
    first = priority.sort(dim=0, descending=True, stable=True).indices[:limit]
    return torch.zeros_like(chosen).scatter(0, first, True) & chosen
