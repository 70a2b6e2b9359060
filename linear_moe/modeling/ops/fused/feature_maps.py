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

NORM_EPS = 1e-4  # the same as flash-linear-attention's, so that weights trained with it give the same outputs


def elu_plus_one(x: Tensor) -> Tensor:
    """Returns `elu(x) + 1` (arXiv 2006.16236), computed in fp32 and rounded once. Triton kernels on CUDA."""
    return fused(elu_definition, "feature_maps_triton", x)


def elu_definition(x: Tensor) -> Tensor:
    """See `elu_plus_one`."""
    return (F.elu(upcast(x)) + 1).to(x.dtype)


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Maps `[..., D]` to `[..., 2 nu D]`: `relu([x, -x])` times its shifts by 1 to nu channels (arXiv 2102.11174)."""
    r = torch.cat([x, -x], -1).relu()
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def hedgehog(x: Tensor) -> Tensor:
    """Maps `[..., D]` to `[..., 2 D]`: softmax of `[2 x, -2 x]` (arXiv 2402.04347)."""
    x = 2 * x
    return torch.cat([x, -x], -1).softmax(-1)


def sum_to_one(x: Tensor) -> Tensor:
    """Divides features by their sum over the last dimension."""
    return x / (x.sum(-1, keepdim=True) + NORM_EPS)


def squares(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, eps: float | None = None, pad: bool = False
) -> Tensor:
    """Maps `[..., D]` to `[..., D (D + 1) / 2]` such that `squares(x) . squares(y) = (x . y)^2` (arXiv 2402.10644).

    The features are the products of all pairs of channels, each pair once. Triton kernels compute the map on CUDA; for
    the backward pass, only `x` is kept.

    Args:
        gamma, beta: `[D]`; the squares are of `gamma * x + beta`.
        eps: epsilon of a layer norm of x, which precedes gamma and beta; None: no norm.
        pad: whether to append zeros to the features of 16-bit tensors on CUDA, up to the size that the recurrences'
            kernels take.
    """
    return _quadratic(x, gamma, beta, eps, series=False, pad=pad)


def taylor(x: Tensor, *, pad: bool = False) -> Tensor:
    """Maps `[..., D]` to `[..., 1 + D + D (D + 1) / 2]` so that `taylor(x) . taylor(y)` is a Taylor series of exp.

    `taylor(x) . taylor(y) = 1 + s + s^2 / 2` with `s = x . y / sqrt(D)` (Based, arXiv 2402.18668). See `squares` for
    the kernels and for `pad`.
    """
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
    """Computes `taylor` (if `series`) or `squares`, padded with zeros to `[..., width]`."""
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
    """Returns i and j of all channel pairs i <= j, and the number of the pair of any two channels, `[size, size]`."""
    i, j = torch.triu_indices(size, size, device=device)
    pair = torch.zeros(size, size, dtype=torch.int64, device=device)
    pair[i, j] = pair[j, i] = torch.arange(len(i), device=device)
    return i, j, pair


class _Squares(Function):
    """The products of all pairs of channels, computed in fp32 (or fp64) and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        i, j, _ = _pairs(x.shape[-1], x.device)
        wide = upcast(x)
        factors = torch.full(i.shape, 2**0.5, dtype=wide.dtype, device=x.device)  # for x_i x_j and x_j x_i
        factors = factors.masked_fill(i == j, 1.0)
        return (wide.index_select(-1, i) * wide.index_select(-1, j) * factors).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size, wide = x.shape[-1], upcast(x)
        # The gradient is gathered to a symmetric matrix per token: index_add would need atomic additions on a GPU.
        matrix = gradient.index_select(-1, _pairs(size, x.device)[2].flatten()).unflatten(-1, (size, size))
        factors = torch.full((size, size), 2**0.5, dtype=wide.dtype, device=x.device).fill_diagonal_(2.0)
        return ((matrix * factors) @ wide.unsqueeze(-1)).squeeze(-1).to(x.dtype)
