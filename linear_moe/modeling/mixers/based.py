"""Based: linear attention with the second-order Taylor series of exp as its kernel (arXiv 2402.18668)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads
from linear_moe.modeling.ops.fused.feature_maps import taylor
from linear_moe.modeling.ops.fused.normalizer import normalized
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class BasedConfig(MixerConfig):
    type: str = opt("based", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    feature_dim: int = opt(16, "size d of a query or key head, which has 1 + d + d (d + 1) / 2 features", ge=1, le=2**8)


class Based(LinearMixer):
    """Weights are those of flash-linear-attention's `BasedLinearAttention`, under the same names. The published
    architecture alternates this layer with short convolutions and attention over small windows; use a layer pattern
    for that."""

    Config = BasedConfig
    family = "decay"
    formula = (
        "S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = S_t^T phi(q_t) / (z_t^T phi(q_t)),  "
        "phi(q)^T phi(k) = 1 + s + s^2 / 2,  s = q^T k / sqrt(d)"
    )
    paper = "arXiv 2402.18668"

    def __init__(self, config: BasedConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        d = config.feature_dim
        self.heads, self.value_dim = host.split(heads), dims.hidden_size // heads
        self.features = 1 + d + d * (d + 1) // 2
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj = column(heads * d), column(heads * d), column(dims.hidden_size)
        self.o_proj = Linear(host, dims.hidden_size, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: BasedConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"hidden_size =": dims.hidden_size})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        rows = (layout.batch, layout.length, self.heads, -1)
        pad = layout.length > 1  # kernels need padded features; a decoding step uses no kernels
        q, k = taylor(self.q_proj(x).view(rows), pad=pad), taylor(self.k_proj(x).view(rows), pad=pad)
        return {"q": q, "k": k, "v": self.v_proj(x).view(rows)}, None

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        # Every kernel value 1 + s + s^2 / 2 is at least 1/2, so that their sum needs no epsilon.
        options: dict[str, Any] = {"scale": 1.0, "eps": 0.0, "features": self.features}
        return normalized(decay, **inputs, **options, states=states, cu_seqlens=layout.cu_seqlens)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(o.flatten(2).flatten(0, 1))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        columns = {"state": self.value_dim, "normalizer": 1}
        return {name: ((batch, self.heads, self.features, n), torch.float32) for name, n in columns.items()}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.features * (self.value_dim + 1)
