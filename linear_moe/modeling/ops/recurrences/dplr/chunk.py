"""The diagonal plus rank one family in chunks of tokens, by the WY representation (arXiv 2503.14456, 2406.06484)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, start_state
from linear_moe.modeling.ops.recurrences.delta.chunk import unit_lower_inverse
from linear_moe.modeling.ops.recurrences.pairwise import pairwise


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.dplr.dplr`. No gate is divided by: any g <= 0 is safe.

    In a chunk that starts from state S, a_i reads y_i from S, from the values that earlier tokens have written, and
    from the reads that they have written, each decayed until the token before i: (I - L) Y = A' S + M V, with L and M
    strictly lower triangular. With I - L inverted for all chunks at once, Y = X + W S; then only Y and S are computed
    chunk by chunk.
    """
    dtype, state = v.dtype, start_state(q, v, initial_state, cu_seqlens)
    chunks = Chunks(q, cu_seqlens)
    q, k, v, a, b, g = (chunks.split(x.float()) for x in (q, k, v, a, b, g))
    # a_i reads the state after token i - 1: shifted to that token it is decayed as q is; the results are shifted back
    early = F.pad(a[..., 1:, :], (0, 0, 0, 1))
    [[qk, qb], [ak, ab]], [q, early], [k_end, b_end], kept = pairwise([q * scale, early], [k, b], g)
    ak, ab = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (ak, ab))
    a_start = torch.cat([a[..., :1, :], early[..., :-1, :]], dim=-2)
    inverse = unit_lower_inverse(-ab)
    x, w, values = (inverse @ (ak @ v)).unbind(), (inverse @ a_start).unbind(), (k_end.mT @ v).unbind()
    writers, decays, reads = b_end.mT.unbind(), kept.unbind(), []

    def advance(n: int, state: Tensor) -> Tensor:
        reads.append(torch.baddbmm(x[n], w[n], state))
        return torch.baddbmm(torch.addcmul(values[n], decays[n], state), writers[n], reads[n])

    before, final = chunks.scan(advance, state)
    return chunks.join(q @ before + qk @ v + qb @ torch.stack(reads)).to(dtype), final
