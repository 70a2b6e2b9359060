"""Division of sequences into pieces: the order of pieces over ranks, padded lengths and tokens per rank."""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.strategies import SequenceLayout


def tensor_sequence(parallel: ParallelConfig) -> bool:
    """Whether activations outside tensor-parallel regions are split by tokens over the tensor ranks."""
    return parallel.tensor > 1 and parallel.tensor_sequence is not False


def in_pieces(parallel: ParallelConfig) -> bool:
    """Whether sequences are cut into pieces."""
    return parallel.sequence > 1 or (parallel.sequence_pieces or 1) > 1


def padded_length(config: Config) -> int:
    """Length of a sequence with padding: training.sequence_length, rounded up so that all pieces are equally long."""
    parallel = config.parallel
    step = order_of(parallel).count * (parallel.tensor if in_pieces(parallel) and tensor_sequence(parallel) else 1)
    return -(-config.training.sequence_length // step) * step


def rank_tokens(config: Config) -> int:
    """Tokens of a micro-batch on a rank, padding included, before they are split over tensor ranks."""
    return config.training.micro_batch * padded_length(config) // config.parallel.sequence


@dataclass(frozen=True)
class PieceOrder:
    """Order in which the pieces of every row are given to the `size` ranks that share out sequences.

    contiguous: the pieces of a rank follow each other. zigzag: in ascending order every rank takes one piece, then
    every rank takes one in descending order, and so on. With two pieces a rank, rank r has pieces r and 2 size - 1 - r,
    and in causal softmax attention all ranks have equally many pairs of a query and a key.

    Attributes:
        size: ranks that share out sequences.
        layout: contiguous or zigzag.
        each: pieces of a row on a rank; None: two in zigzag, else one.
    """

    size: int
    layout: SequenceLayout = SequenceLayout.CONTIGUOUS
    each: int | None = None

    @property
    def per_rank(self) -> int:
        """Pieces of a row on a rank."""
        return self.each or (2 if self.layout == SequenceLayout.ZIGZAG else 1)

    @property
    def count(self) -> int:
        """Pieces of a row on all ranks; they are numbered in order of time, 0 .. count - 1."""
        return self.size * self.per_rank

    def pieces(self, rank: int) -> tuple[int, ...]:
        """Numbers of the pieces of every row that `rank` holds, in order of time."""
        turns = range(self.per_rank)
        if self.layout == SequenceLayout.CONTIGUOUS:
            return tuple(rank * self.per_rank + turn for turn in turns)
        return tuple(turn * self.size + (self.size - 1 - rank if turn % 2 else rank) for turn in turns)

    def owner(self, piece: int) -> tuple[int, int]:
        """Returns the rank that holds a piece, and the index of the piece among the pieces of that rank."""
        if self.layout == SequenceLayout.CONTIGUOUS:
            return divmod(piece, self.per_rank)
        turn, place = divmod(piece, self.size)
        return (self.size - 1 - place if turn % 2 else place), turn


def order_of(parallel: ParallelConfig) -> PieceOrder:
    """Order of pieces for a configuration; without other ranks, pieces are contiguous."""
    layout = SequenceLayout(parallel.sequence_layout) if parallel.sequence > 1 else SequenceLayout.CONTIGUOUS
    return PieceOrder(parallel.sequence, layout, parallel.sequence_pieces)


RING_BLOCKS = 4  # blocks of a state's columns that a ring passes on one by one, so that its ranks overlap
