"""Projection and cross-entropy in one operation, by blocks of the vocabulary: not all logits are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.fused import cross_entropy as definition
from linear_moe.modeling.ops.kernels import has_triton, upcast

BLOCK_ELEMENTS = 2**26  # logits of all tokens and one block: 128 MiB in bf16
BLOCK_ROWS = 2048  # rows of the weight in a block at least, because every block reads and writes the gradient of x

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _kernels(x: Tensor) -> ModuleType:
    if x.is_cuda and has_triton():
        from linear_moe.modeling.ops.fused import cross_entropy_triton

        return cross_entropy_triton
    return definition


def block_rows(tokens: int) -> int:
    """Returns the number of rows of the weight in a block, a multiple of 128."""
    return max(BLOCK_ROWS, BLOCK_ELEMENTS // max(tokens, 1) // 128 * 128)


def _blocks(tokens: int, vocabulary: int) -> list[slice]:
    rows = block_rows(tokens)
    return [slice(i, min(i + rows, vocabulary)) for i in range(0, vocabulary, rows)]


class _LinearCrossEntropy(Function):
    """The autograd function of `linear_cross_entropy`.

    Blocks are of the vocabulary, not of tokens: so a block's rows of the weight's gradient are written once, complete.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, first: int, merge: Merge | None) -> Tensor:
        labels = labels - first
        normaliser = torch.full(labels.shape, -torch.inf, device=x.device)
        target = torch.zeros_like(normaliser)
        with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it in backward
            for block in _blocks(len(x), len(weight)):
                part = weight[block]
                local = labels - block.start
                inside = (local >= 0) & (local < len(part))
                loss, z = _kernels(x).forward(x @ part.T, local.clamp(0, len(part) - 1))
                target += (z - loss).where(inside, 0.0)
                normaliser = torch.logaddexp(normaliser, z)
        if merge is not None:
            normaliser, target = merge(normaliser, target)
        ctx.save_for_backward(x, weight, labels, normaliser)
        return normaliser - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, normaliser = ctx.saved_tensors
        dx, dweight = torch.zeros_like(upcast(x)), torch.empty_like(weight)
        for block in _blocks(len(x), len(weight)):
            part = weight[block]
            logits = x @ part.T
            _kernels(x).backward(logits, labels - block.start, normaliser, grad)
            torch.mm(logits.T, x, out=dweight[block])
            dx += logits @ part
        return dx.to(x.dtype), dweight, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, first: int = 0, merge: Merge | None = None
) -> Tensor:
    """Returns `cross_entropy(x @ weight.T, labels)`, differentiable in x and weight, without all logits in memory.

    The backward pass computes the logits again, in the same blocks, and sums the gradient of x over blocks in fp32.

    Args:
        x: `[N, D]`.
        weight: `[V, D]`, the rows of the whole vocabulary, or the share of its rows that this process has.
        labels: `[N]` int64, numbered in the whole vocabulary.
        first: number of the weight's first row in the whole vocabulary.
        merge: function that takes the log-normalisers of this share and the labels' logits (0 where a label is in
            another share), `[N]` fp32, and returns those of the whole vocabulary. The gradient of x is then the part
            that comes from this share.

    Returns:
        `[N]` fp32.
    """
    return _LinearCrossEntropy.apply(x, weight, labels, first, merge)
