"""Recurrences whose transition is a diagonal plus a matrix of rank one: RWKV-7."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, requested
from linear_moe.modeling.ops.recurrences.dplr import chunk, fla, reference
from linear_moe.modeling.ops.recurrences.dplr.decode import step
from linear_moe.modeling.ops.recurrences.dplr.summary import through

__all__ = ["IMPLEMENTATIONS", "dplr", "step"]

IMPLEMENTATIONS = {"reference": reference.dplr, "chunk": chunk.dplr, "gpu": fla.dplr}


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_gate: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence whose transition is a diagonal plus a matrix of rank one (RWKV-7, arXiv 2503.14456).

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale * S_t^T q_t.

    The vector a reads the state before its decay, and b writes the result. Both are used as given: callers keep the
    transition diag(exp(g)) + b a^T from growing (RWKV-7: a = -k', b = rate * k' with |k'| = 1 and rates in (0, 1)).

    Args:
        q, k, a, b: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H, K]` log-decay, at most 0 (minus infinity forgets everything).
        scale: K**-0.5 unless given.
        initial_state: `[N, H, K, V]` fp32, zeros unless given; N is B, or the number of documents.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; documents may be empty.
        min_gate: a lower bound of g, if the caller knows one: the kernels need a bound of at least -5.
        backend: "reference", "chunk", "gpu" (flash-linear-attention) or "auto": the kernels for 16-bit tensors on
            CUDA where installed, else "chunk". With T = 1, an `initial_state`, no `cu_seqlens` and gradients
            disabled, "auto" is one step of decoding: it UPDATES `initial_state` IN PLACE and returns it.

    Returns:
        `o [B, T, H, V]` in v's dtype and the final state `[N, H, K, V]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    vectors = {name: (x, (tuple(q.shape),)) for name, x in {"a": a, "b": b, "g": g}.items()}
    check_inputs(q, k, v, vectors, initial_state, cu_seqlens)
    scale, backend = q.shape[-1] ** -0.5 if scale is None else scale, requested(backend)
    if backend == "auto" and decodes(q.shape[1], initial_state, cu_seqlens):
        assert initial_state is not None
        return step(q, k, v, a, b, g, state=initial_state, scale=scale)
    implementation = choose(backend, IMPLEMENTATIONS, v, fla.unsupported(q, v, min_gate))
    kernels = implementation is fla.dplr
    implementation = partial(implementation, min_gate=min_gate) if kernels else implementation
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens}
    if (pieces := sequence.current(initial_state)) is not None:
        return through(pieces, implementation, q, k, v, a, b, g, min_gate=min_gate, kernels=kernels, **options)
    return implementation(q, k, v, a, b, g, initial_state=initial_state, **options)
