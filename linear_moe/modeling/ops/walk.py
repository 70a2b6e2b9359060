"""Recurrences from chunk to chunk, differentiated in closed form.

A step is a few small products, one after the other: on a GPU the time is that of launching them. So autograd does not
follow the steps: states go straight into one buffer, and what the backward pass needs besides later gradients is made
for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function

Spans = list[tuple[int, int]]  # of every document, or of all rows: its first chunk and the one after its last


def forwards(starts: Tensor, spans: Spans, count: int) -> tuple[Tensor, Tensor, Iterator[tuple[int, Tensor, Tensor]]]:
    """Buffers of states before every chunk and after every span; n, the state before n, where the next goes."""
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
    """Those of gradients: after every chunk and of the starts; n, the gradient after n, where that before goes."""
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
    """`carried(updates, decays, starts, spans) -> (before, final)`: the state after a chunk is update + decay * state.

    Args:
        updates: `[N, ...]`, real or complex.
        decays: `[N, ...]`, broadcast against the states, or None: 1.
        starts: `[spans, ...]`.

    Returns:
        The states before every chunk, as `updates`, and after every span, as `starts`.
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
