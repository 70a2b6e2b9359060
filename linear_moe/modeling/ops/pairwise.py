"""Products of tokens with the decay per channel between them, within chunks: what a matmul cannot do at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise(lefts: Sequence[Tensor], rights: Sequence[Tensor], g: Tensor) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """`sum_k left[i, k] right[j, k] exp(g[j+1, k] + ... + g[i, k])` at (i, j), 0 where j > i.

    The exponential splits into a factor of i and a factor of j, both at most 1, only at a point between j and i. So
    blocks are merged in pairs, from single tokens to the whole chunk: the products of the second half with the first
    one split at the middle. Only sums of gates are exponentiated: any g <= 0 is safe, minus infinity too.

    Args:
        lefts, rights: each `[N, X, C, K]`, C a power of two.
        g: `[N, X, C, K]` log-decay.

    Returns:
        `[N, X, C, C]` for every left and every right, and the decays `[N, X, C, K]` from the chunk's start to each
        token, its own included, and from after each token to the chunk's end.
    """
    size = g.shape[-2]
    products = [[(left * right).sum(-1)[..., None, None] for right in rights] for left in lefts]  # [N, X, blocks, b, b]
    from_start, to_end = g, torch.zeros_like(g)  # sums of gates: block's start to i inclusive, after j to block's end
    block = 1
    while block < size:
        halves = (size // (2 * block), 2, block)
        start_1, start_2 = from_start.unflatten(-2, halves).unbind(-3)
        end_1, end_2 = to_end.unflatten(-2, halves).unbind(-3)
        since, until = start_2.exp(), end_1.exp()
        second = [left.unflatten(-2, halves)[..., 1, :, :] * since for left in lefts]
        first = [(right.unflatten(-2, halves)[..., 0, :, :] * until).mT for right in rights]
        products = [
            [_merge(within, left @ right) for within, right in zip(row, first, strict=True)]
            for row, left in zip(products, second, strict=True)
        ]
        from_start = torch.cat([start_1, start_2 + start_1[..., -1:, :]], dim=-2).flatten(-3, -2)
        to_end = torch.cat([end_1 + start_2[..., -1:, :], end_2], dim=-2).flatten(-3, -2)
        block *= 2
    return [[product.squeeze(-3) for product in row] for row in products], from_start.exp(), to_end.exp()


def _merge(within: Tensor, across: Tensor) -> Tensor:
    """Blocks `[..., 2n, b, b]`, every second one with the one before it `[..., n, b, b]` -> `[..., n, 2b, 2b]`."""
    first, second = within.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([F.pad(first, (0, first.shape[-1])), torch.cat([across, second], dim=-1)], dim=-2)
