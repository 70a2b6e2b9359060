"""Titans' neural memory: fast weights trained with momentum and forgetting (LMM of arXiv 2501.00663)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant, normal
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm, l2_norm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads
from linear_moe.modeling.ops.fused.gates import Function
from linear_moe.modeling.ops.fused.gates import gate as evaluate
from linear_moe.modeling.ops.recurrences.fast_weights import titans
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt

_GATES: dict[str, tuple[str, Function, float]] = {
    "rate": ("theta", "sigmoid", 1.0),
    "keep": ("alpha", "softplus", -1.0),  # log(1 - sigmoid(.))
    "momentum": ("eta", "logsigmoid", 1.0),
}


@dataclass
class TitansConfig(MixerConfig):
    type: str = opt("titans", "name of the mixer")
    num_heads: int | None = opt(None, "heads, each with a memory; null: model.num_heads", ge=1, le=2**16)
    chunk_size: int = opt(16, "tokens whose gradients are computed at the same memory", ge=1, le=2**10)
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v", ge=1, le=2**10)
    initial_rate: float = opt(0.01, "initial learning rate theta, apart from its projection of the token", gt=0, lt=1)
    initial_momentum: float = opt(0.5, "initial momentum eta, apart from its projection of the token", gt=0, lt=1)
    initial_forget: float = opt(0.01, "initial forgetting alpha, apart from its projection of the token", gt=0, lt=1)


class Titans(LinearMixer):
    """Long-term memory of the paper as a layer of its own. The memory is one matrix for each head (`L_M = 1`), with
    learned initial matrices `M0 [H, D, D]`; the gates theta, eta and alpha are sigmoids of one number for each head and
    token. As in section 4.4, q, k and v have a convolution and SiLU, q and k an L2 norm, and a norm and a gate come
    before the last projection. The authors have published neither code nor weights."""

    Config = TitansConfig
    family = "fast_weights"
    formula = (
        "S_t = eta_t S_{t-1} - theta_t grad |M_c^T k_t - v_t|^2,  M_t = (1 - alpha_t) M_{t-1} + S_t,  o_t = M_t^T q_t; "
        "M_c: M before t's chunk"
    )
    paper = "arXiv 2501.00663"

    def __init__(self, config: TitansConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        width = dims.hidden_size
        self.heads, self.head_dim = host.split(heads), width // heads
        column = partial(Linear, host, width, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = column(width), column(width), column(width), column(width)
        for name in "qkv":
            self.add_module(f"{name}_conv1d", ShortConv(host, width, config.conv_size, name=f"conv_{name}"))
        per_head = partial(host.parameter, heads, axes={0: "tensor"}, fp32=True)
        gates = {"theta": config.initial_rate, "eta": config.initial_momentum, "alpha": config.initial_forget}
        for name, initial in gates.items():
            self.add_module(f"{name}_proj", column(heads))
            bias = per_head(init=constant(math.log(initial / (1 - initial))), decay=False)
            self.register_parameter(f"{name}_bias", bias)
        self.M0 = per_head(self.head_dim, self.head_dim, init=normal(dims.init_std))
        self.o_norm = GatedRMSNorm(host, self.head_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, width, width, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: TitansConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"hidden_size =": dims.hidden_size})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows = (layout.batch, layout.length, -1)
        q, k, v = (self.projected(name, x, layout, cache).unflatten(-1, (self.heads, -1)) for name in "qkv")
        inputs = {"q": l2_norm(q), "k": l2_norm(k), "v": v}
        for key, (name, function, scale) in _GATES.items():
            y, bias = self.get_submodule(f"{name}_proj")(x), self.get_parameter(f"{name}_bias")
            inputs[key] = evaluate(y, function, scale=scale, bias=bias).view(rows)
        return inputs, self.g_proj(x)

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        size = self.config.chunk_size
        carried: dict[str, Any] = {}
        if states:
            if layout.positions is None:
                raise ValueError("decoding with a cache needs positions")
            state, place = states["state"], layout.positions[:, 0] % size
            carried = {"surprise": states["surprise"], "start": states["start"], "place": place}
        else:
            sequences = layout.batch if layout.cu_seqlens is None else len(layout.cu_seqlens) - 1
            state = self.M0.expand(sequences, -1, -1, -1)
        o, finals = titans(**inputs, chunk_size=size, initial_state=state, cu_seqlens=layout.cu_seqlens, **carried)
        return o, dict(zip(("state", "surprise", "start"), finals, strict=False))

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        states = dict.fromkeys(("state", "surprise", "start"), (shape, torch.float32))
        return {**states, **conv_states(self, batch)}

    def init_cache(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Makes the decoding state of `batch` rows, each with the learned initial memory."""
        cache = super().init_cache(batch, max_length, dtype, device)
        for name in ("state", "start"):
            cache[name].copy_(self.M0.detach())
        return cache

    def recurrence_flops(self, length: int) -> float:
        # FLOPs of the error at k, of writing it to M and S, and of reading both; then of scores and errors in a chunk.
        return self.num_heads * self.head_dim * (10.0 * self.head_dim + 4.0 * self.config.chunk_size)
