"""Auxiliary losses of the router, computed from sums over tokens, so that several ranks can share out the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout


def balance_loss(counts: Tensor, score_sums: Tensor, tokens: Tensor | int) -> Tensor:
    """Load-balancing loss `E * sum_i f_i P_i` of each of S sequences, averaged with their tokens as weights; a scalar.

    f_i is the share of expert i in all choices (Switch Transformer, eq. 4; DeepSeek-V2, eq. 23). An even load gives 1.

    Args:
        counts: `[S, E]` how often each expert was chosen, by the sequence's own tokens or by a larger set of tokens.
        score_sums: `[S, E]` sums over tokens of the scores, which are normalised to sum to 1 for each token. The loss
            is linear in `score_sums`: the losses of parts of the tokens add up to the loss of all.
        tokens: number of tokens in all sequences.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return counts.shape[-1] * (share * score_sums).sum() / tokens


def sequence_of_tokens(layout: TokenLayout, start: int, tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """Numbers the sequences, or packed documents: returns each token's number `[tokens]` int64, and how many there are.

    The pieces of one sequence have the same number on all ranks.

    Args:
        start: index of the first token among all tokens of the layout.
        tokens: number of tokens to look up.
    """
    place = torch.arange(start, start + tokens, device=device)
    if layout.cu_seqlens is None:
        number, count = place // layout.length, layout.batch
    else:
        number, count = torch.searchsorted(layout.cu_seqlens, place, right=True) - 1, len(layout.cu_seqlens) - 1
    if layout.pieces is not None:
        number, count = layout.pieces.numbers[number], layout.pieces.sequences
    return number, count


def z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Router z-loss (ST-MoE, eq. 5) of `logits [n, E]`, summed over all tokens, or over those with `counted [n]`."""
    squares = logits.logsumexp(-1).square()
    return (squares if counted is None else squares * counted).sum()
