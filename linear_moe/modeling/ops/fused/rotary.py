"""The rotation of rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.kernels import has_triton


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `2 half` features of every head.

    Feature i is paired with feature i + half, as in Hugging Face's models. Products are in fp32, rounded once; one
    Triton kernel computes them on CUDA. Only cos and sin, which get no gradient, are kept for the backward pass.

    Args:
        x: `[B, T, H, D]`.
        cos, sin: `[B or 1, T, 1, half]` fp32 with 2 half <= D.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, length, _, dim = x.shape
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1:3] != (length, 1) or 2 * half > dim:
        raise ValueError(
            f"cos and sin must be [{batch} or 1, {length}, 1, at most {dim // 2}], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return _Rotation.apply(x, cos, sin)


def definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotate`."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


class _Rotation(Function):
    """The autograd function of `rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if x.is_cuda and has_triton():
            with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it in backward
                return _kernels().rotate(x, cos, sin)
        return definition(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if grad.is_cuda and has_triton():
            return _kernels().rotate(grad, cos, sin, back=True), None, None
        return definition(grad, cos, -sin), None, None


def _kernels() -> ModuleType:
    return importlib.import_module("linear_moe.modeling.ops.fused.rotary_triton")
