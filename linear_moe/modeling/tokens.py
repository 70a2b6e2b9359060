"""How the tokens of a forward pass lie, and what decoding keeps of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from linear_moe.modeling.ops.sequence import Pieces

Cache = dict[str, Tensor]
"""One layer's decoding state, by the names of `Mixer.state_shapes`; mixers update it in place."""


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one forward pass lie: `batch` rows of `length` tokens.

    Attributes:
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, batch = 1; None: every row is one document.
        max_document: longest packed document, a host integer; None when not packed.
        positions: `[B, T]` int64 position of each token in its document; None: 0..T-1 in every row. Required when
            decoding with a cache: then also the slot of each token in a key-value cache.
        shared: what a layer leaves for later layers of the same forward pass, by name: `[B * T, channels]`, this
            rank's heads. A mixer that uses it says so in `crossing`.
        pieces: where the rows, or the packed documents, are pieces of longer sequences on several ranks: what ops ask
            for the rest. Positions then count in the whole documents.
        padding: `[B, T]` bool, tokens that only fill up pieces, behind all others of their row: no loss and no
            statistic of a router counts them; None: there are none.
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None = None
    max_document: int | None = None
    positions: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict, compare=False)
    pieces: Pieces | None = field(default=None, compare=False)
    padding: Tensor | None = field(default=None, compare=False)
