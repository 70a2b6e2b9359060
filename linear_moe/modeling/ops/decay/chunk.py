"""The decay family in chunks of tokens: matmuls within chunks, the recurrence between them (GLA, arXiv 2312.06635).

The decay from token j to token i is a product of gates in [0, 1]. It splits into a factor of i and a factor of j, both
of them such products, only at a point between the two. So blocks are merged in pairs, from single tokens to the whole
chunk, and the second half meets the first one at the middle. No gate is divided by: any gates <= 0 are safe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, start_state


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
    """See `linear_moe.modeling.ops.decay.decay`."""
    dtype, state, chunks = v.dtype, start_state(q, v, initial_state, cu_seqlens), Chunks(q, cu_seqlens)
    if g is not None and g.ndim < 4:
        g = g.expand(q.shape[:3])[..., None]
    a, b = (None if x is None else chunks.split(x.float()).exp() for x in (g, gv))
    q, k, v = (chunks.split(x.float()) for x in (q, k, v))
    before_gate = bonus is not None  # q reads the state before its own token's gates and update
    own = None if bonus is None else (q * k * bonus.float().repeat(chunks.batch, 1)[:, None]).sum(-1, keepdim=True) * v
    scores, q, k, kept = _key_gates(q, k, a, before_gate)
    if b is None:
        o, from_start = scores @ v, None
    else:
        o, from_start, v, kept_values = _value_gates(scores, v, b, before_gate)
        kept = kept_values if kept is None else kept * kept_values
    updates, decays = (k.mT @ v).unbind(), None if kept is None else kept.unbind()

    def advance(n: int, state: Tensor) -> Tensor:
        return updates[n] + state if decays is None else torch.addcmul(updates[n], decays[n], state)

    before, final = chunks.scan(advance, state)
    across = q @ before
    o = o.add_(across) if from_start is None else torch.addcmul(o, from_start, across)
    o = o if own is None else o.add_(own)
    return chunks.join(o.mul_(scale)).to(dtype), final


def _key_gates(
    q: Tensor, k: Tensor, a: Tensor | None, before_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gates `a [N, X, C, K]` of keys, or `[N, X, C, 1]`.

    Returns:
        Decayed scores `[N, X, C, C]`, q decayed from the chunk's start, k decayed to its end, the chunk's decay
        `[N, X, K, 1]`.
    """
    if a is None:
        return (q @ k.mT).tril(-before_gate), q, k, None
    if a.shape[-1] < q.shape[-1]:
        one = torch.ones_like(a)
        decays, from_start, to_end, kept = _key_gates(one, one, a, before_gate)
        return (q @ k.mT) * decays, q * from_start, k * to_end, kept
    scores = (q * k).sum(-1)[..., None, None]  # [N, X, blocks, block, block]
    if before_gate:
        scores = torch.zeros_like(scores)
    else:
        q = q * a
    block, size = 1, q.shape[-2]
    while block < size:
        halves = (-1, 2, block)
        across = q.unflatten(-2, halves)[..., 1, :, :] @ k.unflatten(-2, halves)[..., 0, :, :].mT
        within_1, within_2 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        scores = torch.cat([F.pad(within_1, (0, block)), torch.cat([across, within_2], dim=-1)], dim=-2)
        q, k, a = _merge(q, k, a, block)
        block *= 2
    return scores.squeeze(-3), q, k, a.mT


def _value_gates(scores: Tensor, v: Tensor, b: Tensor, before_gate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates `b [N, X, C, V]` of values.

    Returns:
        The decayed `scores @ v`, the decay of the output from the chunk's start, v decayed to its end, the chunk's
        decay `[N, X, 1, V]`.
    """
    o = scores.diagonal(dim1=-2, dim2=-1)[..., None] * v
    from_start = torch.ones_like(b) if before_gate else b
    block, size = 1, v.shape[-2]
    while block < size:
        halves = (-1, 2, block)
        pairs = scores.unflatten(-1, halves).unflatten(-4, halves)[
            ..., 1, :, :, 0, :
        ]  # [N, X, pairs, block, pairs, block]
        across = _matmul(pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3), v.unflatten(-2, halves)[..., 0, :, :])
        o_1, o_2 = o.unflatten(-2, halves).unbind(-3)
        o_2 = torch.addcmul(o_2, from_start.unflatten(-2, halves)[..., 1, :, :], across)
        o = torch.stack([o_1, o_2], -3).flatten(-4, -2)
        from_start, v, b = _merge(from_start, v, b, block)
        block *= 2
    return o, from_start, v, b


def _merge(from_start: Tensor, to_end: Tensor, whole: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Makes tensors decayed from blocks' starts and to blocks' ends, and the decays of whole blocks, those of pairs."""
    whole_1, whole_2 = whole.unflatten(-2, (-1, 2)).unbind(-2)
    one = torch.ones_like(whole_1)
    from_start = from_start.unflatten(-2, (-1, 2, block)) * torch.stack([one, whole_1], -2)[..., None, :]
    to_end = to_end.unflatten(-2, (-1, 2, block)) * torch.stack([whole_2, one], -2)[..., None, :]
    return from_start.flatten(-4, -2), to_end.flatten(-4, -2), whole_1 * whole_2


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; batched matmuls of next to nothing are slow."""
    inner = a.shape[-1]
    if inner > 2:
        return a @ b
    terms = [a[..., i, None] * b[..., i, None, :] for i in range(inner)]
    return terms[0] if inner == 1 else terms[0] + terms[1]
