"""Repetition, in one pass, of keys or queries that a group of heads shares, with an optional factor for every head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.kernels import fused, has_triton, upcast


def repeat_heads(x: Tensor, weight: Tensor | None = None, *, heads: int | None = None) -> Tensor:
    """Returns `y[.., h, :] = weight[.., h] * x[.., h // (H / G), :]`, rounded once. Triton kernels on CUDA.

    Args:
        x: `[..., G, K]`.
        weight: `[..., H]`, H a multiple of G; None: all factors are 1.
        heads: H, if and only if there is no weight.

    Returns:
        `[..., H, K]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight is None:
        if heads is None or heads % x.shape[-2]:
            raise ValueError(f"heads must be a multiple of {x.shape[-2]}, got {heads}")
        if x.is_cuda and x.dtype != torch.float64 and has_triton():
            with torch.cuda.device_of(x):
                return _Repeat.apply(x, heads)
        return definition(x, None, heads=heads)
    elif heads is not None or weight.shape[:-1] != x.shape[:-2] or weight.shape[-1] % x.shape[-2]:
        raise ValueError(
            f"weight must be {[*x.shape[:-2], 'a multiple of ' + str(x.shape[-2])]}, got {[*weight.shape]}, and "
            f"heads is given only without a weight, got {heads}"
        )
    else:
        heads = weight.shape[-1]
    return fused(definition, "repeat_heads_triton", x, weight, heads=heads)


def definition(x: Tensor, weight: Tensor | None, *, heads: int) -> Tensor:
    """See `repeat_heads`."""
    repeated = x.repeat_interleave(heads // x.shape[-2], dim=-2)
    return repeated if weight is None else (upcast(repeated) * weight.unsqueeze(-1)).to(x.dtype)


class _Repeat(Function):
    """The kernels without a weight, whose backward pass needs no tensor of the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> Tensor:
        from linear_moe.modeling.ops.fused import repeat_heads_triton  # imports triton

        ctx.kernels, ctx.groups = repeat_heads_triton, x.shape[-2]
        return repeat_heads_triton.forward(x, None, heads=heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        like = grad.new_empty(*grad.shape[:-2], ctx.groups, grad.shape[-1])
        return ctx.kernels.backward(grad, like, None, heads=grad.shape[-2])[0], None
