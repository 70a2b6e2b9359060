"""Recurrences with a diagonal transition: linear attention, retention, GLA, Mamba2, HGRN2 and their kin."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, requested
from linear_moe.modeling.ops.recurrences.decay import chunk, fla, reference
from linear_moe.modeling.ops.recurrences.decay.decode import step
from linear_moe.modeling.ops.recurrences.decay.summary import gradient, summary

__all__ = ["IMPLEMENTATIONS", "decay", "step"]

IMPLEMENTATIONS = {"reference": reference.decay, "chunk": chunk.decay, "gpu": fla.decay}


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bounded: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence with a diagonal transition (GLA, arXiv 2312.06635).

    S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T,  o_t = scale * S_t^T q_t.

    With a bonus, o_t = scale * (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t  (RWKV6, arXiv 2404.05892).

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log-decay, at most 0 (minus infinity forgets everything): `[B, T, H]`, one per head; `[B, T, H, K]`, one per
            key channel; `[H]`, the same at every token (retention, lightning attention); None: no decay.
        gv: `[B, T, H, V]`, a log-decay per value channel, at most 0; None: none.
        bonus: `[H, K]`, the weight of a token's own key in its output; None: the updated state is read.
        scale: K**-0.5 unless given.
        initial_state: `[N, H, K, V]` fp32, zeros unless given; N is B, or the number of documents.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; documents may be empty.
        bounded: whether g and gv are known to be at least -80, as the kernels need them, which saves a pass over both.
        backend: "reference", "chunk", "gpu" (flash-linear-attention) or "auto": the kernels for 16-bit tensors on
            CUDA where installed, else "chunk". With T = 1, an `initial_state`, no `cu_seqlens` and gradients
            disabled, "auto" is one step of decoding: it UPDATES `initial_state` IN PLACE and returns it.

    Returns:
        `o [B, T, H, V]` in v's dtype and the final state `[N, H, K, V]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    gates = {"g": (g, (tuple(q.shape[:3]), tuple(q.shape), (q.shape[2],))), "gv": (gv, (tuple(v.shape),))}
    gates["bonus"] = (bonus, ((q.shape[2], q.shape[3]),))
    check_inputs(q, k, v, gates, initial_state, cu_seqlens)
    pieces = sequence.current(initial_state)
    scale, backend = q.shape[-1] ** -0.5 if scale is None else scale, requested(backend)
    if backend == "auto" and decodes(q.shape[1], initial_state, cu_seqlens):
        assert initial_state is not None
        return step(q, k, v, g, gv, bonus, state=initial_state, scale=scale)
    implementations = IMPLEMENTATIONS | {"gpu": partial(fla.decay, bounded=bounded)}
    implementation = choose(backend, implementations, v, fla.unsupported(gv, bonus))

    def run(initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return implementation(q, k, v, g, gv, bonus, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)

    if pieces is None:
        return run(initial_state)
    by_token = g.expand(q.shape[:3]) if g is not None and g.ndim == 1 else g
    return pieces.through(
        run, (summary, k, v, by_token, gv), (partial(gradient, scale, bonus is not None), q, by_token, gv)
    )
