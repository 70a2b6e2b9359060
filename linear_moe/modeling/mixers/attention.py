"""Softmax attention with grouped query heads (arXiv 2305.13245) and rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.layers.rotary import rotate, rotations
from linear_moe.modeling.mixers.base import Mixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads
from linear_moe.modeling.ops.attention.softmax import softmax_attention
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check, unused
from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import opt


@dataclass
class AttentionConfig(MixerConfig):
    type: str = opt("attention", "name of the mixer")
    num_heads: int | None = opt(None, "query heads; null: model.num_heads", ge=1, le=2**16)
    num_kv_heads: int | None = opt(None, "key and value heads; null: num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(None, "size of a head; null: hidden_size / num_heads", ge=1, le=2**16)
    rope: bool = opt(True, "rotary position embedding")
    rope_base: float = opt(10000.0, "base of the rotary frequencies", gt=1)
    rotary_fraction: float = opt(1.0, "share of each head that is rotated, from its start", gt=0, le=1)
    qk_norm: bool = opt(False, "RMSNorm of every query and key head before the rotation")
    qkv_bias: bool = opt(False, "biases in the q, k and v projections")
    output_gate: bool = opt(False, "multiply the heads' outputs by a sigmoid gate computed from the token")
    window: int | None = opt(None, "tokens that a token attends to, itself included; null: all before it", ge=1)


class Attention(Mixer):
    """Weights are those of Hugging Face's Llama, Qwen2 and Qwen3 attention, under the same names. `g_proj` is the gate
    whose weights Qwen3-Next interleaves with those of `q_proj`, head by head."""

    Config = AttentionConfig
    family = "softmax"
    formula = "o_t = sum_{s <= t} softmax_s(q_t^T k_s / sqrt(D)) v_s"
    paper = "arXiv 1706.03762"

    def __init__(self, config: AttentionConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = config.num_heads or dims.num_heads
        kv_heads = config.num_kv_heads or self.num_heads
        self.head_dim = config.head_dim or dims.hidden_size // self.num_heads
        self.rotary_dim = round(self.head_dim * config.rotary_fraction)
        self.heads, self.kv_heads = host.split(self.num_heads), host.split(kv_heads)
        width, kv_width = self.num_heads * self.head_dim, kv_heads * self.head_dim
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj = column(width, bias=config.qkv_bias)
        self.k_proj = column(kv_width, bias=config.qkv_bias)
        self.v_proj = column(kv_width, bias=config.qkv_bias)
        self.g_proj = column(width) if config.output_gate else None
        head_norm = partial(RMSNorm, host, self.head_dim, dims.norm_eps, split="shared")
        self.q_norm: RMSNorm | None = head_norm() if config.qk_norm else None
        self.k_norm: RMSNorm | None = head_norm() if config.qk_norm else None
        self.o_proj = Linear(host, width, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: AttentionConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        divisible = f"be divisible by parallel.tensor = {tensor}"
        check(f"{path}.num_heads", heads, lambda n: n % tensor == 0, f"must {divisible}")
        check_heads(f"{path}.num_kv_heads", config.num_kv_heads or heads, tensor, {"num_heads =": heads})
        if config.head_dim is None:
            check(
                f"{path}.num_heads",
                heads,
                lambda n: dims.hidden_size % n == 0 and n % tensor == 0,
                f"must divide hidden_size = {dims.hidden_size} unless head_dim is set, and {divisible}",
            )
        head_dim = config.head_dim or dims.hidden_size // heads
        rotary = head_dim * config.rotary_fraction
        if config.rope and (not math.isclose(rotary, round(rotary), rel_tol=1e-9) or round(rotary) % 2):
            raise ConfigError(
                f"{path}.rotary_fraction",
                config.rotary_fraction,
                f"times the head size {head_dim} must be an even whole number",
                fix=f"nearest valid: {max(2, 2 * round(rotary / 2)) / head_dim:.12g}"
                if head_dim > 1
                else "set rope: false",
            )
        if not config.rope:
            unused(path, config, "rope_base", "rotary_fraction", needs="set rope")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor | None]:
        rows = (layout.batch, layout.length, -1, self.head_dim)
        q, k, v = self.q_proj(x).view(rows), self.k_proj(x).view(rows), self.v_proj(x).view(rows)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            cos, sin = rotations(layout, x.device, self.config.rope_base, self.rotary_dim)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return {"q": q, "k": k, "v": v}, None if self.g_proj is None else self.g_proj(x)

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        if cache is None:
            return softmax_attention(
                **inputs, cu_seqlens=layout.cu_seqlens, max_document=layout.max_document, window=self.config.window
            )
        if layout.positions is None or layout.cu_seqlens is not None:
            raise ValueError("decoding with a cache needs positions and no packed documents")
        rows = torch.arange(layout.batch, device=layout.positions.device).unsqueeze(1)
        for name in ("k", "v"):
            cache[name][rows, layout.positions] = inputs[name]
        return softmax_attention(
            inputs["q"], cache["k"], cache["v"], positions=layout.positions, window=self.config.window
        )

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o.flatten(2).flatten(0, 1)
        return self.o_proj(o if gate is None else o * gate.sigmoid())

    @classmethod
    def softmax_heads(cls, config: AttentionConfig, dims: Dims) -> tuple[int, int]:
        heads = config.num_heads or dims.num_heads
        return heads, config.num_kv_heads or heads

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        shape = (batch, max_length, self.kv_heads, self.head_dim)
        return {"k": (shape, None), "v": (shape, None)}

    def recurrence_flops(self, length: int) -> float:
        seen = (length + 1) / 2
        if self.config.window is not None and (window := self.config.window) < length:
            seen = window - window * (window - 1) / (2 * length)
        return 4.0 * self.num_heads * self.head_dim * seen
