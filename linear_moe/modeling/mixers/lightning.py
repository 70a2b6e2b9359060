"""Lightning attention: linear attention with a constant decay per head and layer (arXiv 2401.04658, 2501.08313)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.feature_maps import FeatureMap
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class LightningConfig(MixerConfig):
    type: str = opt("lightning", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(None, "size of a head; null: hidden_size / num_heads", ge=1, le=2**16)
    activation: str = opt("swish", "activation of queries, keys and values", choices=("swish", "relu", "identity"))
    slopes: str = opt(
        "minimax",
        "decay rate of head h of H in layer l of L: minimax (2501.08313): 2^(-8 (h + 1) / H) (1 - l / (L - 1)); "
        "transnormer (2307.14995): 8 h / H (1 - l / L)",
        choices=("minimax", "transnormer"),
    )


class LightningAttention(LinearMixer):
    """Weights are those of Hugging Face's `MiniMaxLightningAttention`, under the same names, except that its
    `qkv_proj.weight` interleaves the rows of our `q_proj`, `k_proj` and `v_proj` head by head."""

    Config = LightningConfig
    family = "decay"
    op = partial(decay, scale=1.0)
    formula = "S_t = exp(-rate_h) S_{t-1} + k_t v_t^T of head h,  o_t = S_t^T q_t"
    paper = "arXiv 2401.04658"

    def __init__(self, config: LightningConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = config.num_heads or dims.num_heads
        self.head_dim, self.heads = config.head_dim or dims.hidden_size // self.num_heads, host.split(self.num_heads)
        width = self.num_heads * self.head_dim
        column = partial(Linear, host, dims.hidden_size, width, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj, self.output_gate = column(), column(), column(), column()
        self.activation = FeatureMap(config.activation, host, self.head_dim)
        self.norm = GatedRMSNorm(host, width, dims.norm_eps, split="column", activation="sigmoid")
        self.out_proj = Linear(host, width, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: LightningConfig, dims: Dims, tensor: int, path: str) -> None:
        check(
            f"{path}.num_heads",
            config.num_heads or dims.num_heads,
            lambda n: n % tensor == 0 and (config.head_dim is not None or dims.hidden_size % n == 0),
            f"must be divisible by parallel.tensor = {tensor} and, unless head_dim is set, "
            f"divide hidden_size = {dims.hidden_size}",
        )

    def log_decay(self, device: torch.device) -> Tensor:
        """Log decays `[H]` fp32 of this rank's heads, minus their rates; heads h are counted over all ranks."""
        layer, layers = self.dims.layer, self.dims.num_layers
        first = self.host.rank("tensor") * self.heads
        h = torch.arange(first, first + self.heads, device=device, dtype=torch.float32)
        if self.config.slopes == "transnormer":
            return h * (-8 / self.num_heads * (1 - layer / layers))
        return torch.exp2((h + 1) * (-8 / self.num_heads)) * -(1 - layer / (layers - 1 + 1e-5) + 1e-5)

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows = (layout.batch, layout.length, self.heads, self.head_dim)
        q, k, v = (self.activation(proj(x)).view(rows) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return {"q": q, "k": k, "v": v, "g": self.log_decay(x.device)}, self.output_gate(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.out_proj(self.norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.heads, self.head_dim, self.head_dim), torch.float32)}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.head_dim**2
