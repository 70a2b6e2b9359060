"""Mamba-2: state space duality, a scalar decay per head from the step size (arXiv 2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_uniform_rate
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.repeat_heads import repeat_heads
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class Mamba2Config(MixerConfig):
    type: str = opt("mamba2", "name of the mixer")
    expand: float = opt(2.0, "inner width over hidden_size", gt=0, le=64)
    head_dim: int = opt(64, "channels of a head; the mixer has expand * hidden_size / head_dim heads", ge=1, le=2**16)
    state_size: int = opt(128, "size of B and C: the state of one channel", ge=1, le=2**16)
    num_groups: int = opt(1, "groups of heads that share B, C and the output norm", ge=1, le=2**16)
    conv_size: int = opt(4, "taps of the short convolutions on x, B and C", ge=1, le=2**10)


class Mamba2(LinearMixer):
    """Weights are those of mamba_ssm and Hugging Face, except that z, x, B, C and dt have projections of their own, and
    x, B and C convolutions of their own, so that each splits by heads or groups. The `in_proj` and `conv1d` of
    mamba_ssm and Hugging Face are these weights stacked in this order along dimension 0. Other names are the same."""

    Config = Mamba2Config
    family = "decay"
    op = partial(decay, scale=1.0, bounded=True)
    formula = "S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,  y_t = S_t^T C_t + D x_t"
    paper = "arXiv 2405.21060"

    def __init__(self, config: Mamba2Config, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        inner, states = round(dims.hidden_size * config.expand), config.num_groups * config.state_size
        self.num_heads = inner // config.head_dim
        self.heads, self.groups = host.split(self.num_heads), host.split(config.num_groups)
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.z_proj, self.x_proj, self.B_proj, self.C_proj = (
            column(inner),
            column(inner),
            column(states),
            column(states),
        )
        self.dt_proj = column(self.num_heads)
        for name, channels in {"x": inner, "B": states, "C": states}.items():
            conv = ShortConv(host, channels, config.conv_size, name=f"conv_{name}", bias=True)
            self.add_module(f"{name}_conv1d", conv)
        per_head = partial(host.parameter, self.num_heads, axes={0: "tensor"}, decay=False, fp32=True)
        self.A_log, self.D = per_head(init=log_uniform_rate(1.0, 16.0)), per_head(init=constant(1.0))
        self.dt_bias = per_head(init=inverse_softplus_step())
        groups = config.num_groups
        self.norm = GatedRMSNorm(host, inner, dims.norm_eps, split="column", groups=groups, gate_first=True)
        self.out_proj = Linear(host, inner, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: Mamba2Config, dims: Dims, tensor: int, path: str) -> None:
        inner = scaled(f"{path}.expand", dims.hidden_size, config.expand, "hidden_size")
        check(
            f"{path}.head_dim",
            config.head_dim,
            lambda n: inner % n == 0 and inner // n % tensor == 0,
            f"must divide expand * hidden_size = {inner} into heads divisible by parallel.tensor = {tensor}",
        )
        heads = inner // config.head_dim
        check(
            f"{path}.num_groups",
            config.num_groups,
            lambda n: heads % n == 0 and n % tensor == 0,
            f"must divide the mixer's {heads} heads and be divisible by parallel.tensor = {tensor}",
        )

    def project(
        self, x: Tensor, layout: TokenLayout, cache: Cache | None
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        rows = (layout.batch, layout.length, -1)
        channels, B, C = (self.projected(name, x, layout, cache) for name in "xBC")
        steps = self.dt_proj(x)
        dt = gate(steps, "softplus", bias=self.dt_bias).view(rows)
        g = gate(steps, "softplus", scale=-1.0, bias=self.dt_bias, log_rate=self.A_log, floor=MIN_GATE).view(rows)
        # Head h reads B and C of group h // (heads / groups). dt scales B and not x, because a copy of B is written for
        # every head anyway.
        B, C = (t.unflatten(-1, (self.groups, self.config.state_size)) for t in (B, C))
        v = channels.unflatten(-1, (self.heads, self.config.head_dim))
        q, k = repeat_heads(C, heads=self.heads), repeat_heads(B, dt)
        return {"q": q, "k": k, "v": v, "g": g}, (self.z_proj(x), channels)

    def output(self, o: Tensor, gate: tuple[Tensor, Tensor]) -> Tensor:
        z, x = gate
        return self.out_proj(self.norm(o, z, x, self.D))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.config.state_size, self.config.head_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.config.state_size * self.config.head_dim
