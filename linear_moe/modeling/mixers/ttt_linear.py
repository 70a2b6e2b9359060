"""TTT-Linear: a linear model trained on the tokens by mini-batch gradient descent, as memory (arXiv 2407.04620)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant, normal
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import LayerNorm
from linear_moe.modeling.layers.rotary import rotary_angles, token_positions
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.ops.fused.gates import gate as evaluate
from linear_moe.modeling.ops.recurrences.fast_weights import ttt
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check, unused
from linear_moe.options.fields import opt


@dataclass
class TTTLinearConfig(MixerConfig):
    type: str = opt("ttt_linear", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    mini_batch_size: int = opt(16, "tokens whose inner gradients are computed at the same weights", ge=1, le=2**10)
    inner_lr: float = opt(1.0, "the inner learning rate is inner_lr * sigmoid(.) / head size", gt=0)
    inner_norm_eps: float = opt(1e-6, "epsilon of the inner LayerNorm", gt=0)
    rope_base: float = opt(10000.0, "base of the rotary frequencies; positions count within the mini-batch", gt=1)
    share_qk: bool = opt(True, "q and k are convolutions of one projection, as in the Mamba backbone")
    conv_size: int = opt(4, "taps of the convolutions of share_qk", ge=1, le=2**10)
    gate: bool = opt(True, "multiply the output by GELU of a projection, as in the Mamba backbone")


class TTTLinear(LinearMixer):
    """Weights are those of the authors' PyTorch code (ttt-lm-pytorch, `TTTLinear`), under the same names, with three
    exceptions: `lr_proj`, with weight `[H, hidden]` and bias `[H]`, is its `learnable_ttt_lr_weight [H, hidden, 1]` and
    `learnable_ttt_lr_bias [H, 1]`; `b1` is `[H, D]` instead of `[H, 1, D]`; and weights of convolutions are `[C, W]`
    instead of `[C, 1, W]`. The defaults give the paper's Mamba backbone; `share_qk: false, gate: false` gives its
    Transformer backbone. The authors' backbone also convolves the residual stream in a separate layer (`pre_conv`),
    which is not part of this mixer."""

    Config = TTTLinearConfig
    family = "fast_weights"
    formula = (
        "A_t = A_{t-1} + eta_t grad_W |f_W(k_t) - v_t|^2 / 2,  o_t = f_{W - A_t/i}(q_t),  f_W(x) = x + LN(x W + b);  "
        "W = W - A_t/C, A = 0 after C tokens"
    )
    paper = "arXiv 2407.04620"

    def __init__(self, config: TTTLinearConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        heads, width = config.num_heads or dims.num_heads, dims.hidden_size
        self.heads, self.head_dim = host.split(heads), width // heads
        column = partial(Linear, host, width, split="column", std=dims.init_std)
        self.q_proj, self.v_proj = column(width), column(width)
        if config.share_qk:
            conv = partial(ShortConv, host, width, config.conv_size, bias=True, activation=None)
            self.conv_q, self.conv_k = conv(name="conv_q"), conv(name="conv_k")
        else:
            self.k_proj = column(width)
        self.lr_proj = column(heads, bias=True)
        self.learnable_token_idx = host.parameter(config.mini_batch_size, init=constant(0.0), decay=False, fp32=True)
        per_head = partial(host.parameter, heads, axes={0: "tensor"}, fp32=True)
        self.W1 = per_head(self.head_dim, self.head_dim, init=normal(dims.init_std))
        self.b1 = per_head(self.head_dim, init=constant(0.0), decay=False)
        self.ttt_norm_weight = per_head(self.head_dim, init=constant(1.0), decay=False)
        self.ttt_norm_bias = per_head(self.head_dim, init=constant(0.0), decay=False)
        self.post_norm = LayerNorm(host, width, dims.norm_eps, split="column")
        self.g_proj = column(width) if config.gate else None
        self.o_proj = Linear(host, width, width, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: TTTLinearConfig, dims: Dims, tensor: int, path: str) -> None:
        check(
            f"{path}.num_heads",
            config.num_heads or dims.num_heads,
            lambda n: n % tensor == 0 and dims.hidden_size % (2 * n) == 0,
            f"must divide hidden_size = {dims.hidden_size} into heads of even size and be divisible by "
            f"parallel.tensor = {tensor}",
        )
        if not config.share_qk:
            unused(path, config, "conv_size", needs="set share_qk")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor | None]:
        rows, config = (layout.batch, layout.length, -1), self.config
        q, v = self.q_proj(x).view(rows), self.v_proj(x).view(rows)
        if config.share_qk:
            q, k = self.conv_q(q, layout, cache), self.conv_k(q, layout, cache)
        else:
            k = self.k_proj(x).view(rows)
        q, k, v = (t.unflatten(-1, (self.heads, self.head_dim)) for t in (q, k, v))
        places = token_positions(layout, x.device) % config.mini_batch_size
        angles = rotary_angles(places, config.rope_base, self.head_dim)
        cos, sin = angles.cos(), angles.sin()
        rate = evaluate(self.lr_proj(x), "sigmoid", scale=config.inner_lr / self.head_dim).view(rows)
        inputs = {"q": rotate_pairs(q, cos, sin), "k": rotate_pairs(k, cos, sin), "v": v, "rate": rate}
        return inputs, None if self.g_proj is None else F.gelu(self.g_proj(x), approximate="tanh")

    def _initial_weights(self) -> Tensor:
        return torch.cat([self.W1, self.b1.unsqueeze(1)], dim=1)  # [H, D + 1, D]

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        size = self.config.mini_batch_size
        harmonic = 1 / torch.arange(1, size + 1, device=self.W1.device)
        carried: dict[str, Any] = {}
        if states:
            if layout.positions is None:
                raise ValueError("decoding with a cache needs positions")
            carried = {"gradient": states["gradient"], "place": layout.positions[:, 0] % size}
            state = states["state"]
        else:
            sequences = layout.batch if layout.cu_seqlens is None else len(layout.cu_seqlens) - 1
            state = self._initial_weights().expand(sequences, -1, -1, -1)
        o, finals = ttt(
            **inputs,
            scale=(harmonic + self.host.shared(self.learnable_token_idx)).clamp(min=0),
            weight=self.ttt_norm_weight,
            bias=self.ttt_norm_bias,
            initial_state=state,
            eps=self.config.inner_norm_eps,
            cu_seqlens=layout.cu_seqlens,
            **carried,
        )
        return o, dict(zip(("state", "gradient"), finals, strict=False))

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        y = self.post_norm(o.flatten(2).flatten(0, 1))
        return self.o_proj(y if gate is None else y * gate)

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        shape = (batch, self.heads, self.head_dim + 1, self.head_dim)
        return {"state": (shape, torch.float32), "gradient": (shape, torch.float32)} | conv_states(self, batch)

    def init_cache(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Makes the decoding state of `batch` rows, each with the learned initial weights."""
        cache = super().init_cache(batch, max_length, dtype, device)
        cache["state"].copy_(self._initial_weights().detach())
        return cache

    def recurrence_flops(self, length: int) -> float:
        heads = self.config.num_heads or self.dims.num_heads
        # FLOPs of the error at k, of writing it, and of reading at q; then of scores and gradients in the mini-batch.
        return heads * self.head_dim * (6.0 * self.head_dim + 4.0 * self.config.mini_batch_size)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [B, T, H, D]` by angles `[B, T, 1, D / 2]`; features 2i and 2i + 1 are a pair."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
