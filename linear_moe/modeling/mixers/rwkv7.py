"""RWKV-7, "Goose": a decay per channel and a generalised delta rule, values mixed with the first layer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Init, constant
from linear_moe.modeling.layers.conv import shift_state
from linear_moe.modeling.layers.initializers import orthogonal, token_shift_share, uniform
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import LayerNorm, l2_norm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.shift_mix import shift_mix
from linear_moe.modeling.ops.recurrences.delta.fla import MAX_KEY_DIM
from linear_moe.modeling.ops.recurrences.dplr import dplr
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt

MIN_LOG_DECAY = -math.exp(-0.5)


def _rank(what: str, width: str) -> int | None:
    doc = f"rank of the {what}'s projection; null: {width}, rounded to a multiple of 32, as published"
    return opt(None, doc, ge=1, le=2**20)


@dataclass
class RWKV7Config(MixerConfig):
    type: str = opt("rwkv7", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    decay_rank: int | None = _rank("decay", "2.5 sqrt(hidden_size) head_dim / 64")
    rate_rank: int | None = _rank("in-context learning rate", "2.5 sqrt(hidden_size) head_dim / 64")
    value_rank: int | None = _rank("value residual", "1.7 sqrt(hidden_size) head_dim / 64")
    gate_rank: int | None = _rank("output gate", "5 sqrt(hidden_size)")
    norm_eps: float | None = opt(None, "epsilon of the norm of heads; null: head_dim * model.norm_eps", gt=0)


class RWKV7(LinearMixer):
    """Weights are those of flash-linear-attention's `RWKV7Attention`, under the same names, except that `x_r` ... `x_g`
    are `[hidden]` instead of `[1, 1, hidden]`, and `w_lora.N`, `a_lora.N`, `v_lora.N` and `g_lora.N` are its
    `w_lora.lora.N` etc.

    Initial values are those of RWKV-LM, but weights that RWKV-LM starts at zero (`o_proj`, first factors of low-rank
    projections) have a normal distribution. The first RWKV-7 layer of a model leaves its values to the later ones, as
    `TokenLayout.shared["v_first"]`. If this layer is not the model's first layer, it has a value residual too, which
    mixes its values with themselves.
    """

    Config = RWKV7Config
    family = "dplr"
    op = partial(dplr, scale=1.0, min_gate=MIN_LOG_DECAY)
    formula = "S_t = diag(exp(w_t)) S_{t-1} - (a_t * k'_t) (k'_t^T S_{t-1}) + k_t v_t^T,  o_t = S_t^T r_t"
    paper = "arXiv 2503.14456"
    unsplit_states = frozenset({"shift"})
    crossing_fields = ("expand_v",)

    def __init__(self, config: RWKV7Config, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads, hidden = config.num_heads or dims.num_heads, dims.hidden_size
        values = round(hidden * config.expand_v)
        self.heads = host.split(self.num_heads)
        self.key_dim, self.value_dim = hidden // self.num_heads, values // self.num_heads
        depth, to_last = dims.layer / max(dims.num_layers - 1, 1), 1 - dims.layer / dims.num_layers
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            share = host.parameter(hidden, init=token_shift_share(power * to_last), decay=False)
            self.register_parameter(f"x_{name}", share)
        column = partial(Linear, host, split="column")
        self.r_proj = column(hidden, hidden, init=uniform(0.5 * hidden**-0.5))
        self.k_proj = column(hidden, hidden, init=uniform(0.05 * hidden**-0.5))
        self.v_proj = column(hidden, values, init=uniform(0.5 * hidden**-0.5))
        per_channel = partial(host.parameter, axes={0: "tensor"}, decay=False)
        self.k_k = per_channel(hidden, init=_line(0.71, -0.1))
        self.k_a = per_channel(hidden, init=constant(1.02))
        self.r_k = per_channel(self.num_heads, self.key_dim, init=constant(-0.04))

        def low_rank(rank: int | None, factor: float, out: int, activation: type[nn.Module], bias: Init | None) -> Any:
            rank = rank or max(32, round(factor * hidden**0.5 / 32) * 32)
            up = column(rank, out, bias=bias is not None, init=orthogonal(0.1 * max(rank / out, 1.0) ** 0.5))
            if bias is not None:
                up.bias = per_channel(out, init=bias)
            return nn.Sequential(Linear(host, hidden, rank, split="shared", std=dims.init_std), activation(), up)

        per_64 = self.key_dim / 64
        decays = _within_heads(self.key_dim, 2.5, lambda n: -5.5 + 6 * n ** (1 + depth**0.3))
        rates = _within_heads(self.key_dim, 0.3, lambda n: -0.19 + 0.4 * (n - 0.5))
        self.w_lora = low_rank(config.decay_rank, 2.5 * per_64, hidden, nn.Tanh, decays)
        self.a_lora = low_rank(config.rate_rank, 2.5 * per_64, hidden, nn.Identity, rates)
        if dims.layer > 0:
            self.v_lora = low_rank(config.value_rank, 1.7 * per_64, values, nn.Identity, _line(0.73, -0.4))
        self.g_lora = low_rank(config.gate_rank, 5.0, values, nn.Sigmoid, None)
        eps = config.norm_eps or self.key_dim * dims.norm_eps
        self.g_norm = LayerNorm(host, values, eps, split="column", groups=self.num_heads)
        self.g_norm.weight = per_channel(values, init=constant(((dims.layer + 1) / dims.num_layers) ** 0.7))
        self.o_proj = Linear(host, values, hidden, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: RWKV7Config, dims: Dims, tensor: int, path: str) -> None:
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        check(
            f"{path}.num_heads",
            config.num_heads or dims.num_heads,
            lambda n: (
                n % tensor == 0
                and dims.hidden_size % n == 0
                and values % n == 0
                and values > n
                and dims.hidden_size // n <= MAX_KEY_DIM
            ),
            f"must divide hidden_size = {dims.hidden_size} (into at most {MAX_KEY_DIM}, the GPU kernels' limit) and "
            f"the value width {values} (into 2 or more, for the norm of heads), and be divisible by "
            f"parallel.tensor = {tensor}",
        )

    @classmethod
    def crossing(cls, config: RWKV7Config, dims: Dims) -> dict[str, int]:
        return {"v_first": round(dims.hidden_size * config.expand_v)}

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows = (layout.batch, layout.length, self.heads, -1)
        tokens = x.view(*rows[:2], -1)
        shares = self.host.shared(torch.stack([self.get_parameter(f"x_{name}") for name in "rwkvag"]))
        mixed = shift_mix(tokens, shares, state=shift_state(tokens, cache), cu_seqlens=layout.cu_seqlens)
        x_r, x_w, x_k, x_v, x_a, x_g = (y.view_as(x) for y in mixed)
        r, k, v, rate = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v), self.a_lora(x_a).sigmoid()
        if self.dims.layer == 0:
            layout.shared["v_first"] = v
        else:
            v = torch.lerp(v, layout.shared.setdefault("v_first", v), self.v_lora(x_v).sigmoid())
        erased = l2_norm((k * self.k_k).view(rows), eps=1e-12)
        r, k, v, rate = (t.view(rows) for t in (r, torch.addcmul(k, k * (rate - 1), self.k_a), v, rate))
        g = gate(self.w_lora(x_w), "sigmoid", scale=MIN_LOG_DECAY).view(rows)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        inputs = {"q": r, "k": k, "v": v, "a": -erased, "b": erased * rate, "g": g}
        return inputs, torch.stack([bonus.flatten(0, 1).flatten(1), self.g_lora(x_g)])

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        bonus, gate = gate.unbind()
        return self.o_proj((self.g_norm(o.reshape(gate.shape)) + bonus) * gate)

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32), "shift": ((batch, self.dims.hidden_size), None)}

    def recurrence_flops(self, length: int) -> float:
        return 8.0 * self.num_heads * self.key_dim * self.value_dim


def _ramp(t: Tensor) -> Tensor:
    return torch.linspace(0, 1, len(t), device=t.device)


def _line(middle: float, slope: float) -> Init:
    """Initialiser that rises by `slope` from the first channel to the last, with `middle` in between."""
    return lambda t, _: t.copy_(middle + slope * (_ramp(t) - 0.5))


def _within_heads(head_dim: int, amplitude: float, value: Callable[[Tensor], Tensor]) -> Init:
    """Initialiser `value(n) + amplitude z |z|`: n rises from 0 to 1 over all channels, z from -1 to 1 in each head."""

    def fill(t: Tensor, _: torch.Generator) -> None:
        z = torch.linspace(-1, 1, head_dim, device=t.device).repeat(len(t) // head_dim)
        t.copy_(value(_ramp(t)) + amplitude * z * z.abs())

    return fill
