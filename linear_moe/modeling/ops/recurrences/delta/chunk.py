"""The delta family in chunks of tokens, by the WY representation (arXiv 2406.06484, gated: arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, segment_sums, start_state
from linear_moe.modeling.ops.recurrences.pairwise import pairwise


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.delta.delta`. No gate is divided by: any g <= 0 is safe.

    In a chunk that starts from state S, token i writes u_i = beta_i (v_i - r_i), where its key reads r_i from S and
    from the writes before token i, each decayed since: (I + L) U = diag(beta) (V - K' S), L strictly lower triangular.
    With I + L inverted for all chunks at once, U = X - W S; then only U and S are computed chunk by chunk.
    """
    dtype, state = v.dtype, start_state(q, v, initial_state, cu_seqlens)
    chunks = Chunks(q, cu_seqlens)
    q, k, v, beta = (chunks.split(x.float()) for x in (q, k, v, beta))
    q = q * scale
    k_start, k_end, decays = k, k, None
    if g is None:
        similarity, scores = k @ k.mT, (q @ k.mT).tril()  # [N, X, C, C]
    elif g.ndim == 3:
        g = chunks.split(g.float())
        between = segment_sums(g).exp()
        from_start = g.cumsum(-1).exp()[..., None]
        similarity, scores = (k @ k.mT) * between, (q @ k.mT) * between
        q, k_start, k_end = q * from_start, k * from_start, k * between[..., -1, :, None]
        decays = from_start[..., -1:, :].unbind()
    else:
        [[similarity], [scores]], [k_start, q], [k_end], kept = pairwise([k, q], [k], chunks.split(g.float()))
        decays = kept.unbind()
    inverse = unit_lower_inverse(beta[..., None] * similarity) * beta[..., None, :]
    x, w, keys = (inverse @ v).unbind(), (inverse @ k_start).unbind(), k_end.mT.unbind()
    writes = []

    def advance(n: int, state: Tensor) -> Tensor:
        writes.append(torch.baddbmm(x[n], w[n], state, alpha=-1))
        return torch.baddbmm(state if decays is None else decays[n] * state, keys[n], writes[n])

    before, final = chunks.scan(advance, state)
    return chunks.join(q @ before + scores @ torch.stack(writes)).to(dtype), final


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Returns the inverse of the identity plus the part of `lower [..., C, C]` below its diagonal."""
    identity = torch.eye(lower.shape[-1], device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower.tril(-1), identity, upper=False, unitriangular=True)
