"""ReBased: linear attention with a learnable quadratic kernel (arXiv 2402.10644)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads
from linear_moe.modeling.ops.fused.feature_maps import squares
from linear_moe.modeling.ops.fused.normalizer import normalized
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check, unused
from linear_moe.options.fields import opt


@dataclass
class ReBasedConfig(MixerConfig):
    type: str = opt("rebased", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    feature_dim: int = opt(16, "size d of a query or key head, which has d (d + 1) / 2 features", ge=1, le=2**8)
    qk_norm: bool = opt(True, "normalise every query and key head before scaling it by gamma and adding beta")
    use_gamma: bool = opt(True, "scale every query and key feature by a learned gamma")
    use_beta: bool = opt(True, "add a learned beta to every query and key feature")
    tie_feature_map_qk: bool = opt(True, "queries and keys share gamma and beta, as in the published code")
    normalizer_eps: float = opt(1e-5, "added to the sum of weights by which outputs are divided", gt=0)


class QuadraticMap(nn.Module):
    """Feature map `squares(gamma * norm(x) + beta)` of each head, inside a tensor-parallel region.

    All heads share gamma and beta.
    """

    def __init__(self, config: ReBasedConfig, host: Host, eps: float):
        super().__init__()
        self.host, self.eps = host, eps if config.qk_norm else None
        self.gamma = host.parameter(config.feature_dim, init=constant(1.0), decay=False) if config.use_gamma else None
        self.beta = host.parameter(config.feature_dim, init=constant(0.0), decay=False) if config.use_beta else None

    def forward(self, x: Tensor, pad: bool) -> Tensor:
        gamma, beta = (p if p is None else self.host.shared(p) for p in (self.gamma, self.beta))
        return squares(x, gamma, beta, eps=self.eps, pad=pad)


class ReBased(LinearMixer):
    """Weights are those of flash-linear-attention's `ReBasedLinearAttention`, under the same names, except that
    `feature_map_q` is its `feature_map`, which serves queries and keys. If feature maps are not tied, that of the keys
    is `feature_map_k`."""

    Config = ReBasedConfig
    family = "decay"
    formula = (
        "S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = S_t^T phi(q_t) / (z_t^T phi(q_t)),  "
        "phi(q)^T phi(k) = (q^T k)^2 / d of q and k normalised, times gamma, plus beta"
    )
    paper = "arXiv 2402.10644"

    def __init__(self, config: ReBasedConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        d = config.feature_dim
        self.heads, self.value_dim, self.features = host.split(heads), dims.hidden_size // heads, d * (d + 1) // 2
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj = column(heads * d), column(heads * d), column(dims.hidden_size)
        self.feature_map_q = QuadraticMap(config, host, dims.norm_eps)
        if not config.tie_feature_map_qk:
            self.feature_map_k = QuadraticMap(config, host, dims.norm_eps)
        self.o_proj = Linear(host, dims.hidden_size, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: ReBasedConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"hidden_size =": dims.hidden_size})
        least = 2 if config.qk_norm else 1
        check(f"{path}.feature_dim", config.feature_dim, lambda n: n >= least, "must be at least 2 for qk_norm")
        if not (config.use_gamma or config.use_beta):
            unused(path, config, "tie_feature_map_qk", needs="set use_gamma or use_beta")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        rows = (layout.batch, layout.length, self.heads, -1)
        map_k = self.feature_map_q if self.config.tie_feature_map_qk else self.feature_map_k
        pad = layout.length > 1  # kernels need padded features; a decoding step uses no kernels
        q, k = self.feature_map_q(self.q_proj(x).view(rows), pad), map_k(self.k_proj(x).view(rows), pad)
        return {"q": q, "k": k, "v": self.v_proj(x).view(rows)}, None

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        options: dict[str, Any] = {"scale": 1 / self.config.feature_dim, "eps": self.config.normalizer_eps}
        options["features"] = self.features
        return normalized(decay, **inputs, **options, states=states, cu_seqlens=layout.cu_seqlens)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(o.flatten(2).flatten(0, 1))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        columns = {"state": self.value_dim, "normalizer": 1}
        return {name: ((batch, self.heads, self.features, n), torch.float32) for name, n in columns.items()}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.features * (self.value_dim + 1)
