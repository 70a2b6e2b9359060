"""S4D: a state space model with a diagonal complex transition that does not depend on the token (arXiv 2206.11893)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Init, Matrices, normal
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.ops.recurrences.scan import diagonal_scan
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check
from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import opt


@dataclass
class S4Config(MixerConfig):
    type: str = opt("s4", "name of the mixer")
    state_size: int = opt(
        64, "states of a channel, with conjugates: half as many complex numbers are computed", ge=2, le=2**12
    )
    init: str = opt(
        "lin",
        "initial A: S4D-Lin, -1/2 + i pi n (lin); S4D-Inv (inv); S4D-Real, -(n + 1) (real)",
        choices=("lin", "inv", "real"),
    )
    discretization: str = opt("zoh", "zero-order hold or bilinear transform", choices=("zoh", "bilinear"))
    dt_min: float = opt(1e-3, "smallest initial step size", gt=0)
    dt_max: float = opt(0.1, "largest initial step size", gt=0)
    glu: bool = opt(True, "a gated linear unit after the output projection, which is then twice as wide")


class S4(LinearMixer):
    """Weights are those of the authors' minimal `S4D`, under the same names without `kernel.`. `C` is `[H, N/2, 2]`,
    and `o_proj` is their `output_linear.0`, a convolution of width 1 (`[2H, H, 1]`). There is no input projection: the
    channels are those of the residual stream. B is fixed at 1, as published. The recurrence has no GPU kernel: on a GPU
    too, PyTorch computes it in chunks."""

    Config = S4Config
    family = "scan"
    formula = "h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t,  y_t = 2 Re(C h_t) + D u_t, complex and diagonal"
    paper = "arXiv 2206.11893"

    def __init__(self, config: S4Config, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.channels, self.states = host.split(dims.hidden_size), config.state_size // 2
        parameter = partial(host.parameter, dims.hidden_size, axes={0: "tensor"}, fp32=True)
        self.log_dt = parameter(init=_log_uniform(config.dt_min, config.dt_max), decay=False)
        real, imaginary = _initial_rates(config.init, config.state_size)
        self.log_A_real = parameter(self.states, init=lambda t, _: t.copy_(real.log().expand_as(t)), decay=False)
        self.A_imag = parameter(self.states, init=lambda t, _: t.copy_(imaginary.expand_as(t)), decay=False)
        self.C = parameter(self.states, 2, init=normal(0.5**0.5))
        self.D = parameter(init=normal(1.0))
        self.o_proj = Linear(
            host,
            dims.hidden_size,
            dims.hidden_size * (2 if config.glu else 1),
            split="row",
            bias=True,
            std=dims.output_init_std,
            matrices=Matrices((dims.hidden_size,) * 2 if config.glu else ()),
        )

    @classmethod
    def validate(cls, config: S4Config, dims: Dims, tensor: int, path: str) -> None:
        check(f"{path}.state_size", config.state_size, lambda n: n % 2 == 0, "must be even: pairs of conjugates")
        check(
            "model.hidden_size",
            dims.hidden_size,
            lambda n: n % tensor == 0,
            f"must be divisible by parallel.tensor = {tensor}, which splits s4's channels",
        )
        if config.dt_min > config.dt_max:
            raise ConfigError(f"{path}.dt_min", config.dt_min, f"must be at most dt_max = {config.dt_max:g}")

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        start = self.host.rank("tensor") * self.channels
        u = x.view(layout.batch, layout.length, -1)[..., start : start + self.channels]
        # In fp32, exp(dt A) - 1 would lose small step sizes by cancellation.
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        dt_A = self.log_dt.double().exp()[:, None] * A
        if self.config.discretization == "zoh":
            log_a, b = dt_A, (dt_A.exp() - 1) / A
        else:
            log_a, b = ((1 + dt_A / 2) / (1 - dt_A / 2)).log(), dt_A / A / (1 - dt_A / 2)
        c = 2 * b * torch.view_as_complex(self.C)
        return {"u": u, "log_a": torch.view_as_real(log_a).float(), "c": torch.view_as_real(c).float()}, None

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        y, state = diagonal_scan(**inputs, initial_state=states.get("state"), cu_seqlens=layout.cu_seqlens)
        return (y + self.D * inputs["u"]).to(y.dtype), {"state": state}

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        y = self.o_proj(F.gelu(o).flatten(0, 1))
        return F.glu(y, dim=-1) if self.config.glu else y

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {"state": ((batch, self.channels, self.states, 2), torch.float32)}

    def recurrence_flops(self, length: int) -> float:
        return 12.0 * self.dims.hidden_size * self.states


def _log_uniform(low: float, high: float) -> Init:
    """Initialiser of `log_dt`: dt is log-uniform from low to high."""
    return lambda t, g: t.uniform_(math.log(low), math.log(high), generator=g)


def _initial_rates(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """Initial A (section 4 of the paper): minus the real parts, and the imaginary parts, of `size / 2` entries."""
    n = torch.arange(size // 2, dtype=torch.float64)
    if kind == "real":
        return n + 1, torch.zeros_like(n)
    imaginary = math.pi * n if kind == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
    return torch.full_like(n, 0.5), imaginary
