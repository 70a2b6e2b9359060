"""RMS norm over groups of features, with the gate and the skip connection that surround it in mixers, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.fused import fused, upcast

Activation = Literal["silu", "sigmoid", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    *,
    eps: float,
    size: int | None = None,
    activation: Activation = "silu",
    gate_first: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`scale * norm(u) * weight * activation(gate)`; `gate_first`: `scale * norm(u * activation(gate)) * weight`.

    Here `u = x + skip_weight * skip` and `norm(u) = u / sqrt(mean(u^2) + eps)` over each group of `size` neighbouring
    features. Arithmetic in fp32, rounded once. Triton kernels on CUDA; only the inputs are saved for backward.

    Args:
        x: `[..., C]`.
        weight: `[C]`, or `[size]` for every group alike.
        gate, skip: `[..., C]`.
        skip_weight: `[heads]`, one per head of `C / heads` neighbouring features.
        size: C unless given; divides C.

    Returns:
        `[..., C]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = x.shape[-1]
    size = size or width
    if width % size:
        raise ValueError(f"size must divide the last dimension {width}, got {size}")
    if weight is not None and tuple(weight.shape) not in ((width,), (size,)):
        raise ValueError(f"weight must be [{width}] or [{size}], got {tuple(weight.shape)}")
    for name, t in {"gate": gate, "skip": skip}.items():
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
    if (skip is None) != (skip_weight is None) or (skip_weight is not None and width % len(skip_weight)):
        raise ValueError(f"skip and skip_weight go together, and the number of heads must divide {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    options = {"eps": eps, "size": size, "activation": activation, "gate_first": gate_first, "scale": scale}
    return fused(definition, "rms_norm_gpu", x, weight, gate, skip, skip_weight, **options)


def definition(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    size: int,
    activation: Activation,
    gate_first: bool,
    scale: float,
) -> Tensor:
    """See `rms_norm`."""
    u = upcast(x)
    if skip is not None and skip_weight is not None:
        u = u + upcast(skip) * skip_weight.repeat_interleave(x.shape[-1] // len(skip_weight))
    a = None if gate is None else ACTIVATIONS[activation](upcast(gate))
    if a is not None and gate_first:
        u = u * a
    y = F.rms_norm(u.unflatten(-1, (-1, size)), (size,), eps=eps)
    if weight is not None:
        y = y * upcast(weight).view(-1, size)
    y = y.flatten(-2) * scale
    return (y if a is None or gate_first else y * a).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension."""
    dim = x.shape[-1]
    return rms_norm(x, eps=eps / dim, scale=dim**-0.5)
