"""Gated DeltaNet: the delta rule with a scalar decay per head, computed from the token (arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_uniform_rate
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_head_dims
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.repeat_heads import repeat_heads
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class GatedDeltaNetConfig(MixerConfig):
    type: str = opt("gated_deltanet", "name of the mixer")
    num_heads: int | None = opt(None, "query and key heads; null: model.num_heads", ge=1, le=2**16)
    num_v_heads: int | None = opt(None, "value heads, a multiple of num_heads; null: num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(
        None, "size of a key head; null: 3/4 hidden_size / num_heads, as published", ge=1, le=2**16
    )
    expand_v: float = opt(2.0, "size of a value head over head_dim", gt=0, le=64)
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v", ge=1, le=2**10)
    allow_neg_eigval: bool = opt(
        False, "beta in (0, 2), so that transitions have negative eigenvalues (arXiv 2411.12537)"
    )


class GatedDeltaNet(LinearMixer):
    """Weights are those of flash-linear-attention's `GatedDeltaNet`, under the same names; weights of convolutions are
    `[C, W]` instead of `[C, 1, W]`. With num_v_heads, value head i uses key head i // (num_v_heads / num_heads), as in
    Qwen3-Next."""

    Config = GatedDeltaNetConfig
    family = "delta"
    op = partial(delta, bounded=True)
    formula = "S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2412.06464"

    def __init__(self, config: GatedDeltaNetConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        heads = config.num_heads or dims.num_heads
        self.num_v_heads = config.num_v_heads or heads
        self.key_dim = config.head_dim or 3 * dims.hidden_size // (4 * heads)
        self.value_dim = round(self.key_dim * config.expand_v)
        self.heads, self.v_heads = host.split(heads), host.split(self.num_v_heads)
        keys, values = heads * self.key_dim, self.num_v_heads * self.value_dim
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = column(keys), column(keys), column(values), column(values)
        self.a_proj, self.b_proj = column(self.num_v_heads), column(self.num_v_heads)
        per_head = partial(host.parameter, self.num_v_heads, axes={0: "tensor"}, decay=False, fp32=True)
        self.A_log = per_head(init=log_uniform_rate(1e-4, 16.0))  # published: U(0, 16), where 0 has no logarithm
        self.dt_bias = per_head(init=inverse_softplus_step())
        for name, channels in {"q": keys, "k": keys, "v": values}.items():
            norm = None if name == "v" else self.key_dim
            conv = ShortConv(host, channels, config.conv_size, name=f"conv_{name}", norm_size=norm)
            self.add_module(f"{name}_conv1d", conv)
        self.o_norm = GatedRMSNorm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GatedDeltaNetConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check(f"{path}.num_heads", heads, lambda n: n % tensor == 0, f"must be divisible by parallel.tensor = {tensor}")
        check(
            f"{path}.num_v_heads",
            config.num_v_heads or heads,
            lambda n: n % heads == 0,
            f"must be a multiple of num_heads = {heads}",
        )
        if config.head_dim is None:
            check(
                f"{path}.num_heads",
                heads,
                lambda n: n % tensor == 0 and 3 * dims.hidden_size % (4 * n) == 0,
                f"must divide 3/4 hidden_size = {0.75 * dims.hidden_size:g} unless head_dim is set",
            )
        head_dim = config.head_dim or 3 * dims.hidden_size // (4 * heads)
        check_head_dims(path, head_dim, config.expand_v)

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows = (layout.batch, layout.length, -1)
        q, k, v = (self.projected(name, x, layout, cache) for name in "qkv")
        q, k = (t.unflatten(-1, (self.heads, self.key_dim)) for t in (q, k))
        if self.v_heads != self.heads:
            q, k = (repeat_heads(t, heads=self.v_heads) for t in (q, k))
        v = v.unflatten(-1, (self.v_heads, self.value_dim))
        beta = gate(self.b_proj(x), "sigmoid", scale=2.0 if self.config.allow_neg_eigval else 1.0)
        g = gate(self.a_proj(x), "softplus", scale=-1.0, bias=self.dt_bias, log_rate=self.A_log, floor=MIN_GATE)
        return {"q": q, "k": k, "v": v, "beta": beta.view(rows), "g": g.view(rows)}, self.g_proj(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.v_heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 6.0 * self.num_v_heads * self.key_dim * self.value_dim
