"""Tokens regrouped so that the chosen ones of a document stand together at its front, for several choices at once."""

from __future__ import annotations

import importlib
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.kernels import has_triton, stand_in, stood_in, upcast


class Grouping:
    """A permutation of the tokens within each document and for each of M groups: those in the group first.

    Order is kept among the chosen, so whatever is causal stays so, and zeros take the places of the others behind them.
    Sizes depend on shapes alone: no host synchronisation. Triton kernels on CUDA, which neither read nor sum what is
    not chosen.

    Args:
        chosen: `[B, T, M]` bool, the tokens of each group.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; None: every row is one document.

    Attributes:
        counts: `[B, M]` int64, chosen tokens of each row (of all its documents).
        places: `[M, B, T]` int32, where each token goes in its row; -1 - p for a token that is not chosen.
    """

    def __init__(self, chosen: Tensor, cu_seqlens: Tensor | None):
        length = chosen.shape[1]
        time = torch.arange(length, device=chosen.device, dtype=torch.int32)
        flags = chosen.permute(2, 0, 1).to(torch.int32, memory_format=torch.contiguous_format)
        sums = flags.flatten().cumsum(0, dtype=torch.int32).view_as(flags)  # over all: the fast scan is that of vectors
        seen = sums - (sums - flags)[..., :1]
        self.counts = seen[..., -1].T.long()
        start: Tensor | int = 0
        inside, total = seen, seen[..., -1:]  # chosen tokens of the document: up to and with each token, and in all
        if cu_seqlens is not None:
            document = torch.bucketize(time, cu_seqlens[1:], right=True)
            first, last = cu_seqlens.index_select(0, document), cu_seqlens.index_select(0, document + 1) - 1
            before = (seen - flags).index_select(2, first)
            inside, total, start = seen - before, seen.index_select(2, last) - before, first.int()
        self.places = torch.where(flags > 0, start + inside - 1, inside - total - time - 1)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token at each place, the place of each token, and whether a token is chosen: `[B, T, M]`."""
        signed = self.places.permute(1, 2, 0).long()
        chosen = signed >= 0
        place = torch.where(chosen, signed, -1 - signed)
        time = torch.arange(place.shape[1], device=place.device)[:, None]
        return torch.empty_like(place).scatter_(1, place, time.expand_as(place)), place, chosen

    @cached_property
    def filled(self) -> Tensor:
        """Whether a chosen token stands at each place: `[B, T, M]` bool."""
        token, _, chosen = self._order
        return chosen.gather(1, token)

    def collect(self, x: Tensor) -> Tensor:
        """`x [B, T, H, M or 1, D]` in order of time -> `[B, T, H, M, D]`, regrouped, zeros behind the chosen."""
        if stood_in():
            y = x.new_zeros(*x.shape[:3], len(self.places), x.shape[4])
            return stand_in([y], kept_collect(self.places), [x])
        if _on_kernels(x):
            return _Collect.apply(x, self.places)
        token, place, _ = self._order
        x = _Permute.apply(x.expand(-1, -1, -1, len(self.places), -1), token, place)
        return x * self.filled[:, :, None, :, None]

    def combine(self, x: Tensor, weights: Tensor) -> Tensor:
        """`sum_m weights_m x_m` of every token over the groups that it is chosen for, summed in fp32.

        Args:
            x: `[B, T, H, M, D]`, regrouped.
            weights: `[B, T, M]` in order of time.

        Returns:
            `[B, T, H, D]` in order of time, in x's dtype.
        """
        if stood_in():
            return stand_in([torch.zeros_like(x[:, :, :, 0])], kept_combine(x, weights, self.places), (x, weights))
        if _on_kernels(x):
            return _Combine.apply(x, weights, self.places)
        token, place, chosen = self._order
        weights = (weights * chosen)[:, :, None, :, None]
        return (upcast(_Permute.apply(x, place, token)) * weights).sum(3).to(x.dtype)

    def before(self, x: Tensor, count: int) -> Tensor | None:
        """What comes before the sequences where they are pieces of longer ones: each group's last `count` tokens.

        Args:
            x: `[B, T, H, M, D]`, regrouped.

        Returns:
            `[N, H * M * D, count]` in x's dtype, oldest first, zeros before a sequence's beginning, as `short_conv`
            takes it; None: these are whole sequences.
        """
        if (pieces := sequence.current()) is None:
            return None
        windows = pieces.states(partial(last_of_groups, count=count), x, self.filled, matrix=True)
        return windows.unflatten(3, x.shape[2::2]).permute(0, 3, 1, 4, 2).flatten(1, 3).to(x.dtype)


def last_of_groups(x: Tensor, filled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The summary (see `ops.sequence`) of windows `[N, M, count, H * D]`, which shift by as many tokens as a group has.

    Args:
        x: `[N, T, H, M, D]`, regrouped.
        filled: `[N, T, M]`, see `Grouping`.
    """
    tokens = filled.sum(1)[..., None]  # [N, M, 1]
    places = torch.arange(count, device=x.device)
    index = (tokens - count + places)[..., None]
    by_group = x.movedim(3, 1).flatten(3)
    state = by_group.gather(2, index.clamp(min=0).expand(-1, -1, -1, by_group.shape[3])).float() * (index >= 0)
    return (places == (places + tokens)[..., None]).float(), state


def _on_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


class _Permute(Function):
    """`x [B, T, H, M, D]` gathered along T by `index [B, T, M]`; the gradient by its inverse, with no atomic sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.gather(1, index[:, :, None, :, None].expand_as(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.gather(1, inverse[:, :, None, :, None].expand_as(gradient)), None, None


def _kernels() -> Any:
    return importlib.import_module("linear_moe.modeling.ops.fused.grouping_triton")


def kept_collect(places: Tensor) -> list[Tensor]:
    """What the kernel of `Grouping.collect` keeps: the places."""
    return [places]


def kept_combine(x: Tensor, weights: Tensor, places: Tensor) -> list[Tensor]:
    """What the kernel of `Grouping.combine` keeps: its inputs."""
    return [x, weights, places]


class _Collect(Function):
    """`Grouping.collect` in one kernel each way, which keep nothing but the places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(*kept_collect(places))
        ctx.shared = x.shape[3] == 1 < len(places)
        return _kernels().scatter(x, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        dx = _kernels().gather(gradient, places, total=ctx.shared)
        return dx.unsqueeze(3) if ctx.shared else dx, None


class _Combine(Function):
    """`Grouping.combine` in one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(*kept_combine(x, weights, places))
        return _kernels().gather(x, places, weights, total=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights, places = ctx.saved_tensors
        return *_kernels().scatter_weighted(gradient, x, weights, places), None
