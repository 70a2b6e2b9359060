"""GateLoop: linear attention with a complex decay per key channel, magnitude and phase computed from the token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.fused.gates import gate as evaluate
from linear_moe.modeling.ops.recurrences.complex_decay import complex_decay
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class GateLoopConfig(MixerConfig):
    type: str = opt("gateloop", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' keys over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    phase: bool = opt(True, "complex decays; false: real ones, without beta_proj")
    transition_bias: bool = opt(True, "biases in the projections of magnitude and phase")
    output_norm: bool = opt(False, "RMS norm of each head's output before the output gate")


class GateLoop(LinearMixer):
    """Decay a_t = sigmoid(alpha_t) exp(i beta_t) of every key channel, from the projections `alpha_proj` and
    `beta_proj`. Neither flash-linear-attention nor transformers has this layer."""

    Config = GateLoopConfig
    family = "complex_decay"
    formula = "S_t = diag(sigmoid(alpha_t) exp(i beta_t)) S_{t-1} + k_t v_t^T,  o_t = Re(S_t^T q_t)"
    paper = "arXiv 2311.01927"

    def __init__(self, config: GateLoopConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        keys, values = round(dims.hidden_size * config.expand_k), round(dims.hidden_size * config.expand_v)
        self.heads, self.key_dim, self.value_dim = host.split(heads), keys // heads, values // heads
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = column(keys), column(keys), column(values), column(values)
        self.alpha_proj = column(keys, bias=config.transition_bias)
        if config.phase:
            self.beta_proj = column(keys, bias=config.transition_bias)
        if config.output_norm:
            self.o_norm = GatedRMSNorm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: GateLoopConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"the key width": keys, "value width": values})

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        def by_head(y: Tensor) -> Tensor:
            return y.view(layout.batch, layout.length, self.heads, -1)

        inputs = {name: by_head(self.get_submodule(f"{name}_proj")(x)) for name in "qkv"}
        inputs["g"] = by_head(evaluate(self.alpha_proj(x), "logsigmoid", floor=MIN_GATE))
        if self.config.phase:
            inputs["theta"] = by_head(self.beta_proj(x))
        return inputs, self.g_proj(x)

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        state, cu_seqlens = states.get("state"), layout.cu_seqlens
        if self.config.phase:
            o, state = complex_decay(**inputs, initial_state=state, cu_seqlens=cu_seqlens)
        else:
            o, state = decay(**inputs, bounded=True, scale=1.0, initial_state=state, cu_seqlens=cu_seqlens)
        return o, {"state": state}

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate) if self.config.output_norm else o.reshape(gate.shape) * F.silu(gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        keys = self.key_dim * (2 if self.config.phase else 1)  # real and imaginary parts
        return {"state": ((batch, self.heads, keys, self.value_dim), torch.float32)}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.key_dim * self.value_dim * (2 if self.config.phase else 1)
