"""TODO layout.sequence."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from linear_moe.options.errors import ConfigError, nearest
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.activations import MODULES
from linear_moe.modeling.host import DTYPES
from linear_moe.options.checks import check, unused
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.pattern import ResolvedLayer, resolve_layers
from linear_moe.layout.pipeline import default_split
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
import torch
import torch.nn.functional as F
from torch import Tensor
from linear_moe.config.schema import ParallelConfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from linear_moe.modeling.deferred import fill_gap
from linear_moe.layout.sequence import Order


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
class Order:
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


def order_of(parallel: ParallelConfig) -> Order:
    layout = parallel.sequence_layout if parallel.sequence > 1 else "contiguous"
    return Order(parallel.sequence, layout, parallel.sequence_pieces)


BLOCKS = 4  # of a state's columns, that a ring passes on one by one
