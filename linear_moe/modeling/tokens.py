"""Layout of the tokens of a forward pass, and the type of a layer's decoding state."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from linear_moe.modeling.ops.sequence import Pieces

Cache = dict[str, Tensor]
"""Decoding state of one layer, by the names of `Mixer.state_shapes`; mixers update its tensors in place."""


@dataclass(frozen=True)
class TokenLayout:
    """Layout of the tokens of one forward pass: `batch` rows of `length` tokens.

    Attributes:
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, batch = 1; None: every row is one document.
        max_document: length of the longest packed document, a host integer; None when not packed.
        positions: `[B, T]` int64 position of each token in its document; None: 0..T-1 in every row. Required when
            decoding with a cache, where a position is also the slot of its token in a key-value cache.
        shared: tensors `[B * T, channels]`, by name, that layers leave for later layers of the same forward pass, with
            this rank's heads. Mixers declare them in `crossing`.
        pieces: exchange with other ranks, if the rows or packed documents are pieces of longer sequences; ops use it.
            `positions` then count from the start of the whole documents.
        padding: `[B, T]` bool, tokens at the end of rows that only make pieces equally long; neither the loss nor the
            statistics of routers count them. None: there is no padding.
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None = None
    max_document: int | None = None
    positions: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict, compare=False)
    pieces: Pieces | None = field(default=None, compare=False)
    padding: Tensor | None = field(default=None, compare=False)
