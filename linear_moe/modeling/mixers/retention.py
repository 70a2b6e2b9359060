"""Multi-scale retention: rotary positions and a constant decay of each head's own (RetNet, arXiv 2307.08621)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.feature_maps import FeatureMap
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm, RMSNorm
from linear_moe.modeling.layers.rotary import rotate, rotations
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class RetentionConfig(MixerConfig):
    type: str = opt("retention", "name of the mixer")
    num_heads: int | None = opt(None, "query heads; null: model.num_heads", ge=1, le=2**16)
    num_kv_heads: int | None = opt(None, "key and value heads; null: num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' queries over hidden_size", gt=0, le=64)
    expand_v: float = opt(2.0, "width of all heads' outputs over hidden_size", gt=0, le=64)
    feature_map: str = opt(
        "identity", "feature map of queries and keys before rotation", choices=("identity", "relu", "swish")
    )
    rope_base: float = opt(10000.0, "base of the rotary frequencies", gt=1)
    conv_size: int = opt(0, "taps of a short convolution with SiLU on q, k and v; 0: none", ge=0, le=2**10)
    output_gate: bool = opt(True, "multiply normalised outputs by SiLU of a projection of the token")


class Retention(LinearMixer):
    """Weights are those of flash-linear-attention's `MultiScaleRetention`, under the same names, except that
    `o_norm.weight` is its `g_norm_swish_gate.weight` (`g_norm.weight` without a gate), and weights of convolutions are
    `[C, W]` instead of `[C, 1, W]`."""

    Config = RetentionConfig
    family = "decay"
    op = decay
    formula = "S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T of head h,  o_t = S_t^T q_t / sqrt(K),  q and k rotated by t"
    paper = "arXiv 2307.08621"

    def __init__(self, config: RetentionConfig, dims: Dims, host: Host):
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
        self.feature_map = FeatureMap(config.feature_map, host, self.key_dim)
        self.g_proj = column(values) if config.output_gate else None
        norm = GatedRMSNorm if config.output_gate else RMSNorm
        self.o_norm = norm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: RetentionConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check(
            f"{path}.num_heads",
            heads,
            lambda n: n % tensor == 0 and keys % (2 * n) == 0 and values % n == 0,
            f"must divide half the key width {keys} (rotary positions) and the value width {values} and be divisible "
            f"by parallel.tensor = {tensor}",
        )
        check_heads(f"{path}.num_kv_heads", config.num_kv_heads or heads, tensor, {"num_heads =": heads})

    def log_decay(self, device: torch.device) -> Tensor:
        """Log decays log(1 - 2^(-5 - h)), `[H]` fp32, of this rank's heads; heads h are counted over all ranks."""
        first = self.host.rank("tensor") * self.heads
        h = torch.arange(first, first + self.heads, device=device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5.0 - h))

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor | None]:
        inputs = {}
        for name in "qkv":
            y = self.projected(name, x, layout, cache)
            inputs[name] = y.unflatten(-1, (self.heads if name == "q" else self.kv_heads, -1))
        cos, sin = rotations(layout, x.device, self.config.rope_base, self.key_dim)
        for name in "qk":
            inputs[name] = rotate(self.feature_map(inputs[name]), cos, sin)
        if self.kv_heads != self.heads:
            for name in "kv":
                inputs[name] = inputs[name].repeat_interleave(self.heads // self.kv_heads, dim=2)
        return inputs | {"g": self.log_decay(x.device)}, None if self.g_proj is None else self.g_proj(x)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(self.o_norm(o).flatten(2).flatten(0, 1) if gate is None else self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.key_dim * self.value_dim
