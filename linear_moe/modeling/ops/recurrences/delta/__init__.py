"""Recurrences with the delta rule: DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, requested
from linear_moe.modeling.ops.recurrences.delta import chunk, fla, reference
from linear_moe.modeling.ops.recurrences.delta.decode import step
from linear_moe.modeling.ops.recurrences.delta.summary import through

__all__ = ["IMPLEMENTATIONS", "delta", "step"]

IMPLEMENTATIONS = {"reference": reference.delta, "chunk": chunk.delta, "gpu": fla.delta}


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bounded: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence with the delta rule.

    S' = diag(exp(g_t)) S_{t-1},  S_t = S' + beta_t k_t (v_t - k_t^T S')^T,  o_t = scale * S_t^T q_t.

    Without g this is DeltaNet (arXiv 2406.06484), with a decay per head Gated DeltaNet (arXiv 2412.06464), with a decay
    per key channel Kimi Delta Attention (arXiv 2510.26692). q and k are used as given: the recurrence is stable for
    beta |k|^2 <= 2, so callers normalise k.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, the strength of the write.
        g: log-decay, at most 0 (minus infinity forgets everything): `[B, T, H]`, one per head; `[B, T, H, K]`, one per
            key channel; None: no decay.
        scale: K**-0.5 unless given.
        initial_state: `[N, H, K, V]` fp32, zeros unless given; N is B, or the number of documents.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; documents may be empty.
        bounded: whether g is known to be at least -80, as the kernels need it, which saves a pass over g.
        backend: "reference", "chunk", "gpu" (flash-linear-attention) or "auto": the kernels for 16-bit tensors on
            CUDA where installed, else "chunk". With T = 1, an `initial_state`, no `cu_seqlens` and gradients
            disabled, "auto" is one step of decoding: it UPDATES `initial_state` IN PLACE and returns it.

    Returns:
        `o [B, T, H, V]` in v's dtype and the final state `[N, H, K, V]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    per_head, per_channel = tuple(q.shape[:3]), tuple(q.shape)
    gates = {"beta": (beta, (per_head,)), "g": (g, (per_head, per_channel))}
    check_inputs(q, k, v, gates, initial_state, cu_seqlens)
    scale, backend = q.shape[-1] ** -0.5 if scale is None else scale, requested(backend)
    if backend == "auto" and decodes(q.shape[1], initial_state, cu_seqlens):
        assert initial_state is not None
        return step(q, k, v, beta, g, state=initial_state, scale=scale)
    implementations = IMPLEMENTATIONS | {"gpu": partial(fla.delta, bounded=bounded)}
    implementation = choose(backend, implementations, v, fla.unsupported(q, v))
    if (pieces := sequence.current(initial_state)) is not None:
        options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "bounded": bounded}
        kernels = implementation is implementations["gpu"]
        return through(pieces, implementation, q, k, v, beta, g, kernels=kernels, **options)
    return implementation(q, k, v, beta, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
