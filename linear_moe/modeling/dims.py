"""Sizes and constants of a model that its mixers and FFNs depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """Sizes and constants of the model around one layer, for the layer's mixer and FFN."""

    hidden_size: int
    num_heads: int
    num_layers: int
    layer: int  # global index of this layer
    norm_eps: float
    init_std: float
    output_init_std: float  # standard deviation for projections that write into the residual stream
