"""Multi-head latent attention: keys and values of all heads from one small latent per token (arXiv 2405.04434)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Matrices
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.layers.rotary import rotate, rotations
from linear_moe.modeling.mixers.base import Mixer, MixerConfig
from linear_moe.modeling.ops.attention.softmax import latent_attention, softmax_attention
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class MLAConfig(MixerConfig):
    type: str = opt("mla", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    q_lora_rank: int | None = opt(
        None, "size of the latent from which queries are computed; null: one full projection", ge=1, le=2**20
    )
    kv_lora_rank: int = opt(512, "size of the latent from which keys and values are computed", ge=1, le=2**20)
    qk_nope_head_dim: int = opt(128, "size of the part of a query or key head without positions", ge=1, le=2**16)
    qk_rope_head_dim: int = opt(
        64, "size of the rotated part of a query or key head; all key heads share one", ge=2, le=2**16
    )
    v_head_dim: int = opt(128, "size of a value head", ge=1, le=2**16)
    rope_base: float = opt(10000.0, "base of the rotary frequencies", gt=1)
    rope_interleave: bool = opt(True, "rotate features 2i and 2i + 1 as a pair, as in DeepSeek; false: i and i + half")


class MultiHeadLatentAttention(Mixer):
    """Weights are those of Hugging Face's DeepSeek-V2 and -V3 attention, under the same names.

    The decoding cache holds the latent and the rotated key of every token. If there are few new tokens, they attend to
    the latents directly, and the projections of keys and values are applied to the query and the output instead. If
    there are many, keys and values are computed from the latents first.
    """

    Config = MLAConfig
    family = "softmax"
    formula = "c_t = W_c x_t,  o_t = sum_{s <= t} softmax_s(q_t^T [W_k c_s; r_s] / sqrt(D)) W_v c_s"
    paper = "arXiv 2405.04434"
    unsplit_states = frozenset({"latent"})

    def __init__(self, config: MLAConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = config.num_heads or dims.num_heads
        self.heads, self.head_dim = host.split(self.num_heads), config.qk_nope_head_dim + config.qk_rope_head_dim
        column = partial(Linear, host, split="column", std=dims.init_std)
        shared = partial(Linear, host, dims.hidden_size, split="shared", std=dims.init_std)
        norm = partial(RMSNorm, host, eps=dims.norm_eps, split="shared")
        if config.q_lora_rank is None:
            self.q_proj: nn.Module = column(dims.hidden_size, self.num_heads * self.head_dim)
        else:
            self.q_a_proj, self.q_a_layernorm = shared(config.q_lora_rank), norm(config.q_lora_rank)
            self.q_b_proj = column(config.q_lora_rank, self.num_heads * self.head_dim)
        self.kv_a_proj_with_mqa = shared(
            sum(parts := (config.kv_lora_rank, config.qk_rope_head_dim)), matrices=Matrices(parts)
        )
        self.kv_a_layernorm = norm(config.kv_lora_rank)
        keys_and_values = Matrices((config.qk_nope_head_dim, config.v_head_dim), repeat=self.num_heads)
        width = self.num_heads * sum(keys_and_values.sizes)
        self.kv_b_proj = column(config.kv_lora_rank, width, matrices=keys_and_values)
        self.o_proj = Linear(
            host, self.num_heads * config.v_head_dim, dims.hidden_size, split="row", std=dims.output_init_std
        )

    @classmethod
    def validate(cls, config: MLAConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check(f"{path}.num_heads", heads, lambda n: n % tensor == 0, f"must be divisible by parallel.tensor = {tensor}")
        check(f"{path}.qk_rope_head_dim", config.qk_rope_head_dim, lambda n: n % 2 == 0, "must be even")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        """Projects to `q [B, T, H, D]` and `latent [B, T, R + P]`, the normalised latent and the keys' rotated part."""
        config, rows = self.config, (layout.batch, layout.length, -1)
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, q_rope = q.view(*rows, self.head_dim).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        turn = partial(self._rotate, angles=rotations(layout, x.device, config.rope_base, config.qk_rope_head_dim))
        k_rope = turn(k_rope.view(*rows[:2], 1, -1)).flatten(2)
        latent = torch.cat([self.kv_a_layernorm(latent).view(rows), k_rope], dim=-1)
        return {"q": torch.cat([q, turn(q_rope)], dim=-1), "latent": latent}, None

    def _rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        if self.config.rope_interleave:  # brings pairs into the order of halves, in queries and keys alike
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x, *angles)

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        if cache is None:
            return latent_attention(
                **inputs,
                expand=self._expand,
                parameters=[self.kv_b_proj.weight],
                cu_seqlens=layout.cu_seqlens,
                max_document=layout.max_document,
            )
        if layout.positions is None or layout.cu_seqlens is not None:
            raise ValueError("decoding with a cache needs positions and no packed documents")
        rows = torch.arange(layout.batch, device=layout.positions.device).unsqueeze(1)
        cache["latent"][rows, layout.positions] = inputs["latent"]
        rank, expanded = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        # Compares the multiplications of both ways for each head and slot of the cache.
        if layout.length * (2 * rank - expanded) < rank * expanded:
            return self._attend_to_latents(inputs["q"], cache["latent"], layout.positions)
        return softmax_attention(inputs["q"], *self._expand(cache["latent"]), positions=layout.positions)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Computes `k [B, S, H, D]` and `v [B, S, H, V]` from `latent [B, S, R + P]`."""
        config = self.config
        latent, rope = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
        k, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return torch.cat([k, rope.unsqueeze(2).expand(-1, -1, self.heads, -1)], dim=-1), v

    def _attend_to_latents(self, q: Tensor, latent: Tensor, positions: Tensor) -> Tensor:
        """Computes the attention as one head with H times as many queries, whose keys and values are the latents."""
        config = self.config
        weight = self.kv_b_proj.weight.view(self.heads, -1, config.kv_lora_rank)
        k_weight, v_weight = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q = torch.cat([torch.einsum("bthn,hnr->bthr", q, k_weight), q_rope], dim=-1).flatten(1, 2).unsqueeze(2)
        keys = latent.unsqueeze(2)
        o = softmax_attention(
            q,
            keys,
            keys[..., : config.kv_lora_rank],
            scale=self.head_dim**-0.5,
            positions=positions.repeat_interleave(self.heads, dim=1),
        )
        return torch.einsum("bthr,hvr->bthv", o.view(*positions.shape, self.heads, -1), v_weight)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(o.flatten(2).flatten(0, 1))

    @classmethod
    def softmax_heads(cls, config: MLAConfig, dims: Dims) -> tuple[int, int]:
        heads = config.num_heads or dims.num_heads
        return heads, heads

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"latent": ((batch, max_length, self.config.kv_lora_rank + self.config.qk_rope_head_dim), None)}

    def recurrence_flops(self, length: int) -> float:
        return (self.head_dim + self.config.v_head_dim) * self.num_heads * (length + 1.0)
