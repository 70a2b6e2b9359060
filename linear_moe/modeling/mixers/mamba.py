"""Mamba: a selective scan, every channel with a state and a step size of its own (arXiv 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Matrices, constant
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_integers, uniform
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.norms import norm
from linear_moe.modeling.ops.recurrences.scan import selective_scan
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class MambaConfig(MixerConfig):
    type: str = opt("mamba", "name of the mixer")
    expand: float = opt(2.0, "inner width over hidden_size", gt=0, le=64)
    state_size: int = opt(16, "size of B and C: the state of one channel", ge=1, le=2**10)
    dt_rank: int | None = opt(None, "rank of the step size's projection; null: hidden_size / 16", ge=1, le=2**16)
    conv_size: int = opt(4, "taps of the short convolution", ge=1, le=2**10)
    conv_bias: bool = opt(True, "a bias in the convolution")
    bias: bool = opt(False, "biases in the input and output projections")


class Mamba(LinearMixer):
    """Weights are those of Hugging Face's `MambaMixer` and flash-linear-attention's `Mamba`, under the same names, with
    three exceptions: `u_proj` and `z_proj` are the first and second half of their `in_proj` along dimension 0,
    `dt_bias` is their `dt_proj.bias`, and `conv1d.weight` is `[C, W]` instead of `[C, 1, W]`."""

    Config = MambaConfig
    family = "scan"
    op = selective_scan
    formula = "h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t"
    paper = "arXiv 2312.00752"

    def __init__(self, config: MambaConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        inner = round(dims.hidden_size * config.expand)
        self.inner, self.rank = host.split(inner), config.dt_rank or -(-dims.hidden_size // 16)
        column = partial(Linear, host, dims.hidden_size, inner, split="column", bias=config.bias, std=dims.init_std)
        self.u_proj, self.z_proj = column(), column()
        self.conv1d = ShortConv(host, inner, config.conv_size, name="conv", bias=config.conv_bias)
        # dt's low-rank form, B and C depend on all channels: the ranks' parts are summed, and every rank has the sum.
        parts = (self.rank, config.state_size, config.state_size)
        self.x_proj = Linear(host, inner, sum(parts), split="row", std=dims.init_std, matrices=Matrices(parts))
        self.dt_proj = Linear(host, self.rank, inner, split="column", init=uniform(self.rank**-0.5))
        per_channel = partial(host.parameter, axes={0: "tensor"}, decay=False, fp32=True)
        self.dt_bias = per_channel(inner, init=inverse_softplus_step())
        self.A_log = per_channel(inner, config.state_size, init=log_integers())
        self.D = per_channel(inner, init=constant(1.0))
        self.out_proj = Linear(host, inner, dims.hidden_size, split="row", bias=config.bias, std=dims.output_init_std)

    @classmethod
    def validate(cls, config: MambaConfig, dims: Dims, tensor: int, path: str) -> None:
        scaled(f"{path}.expand", dims.hidden_size, config.expand, "hidden_size", tensor)

    def project(
        self, x: Tensor, layout: TokenLayout, cache: Cache | None
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        rows, size = (layout.batch, layout.length, -1), self.config.state_size
        u = self.conv1d(self.u_proj(x).view(rows), layout, cache)
        low_rank, B, C = self.host.enter(self.x_proj(u.flatten(0, 1))).view(rows).split([self.rank, size, size], dim=-1)
        dt = gate(self.dt_proj(low_rank), "softplus", bias=self.dt_bias)
        return {"u": u, "dt": dt, "A": -self.A_log.exp(), "B": B, "C": C}, (self.z_proj(x), u)

    def output(self, o: Tensor, gate: tuple[Tensor, Tensor]) -> Tensor:
        z, u = gate
        o, u = o.reshape(z.shape), u.reshape(z.shape)
        return self.out_proj(norm(o, None, None, z, u, self.D, kind="none"))  # (o + D u) silu(z)

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.inner, self.config.state_size), torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 6.0 * self.host.size("tensor") * self.inner * self.config.state_size
