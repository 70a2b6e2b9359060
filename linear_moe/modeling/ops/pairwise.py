"""Products of tokens with the decay per channel between them, within chunks: what one matmul cannot do.

The decay from token j to token i is a product of gates in [0, 1]. It splits into a factor of i and a factor of j, both
of them such products, only at a point between the two. So blocks are merged in pairs, from single tokens to the whole
chunk, and the second half meets the first one at the middle. No gate is divided by: any log-decay <= 0 is safe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], g: Tensor
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], Tensor]:
    """`sum_k left[i, k] right[j, k] exp(g[j+1, k] + ... + g[i, k])` at (i, j), 0 where j > i.

    Args:
        lefts, rights: each `[N, X, C, K]`, C a power of two.
        g: `[N, X, C, K]` log-decay.

    Returns:
        For every left, for every right, the products `[N, X, C, C]`; the lefts decayed from the chunk's start to each
        token, its own decay included; the rights decayed from after each token to the chunk's end; the decay of the
        whole chunk `[N, X, K, 1]`.
    """
    products = [[(left * right).sum(-1)[..., None, None] for right in rights] for left in lefts]  # [N, X, blocks, b, b]
    whole, block, size = g.exp(), 1, g.shape[-2]
    lefts, rights = [left * whole for left in lefts], list(rights)
    while block < size:
        halves = (-1, 2, block)
        second = [left.unflatten(-2, halves)[..., 1, :, :] for left in lefts]
        first = [right.unflatten(-2, halves)[..., 0, :, :].mT for right in rights]
        products = [
            [_merge(within, left @ right) for within, right in zip(row, first, strict=True)]
            for row, left in zip(products, second, strict=True)
        ]
        whole_1, whole_2 = whole.unflatten(-2, (-1, 2)).unbind(-2)
        one = torch.ones_like(whole_1)
        since, until = torch.stack([one, whole_1], -2)[..., None, :], torch.stack([whole_2, one], -2)[..., None, :]
        lefts = [(left.unflatten(-2, halves) * since).flatten(-4, -2) for left in lefts]
        rights = [(right.unflatten(-2, halves) * until).flatten(-4, -2) for right in rights]
        whole, block = whole_1 * whole_2, 2 * block
    return [[product.squeeze(-3) for product in row] for row in products], lefts, rights, whole.mT


def _merge(within: Tensor, across: Tensor) -> Tensor:
    """Blocks `[..., 2n, b, b]`, every second one with the one before it `[..., n, b, b]` -> `[..., n, 2b, 2b]`."""
    first, second = within.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([F.pad(first, (0, first.shape[-1])), torch.cat([across, second], dim=-1)], dim=-2)
