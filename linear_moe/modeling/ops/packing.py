"""Cuts of sequences: into documents for the references, into chunks for the chunkwise implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.walk import Carried

State = TypeVar("State", Tensor, tuple[Tensor, ...])

MAX_CHUNK = 32  # the fastest size of a chunk on CPU for K = V = 32 to 64
MIN_CHUNK = 16


def documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """Returns the number of every token's document, `[T]` int64."""
    return torch.searchsorted(cu_seqlens, torch.arange(length, device=cu_seqlens.device), right=True) - 1


def first_tokens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Returns the index of the first token of every token's document, `[T]` int32."""
    return cu_seqlens[documents(cu_seqlens, length)].int()


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a small tensor from the CPU to `device`, without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def by_token(*inputs: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yields the inputs `[B, T, ...]` token by token, as `[B, ...]`; an input that is None stays None.

    The inputs are unbound at once, because the gradients of T separate selections would be T tensors of the whole size.
    """
    length = next(x.shape[1] for x in inputs if x is not None)
    return zip(*([None] * length if x is None else x.unbind(1) for x in inputs), strict=True)


def separately(
    function: Callable[..., tuple[Tensor, State]],
    inputs: Sequence[Tensor | None],
    initial_state: State,
    cu_seqlens: Tensor,
) -> tuple[Tensor, State]:
    """Runs `function(state, *inputs) -> (output, final state)` on each packed document `[1, length, ...]` alone.

    Args:
        inputs: `[1, T, ...]`, or None.
        initial_state: `[documents, ...]`, or a tuple of such tensors.
        cu_seqlens: `[documents + 1]` offsets, documents may be empty: the final state of these is the initial one.

    Returns:
        The outputs of all documents `[1, T, ...]`, and the final states as `initial_state`.
    """
    outputs, finals = [], []
    for document, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own = slice(document, document + 1)
        state = initial_state[own] if isinstance(initial_state, Tensor) else tuple(x[own] for x in initial_state)
        if end > start:
            output, state = function(state, *(None if x is None else x[:, start:end] for x in inputs))
            outputs.append(output)
        finals.append(state)
    final = torch.cat(finals) if isinstance(initial_state, Tensor) else tuple(map(torch.cat, zip(*finals, strict=True)))
    return torch.cat(outputs, dim=1), final


class Chunks:
    """A cut of tensors `[B, T, H, ...]` into N chunks of C tokens, `[N, B*H, C, ...]`.

    Every packed document begins a new chunk, so no chunk holds tokens of two documents. Slots of a chunk without a
    token hold zeros, which must be neutral in the recurrence: no decay, no update.

    Args:
        x: `[B, T, H, ...]`, for its sizes and device.
        cu_seqlens: `[documents + 1]` offsets of packed documents, B = 1; None: every row is one sequence.
        size: C, if the recurrence itself prescribes the number of tokens in a chunk; None: a size that is fast.
        skip: slots left empty before the first token of every row; only without `cu_seqlens`.

    Attributes:
        size, count: C and N.
        slots: `[T]`, the place of each token in the sequence of all slots; None without `cu_seqlens`.
        spans: first chunk and end of every document, or of all rows together.
        complete: whether the last chunk of each span has no empty slots.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, size: int | None = None, skip: int = 0):
        self.batch, self.length, self.heads = x.shape[:3]
        self.slots: Tensor | None = None
        self.skip = skip
        if cu_seqlens is None:
            self.size = size or chunk_size(self.length)
            self.count = -(-(skip + self.length) // self.size)
            self.spans = [(0, self.count)]
            self.complete = [(skip + self.length) % self.size == 0]
            return
        assert skip == 0
        offsets = cu_seqlens.cpu()
        lengths = offsets.diff()
        self.size = size or chunk_size(-(-self.length // max(int((lengths > 0).sum()), 1)))
        self.complete = (lengths % self.size == 0).tolist()
        ends = lengths.add(self.size - 1).floor_divide(self.size).cumsum(0)
        firsts = F.pad(ends[:-1], (1, 0))
        self.count = int(ends[-1])
        self.spans = list(zip(firsts.tolist(), ends.tolist(), strict=True))
        shift = (firsts * self.size - offsets[:-1]).repeat_interleave(lengths)
        self.slots = on_device(torch.arange(self.length) + shift, x.device)

    def split(self, x: Tensor) -> Tensor:
        """Cuts `x [B, T, H, ...]` into chunks `[N, B*H, C, ...]`."""
        if self.slots is not None:
            x = x.new_zeros(1, self.count * self.size, *x.shape[2:]).index_copy(1, self.slots, x)
        elif self.count * self.size != self.length:
            behind = self.count * self.size - self.length - self.skip
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (self.skip, behind))
        x = x.unflatten(1, (self.count, self.size)).movedim((1, 3), (0, 2))
        return x.reshape(self.count, self.batch * self.heads, self.size, *x.shape[4:]).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """Joins the chunks `x [N, B*H, C, D]` to `[B, T, H, D]`."""
        x = x.unflatten(1, (self.batch, self.heads)).movedim((0, 2), (1, 3)).flatten(1, 2)
        if self.slots is not None:
            return x.index_select(1, self.slots)
        return x[:, self.skip : self.skip + self.length]

    def scan(self, advance: Callable[[int, Tensor], Tensor], initial_state: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over chunks: `advance(n, state)` maps the state before chunk n to the state after it.

        Args:
            initial_state: `[sequences, H, K, V]`.

        Returns:
            The states before every chunk `[N, B*H, K, V]`, and the final states `[sequences, H, K, V]`.
        """
        starts = initial_state.reshape(len(self.spans), -1, *initial_state.shape[2:]).unbind()
        before, final = [], []
        for state, (first, end) in zip(starts, self.spans, strict=True):
            for n in range(first, end):
                before.append(state)
                state = advance(n, state)
            final.append(state)
        return torch.stack(before), torch.stack(final).reshape(initial_state.shape)

    def carry(self, updates: Tensor, decays: Tensor | None, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over chunks in which the state after chunk n is `updates[n] + decays[n] * state`.

        Args:
            updates: `[N, B*H, K, V]`, real or complex.
            decays: `[N, B*H, K or 1, V or 1]`; None: all are 1.
            initial_state: see `scan`.

        Returns:
            See `scan`.
        """
        starts = initial_state.reshape(len(self.spans), -1, *initial_state.shape[2:])
        before, final = Carried.apply(updates, decays, starts, self.spans)
        return before, final.reshape(initial_state.shape)


def chunk_size(length: int) -> int:
    """Returns a number of tokens for chunks: `length` rounded up to a power of two, within MIN_CHUNK and MAX_CHUNK."""
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << (length - 1).bit_length()))


def start_state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Returns `initial_state`, or zeros `[sequences, H, K, V]` in fp32 if it is None."""
    if initial_state is not None:
        return initial_state
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def segment_sums(g: Tensor) -> Tensor:
    """Returns the sums of `g [..., C]` over segments, `[..., C, C]`: g[j+1] + ... + g[i] at (i, j), -infinity if j > i.

    Every segment is summed by itself. Differences of cumulative sums would lose the small gates that follow large ones
    and give NaN for infinite ones, in the gradient too.
    """
    size = g.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=g.device)
    sums = g[..., None].expand(*g.shape, size).masked_fill(ones.triu(), 0.0).cumsum(-2)
    return sums.masked_fill(ones.triu(1), float("-inf"))
