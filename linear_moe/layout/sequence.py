"""How sequences are cut into pieces, which rank holds which, and the lengths that follow."""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.config.schema import Config, ParallelConfig


def tensor_sequence(parallel: ParallelConfig) -> bool:
    """Whether activations outside tensor-parallel regions are split by tokens over the tensor ranks."""
    return parallel.tensor > 1 and parallel.tensor_sequence is not False


def in_pieces(parallel: ParallelConfig) -> bool:
    """Whether sequences are cut into pieces."""
    return parallel.sequence > 1 or (parallel.sequence_pieces or 1) > 1


def padded_length(config: Config) -> int:
    """training.sequence_length, up to equal pieces of `in_pieces`."""
    parallel = config.parallel
    each = parallel.sequence_pieces or (2 if parallel.sequence > 1 and parallel.sequence_layout == "zigzag" else 1)
    step = parallel.sequence * each * (parallel.tensor if in_pieces(parallel) and tensor_sequence(parallel) else 1)
    return -(-config.training.sequence_length // step) * step


def rank_tokens(config: Config) -> int:
    """Of a micro-batch, before its tokens are split over tensor ranks."""
    return config.training.micro_batch * padded_length(config) // config.parallel.sequence


@dataclass(frozen=True)
class PieceOrder:
    """Which rank of `size` holds which piece of every row.

    contiguous: a rank's follow each other. zigzag: ranks take one each, in order, then one each in the reverse order,
    and so on; with two each, pieces r and 2 size - 1 - r of 2 size, every rank has equally many pairs of a query and a
    key in causal softmax attention.

    Attributes:
        each: pieces of a rank; None: two in zigzag, else one.
    """

    size: int
    layout: str = "contiguous"
    each: int | None = None

    @property
    def per_rank(self) -> int:
        return self.each or (2 if self.layout == "zigzag" else 1)

    @property
    def count(self) -> int:
        """Pieces of a row, in order of time 0 .. count - 1."""
        return self.size * self.per_rank

    def pieces(self, rank: int) -> tuple[int, ...]:
        turns = range(self.per_rank)
        if self.layout == "contiguous":
            return tuple(rank * self.per_rank + turn for turn in turns)
        return tuple(turn * self.size + (self.size - 1 - rank if turn % 2 else rank) for turn in turns)

    def owner(self, piece: int) -> tuple[int, int]:
        """The rank that holds a piece, and its place among that rank's."""
        if self.layout == "contiguous":
            return divmod(piece, self.per_rank)
        turn, place = divmod(piece, self.size)
        return (self.size - 1 - place if turn % 2 else place), turn


def order_of(parallel: ParallelConfig) -> PieceOrder:
    layout = parallel.sequence_layout if parallel.sequence > 1 else "contiguous"
    return PieceOrder(parallel.sequence, layout, parallel.sequence_pieces)


RING_BLOCKS = 4  # of a state's columns, that a ring passes on one by one
