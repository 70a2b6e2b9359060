"""The decay family in chunks of tokens: matmuls within chunks, the recurrence between them (GLA, arXiv 2312.06635)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, segment_sums, start_state


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.decay.decay`. Only sums of gates are exponentiated, so any gates <= 0 are safe."""
    dtype, state = v.dtype, start_state(q, v, initial_state, cu_seqlens)
    shape, chunks = q.shape[:3], Chunks(q, cu_seqlens)
    q, k, v = (chunks.split(x.float()) for x in (q, k, v))
    q = q * scale
    if g is None:
        scores, kept = (q @ k.mT).tril(), None
    elif g.ndim == 1:
        per_head = g.float().repeat(chunks.batch)[:, None].expand(-1, chunks.size)
        scores, q, k, kept = _scalar_gate(q, k, chunks.split(g.float().expand(shape)), segment_sums(per_head).exp())
    elif g.ndim == 3:
        g = chunks.split(g.float())
        scores, q, k, kept = _scalar_gate(q, k, g, segment_sums(g).exp())
    else:
        scores, q, k, kept = _vector_gate(q, k, chunks.split(g.float()))
    updates = (k.mT @ v).unbind()
    decays = None if kept is None else kept.unbind()

    def advance(n: int, state: Tensor) -> Tensor:
        return updates[n] + state if decays is None else torch.addcmul(updates[n], decays[n], state)

    before, final = chunks.scan(advance, state)
    return chunks.join(scores @ v + q @ before).to(dtype), final


def _scalar_gate(q: Tensor, k: Tensor, g: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`g [N, X, C]` -> decayed scores, q decayed from the chunk's start, k decayed to its end, the chunk's decay.

    Args:
        decays: `[N, X, C, C]`, or what broadcasts to it: exp(g[j+1] + ... + g[i]) at (i, j), 0 where j > i.
    """
    from_start = g.cumsum(-1).exp()
    to_end = F.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()
    return (q @ k.mT) * decays, q * from_start[..., None], k * to_end[..., None], from_start[..., -1:, None]


def _vector_gate(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for `g [N, X, C, K]`.

    Scores need exp(g[j+1] + ... + g[i]) for each channel, which splits into a factor of i and a factor of j, both at
    most 1, only at a point between j and i. So blocks are merged in pairs, from single tokens to the whole chunk: the
    scores of the second half with the first one split at the middle.
    """
    size = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # [N, X, blocks, block, block]
    from_start, to_end = g, torch.zeros_like(g)  # sums of gates: block's start to i inclusive, after j to block's end
    block = 1
    while block < size:
        halves = (size // (2 * block), 2, block)
        start_1, start_2 = from_start.unflatten(-2, halves).unbind(-3)
        end_1, end_2 = to_end.unflatten(-2, halves).unbind(-3)
        across = (q.unflatten(-2, halves)[..., 1, :, :] * start_2.exp()) @ (
            k.unflatten(-2, halves)[..., 0, :, :] * end_1.exp()
        ).mT
        within_1, within_2 = scores.unflatten(-3, halves[:2]).unbind(-3)
        scores = torch.cat([F.pad(within_1, (0, block)), torch.cat([across, within_2], dim=-1)], dim=-2)
        from_start = torch.cat([start_1, start_2 + start_1[..., -1:, :]], dim=-2).flatten(-3, -2)
        to_end = torch.cat([end_1 + start_2[..., -1:, :], end_2], dim=-2).flatten(-3, -2)
        block *= 2
    return scores.squeeze(-3), q * from_start.exp(), k * to_end.exp(), from_start[..., -1, :, None].exp()
