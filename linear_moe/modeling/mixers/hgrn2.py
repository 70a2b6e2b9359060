"""HGRN2: a gated linear RNN with matrix states, whose keys are 1 minus the forget gates (arXiv 2404.07904)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.lower_bound import BOUNDS, LowerBound
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import unused
from linear_moe.options.fields import opt


@dataclass
class HGRN2Config(MixerConfig):
    type: str = opt("hgrn2", "name of the mixer")
    num_heads: int | None = opt(
        None, "heads, of state size (hidden_size / num_heads)^2; null: model.num_heads", ge=1, le=2**16
    )
    lower_bound: str = opt(
        "learned",
        "lower bound of the forget gates: learned, starting at layer / num_layers; fixed at this value; or none",
        choices=BOUNDS,
    )
    conv_size: int = opt(0, "taps of a short convolution on queries, gates and inputs; 0: none", ge=0, le=2**10)
    conv_bias: bool = opt(False, "biases in the short convolutions")


class HGRN2(LinearMixer):
    """Weights are those of flash-linear-attention's `HGRN2Attention`, under the same names; weights of convolutions are
    `[C, W]` instead of `[C, 1, W]`, and its expand_ratio is hidden_size / num_heads. flash-linear-attention keeps the
    lower bounds of all layers in its model; here each layer has its own (see `LowerBound`)."""

    Config = HGRN2Config
    family = "decay"
    op = partial(decay, bounded=True)
    formula = "S_t = diag(exp(g_t)) S_{t-1} + (1 - exp(g_t)) i_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2404.07904"

    def __init__(self, config: HGRN2Config, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        hidden, heads = dims.hidden_size, config.num_heads or dims.num_heads
        self.heads, self.head_dim = host.split(heads), hidden // heads
        column = partial(Linear, host, hidden, hidden, split="column", std=dims.init_std)
        self.q_proj, self.f_proj, self.i_proj = column(), column(), column()
        self.lower_bound = LowerBound(host, config.lower_bound, hidden, dims)
        for name in "qfi" if config.conv_size else "":
            conv = ShortConv(
                host, hidden, config.conv_size, name=f"conv_{name}", bias=config.conv_bias, activation=None
            )
            self.add_module(f"{name}_conv1d", conv)
        self.g_norm = RMSNorm(host, hidden, dims.norm_eps, split="column")
        self.o_proj = Linear(host, hidden, hidden, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: HGRN2Config, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"hidden_size =": dims.hidden_size})
        if not config.conv_size:
            unused(path, config, "conv_bias", needs="set conv_size")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        q, f, i = (self.projected(name, x, layout, cache) for name in "qfi")
        g, k = self.lower_bound(f)
        inputs = {"q": F.silu(q), "k": k, "v": i, "g": g}
        return {name: t.unflatten(-1, (self.heads, self.head_dim)) for name, t in inputs.items()}, None

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(self.g_norm(o.flatten(2).flatten(0, 1)))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.heads, self.head_dim, self.head_dim), torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.dims.hidden_size * self.head_dim
