"""HGRN: an element-wise gated linear RNN whose forget gates are bounded from below, more so in later layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.lower_bound import BOUNDS, LowerBound
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.recurrences.scan import linear_scan
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import unused
from linear_moe.options.fields import opt


@dataclass
class HGRNConfig(MixerConfig):
    type: str = opt("hgrn", "name of the mixer")
    expand: float = opt(1.0, "width of the recurrence over hidden_size", gt=0, le=64)
    lower_bound: str = opt(
        "learned",
        "lower bound of the forget gates: learned, starting at layer / num_layers; fixed at this value; or none",
        choices=BOUNDS,
    )
    conv_size: int = opt(0, "taps of a short convolution on the input and the forget gate; 0: none", ge=0, le=2**10)
    conv_bias: bool = opt(False, "biases in the short convolutions")


class HGRN(LinearMixer):
    """Weights are those of flash-linear-attention's `HGRNAttention`, under the same names; weights of convolutions are
    `[C, W]` instead of `[C, 1, W]`. As there, the recurrence is real-valued, and the output has RMSNorm and a SiLU
    gate. flash-linear-attention keeps the lower bounds of all layers in its model; here each layer has its own (see
    `LowerBound`)."""

    Config = HGRNConfig
    family = "scan"
    op = linear_scan
    formula = "h_t = exp(g_t) h_{t-1} + (1 - exp(g_t)) i_t,  o_t = h_t"
    paper = "arXiv 2311.04823"

    def __init__(self, config: HGRNConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        inner = round(dims.hidden_size * config.expand)
        self.inner = host.split(inner)
        column = partial(Linear, host, dims.hidden_size, inner, split="column", std=dims.init_std)
        self.i_proj, self.f_proj, self.g_proj = column(), column(), column()
        self.lower_bound = LowerBound(host, config.lower_bound, inner, dims)
        for name in "if" if config.conv_size else "":
            conv = ShortConv(host, inner, config.conv_size, name=f"conv_{name}", bias=config.conv_bias, activation=None)
            self.add_module(f"{name}_conv1d", conv)
        self.g_norm = GatedRMSNorm(host, inner, dims.norm_eps, split="column")
        self.o_proj = Linear(host, inner, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: HGRNConfig, dims: Dims, tensor: int, path: str) -> None:
        scaled(f"{path}.expand", dims.hidden_size, config.expand, "hidden_size", tensor)
        if not config.conv_size:
            unused(path, config, "conv_bias", needs="set conv_size")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        i, f = (self.projected(name, x, layout, cache) for name in "if")
        g, update = self.lower_bound(f, i)
        return {"x": update, "g": g}, self.g_proj(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.g_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.inner), torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 2.0 * self.host.size("tensor") * self.inner
