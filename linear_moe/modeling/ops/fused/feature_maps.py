"""Feature maps of linear attention, phi(q) phi(k)^T in place of exp(q k^T): functions of the last dimension."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.backends import pad_keys, tiled
from linear_moe.modeling.ops.kernels import fused, has_triton, stood_in, upcast

NORM_EPS = 1e-4  # flash-linear-attention's, so that weights trained there mean the same here


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1` (arXiv 2006.16236), in fp32, rounded once. Triton kernels on CUDA."""
    return fused(elu_definition, "feature_maps_triton", x)


def elu_definition(x: Tensor) -> Tensor:
    """See `elu_plus_one`."""
    return (F.elu(upcast(x)) + 1).to(x.dtype)


def dpfp(x: Tensor, nu: int) -> Tensor:
    """`[..., D]` -> `[..., 2 nu D]`: `relu([x, -x])` times itself shifted by each of 1 to nu (arXiv 2102.11174)."""
    r = torch.cat([x, -x], -1).relu()
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def hedgehog(x: Tensor) -> Tensor:
    """`[..., D]` -> `[..., 2 D]`: softmax of `[2 x, -2 x]` (arXiv 2402.04347)."""
    x = 2 * x
    return torch.cat([x, -x], -1).softmax(-1)


def sum_to_one(x: Tensor) -> Tensor:
    """Features divided by their sum."""
    return x / (x.sum(-1, keepdim=True) + NORM_EPS)


def squares(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, eps: float | None = None, pad: bool = False
) -> Tensor:
    """`[..., D]` -> `[..., D (D + 1) / 2]` such that `squares(x) . squares(y) = (x . y)^2` (arXiv 2402.10644).

    The products of pairs of channels, once each. Triton kernels on CUDA; the backward pass keeps `x` only.

    Args:
        gamma, beta: `[D]`; the squares are of `gamma * x + beta`.
        eps: of a layer norm of x before that; None: no norm.
        pad: zeros behind the features of 16-bit tensors on CUDA, up to the size that the recurrences' kernels take.
    """
    return _quadratic(x, gamma, beta, eps, series=False, pad=pad)


def taylor(x: Tensor, *, pad: bool = False) -> Tensor:
    """`[..., D]` -> `[..., 1 + D + D (D + 1) / 2]` such that `taylor(x) . taylor(y) = 1 + s + s^2 / 2` with
    `s = x . y / sqrt(D)` (Based, arXiv 2402.18668). As `squares` otherwise."""
    return _quadratic(x, None, None, None, series=True, pad=pad)


def _quadratic(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float | None, *, series: bool, pad: bool
) -> Tensor:
    size = x.shape[-1]
    width = size * (size + 1) // 2 + (1 + size if series else 0)
    if stood_in() or (x.is_cuda and x.dtype != torch.float64 and has_triton()):
        width = tiled(width) if pad and x.element_size() == 2 else width
        kernels = "quadratic_map_triton"
        return fused(quadratic_definition, kernels, x, gamma, beta, eps=eps, series=series, width=width)
    return quadratic_definition(x, gamma, beta, eps=eps, series=series, width=width)


def quadratic_definition(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, eps: float | None, series: bool, width: int
) -> Tensor:
    """`taylor` (`series`) or `squares`, `[..., width]` with zeros behind the features."""
    if eps is not None:
        x = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    else:
        x = x if gamma is None else x * gamma
        x = x if beta is None else x + beta
    if series:
        x = x * x.shape[-1] ** -0.25
        y = torch.cat([torch.ones_like(x[..., :1]), x, _Squares.apply(x) * 0.5**0.5], -1)
    else:
        y = _Squares.apply(x)
    return pad_keys(y, -1, width)


@cache
def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the channel pairs i <= j: i and j; and the pair that (i, j) is in either order, `[size, size]`."""
    i, j = torch.triu_indices(size, size, device=device)
    pair = torch.zeros(size, size, dtype=torch.int64, device=device)
    pair[i, j] = pair[j, i] = torch.arange(len(i), device=device)
    return i, j, pair


class _Squares(Function):
    """Products in fp32 (or fp64), rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        i, j, _ = _pairs(x.shape[-1], x.device)
        wide = upcast(x)
        factors = torch.full(i.shape, 2**0.5, dtype=wide.dtype, device=x.device)  # x_i x_j and x_j x_i in one
        factors = factors.masked_fill(i == j, 1.0)
        return (wide.index_select(-1, i) * wide.index_select(-1, j) * factors).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size, wide = x.shape[-1], upcast(x)
        # A small symmetric matrix per token, gathered: index_add would be atomic additions on a GPU.
        matrix = gradient.index_select(-1, _pairs(size, x.device)[2].flatten()).unflatten(-1, (size, size))
        factors = torch.full((size, size), 2**0.5, dtype=wide.dtype, device=x.device).fill_diagonal_(2.0)
        return ((matrix * factors) @ wide.unsqueeze(-1)).squeeze(-1).to(x.dtype)
