"""What a mixer or FFN must know of the model around it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """What a mixer must know of the model around it."""

    hidden_size: int
    num_heads: int
    num_layers: int
    layer: int  # global index of this layer
    norm_eps: float
    init_std: float
    output_init_std: float  # of projections that write into the residual stream
