"""Kimi Delta Attention: the delta rule with a decay per key channel, computed from the token (arXiv 2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_uniform_rate
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm, l2_norm
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
class KDAConfig(MixerConfig):
    type: str = opt("kda", "name of the mixer")
    num_heads: int | None = opt(None, "query and key heads; null: model.num_heads", ge=1, le=2**16)
    num_v_heads: int | None = opt(None, "value heads, a multiple of num_heads; null: num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(None, "size of a key head; null: hidden_size / num_heads", ge=1, le=2**16)
    expand_v: float = opt(1.0, "size of a value head over head_dim", gt=0, le=64)
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v; 0: none", ge=0, le=2**10)
    gate_bias: bool = opt(True, "a bias in the output gate; Kimi Linear's published weights have none")
    lower_bound: float | None = opt(
        None,
        "lower bound of the log decay g: g = lower_bound * sigmoid(A .); null: none, g = -A softplus(.)",
        ge=-5,
        lt=0,
    )
    allow_neg_eigval: bool = opt(
        False, "beta in (0, 2), so that transitions have negative eigenvalues (arXiv 2411.12537)"
    )


class KimiDeltaAttention(LinearMixer):
    """Weights are those of flash-linear-attention's `KimiDeltaAttention`, under the same names; weights of convolutions
    are `[C, W]` instead of `[C, 1, W]`.

    Hugging Face's `KimiLinearDeltaAttention` has other names: its `conv1d` is our q, k and v convolutions stacked, its
    `forget_gate.f_a_proj`, `f_b_proj`, `A_log [1, 1, H, 1]` and `dt_bias` are our `f_proj.0`, `f_proj.1`, `A_log [H]`
    and `dt_bias`, and its `g_a_proj` and `g_b_proj` are our `g_proj.0` and `g_proj.1`."""

    Config = KDAConfig
    family = "delta"
    op = partial(delta, bounded=True)
    formula = "S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2510.26692"

    def __init__(self, config: KDAConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        heads = config.num_heads or dims.num_heads
        self.num_v_heads = config.num_v_heads or heads
        self.key_dim = config.head_dim or dims.hidden_size // heads
        self.value_dim = round(self.key_dim * config.expand_v)
        self.heads, self.v_heads = host.split(heads), host.split(self.num_v_heads)
        keys, values, gates = heads * self.key_dim, self.num_v_heads * self.value_dim, self.num_v_heads * self.key_dim
        column = partial(Linear, host, split="column", std=dims.init_std)
        low_rank = partial(Linear, host, dims.hidden_size, self.value_dim, split="shared", std=dims.init_std)
        self.q_proj, self.k_proj = column(dims.hidden_size, keys), column(dims.hidden_size, keys)
        self.v_proj = column(dims.hidden_size, values)
        self.f_proj = nn.Sequential(low_rank(), column(self.value_dim, gates))
        self.b_proj = column(dims.hidden_size, self.num_v_heads)
        self.g_proj = nn.Sequential(low_rank(), column(self.value_dim, values, bias=config.gate_bias))
        split = partial(host.parameter, axes={0: "tensor"}, decay=False, fp32=True)
        rate = log_uniform_rate(1.0, 16.0) if config.lower_bound is None else constant(0.0)
        self.A_log, self.dt_bias = split(self.num_v_heads, init=rate), split(gates, init=inverse_softplus_step())
        for name, channels in {"q": keys, "k": keys, "v": values}.items() if config.conv_size else ():
            norm = None if name == "v" else self.key_dim
            conv = ShortConv(host, channels, config.conv_size, name=f"conv_{name}", norm_size=norm)
            self.add_module(f"{name}_conv1d", conv)
        self.o_norm = GatedRMSNorm(host, self.value_dim, dims.norm_eps, split="shared", activation="sigmoid")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: KDAConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        whole = config.head_dim is not None
        check(
            f"{path}.num_heads",
            heads,
            lambda n: n % tensor == 0 and (whole or dims.hidden_size % n == 0),
            f"must be divisible by parallel.tensor = {tensor}"
            + ("" if whole else f" and divide hidden_size = {dims.hidden_size} unless head_dim is set"),
        )
        check(
            f"{path}.num_v_heads",
            config.num_v_heads or heads,
            lambda n: n % heads == 0,
            f"must be a multiple of num_heads = {heads}",
        )
        head_dim = config.head_dim or dims.hidden_size // heads
        check_head_dims(path, head_dim, config.expand_v)

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows, inputs = (layout.batch, layout.length, -1), {}
        for name, heads in {"q": self.heads, "k": self.heads, "v": self.v_heads}.items():
            y = self.projected(name, x, layout, cache)
            if not self.config.conv_size:
                y = F.silu(y) if name == "v" else l2_norm(F.silu(y), size=self.key_dim)
            y = y.unflatten(-1, (heads, -1))
            inputs[name] = y if heads == self.v_heads else repeat_heads(y, heads=self.v_heads)
        inputs["beta"] = gate(self.b_proj(x), "sigmoid", scale=2.0 if self.config.allow_neg_eigval else 1.0).view(rows)
        f, bound = self.f_proj(x), self.config.lower_bound
        if bound is None:
            g = gate(f, "softplus", scale=-1.0, bias=self.dt_bias, log_rate=self.A_log, floor=MIN_GATE)
        else:
            g = bound * torch.sigmoid(self.A_log.exp().repeat_interleave(self.key_dim) * (f.float() + self.dt_bias))
        inputs["g"] = g.view(*rows[:2], self.v_heads, self.key_dim)
        return inputs, self.g_proj(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.v_heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 6.0 * self.num_v_heads * self.key_dim * self.value_dim
