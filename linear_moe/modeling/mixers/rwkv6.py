"""RWKV-6, "Finch": a decay per key channel, a bonus for the current token, token shift that depends on the token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Init, Matrices
from linear_moe.modeling.layers.conv import shift_state
from linear_moe.modeling.layers.initializers import token_shift_share, uniform
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import LayerNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import scaled
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.shift_mix import shift_mix
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.fields import opt


@dataclass
class RWKV6Config(MixerConfig):
    type: str = opt("rwkv6", "name of the mixer")
    num_heads: int | None = opt(None, "heads; null: model.num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' keys over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' values over hidden_size", gt=0, le=64)
    shift_rank: int = opt(32, "rank of each of the five token shifts' dependence on the token", ge=1, le=2**20)
    decay_rank: int = opt(64, "rank of the decay's projection", ge=1, le=2**20)
    norm_eps: float | None = opt(None, "epsilon of the norm of heads (RWKV-LM: 64e-5); null: model.norm_eps", gt=0)


class RWKV6(LinearMixer):
    """Weights are those of flash-linear-attention's `RWKV6Attention`, in part under other names: `r_proj`, `k_proj`,
    `v_proj` and `g_proj` are its `NAME_proj.linear`, `w_proj.N` is its `w_proj.linear.lora.N`, and `x_mu`, `x_down` and
    `x_up` are its `x_proj.0.mu`, `x_proj.0.linear.weight` and `x_proj.2.weight`. `x_bias`, `bonus`, `g_norm` and
    `o_proj` have the same names.

    Initial values of shifts, decays and bonus are those of RWKV-LM. RWKV-LM starts the first factor of low-rank
    projections at zero and the second one small; here the first one is random, and the second one is small as well.
    Other projections are initialised as in the rest of this framework. The default of expand_k is the paper's 1, not
    flash-linear-attention's 0.5.
    """

    Config = RWKV6Config
    family = "decay"
    op = partial(decay, scale=1.0, bounded=True)
    formula = "S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T,  o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t"
    paper = "arXiv 2404.05892"
    unsplit_states = frozenset({"shift"})

    def __init__(self, config: RWKV6Config, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        hidden = dims.hidden_size
        keys, values = round(hidden * config.expand_k), round(hidden * config.expand_v)
        self.heads, self.key_dim, self.value_dim = host.split(heads), keys // heads, values // heads
        depth, to_last = dims.layer / max(dims.num_layers - 1, 1), 1 - dims.layer / dims.num_layers
        whole = partial(host.parameter, decay=False)
        self.x_mu = whole(hidden, init=token_shift_share(to_last))
        self.x_bias = whole(5, hidden, init=_shifts(depth, to_last))
        five = (config.shift_rank,) * 5
        self.x_down = host.parameter(5 * config.shift_rank, hidden, init=uniform(hidden**-0.5), matrices=Matrices(five))
        self.x_up = host.parameter(hidden, 5 * config.shift_rank, init=uniform(0.01), matrices=Matrices(five, dim=-1))
        column = partial(Linear, host, split="column", std=dims.init_std)
        self.r_proj, self.k_proj = column(hidden, keys), column(hidden, keys)
        self.v_proj, self.g_proj = column(hidden, values), column(hidden, values)
        self.w_proj = nn.Sequential(
            Linear(host, hidden, config.decay_rank, split="shared", std=dims.init_std),
            nn.Tanh(),
            Linear(host, config.decay_rank, keys, split="column", bias=True, init=uniform(0.01)),
        )
        self.w_proj[2].bias = host.parameter(keys, init=_decays(depth), axes={0: "tensor"}, decay=False)
        self.bonus = host.parameter(heads, self.key_dim, init=_bonus(depth), axes={0: "tensor"}, decay=False, fp32=True)
        self.g_norm = LayerNorm(host, values, config.norm_eps or dims.norm_eps, split="column", groups=heads)
        self.o_proj = Linear(host, values, hidden, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: RWKV6Config, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        check(
            f"{path}.num_heads",
            config.num_heads or dims.num_heads,
            lambda n: n % tensor == 0 and keys % n == 0 and values % n == 0 and values > n,
            f"must divide the key width {keys} and value width {values} (into 2 or more, for the norm of heads) and be "
            f"divisible by parallel.tensor = {tensor}",
        )

    def shifted(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[Tensor, ...]:
        """Interpolates `x [B, T, hidden]` with the tokens before: five tensors `[N, hidden]`, for r, w, k, v and g."""
        mu, down, up, bias = (self.host.shared(p) for p in (self.x_mu, self.x_down, self.x_up, self.x_bias))
        mix = partial(shift_mix, x, state=shift_state(x, cache), cu_seqlens=layout.cu_seqlens)
        low = torch.tanh(F.linear(mix(mu[None])[0].flatten(0, 1), down)).unflatten(-1, (5, -1))
        weights = torch.einsum("nir,hir->inh", low, up.unflatten(-1, (5, -1)))
        return tuple(y.flatten(0, 1) for y in mix(bias, weights.view(5, *x.shape)))

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        rows = (layout.batch, layout.length, -1)
        x_r, x_w, x_k, x_v, x_g = self.shifted(x.view(rows), layout, cache)
        tokens = {"q": self.r_proj(x_r), "k": self.k_proj(x_k), "v": self.v_proj(x_v)}
        tokens["g"] = gate(self.w_proj(x_w), "exp", scale=-1.0, floor=MIN_GATE)
        inputs = {name: y.view(rows).unflatten(-1, (self.heads, -1)) for name, y in tokens.items()}
        return inputs | {"bonus": self.bonus}, self.g_proj(x_g)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.g_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        state = (batch, self.heads, self.key_dim, self.value_dim)
        return {"state": (state, torch.float32), "shift": ((batch, self.dims.hidden_size), None)}

    def recurrence_flops(self, length: int) -> float:
        return self.num_heads * (4.0 * self.key_dim * self.value_dim + 3.0 * self.key_dim + 2.0 * self.value_dim)


def _shifts(depth: float, to_last: float) -> Init:
    """Initialiser of `x_bias [5, hidden]`, as in RWKV-LM."""
    rest = {"r": (0.5, 0.0), "w": (1.0, 0.0), "k": (1.0, 0.0), "v": (1.0, 0.3 * depth), "g": (0.5, 0.0)}

    def fill(t: Tensor, generator: torch.Generator) -> None:
        for row, (power, less) in zip(t, rest.values(), strict=True):
            token_shift_share(power * to_last, less)(row, generator)

    return fill


def _decays(depth: float) -> Init:
    """Initialiser of log(-log decay): from -6 in the first channel, which decays most slowly, to -1 in the last."""
    return lambda t, _: t.copy_(-6 + 5 * torch.linspace(0, 1, len(t), device=t.device) ** (0.7 + 1.3 * depth))


def _bonus(depth: float) -> Init:
    """Initialiser of the bonus, as in RWKV-LM."""

    def fill(t: Tensor, _: torch.Generator) -> None:
        n = torch.arange(t.numel(), device=t.device)
        t.copy_((depth * (1 - n / max(t.numel() - 1, 1)) + ((n + 1) % 3 - 1) * 0.1).view_as(t))

    return fill
