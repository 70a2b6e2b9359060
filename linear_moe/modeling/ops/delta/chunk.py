"""The delta family in chunks of tokens, by the WY representation (arXiv 2406.06484, gated: arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, segment_sums, start_state


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
    """See `linear_moe.modeling.ops.delta.delta`.

    In a chunk that starts from state S, token i writes u_i = beta_i (v_i - what k_i reads), and it reads S and the
    writes before it, each decayed since: (I + L) U = diag(beta) (V - K' S), L strictly lower triangular. Solved for
    V and K' at once, U = X - W S for every chunk before any state is known; then S -> M S + R between chunks.
    """
    dtype, state = v.dtype, start_state(q, v, initial_state, cu_seqlens)
    chunks = Chunks(q, cu_seqlens)
    q, k, v, beta = (chunks.split(x.float()) for x in (q, k, v, beta[..., None]))
    q = q * scale
    similarity, scores = k @ k.mT, q @ k.mT  # [N, X, C, C]
    if g is None:
        scores = scores.tril()
        k_start, k_end, kept = k, k, torch.ones_like(k[..., :1, :1])
    else:
        g = chunks.split(g.float())
        decays = segment_sums(g).exp()
        from_start, to_end = g.cumsum(-1).exp()[..., None], decays[..., -1, :, None]
        similarity, scores = similarity * decays, scores * decays
        q, k_start, k_end, kept = q * from_start, k * from_start, k * to_end, from_start[..., -1:, :]
    lower = (beta * similarity).tril(-1)
    right = torch.cat([v, k_start], dim=-1) * beta
    x, w = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    identity = torch.eye(k.shape[-1], device=k.device)
    transitions = (kept * identity - k_end.mT @ w).unbind()
    updates = (k_end.mT @ x).unbind()
    before, final = chunks.scan(lambda n, state: torch.baddbmm(updates[n], transitions[n], state), state)
    return chunks.join(q @ before + scores @ (x - w @ before)).to(dtype), final
