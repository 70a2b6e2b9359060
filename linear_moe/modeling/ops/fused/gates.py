"""Gates of recurrences: an elementwise function of a projection, in fp32, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.kernels import fused, upcast

Function = Literal["logsigmoid", "softplus", "sigmoid", "exp"]

# exp(88) is finite in fp32. Above, exp would be infinite, and its gradient through a floor infinity times zero.
MAX_EXPONENT = 88.0
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(x.clamp(max=MAX_EXPONENT)),
}


def gate(
    x: Tensor,
    function: Function,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    log_rate: Tensor | None = None,
    floor: float | None = None,
) -> Tensor:
    """Returns `max(scale * exp(log_rate) * function(x + bias), floor)`, computed in fp32 from x of any dtype.

    GLA's log-decay is `gate(x, "logsigmoid", scale=1 / 16)`, Mamba-2's and Gated DeltaNet's `gate(x, "softplus",
    scale=-1, bias=dt_bias, log_rate=A_log)`, a write strength `gate(x, "sigmoid")`.
    Triton kernels on CUDA; only the inputs are saved for backward.

    Args:
        x: `[..., C]`.
        function: "logsigmoid", "softplus", "sigmoid", or "exp", whose argument is capped at 88.
        bias: `[C]`.
        log_rate: `[heads]`, one per head of `C / heads` neighbouring features.
        floor: lower bound of the gate; values below become the floor, and have no gradient.

    Returns:
        `[..., C]` in fp32 (x's dtype if that is larger).

    Raises:
        ValueError: shapes or a function that do not fit.
    """
    width = x.shape[-1]
    if function not in _FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(_FUNCTIONS)}, got {function!r}")
    if bias is not None and tuple(bias.shape) != (width,):
        raise ValueError(f"bias must be [{width}], got {tuple(bias.shape)}")
    if log_rate is not None and (log_rate.ndim != 1 or width % len(log_rate)):
        raise ValueError(f"log_rate must be [heads], a divisor of {width}, got {tuple(log_rate.shape)}")
    return fused(definition, "gates_triton", x, bias, log_rate, function=function, scale=scale, floor=floor)


def gate_and_complement(
    x: Tensor, function: Function, *, scale: float = 1.0, floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns g = `gate(x, function, scale=scale, floor=floor)` and `1 - exp(g)` in x's dtype, from a single pass."""
    assert function in _FUNCTIONS, function
    options = {"function": function, "scale": scale, "floor": floor, "complement": True}
    return fused(definition, "gates_triton", x, None, None, **options)


def definition(
    x: Tensor,
    bias: Tensor | None,
    log_rate: Tensor | None,
    *,
    function: Function,
    scale: float,
    floor: float | None,
    complement: bool = False,
) -> Any:
    """See `gate`; with `complement`, `gate_and_complement`."""
    y = upcast(x)
    y = scale * _FUNCTIONS[function](y if bias is None else y + bias)
    if log_rate is not None:
        y = y * upcast(log_rate).exp().repeat_interleave(x.shape[-1] // len(log_rate))
    y = y if floor is None else y.clamp(min=floor)
    return (y, -torch.expm1(y).to(x.dtype)) if complement else y
