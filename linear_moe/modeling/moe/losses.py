"""The router's auxiliary losses, from sums over tokens, so that ranks can share out the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout


def balance_loss(counts: Tensor, score_sums: Tensor, tokens: Tensor | int) -> Tensor:
    """Load-balancing loss `E * sum_i f_i P_i`, within each of S sequences, averaged over them by their tokens. Scalar.

    Switch Transformer's eq. 4, with f_i an expert's share of all choices; DeepSeek-V2's eq. 23. 1 for an even load.

    Args:
        counts: `[S, E]` how often each expert was chosen, by the sequence's tokens or others in their place.
        score_sums: `[S, E]` sums of the tokens' scores, each token's divided by their sum. The loss is linear in them:
            those of parts of the tokens add up to that of all.
        tokens: of all sequences.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return counts.shape[-1] * (share * score_sums).sum() / tokens


def sequence_of_tokens(layout: TokenLayout, start: int, tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """Number of the sequence, or packed document, that each token is in `[tokens]`, and how many there are.

    Of pieces of sequences: the same number on every rank.

    Args:
        start: place of the first token among all of the layout's.
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
    """ST-MoE's eq. 5, summed over tokens, or those that are `counted [n]`: `[n, E]` -> scalar."""
    squares = logits.logsumexp(-1).square()
    return (squares if counted is None else squares * counted).sum()
