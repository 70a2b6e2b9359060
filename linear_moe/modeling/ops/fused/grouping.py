"""Regrouping of tokens: for each of several groups, the group's tokens move to the front of their document."""

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
    """A permutation of every document's tokens, for each of M groups, that puts the group's chosen tokens first.

    Chosen tokens keep their order, so a causal operation on them stays causal; zeros follow them, in the places of the
    tokens that are not chosen. Sizes depend on shapes alone: no host synchronisation. Triton kernels regroup on CUDA;
    they neither read nor sum tokens that are not chosen.

    Args:
        chosen: `[B, T, M]` bool, the tokens of each group.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; None: every row is one document.

    Attributes:
        counts: `[B, M]` int64, number of chosen tokens of each row, over all of its documents.
        places: `[M, B, T]` int32, the place p in its row to which each token goes, or -1 - p if it is not chosen.
    """

    def __init__(self, chosen: Tensor, cu_seqlens: Tensor | None):
        length = chosen.shape[1]
        time = torch.arange(length, device=chosen.device, dtype=torch.int32)
        flags = chosen.permute(2, 0, 1).to(torch.int32, memory_format=torch.contiguous_format)
        sums = flags.flatten().cumsum(0, dtype=torch.int32).view_as(flags)  # flat: scans of vectors are fast
        seen = sums - (sums - flags)[..., :1]
        self.counts = seen[..., -1].T.long()
        start: Tensor | int = 0
        inside, total = seen, seen[..., -1:]  # chosen tokens of the document: up to each token, itself included; in all
        if cu_seqlens is not None:
            document = torch.bucketize(time, cu_seqlens[1:], right=True)
            first, last = cu_seqlens.index_select(0, document), cu_seqlens.index_select(0, document + 1) - 1
            before = (seen - flags).index_select(2, first)
            inside, total, start = seen - before, seen.index_select(2, last) - before, first.int()
        self.places = torch.where(flags > 0, start + inside - 1, inside - total - time - 1)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token at each place, the place of each token, and whether each token is chosen; all `[B, T, M]`."""
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
        """Regroups `x [B, T, H, M or 1, D]`, in order of time, to `[B, T, H, M, D]` with zeros behind chosen tokens."""
        if stood_in():
            y = x.new_zeros(*x.shape[:3], len(self.places), x.shape[4])
            return stand_in([y], kept_collect(self.places), [x])
        if _on_kernels(x):
            return _Collect.apply(x, self.places)
        token, place, _ = self._order
        x = _Permute.apply(x.expand(-1, -1, -1, len(self.places), -1), token, place)
        return x * self.filled[:, :, None, :, None]

    def combine(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns `sum_m weights_m x_m` of every token over the groups that chose the token, summed in fp32.

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
        """Returns, for pieces of sequences, each group's last `count` tokens before every local sequence.

        Args:
            x: `[B, T, H, M, D]`, regrouped.
            count: number of tokens.

        Returns:
            `[N, H * M * D, count]` in x's dtype, oldest first, with zeros before the beginning of the whole sequence:
            the `state` of `short_conv`. None: the tokens are not pieces but whole sequences.
        """
        if (pieces := sequence.current()) is None:
            return None
        windows = pieces.states(partial(last_of_groups, count=count), x, self.filled, matrix=True)
        return windows.unflatten(3, x.shape[2::2]).permute(0, 3, 1, 4, 2).flatten(1, 3).to(x.dtype)


def last_of_groups(x: Tensor, filled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Computes the summary (`ops.sequence.Summary`) of windows `[N, M, count, H * D]` over each group's last tokens.

    A window shifts by as many tokens as its group has.

    Args:
        x: `[N, T, H, M, D]`, regrouped.
        filled: `[N, T, M]`, see `Grouping`.
        count: tokens of a window.
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
    """A gather of `x [B, T, H, M, D]` along T by `index [B, T, M]`; backward gathers too, without atomic sums."""

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
    """Tensors that the kernel of `Grouping.collect` keeps: the places."""
    return [places]


def kept_combine(x: Tensor, weights: Tensor, places: Tensor) -> list[Tensor]:
    """Tensors that the kernel of `Grouping.combine` keeps: its inputs."""
    return [x, weights, places]


class _Collect(Function):
    """`Grouping.collect` in one kernel for each direction; only the places are kept for the backward pass."""

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
    """`Grouping.combine` in one kernel for each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(*kept_combine(x, weights, places))
        return _kernels().gather(x, places, weights, total=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights, places = ctx.saved_tensors
        return *_kernels().scatter_weighted(gradient, x, weights, places), None
