"""RMS and layer norms over groups of features, with the gate and the skip connection around them, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.kernels import fused, stood_in, upcast

Kind = Literal["rms", "layer", "none"]
Activation = Literal["silu", "sigmoid", "identity"]

L2_EPS = 1e-6
# PyTorch's norms on CUDA are slow for small groups and in their weights' gradients, but quicker to launch: plain norms
# of fewer elements are left to PyTorch.
KERNEL_ELEMENTS = 2**20
KERNEL_SIZE = 8192  # features of a group that the kernels take: a wider group does not fit into registers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    kind: Kind = "rms",
    size: int | None = None,
    activation: Activation = "silu",
    gate_first: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Returns `(scale * n(u) * weight + bias) * activation(gate)` with `u = x + skip_weight * skip`.

    With `gate_first`, the result is `scale * n(u * activation(gate)) * weight + bias`, where n(activation(u)) takes the
    place of the norm if there is no gate. The norm n acts on each group of `size` neighbouring features: "rms" is
    `u / sqrt(mean(u^2) + eps)`, "layer" `(u - mean(u)) / sqrt(variance(u) + eps)`, "none" leaves u as it is.
    Arithmetic is in fp32, rounded once. Triton kernels compute the norm on CUDA; only the inputs are saved for
    backward. A plain norm over all features is left to PyTorch on a CPU and for few tokens.

    Args:
        x: `[..., C]`.
        weight, bias: `[C]`, or `[size]` for every group alike.
        gate, skip: `[..., C]`.
        skip_weight: `[heads]`, one per head of `C / heads` neighbouring features.
        size: features of a group, a divisor of C; None: C.

    Returns:
        `[..., C]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = x.shape[-1]
    size = size or width
    if width % size:
        raise ValueError(f"size must divide the last dimension {width}, got {size}")
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None and tuple(t.shape) not in ((width,), (size,)):
            raise ValueError(f"{name} must be [{width}] or [{size}], got {tuple(t.shape)}")
    if bias is not None and (weight is None or weight.shape != bias.shape):
        raise ValueError("bias needs a weight of the same shape")
    for name, t in {"gate": gate, "skip": skip}.items():
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
    if (skip is None) != (skip_weight is None) or (skip_weight is not None and width % len(skip_weight)):
        raise ValueError(f"skip and skip_weight go together, and the number of heads must divide {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    bare = gate is None and not gate_first and skip is None and kind != "none" and size == width and scale == 1.0
    many = stood_in() or (x.is_cuda and x.numel() >= KERNEL_ELEMENTS)
    if bare and not (many and size <= KERNEL_SIZE):
        if kind == "rms" and bias is None:
            return F.rms_norm(x, (size,), weight, eps)
        if kind == "layer":
            return F.layer_norm(x, (size,), weight, bias, eps)
    options = {"eps": eps, "kind": kind, "size": size, "activation": activation, "gate_first": gate_first}
    return fused(definition, "norms_triton", x, weight, bias, gate, skip, skip_weight, scale=scale, **options)


def definition(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    kind: Kind,
    size: int,
    activation: Activation,
    gate_first: bool,
    scale: float,
) -> Tensor:
    """See `norm`."""
    u = upcast(x)
    if skip is not None and skip_weight is not None:
        u = u + upcast(skip) * skip_weight.repeat_interleave(x.shape[-1] // len(skip_weight))
    a = None if gate is None else ACTIVATIONS[activation](upcast(gate))
    if gate_first:
        u = ACTIVATIONS[activation](u) if a is None else u * a
    y = u.unflatten(-1, (-1, size))
    if kind != "none":
        function: Any = F.rms_norm if kind == "rms" else F.layer_norm
        y = function(y, (size,), eps=eps)
    y = y * scale
    if weight is not None:
        y = y * upcast(weight).view(-1, size)
    if bias is not None:
        y = y + upcast(bias).view(-1, size)
    y = y.flatten(-2)
    return (y if a is None or gate_first else y * a).to(x.dtype)


def l2_norm(x: Tensor, eps: float = L2_EPS, *, size: int | None = None) -> Tensor:
    """Returns `x / sqrt(sum(x^2) + eps)` over the last dimension, or over groups of `size` neighbouring features."""
    size = size or x.shape[-1]
    return norm(x, eps=eps / size, size=size, scale=size**-0.5)
