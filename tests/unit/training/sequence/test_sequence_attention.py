"""The blocks of attention contain every visible pair of a query and a key once, and no other pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.ops.attention.blocks import Block
from linear_moe.modeling.ops.attention.softmax import visible
from linear_moe.training.sequence.attention import Reach
from linear_moe.training.sequence.cut import cut, share

ROWS, LENGTH = 2, 48
DOCUMENTS = [0, 1, 11, 11, 13, 48, 55, 96]  # offsets; a document ends at the end of each row


def count(pairs: Tensor, block: Block) -> None:
    """Adds 1 to `pairs [queries, keys]` at every pair of the block. Asserts that no query is twice in the block."""
    seen = torch.zeros(len(pairs))
    for (a, b), (c, d) in zip(block.queries, block.keys, strict=True):
        assert b > a and d > c
        seen[a:b] += 1
        distance = torch.arange(d - c) - ((d - c) - (b - a)) - torch.arange(b - a).unsqueeze(1)
        inside = torch.ones_like(distance, dtype=torch.bool)
        if block.right is not None:
            inside &= distance <= block.right
        if block.left is not None:
            inside &= distance >= -block.left
        assert inside.any(1).all(), "a query without a key"
        pairs[a:b, c:d] += inside.float()
    assert seen.max() <= 1, "a query twice in a block"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 20])
def test_every_visible_pair_once(size: int, layout: str, packed: bool, window: int | None) -> None:
    order, device = PieceOrder(size, layout), torch.device("cpu")
    offsets = torch.tensor(DOCUMENTS if packed else [0, LENGTH, 2 * LENGTH])
    mask = visible(ROWS * LENGTH, ROWS * LENGTH, device, cu_seqlens=offsets, window=window)[0].float()
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    cuts = [cut(ROWS, LENGTH, order, rank, offsets if packed else None) for rank in range(size)]
    held = [share(tokens, own_cut).flatten() for own_cut in cuts]
    reaches = [Reach(own_cut, device) for own_cut in cuts]
    for rank, (own_cut, reach) in enumerate(zip(cuts, reaches, strict=True)):
        for source in range(size):
            pairs, blocks = torch.zeros(len(held[rank]), len(held[source])), reach.of_rank(source, window)
            for block in blocks:
                count(pairs, block)
            assert torch.equal(pairs, mask[held[rank]][:, held[source]])
            assert window is not None or len(blocks) <= (2 if source == rank and packed else 1)
        sources, block = reach.gathered(window)
        keys = torch.cat([held[source][a:b] for source, (a, b) in sources])
        pairs = torch.zeros(len(held[rank]), len(keys))
        count(pairs, block)
        whole = torch.zeros(len(held[rank]), ROWS * LENGTH).index_add_(1, keys, pairs)
        assert torch.equal(whole, mask[held[rank]])
        assert window is None or len(keys) <= len(held[rank]) + len(own_cut.starts) * (window - 1), "keys out of reach"
        wanted, given = reach.wanted(window)
        assert not wanted[rank] and not given[rank]
        assert wanted == [[span for by, span in sources if by == n != rank] for n in range(size)]
        assert given == [reaches[n].wanted(window)[0][rank] for n in range(size)]
