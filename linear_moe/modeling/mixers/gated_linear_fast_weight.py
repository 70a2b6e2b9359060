"""Decaying fast weights: linear attention whose state decays along both of its dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class GatedLinearFastWeightConfig(MixerConfig):
    type: str = opt("gated_linear_fast_weight", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' keys over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    gate_rank: int | None = opt(None, "rank of both gates' projections; null: full, as published", ge=1, le=2**20)
    gate_init: float = opt(0.99, "initial value of both gates, apart from their projections", gt=0, lt=1)
    qkv_bias: bool = opt(False, "biases in the q, k and v projections, as in the GPT-2 that the paper fine-tunes")
    output_norm: bool = opt(False, "RMSNorm of each head's output; the paper has none")


class GatedLinearFastWeight(LinearMixer):
    """Decay rule of "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights": no feature map, no normaliser,
    and gates that are sigmoids of projections of the token, one over keys (`gk_proj`) and one over values (`gv_proj`).
    The GPU kernel goes token by token, because no chunked kernel has decays of values, states and gradients."""

    Config = GatedLinearFastWeightConfig
    family = "decay"
    op = partial(decay, bounded=True)
    formula = "S_t = (f_t z_t^T) * S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2210.04243"

    def __init__(self, config: GatedLinearFastWeightConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        hidden = dims.hidden_size
        keys, values = round(hidden * config.expand_k), round(hidden * config.expand_v)
        self.heads, self.key_dim, self.value_dim = host.split(heads), keys // heads, values // heads
        column = partial(Linear, host, split="column", std=dims.init_std)
        self.q_proj = column(hidden, keys, bias=config.qkv_bias)
        self.k_proj = column(hidden, keys, bias=config.qkv_bias)
        self.v_proj = column(hidden, values, bias=config.qkv_bias)
        for name, width in {"gk": keys, "gv": values}.items():
            up = column(config.gate_rank or hidden, width)
            first = constant(math.log(config.gate_init / (1 - config.gate_init)))
            up.bias = host.parameter(width, init=first, axes={0: "tensor"}, decay=False)
            down = (
                [Linear(host, hidden, config.gate_rank, split="shared", std=dims.init_std)] if config.gate_rank else []
            )
            self.add_module(f"{name}_proj", nn.Sequential(*down, up) if down else up)
        self.o_norm = RMSNorm(host, self.value_dim, dims.norm_eps, split="shared") if config.output_norm else None
        self.o_proj = Linear(host, values, hidden, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GatedLinearFastWeightConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"the key width": keys, "value width": values})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        tokens = {name: self.get_submodule(f"{name}_proj")(x) for name in ("q", "k", "v", "gk", "gv")}
        tokens["g"] = gate(tokens.pop("gk"), "logsigmoid", floor=MIN_GATE)
        tokens["gv"] = gate(tokens["gv"], "logsigmoid", floor=MIN_GATE)
        shape = (layout.batch, layout.length, self.heads, -1)
        return {name: y.view(shape) for name, y in tokens.items()}, None

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o if self.o_norm is None else self.o_norm(o)
        return self.o_proj(o.flatten(2).flatten(0, 1))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.heads, self.key_dim, self.value_dim), torch.float32)}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.key_dim * self.value_dim
