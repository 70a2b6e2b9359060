"""The assignment of tokens to experts, and the order of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """The rows of every expert, and how they correspond to slots of tokens.

    Without `slot` and `row`, the tokens are themselves the rows (k = 1), sorted by expert; tokens without an expert
    come last, and results for them are undefined.

    Attributes:
        counts: `[E]` int32, number of rows of each expert; their sum is below M if some slots have no expert.
        offsets: `[E + 1]` int32, the first row of each expert, and the end of the last expert's rows.
        slot: `[M]` int32, the slot of each row, M = n * k; slots without an expert come last.
        row: `[n, k]` int32, the row of each slot.
    """

    counts: Tensor
    offsets: Tensor
    slot: Tensor | None = None
    row: Tensor | None = None

    @classmethod
    def of_rows(cls, counts: Tensor) -> Assignment:
        """Returns the assignment of tokens that are already sorted by expert, `counts [E]` for each expert."""
        counts = counts.to(torch.int32)
        return cls(counts, offsets_of(counts))

    @property
    def ends(self) -> Tensor:
        """The end of each expert's rows, `[E]`."""
        return self.offsets[1:]

    @property
    def top_k(self) -> int:
        """Number k of slots of a token."""
        return 1 if self.row is None else self.row.shape[1]


def offsets_of(counts: Tensor) -> Tensor:
    """Returns the first row of each expert, and the end of the last expert's rows, `[E + 1]`, from `counts [E]`."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
