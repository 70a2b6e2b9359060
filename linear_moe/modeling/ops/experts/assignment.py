"""The assignment of tokens to experts, and the order of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Which rows are whose. Without `slot` and `row` the tokens are themselves the rows: k = 1, sorted by expert, those
    without one last; what is computed for these is undefined.

    Attributes:
        counts: `[E]` int32, rows of each expert; they may sum to fewer than there are slots, the rest having none.
        offsets: `[E + 1]` int32, where each expert's rows begin, and where the last one's end.
        slot: `[M]` int32, the slot of each row, M = n * k; slots without an expert come last.
        row: `[n, k]` int32, the row of each slot.
    """

    counts: Tensor
    offsets: Tensor
    slot: Tensor | None = None
    row: Tensor | None = None

    @classmethod
    def of_rows(cls, counts: Tensor) -> Assignment:
        """For tokens already sorted by expert, `counts [E]` of each."""
        counts = counts.to(torch.int32)
        return cls(counts, offsets_of(counts))

    @property
    def ends(self) -> Tensor:
        """`[E]`, where each expert's rows end."""
        return self.offsets[1:]

    @property
    def top_k(self) -> int:
        return 1 if self.row is None else self.row.shape[1]


def offsets_of(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
