"""Gated slot attention: softmax attention over a fixed number of slots, each with a decay of its own."""

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
from linear_moe.modeling.layers.feature_maps import FeatureMap
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.fused.gates import gate_and_complement
from linear_moe.modeling.ops.fused.repeat_heads import repeat_heads
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.ops.recurrences.gsa import gsa
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class GSAConfig(MixerConfig):
    type: str = opt("gsa", "name of the mixer")
    num_heads: int | None = opt(None, "query heads; null: model.num_heads", ge=1, le=2**16)
    num_kv_heads: int | None = opt(None, "key and value heads; null: num_heads", ge=1, le=2**16)
    num_slots: int = opt(64, "slots of each head", ge=2, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' queries over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' outputs over hidden_size", gt=0, le=64)
    gate_normalizer: float = opt(8.0, "the log decay is logsigmoid(.) / gate_normalizer", gt=0)
    scale: float = opt(1.0, "factor of the scores of slots", gt=0)
    feature_map: str = opt("swish", "feature map of queries and keys", choices=("swish", "relu", "t2r", "identity"))
    conv_size: int = opt(0, "taps of a short convolution with SiLU on q, k and v; 0: none", ge=0, le=2**10)


class GatedSlotAttention(LinearMixer):
    """Weights are those of flash-linear-attention's `GatedSlotAttention`, under the same names, except that
    `o_norm.weight` is its `g_norm.weight`, and weights of convolutions are `[C, W]` instead of `[C, 1, W]`. As in
    flash-linear-attention, the output passes through SiLU, an RMSNorm over all heads and the projection, and every
    query head has a copy of its key-value head's state."""

    Config = GSAConfig
    family = "decay"
    formula = (
        "K_t = K_{t-1} diag(a_t) + k_t (1 - a_t)^T,  V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t^T,"
        "  o_t = V_t^T softmax(K_t^T q_t)"
    )
    paper = "arXiv 2409.07146"

    def __init__(self, config: GSAConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        kv_heads = config.num_kv_heads or heads
        keys, values = round(dims.hidden_size * config.expand_k), round(dims.hidden_size * config.expand_v)
        self.key_dim, self.value_dim = keys // heads, values // heads
        self.heads, self.kv_heads = host.split(heads), host.split(kv_heads)
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        widths = {"q": keys, "k": kv_heads * self.key_dim, "v": kv_heads * self.value_dim}
        for name, width in widths.items():
            self.add_module(f"{name}_proj", column(width))
            if config.conv_size:
                self.add_module(f"{name}_conv1d", ShortConv(host, width, config.conv_size, name=f"conv_{name}"))
        self.f_proj = column(kv_heads * config.num_slots)
        self.feature_map = FeatureMap(config.feature_map, host, self.key_dim)
        self.o_norm = RMSNorm(host, values, dims.norm_eps, split="column")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GSAConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"the key width": keys, "value width": values})
        check_heads(f"{path}.num_kv_heads", config.num_kv_heads or heads, tensor, {"num_heads =": heads})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        inputs = {}
        for name in "qkv":
            heads = self.heads if name == "q" else self.kv_heads
            y = self.projected(name, x, layout, cache).unflatten(-1, (heads, -1))
            inputs[name] = F.silu(y) if name == "v" else self.feature_map(y)
        f = self.f_proj(x).view(layout.batch, layout.length, self.kv_heads, -1)
        options: Any = {"scale": 1 / self.config.gate_normalizer, "floor": MIN_GATE}
        inputs["g"], inputs["s"] = gate_and_complement(f, "logsigmoid", **options)
        if self.kv_heads != self.heads:
            for name in "kvgs":
                inputs[name] = repeat_heads(inputs[name], heads=self.heads)
        return inputs, None

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        initial = (states["keys"], states["values"]) if states else None
        options: Any = {"initial_states": initial, "cu_seqlens": layout.cu_seqlens, "bounded": True}
        o, (keys, values) = gsa(**inputs, scale=self.config.scale, **options)
        return o, {"keys": keys, "values": values}

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(self.o_norm(o.flatten(2).flatten(0, 1), "silu"))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        keys = (batch, self.heads, self.key_dim, self.config.num_slots)
        values = (batch, self.heads, self.config.num_slots, self.value_dim)
        return {"keys": (keys, torch.float32), "values": (values, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return self.num_heads * self.config.num_slots * (4.0 * self.key_dim + 4.0 * self.value_dim + 5.0)
