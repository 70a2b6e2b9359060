"""DeltaNet: the delta rule without a decay (arXiv 2406.06484; fast weight programmers, arXiv 2102.11174)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm, RMSNorm, l2_norm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.ops.recurrences.delta.fla import MAX_KEY_DIM
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1.0,
    "identity": lambda x: x,
}
NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2_norm, "sum": partial(F.normalize, p=1.0, dim=-1, eps=1e-6)}
# Activations that ShortConv computes by itself; only after them can it also compute the L2 norm.
IN_CONV: dict[str, Literal["silu"] | None] = {"silu": "silu", "identity": None}


@dataclass
class DeltaNetConfig(MixerConfig):
    type: str = opt("deltanet", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' keys over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    use_beta: bool = opt(
        True, "compute the strength beta of a write from the token; false: beta is 1 (2 with allow_neg_eigval)"
    )
    use_gate: bool = opt(False, "gate the output by SiLU of a projection")
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v; 0: none", ge=0, le=2**10)
    qk_activation: str = opt(
        "silu", "activation of q and k ('elu' is elu + 1); v always has silu", choices=tuple(ACTIVATIONS)
    )
    qk_norm: str = opt(
        "l2", "divide q and k by their Euclidean norm (l2) or by their sum of magnitudes (sum)", choices=tuple(NORMS)
    )
    allow_neg_eigval: bool = opt(
        False, "beta in (0, 2), so that transitions have negative eigenvalues (arXiv 2411.12537)"
    )


class DeltaNet(LinearMixer):
    """Weights are those of flash-linear-attention's `DeltaNet`, under the same names; weights of convolutions are
    `[C, W]` instead of `[C, 1, W]`."""

    Config = DeltaNetConfig
    family = "delta"
    op = delta
    formula = "S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)"
    paper = "arXiv 2406.06484"

    def __init__(self, config: DeltaNetConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = config.num_heads or dims.num_heads
        keys, values = round(dims.hidden_size * config.expand_k), round(dims.hidden_size * config.expand_v)
        self.heads = host.split(self.num_heads)
        self.key_dim, self.value_dim = keys // self.num_heads, values // self.num_heads
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj = column(keys), column(keys), column(values)
        if config.use_beta:
            self.b_proj = column(self.num_heads)
        if config.use_gate:
            self.g_proj = column(values)
        for name, channels in {"q": keys, "k": keys, "v": values}.items() if config.conv_size else ():
            activation = "silu" if name == "v" else config.qk_activation
            normed = name != "v" and self._normed_in_conv()
            conv = ShortConv(
                host,
                channels,
                config.conv_size,
                name=f"conv_{name}",
                activation=IN_CONV.get(activation),
                norm_size=self.key_dim if normed else None,
            )
            self.add_module(f"{name}_conv1d", conv)
        self.o_norm = (GatedRMSNorm if config.use_gate else RMSNorm)(
            host, self.value_dim, dims.norm_eps, split="shared"
        )
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: DeltaNetConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        check(
            f"{path}.num_heads",
            config.num_heads or dims.num_heads,
            lambda n: n % tensor == 0 and keys % n == 0 and values % n == 0 and keys // n <= MAX_KEY_DIM,
            f"must divide the key width {keys} (into at most {MAX_KEY_DIM}, the GPU kernels' limit) and the value "
            f"width {values}, and be divisible by parallel.tensor = {tensor}",
        )

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor | None]:
        rows, inputs = (layout.batch, layout.length, -1), {}
        for name in "qkv":
            y = self.projected(name, x, layout, cache)
            activation = "silu" if name == "v" else self.config.qk_activation
            if not self.config.conv_size or activation not in IN_CONV:
                y = ACTIVATIONS[activation](y)
            y = y.unflatten(-1, (self.heads, -1))
            inputs[name] = y if name == "v" or self._normed_in_conv() else NORMS[self.config.qk_norm](y)
        most = 2.0 if self.config.allow_neg_eigval else 1.0
        if self.config.use_beta:
            inputs["beta"] = gate(self.b_proj(x), "sigmoid", scale=most).view(rows)
        else:
            inputs["beta"] = x.new_full((layout.batch, layout.length, self.heads), most, dtype=torch.float32)
        return inputs, self.g_proj(x) if self.config.use_gate else None

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        return self.o_proj(self.o_norm(o).flatten(0, 1).flatten(1) if gate is None else self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32)} | conv_states(self, batch)

    def recurrence_flops(self, length: int) -> float:
        return 6.0 * self.num_heads * self.key_dim * self.value_dim

    def _normed_in_conv(self) -> bool:
        """Whether the convolutions of q and k also compute the L2 norm."""
        config = self.config
        return config.conv_size > 0 and config.qk_norm == "l2" and config.qk_activation in IN_CONV
