"""Tokens regrouped so that the chosen ones of a document stand together at its front, for several choices at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Grouping:
    """A permutation of the tokens within each document and for each of M groups: those in the group first.

    Order is kept among the chosen and among the others, so whatever is causal stays so, and what follows in a document
    after its last chosen token can be made neutral. Sizes depend on shapes alone: no host synchronisation.

    Args:
        chosen: `[B, T, M]` bool, the tokens of each group.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; None: every row is one document.

    Attributes:
        counts: `[B, M]` int64, chosen tokens of each row (of all its documents).
    """

    def __init__(self, chosen: Tensor, cu_seqlens: Tensor | None):
        length = chosen.shape[1]
        time = torch.arange(length, device=chosen.device)[:, None]
        seen = chosen.long().cumsum(1)
        self.counts = seen[:, -1]
        start: Tensor | int = 0
        inside, total = seen, seen[:, -1:]  # chosen tokens of the document: up to and with each token, and in all
        if cu_seqlens is not None:
            document = torch.bucketize(time[:, 0], cu_seqlens[1:], right=True)
            first, last = cu_seqlens.index_select(0, document), cu_seqlens.index_select(0, document + 1) - 1
            before = (seen - chosen.long()).index_select(1, first)
            inside, total, start = seen - before, seen.index_select(1, last) - before, first[:, None]
        self.place = start + torch.where(chosen, inside - 1, total + (time - start) - inside)
        self.token = torch.empty_like(self.place).scatter_(1, self.place, time.expand_as(self.place))

    def collect(self, x: Tensor) -> Tensor:
        """`x [B, T, H, M or 1, D]` in order of time -> `[B, T, H, M, D]`, regrouped."""
        return _Permute.apply(x.expand(-1, -1, -1, self.place.shape[-1], -1), self.token, self.place)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `collect` for `x [B, T, H, M, D]`."""
        return _Permute.apply(x, self.place, self.token)


class _Permute(torch.autograd.Function):
    """`x [B, T, H, M, D]` gathered along T by `index [B, T, M]`; the gradient by its inverse, with no atomic sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.gather(1, index[:, :, None, :, None].expand_as(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return gradient.gather(1, inverse[:, :, None, :, None].expand_as(gradient)), None, None
