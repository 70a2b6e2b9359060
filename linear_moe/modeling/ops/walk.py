"""Recurrences from chunk to chunk, differentiated in closed form.

A step is a few small products, which depend on the step before: on a GPU the time goes into launching them. So autograd
does not follow the steps. The states are written straight into one buffer, and the terms of the backward pass that do
not depend on later gradients are computed for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function

Spans = list[tuple[int, int]]
"""First chunk and end (the chunk after the last) of every document, or of all rows together."""


def forwards(starts: Tensor, spans: Spans, count: int) -> tuple[Tensor, Tensor, Iterator[tuple[int, Tensor, Tensor]]]:
    """Allocates the states of a recurrence over chunks, and iterates over its steps.

    Args:
        starts: `[spans, ...]`, the state before the first chunk of every span.
        count: number of chunks.

    Returns:
        Buffers of the states before every chunk `[count, ...]` and after every span `[spans, ...]`, and the steps: the
        number n of a chunk, the state before it, and the buffer for the state after it, which the caller has to write.
    """
    before, final = starts.new_empty(count, *starts.shape[1:]), starts.clone()

    def steps() -> Iterator[tuple[int, Tensor, Tensor]]:
        states = before.unbind()
        for start, end_state, (first, end) in zip(starts.unbind(), final.unbind(), spans, strict=True):
            if first < end:
                states[first].copy_(start)
            for n in range(first, end):
                yield n, states[n], states[n + 1] if n + 1 < end else end_state

    return before, final, steps()


def backwards(d_final: Tensor, spans: Spans, count: int) -> tuple[Tensor, Tensor, Iterator[tuple[int, Tensor, Tensor]]]:
    """Allocates the gradients of a recurrence over chunks, and iterates over its steps from the last to the first.

    Args:
        d_final: `[spans, ...]`, the gradient of the state after every span.
        count: number of chunks.

    Returns:
        Buffers of the gradients of the states after every chunk `[count, ...]` and of the starts `[spans, ...]`, and
        the steps: the number n of a chunk, the gradient of the state after it, and the buffer for the gradient of the
        state before it, which the caller has to write.
    """
    d_after, d_starts = d_final.new_empty(count, *d_final.shape[1:]), d_final.clone()

    def steps() -> Iterator[tuple[int, Tensor, Tensor]]:
        gradients = d_after.unbind()
        ends = list(zip(d_final.unbind(), d_starts.unbind(), spans, strict=True))
        for d_end, d_start, (first, end) in reversed(ends):
            if first < end:
                gradients[end - 1].copy_(d_end)
            for n in reversed(range(first, end)):
                yield n, gradients[n], gradients[n - 1] if n > first else d_start

    return d_after, d_starts, steps()


class Carried(Function):
    """The recurrence over chunks in which the state after a chunk is update + decay * state before it.

    `Carried.apply(updates, decays, starts, spans) -> (before, final)`

    Args:
        updates: `[N, ...]`, real or complex.
        decays: `[N, ...]`, broadcast against the states; None: all are 1.
        starts: `[spans, ...]`, the state before the first chunk of every span.
        spans: first chunk and end of every span.

    Returns:
        The states before every chunk, shaped as `updates`, and after every span, shaped as `starts`.
    """

    @staticmethod
    def forward(
        ctx: Any, updates: Tensor, decays: Tensor | None, starts: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        before, final, walk = forwards(starts, spans, len(updates))
        added, kept = updates.unbind(), None if decays is None else decays.unbind()
        for n, state, after in walk:
            if kept is None:
                torch.add(added[n], state, out=after)
            else:
                torch.addcmul(added[n], kept[n], state, out=after)
        ctx.save_for_backward(decays, before if decays is not None and decays.requires_grad else None)
        ctx.spans = spans
        return before, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        decays, before = ctx.saved_tensors
        d_after, d_starts, walk = backwards(d_final, ctx.spans, len(d_before))
        added, kept = d_before.unbind(), None if decays is None else decays.conj().resolve_conj().unbind()
        for n, after, to in walk:
            if kept is None:
                torch.add(added[n], after, out=to)
            else:
                torch.addcmul(added[n], kept[n], after, out=to)
        d_decays = None if before is None else (before.conj() * d_after).sum_to_size(decays.shape)
        return d_after, d_decays, d_starts, None
