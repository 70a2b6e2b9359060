"""TODO layout.flops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from torch import nn
from linear_moe.config.schema import Config
from linear_moe.layout.processes import ParallelLayout, parallel_layout, smallest_world
from linear_moe.checks.validate import validate
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.flops import Flops, active, layer_flops, products
from linear_moe.modeling.host import DTYPES, Host
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.plan.memory import rank_bytes
from linear_moe.plan.ranks import RankModels


def flops_per_token(config: Config) -> float:
    """Model FLOPs per trained token, forward and backward, without recomputation; over all ranks' shares.

    Two FLOPs per active weight that takes part in a matrix product (the embedding's lookup is none) and what the mixers
    declare for their recurrences at training.sequence_length; the backward pass costs twice the forward pass.
    """
    return 3 * forward_flops(config).total


def forward_flops(config: Config, model: LanguageModel | None = None) -> Flops:
    """Of `flops_per_token`, the forward pass's; `model`: on the plain host, if there is one already."""
    model = model or LanguageModel(config.model, vocab_size(config), Host(DTYPES[config.training.dtype], "meta"))
    head = model.embedding if config.model.tie_embeddings else model.head
    return Flops([layer_flops(layer, config) for layer in model.layers.values()], products(_parameters(head), config))


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
