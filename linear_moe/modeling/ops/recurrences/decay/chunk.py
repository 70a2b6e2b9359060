"""The decay family in chunks of tokens: matmuls within chunks, the recurrence between them (GLA, arXiv 2312.06635)."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, start_state
from linear_moe.modeling.ops.recurrences.pairwise import pairwise, pairwise_sum


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    bonus: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.decay.decay`."""
    dtype, state, chunks = v.dtype, start_state(q, v, initial_state, cu_seqlens), Chunks(q, cu_seqlens)
    if g is not None and g.ndim < 4:
        g = g.expand(q.shape[:3])[..., None]
    g, gv = (None if x is None else chunks.split(x.float()) for x in (g, gv))
    q, k, v = (chunks.split(x.float()) for x in (q, k, v))
    before_gate = bonus is not None  # q reads the state before its own token's gates and update
    own = None if bonus is None else (q * k * bonus.float().repeat(chunks.batch, 1)[:, None]).sum(-1, keepdim=True) * v
    scores, q, k, kept = _key_gates(q, k, g, before_gate)
    if gv is None:
        o, from_start = scores @ v, None
    else:
        o, from_start, v, kept_values = pairwise_sum(scores, v, gv, before_gate)
        kept = kept_values if kept is None else kept * kept_values
    before, final = chunks.carry(k.mT @ v, kept, state)
    across = q @ before
    o = o.add_(across) if from_start is None else torch.addcmul(o, from_start, across)
    o = o if own is None else o.add_(own)
    return chunks.join(o.mul_(scale)).to(dtype), final


def _key_gates(
    q: Tensor, k: Tensor, g: Tensor | None, before_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Applies the log-decay of keys, `g [N, X, C, K or 1]`, within chunks.

    Returns:
        Decayed scores `[N, X, C, C]`, q decayed from the chunk's start, k decayed to the chunk's end, and the decay of
        the whole chunk `[N, X, K or 1, 1]`.
    """
    if g is None:
        return (q @ k.mT).tril(-before_gate), q, k, None
    if g.shape[-1] == q.shape[-1]:
        [[scores]], [q], [k], kept = pairwise([q], [k], g, before_gate)
        return scores, q, k, kept
    one = torch.ones_like(g)
    [[decays]], [from_start], [to_end], kept = pairwise([one], [one], g, before_gate)
    return (q @ k.mT) * decays, q * from_start, k * to_end, kept
