"""Gated DeltaProduct: several writes of the delta rule per token, after a scalar decay (arXiv 2502.10297)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Matrices
from linear_moe.modeling.layers import conv
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_uniform_rate
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm, RMSNorm, l2_norm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.gated_deltanet import GatedDeltaNet
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.ops.recurrences.delta.product import delta_product
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class GatedDeltaProductConfig(MixerConfig):
    type: str = opt("gated_deltaproduct", "name of the mixer")
    num_heads: int | None = opt(None, "query and key heads; null: model.num_heads", ge=1, le=2**16)
    num_v_heads: int | None = opt(None, "value heads, a multiple of num_heads; null: num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(
        None, "size of a key head; null: 3/4 hidden_size / num_heads, as published", ge=1, le=2**16
    )
    expand_v: float = opt(2.0, "size of a value head over head_dim", gt=0, le=64)
    num_householder: int = opt(2, "writes per token, each a (generalised) Householder reflection", ge=1, le=2**6)
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v; 0: none", ge=0, le=2**10)
    use_forget_gate: bool = opt(True, "decay the state before the writes; false: DeltaProduct")
    use_output_gate: bool = opt(True, "gate the output by SiLU of a projection")
    allow_neg_eigval: bool = opt(True, "beta in (0, 2), so that transitions have negative eigenvalues")


def swap_rows(x: Tensor, first: int, second: int) -> Tensor:
    """Reorders rows `[first * second * n, ...]`, sorted by `first`, then `second`, by `second`, then `first`."""
    return x.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)


class ByWrite(Linear):
    """Column-split Linear whose weight has rows by head, then write, but whose output has features by write, then head.

    The recurrence needs this order of features. Reordering the weight costs less than reordering tokens.
    """

    def __init__(self, *args: Any, heads: int, writes: int, **options: Any):
        rows = args[2] // (heads * writes)
        super().__init__(*args, split="column", matrices=Matrices((rows,) * writes, repeat=heads), **options)
        self.heads, self.writes = self.host.split(heads), writes

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, swap_rows(self.weight, self.heads, self.writes))


class ConvByWrite(conv.ShortConv):
    """ShortConv for the output of `ByWrite`; channels of its weight and decoding state are by head, then write."""

    def __init__(self, host: Host, *args: Any, heads: int, writes: int, **options: Any):
        super().__init__(host, *args, **options)
        self.heads, self.writes = host.split(heads), writes

    def forward(
        self, x: Tensor, layout: TokenLayout, cache: Cache | None = None, before: Tensor | None = None
    ) -> Tensor:
        weight = swap_rows(self.weight, self.heads, self.writes)
        options: Any = {"before": before, "cu_seqlens": layout.cu_seqlens, "norm_size": self.norm_size}
        if cache is None:
            return conv.short_conv(x, weight, None, output_state=False, **options)[0]
        state = swap_rows(cache[self.name].transpose(0, 1), self.heads, self.writes).transpose(0, 1)
        y, last = conv.short_conv(x, weight, None, state=state, **options)
        assert last is not None
        cache[self.name].copy_(swap_rows(last.transpose(0, 1), self.writes, self.heads).transpose(0, 1))
        return y


class GatedDeltaProduct(LinearMixer):
    """Weights are those of flash-linear-attention's `GatedDeltaProduct`, under the same names; weights of convolutions
    are `[C, W]` instead of `[C, 1, W]`. The rows of k, v and b (projections and convolutions) are ordered by head, then
    write, then channel, so that tensor ranks split them by heads; flash-linear-attention orders them by write, then
    head, then channel."""

    Config = GatedDeltaProductConfig
    family = "delta"
    op = partial(delta_product, bounded=True)
    formula = (
        "S_t = prod_i (I - beta_ti k_ti k_ti^T) exp(g_t) S_{t-1} + sum_i prod_{j>i} (I - beta_tj k_tj k_tj^T) "
        "beta_ti k_ti v_ti^T,  o_t = S_t^T q_t / sqrt(K)"
    )
    paper = "arXiv 2502.10297"

    def __init__(self, config: GatedDeltaProductConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        heads, writes = config.num_heads or dims.num_heads, config.num_householder
        self.num_v_heads = config.num_v_heads or heads
        self.key_dim = config.head_dim or 3 * dims.hidden_size // (4 * heads)
        self.value_dim = round(self.key_dim * config.expand_v)
        self.heads, self.v_heads = host.split(heads), host.split(self.num_v_heads)
        keys, values = heads * self.key_dim, self.num_v_heads * self.value_dim
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        by_write = partial(ByWrite, host, dims.hidden_size, std=dims.init_std, writes=writes)
        self.q_proj, self.k_proj = column(keys), by_write(keys * writes, heads=heads)
        self.v_proj, self.b_proj = (by_write(n * writes, heads=self.num_v_heads) for n in (values, self.num_v_heads))
        if config.use_forget_gate:
            self.a_proj = column(self.num_v_heads)
            per_head = partial(host.parameter, self.num_v_heads, axes={0: "tensor"}, decay=False, fp32=True)
            self.A_log = per_head(init=log_uniform_rate(1e-4, 16.0))  # published: U(0, 16), where 0 has no logarithm
            self.dt_bias = per_head(init=inverse_softplus_step())
        if config.conv_size:
            self.q_conv1d = conv.ShortConv(host, keys, config.conv_size, name="conv_q", norm_size=self.key_dim)
            for name, width, n in (("k", keys, heads), ("v", values, self.num_v_heads)):
                part = partial(ConvByWrite, host, width * writes, config.conv_size, heads=n, writes=writes)
                group = self.key_dim if name == "k" else None
                self.add_module(f"{name}_conv1d", part(name=f"conv_{name}", norm_size=group))
        if config.use_output_gate:
            self.g_proj = column(values)
        norm = GatedRMSNorm if config.use_output_gate else RMSNorm
        self.o_norm = norm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GatedDeltaProductConfig, dims: Dims, tensor: int, path: str) -> None:
        GatedDeltaNet.validate(config, dims, tensor, path)  # type: ignore[arg-type]  # the same sizes

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor | None]:
        rows, n, inputs = (layout.batch, layout.length, -1), self.config.num_householder, {}
        for name, heads in {"q": self.heads, "k": self.heads, "v": self.v_heads}.items():
            writes = 1 if name == "q" else n
            y = self.projected(name, x, layout, cache)
            y = (y if self.config.conv_size else F.silu(y)).unflatten(-1, (writes, heads, -1))
            if name != "v":
                y = y if self.config.conv_size else l2_norm(y)
                if self.v_heads != self.heads:
                    y = y.repeat_interleave(self.v_heads // self.heads, dim=3)
            inputs[name] = y.squeeze(2) if name == "q" else y
        beta = gate(self.b_proj(x), "sigmoid", scale=2.0 if self.config.allow_neg_eigval else 1.0)
        inputs["beta"] = beta.view(*rows[:2], n, self.v_heads)
        if self.config.use_forget_gate:
            g = gate(self.a_proj(x), "softplus", scale=-1.0, bias=self.dt_bias, log_rate=self.A_log, floor=MIN_GATE)
            inputs["g"] = g.view(rows)
        return inputs, self.g_proj(x) if self.config.use_output_gate else None

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(self.o_norm(o).flatten(0, 1).flatten(1) if gate is None else self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.v_heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv.conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return (4.0 * self.config.num_householder + 2.0) * self.num_v_heads * self.key_dim * self.value_dim
