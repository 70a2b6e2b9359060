"""Tokens for the sequence-parallel tests, and their distribution over ranks.

Imports no Megatron-Core, because the test modules use it as well as the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.sequence.cut import Cut, cut, share
from linear_moe.training.sequence.exchange import STRATEGIES, SequenceGroup
from linear_moe.training.sequence.pieces import pieces_layout

ROWS, LENGTH, HIDDEN, VOCABULARY = 2, 48, 32, 64
# Offsets of documents. Cut into pieces of 6, 12 and 24 tokens, there are a document over several pieces, an empty one,
# one of a single token, one that ends with a piece, one that begins with a piece, two within a piece, and one before a
# boundary that is shorter than a convolution.
OFFSETS = [0, 3, 3, 6, 7, 10, 30, 46, 48, 48]
# Cut into pieces of 2 and 4 tokens, a convolution reaches over several pieces, and documents of a single token follow
# each other.
SHORT = {"LENGTH": 16, "OFFSETS": [0, 1, 2, 2, 7, 8, 9, 16]}


def own_layout(line: SequenceGroup, packed: bool) -> tuple[Cut, TokenLayout]:
    """Cut and layout of this rank's share of `ROWS` whole rows, or of one row of packed documents."""
    offsets = torch.tensor(OFFSETS) if packed else None
    own_cut = cut(1 if packed else ROWS, LENGTH, line.order, line.rank, offsets)
    positions = share(whole_layout(packed).positions, own_cut)  # type: ignore[arg-type]
    local = torch.tensor(own_cut.offsets) if packed else None
    return own_cut, pieces_layout(own_cut, line, torch.device("cpu"), positions, local)


def whole_layout(packed: bool) -> TokenLayout:
    """Layout of all tokens in one process."""
    if not packed:
        return TokenLayout(ROWS, LENGTH, positions=torch.arange(LENGTH).expand(ROWS, LENGTH))
    offsets = torch.tensor(OFFSETS)
    starts = offsets[:-1].repeat_interleave(offsets.diff())
    return TokenLayout(1, LENGTH, offsets, int(offsets.diff().max()), (torch.arange(LENGTH) - starts).unsqueeze(0))


def stream(packed: bool, seed: int) -> Tensor:
    """Random tokens of the residual stream, `[rows, T, hidden]`."""
    rows = 1 if packed else ROWS
    return torch.randn(rows, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def one_pass(module: nn.Module, x: Tensor, weights: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """Output for tokens `x [rows, T, hidden]`, and gradients of the output's sum weighted by `weights`."""
    tokens = x.flatten(0, 1).requires_grad_()
    y = module(tokens, layout)
    (y * weights.flatten(0, 1)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"output": y.detach().view_as(x), "tokens": tokens.grad.view_as(x)} | gradients  # type: ignore[union-attr]


def settings(mixer: Mixer, world: int) -> Iterator[tuple[str, str, str, bool]]:
    """Yields (layout, strategy of states, strategy of softmax attention, packed) that the mixer supports."""
    heads = mixer.softmax_heads(mixer.config, mixer.dims)
    for layout in ("contiguous", "zigzag"):
        for packed in (False, True):
            for strategy in STRATEGIES:
                yield layout, strategy, "all_gather", packed
            if heads is not None:
                yield layout, "all_gather", "ring", packed
            if heads is not None and heads[0] % world == 0:
                yield layout, "all_gather", "ulysses", packed
