"""Gated linear attention: a decay per key channel, computed from the token (arXiv 2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class GLAConfig(MixerConfig):
    type: str = opt("gla", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_k: float = opt(0.5, "width of all heads' keys over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    gate_rank: int = opt(16, "rank of the decay gate's projection", ge=1, le=2**20)
    gate_normalizer: float = opt(16.0, "the log decay is logsigmoid(.) / gate_normalizer", gt=0)
    conv_size: int = opt(0, "taps of a short convolution with SiLU on q, k and v; 0: none", ge=0, le=2**10)
    qkv_bias: bool = opt(False, "biases in the q, k and v projections")


class GatedLinearAttention(LinearMixer):
    """Weights are those of flash-linear-attention's `GatedLinearAttention`, under the same names, except that
    `o_norm.weight` is its `g_norm_swish_gate.weight`, and weights of convolutions are `[C, W]` instead of
    `[C, 1, W]`."""

    Config = GLAConfig
    family = "decay"
    op = partial(decay, bounded=True)
    formula = "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2312.06635"

    def __init__(self, config: GLAConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        keys, values = round(dims.hidden_size * config.expand_k), round(dims.hidden_size * config.expand_v)
        self.heads, self.key_dim, self.value_dim = host.split(heads), keys // heads, values // heads
        column = partial(Linear, host, split="column", std=dims.init_std)
        self.q_proj = column(dims.hidden_size, keys, bias=config.qkv_bias)
        self.k_proj = column(dims.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = column(dims.hidden_size, values, bias=config.qkv_bias)
        self.g_proj = column(dims.hidden_size, values)
        self.gk_proj = nn.Sequential(
            Linear(host, dims.hidden_size, config.gate_rank, split="shared", std=dims.init_std),
            column(config.gate_rank, keys, bias=True),
        )
        sizes = {"q": keys, "k": keys, "v": values} if config.conv_size else {}
        for name, channels in sizes.items():
            self.add_module(f"{name}_conv1d", ShortConv(host, channels, config.conv_size, name=f"conv_{name}"))
        self.o_norm = GatedRMSNorm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GLAConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"the key width": keys, "value width": values})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        inputs = {name: self.projected(name, x, layout, cache).unflatten(-1, (self.heads, -1)) for name in "qkv"}
        g = gate(self.gk_proj(x), "logsigmoid", scale=1 / self.config.gate_normalizer, floor=MIN_GATE)
        inputs["g"] = g.view(layout.batch, layout.length, self.heads, -1)
        return inputs, self.g_proj(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.key_dim * self.value_dim
