"""How sequences are cut: into documents for the references, into chunks for the chunkwise implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.walk import Carried

State = TypeVar("State", Tensor, tuple[Tensor, ...])

MAX_CHUNK = 32  # the fastest on CPU at K = V = 32 to 64
MIN_CHUNK = 16


def documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """The number of every token's document, `[T]` int64."""
    return torch.searchsorted(cu_seqlens, torch.arange(length, device=cu_seqlens.device), right=True) - 1


def first_tokens(cu_seqlens: Tensor, length: int) -> Tensor:
    """The first token of every token's document, `[T]` int32."""
    return cu_seqlens[documents(cu_seqlens, length)].int()


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU, without waiting for the device."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def by_token(*inputs: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The inputs `[B, T, ...]` of each token `[B, ...]`; None stays None.

    Unbound at once: the gradient of T separate selections would be T tensors of the whole size.
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
        initial_state: `[documents, ...]`, or a tuple of such.
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
    """Cuts `[B, T, H, ...]` into `[N, B*H, C, ...]`: N chunks of C tokens, padded with zeros.

    Packed documents each begin a chunk of their own, so no chunk holds tokens of two. Zeros must be neutral in the
    recurrence that uses this: no decay, no update.

    Args:
        size: tokens of a chunk, where the recurrence itself says so; None: what is fast.
        skip: slots left empty before the first token of every row, without `cu_seqlens`.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, size: int | None = None, skip: int = 0):
        self.batch, self.length, self.heads = x.shape[:3]
        self.slots: Tensor | None = None  # [T] place of each token in the padded sequence, when packed
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
        self.complete = (lengths % self.size == 0).tolist()  # whether the last chunk of each span has no empty slots
        ends = lengths.add(self.size - 1).floor_divide(self.size).cumsum(0)
        firsts = F.pad(ends[:-1], (1, 0))
        self.count = int(ends[-1])
        self.spans = list(zip(firsts.tolist(), ends.tolist(), strict=True))
        shift = (firsts * self.size - offsets[:-1]).repeat_interleave(lengths)
        self.slots = on_device(torch.arange(self.length) + shift, x.device)

    def split(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...]` -> `[N, B*H, C, ...]`."""
        if self.slots is not None:
            x = x.new_zeros(1, self.count * self.size, *x.shape[2:]).index_copy(1, self.slots, x)
        elif self.count * self.size != self.length:
            behind = self.count * self.size - self.length - self.skip
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (self.skip, behind))
        x = x.unflatten(1, (self.count, self.size)).movedim((1, 3), (0, 2))
        return x.reshape(self.count, self.batch * self.heads, self.size, *x.shape[4:]).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """`[N, B*H, C, D]` -> `[B, T, H, D]`."""
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
        """`scan` where the state after chunk n is `updates[n] + decays[n] * state`, real or complex.

        Args:
            updates: `[N, B*H, K, V]`.
            decays: `[N, B*H, K or 1, V or 1]`, or None: 1.
        """
        starts = initial_state.reshape(len(self.spans), -1, *initial_state.shape[2:])
        before, final = Carried.apply(updates, decays, starts, self.spans)
        return before, final.reshape(initial_state.shape)


def chunk_size(length: int) -> int:
    """A power of two, near the length of short sequences."""
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << (length - 1).bit_length()))


def start_state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`initial_state`, or zeros `[sequences, H, K, V]` in fp32."""
    if initial_state is not None:
        return initial_state
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def segment_sums(g: Tensor) -> Tensor:
    """`g [..., C]` -> `[..., C, C]`: g[j+1] + ... + g[i] at (i, j), minus infinity where j > i.

    Summed, never subtracted: differences of cumulative sums lose the small gates that follow large ones (and make NaN
    of infinite ones), here and in the gradient.
    """
    size = g.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=g.device)
    sums = g[..., None].expand(*g.shape, size).masked_fill(ones.triu(), 0.0).cumsum(-2)
    return sums.masked_fill(ones.triu(1), float("-inf"))
