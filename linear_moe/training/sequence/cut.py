"""Cuts sequences into pieces, one or several for every rank, and a micro-batch into the ranks' shares."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder


@dataclass(frozen=True)
class Cut:
    """One rank's segments of a micro-batch, as host integers. A segment is one of the rank's pieces in one row.

    Segments are ordered row by row, and within a row in order of time.

    Attributes:
        order, rank: order of the pieces of a row over ranks, see `PieceOrder`, and this rank's number in the order.
        rows: rows of the micro-batch.
        length: tokens of a piece.
        starts: for each segment, its tokens at which local sequences begin: 0, and every packed document.
        begins: for each segment, the token of the row at which the segment's first sequence begins, maybe in an earlier
            piece.
        packed: whether there are document boundaries: segments are then laid end to end in one row of the forward pass.
            False: each segment is a row.
        documents: if packed, offsets of all documents of the micro-batch, whichever ranks hold them, in the whole rows
            laid end to end.
        filled: tokens of a row that are no padding; the tokens behind them, to the end of the last piece, are padding.
    """

    order: PieceOrder
    rank: int
    rows: int
    length: int
    starts: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    packed: bool
    filled: int
    documents: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and piece of each segment."""
        return [(row, piece) for row in range(self.rows) for piece in self.order.pieces(self.rank)]

    @property
    def continued(self) -> list[bool]:
        """Whether the first sequence of each segment began in an earlier piece."""
        return [begin < piece * self.length for begin, (_, piece) in zip(self.begins, self.places, strict=True)]

    @property
    def offsets(self) -> list[int]:
        """First token of each local sequence, with the segments laid end to end; last, the number of tokens."""
        firsts = [s * self.length + start for s, starts in enumerate(self.starts) for start in starts]
        return [*firsts, len(self.starts) * self.length]

    @property
    def sequences(self) -> int:
        """Number of whole sequences (rows or packed documents) of the micro-batch, whichever ranks hold them."""
        return len(self.documents) - 1 if self.packed else self.rows

    @property
    def numbers(self) -> list[int]:
        """Number of the whole sequence, 0 .. `sequences` - 1, that each local sequence is part of."""
        if not self.packed:
            return [row for row, _ in self.places]
        places = zip(self.places, self.starts, strict=True)
        first = [((row * self.order.count + piece) * self.length, starts) for (row, piece), starts in places]
        return [bisect_right(self.documents, token + start) - 1 for token, starts in first for start in starts]

    @property
    def padding(self) -> list[int]:
        """Number of padding tokens at the end of each segment."""
        ends = [(piece + 1) * self.length for _, piece in self.places]
        return [min(max(end - self.filled, 0), self.length) for end in ends]


def cut(
    rows: int, length: int, order: PieceOrder, rank: int, cu_seqlens: Tensor | None = None, filled: int | None = None
) -> Cut:
    """The cut of `rows` rows of `length` tokens (a multiple of `order.count`), as `rank` holds it.

    Args:
        cu_seqlens: `[documents + 1]` offsets, on the CPU, of documents packed into the rows laid end to end; every row
            begins with a document of its own; documents may be empty.
        filled: tokens of a row that are no padding; None: all tokens.
    """
    size = length // order.count
    assert size * order.count == length, (length, order)
    boundaries: list[set[int]] = [{0} for _ in range(rows)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        assert {row * length for row in range(rows)} <= set(offsets), "a document lies in two rows"
        for offset in offsets[:-1]:
            if offset < rows * length:
                boundaries[offset // length].add(offset % length)
    starts, begins = [], []
    for row in range(rows):
        for piece in order.pieces(rank):
            first, end = piece * size, (piece + 1) * size
            starts.append((0, *sorted(b - first for b in boundaries[row] if first < b < end)))
            begins.append(max(b for b in boundaries[row] if b <= first))
    documents = () if cu_seqlens is None else tuple(cu_seqlens.tolist())
    filled = length if filled is None else filled
    return Cut(order, rank, rows, size, tuple(starts), tuple(begins), cu_seqlens is not None, filled, documents)


def share(x: Tensor, cut: Cut) -> Tensor:
    """A rank's tokens of `x [rows, T, ...]`: `[rows, pieces * length, ...]`."""
    pieces = x.unflatten(1, (cut.order.count, cut.length))
    return pieces[:, list(cut.order.pieces(cut.rank))].flatten(1, 2)


def split(batch: dict[str, Any], order: PieceOrder, rank: int, padded: int) -> dict[str, Any]:
    """A rank's share of the loader's micro-batch, with its `cut`; rows are padded to `padded` tokens.

    Padding counts in no loss and in no statistic. It lies at the end of a row, and is a document of its own where
    documents are isolated.
    """
    rows, length = batch["tokens"].shape
    cu_seqlens = batch.get("cu_seqlens")
    if cu_seqlens is not None and padded > length:
        cu_seqlens = _pad_rows(cu_seqlens.tolist(), rows, length, padded)
    own_cut = cut(rows, padded, order, rank, cu_seqlens, length)
    tokens = {name: batch[name] for name in ("tokens", "labels", "loss_mask", "positions")}
    shares = {name: share(F.pad(x, (0, padded - length)), own_cut).contiguous() for name, x in tokens.items()}
    own: dict[str, Any] = {"cut": own_cut}
    if cu_seqlens is not None:
        offsets = own_cut.offsets
        own |= {"cu_seqlens": torch.tensor(offsets), "max_document": max(b - a for a, b in pairwise(offsets))}
    return shares | own


def _pad_rows(offsets: Sequence[int], rows: int, length: int, padded: int) -> Tensor:
    """Offsets of documents in rows of `length` tokens, moved to rows of `padded` tokens; padding is a document."""
    moved = [offset // length * padded + offset % length for offset in offsets if offset < rows * length]
    padding = [row * padded + length for row in range(rows)]
    return torch.tensor(sorted([*moved, *padding, rows * padded]))
