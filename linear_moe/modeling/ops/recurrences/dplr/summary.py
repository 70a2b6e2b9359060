"""Summaries of pieces for DPLR, and gradients of their initial states.

On CUDA, both come from the WY form of the chunks, by the kernels of the delta rule (`delta/summary_triton.py`).
Elsewhere both come from running the op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import import_fla, pad_keys, tiled

CHUNKS = (64, 16)  # tokens of a chunk: 64 if the bound of the gates is safe in so long chunks, else 16

Op = Callable[..., tuple[Tensor, Tensor]]
"""Function `op(q, k, v, a, b, g, scale=..., initial_state=..., cu_seqlens=...) -> (o, final_state)`."""


def through(
    pieces: sequence.Pieces,
    op: Op,
    *inputs: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    min_gate: float | None,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """Runs `op` on pieces of sequences.

    Args:
        inputs: q, k, v, a, b, g.
        scale, cu_seqlens: as for `dplr`.
        min_gate: a lower bound of g; the kernels need one.
        kernels: whether `op` is the one of the GPU kernels.
    """
    summary: Callable[..., Any] = partial(_by_running, op)
    gradient: Callable[..., Any] = partial(sequence.gradient_by_running, op, scale)
    if kernels:
        assert min_gate is not None
        summary, gradient = partial(_on_kernels, min_gate), partial(_gradient_on_kernels, min_gate, scale)

    def run(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return op(*inputs, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)

    return pieces.through(run, (summary, *inputs), (gradient, *inputs), matrix=True)


def _by_running(op: Op, q: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the `Summary` by running `op`."""
    return sequence.affine(partial(op, torch.zeros_like(q), scale=1.0, cu_seqlens=None), *inputs)


def _on_kernels(min_gate: float, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Computes the `Summary` by kernels."""
    keys = q.shape[-1]
    with torch.cuda.device_of(v):
        made = _wy(min_gate, q, k, v, *inputs)
        own = {"q": made.pop("k"), "do": v, "sign": 1, "chunk": made.pop("chunk")}
        for name in ("q", "scores"):
            del made[name]
        transition, state = _kernels().scan(made.pop("b"), **made, **own)
    return transition[:, :, :keys, :keys], state[:, :, :keys]


def _gradient_on_kernels(min_gate: float, scale: float, *inputs: Any) -> Tensor:
    """Computes the `Gradient` by kernels; `inputs` end with d_o."""
    *given, d_o = inputs
    keys = given[0].shape[-1]
    with torch.cuda.device_of(d_o):
        made = _wy(min_gate, *given, scale=scale)
        options: dict[str, Any] = {"gk": made["gk"], "sign": 1, "chunk": made["chunk"], "backwards": True}
        dv = _kernels().local(made["scores"], d_o)
        _, start = _kernels().scan(made["b"], made["w"], dv, q=made["q"], do=d_o, **options)
    return start[:, :, :keys]


def _wy(
    min_gate: float, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *, scale: float = 1.0
) -> dict[str, Any]:
    """Returns the WY form of the chunks, as `delta.summary_triton.scan` takes it.

    The dictionary has b, w and u, q (times `scale`) and k, both decayed within their chunk, the log2-decays "gk", the
    scores with which outputs read the writes of their chunk (for `delta.summary_triton.local`), and the chunk size.
    """
    module = "ops.generalized_delta_rule.dplr"
    size, safe = tiled(q.shape[-1]), import_fla(f"{module}.chunk").gate_bound_is_safe
    q, k, a, b = (pad_keys(x.to(v.dtype), -1, size).contiguous() for x in (q, k, a, b))
    chunk = next(n for n in CHUNKS if n == CHUNKS[-1] or safe(min_gate, n))
    options: dict[str, Any] = {"chunk_size": chunk, "cu_seqlens": None}
    log2 = import_fla("ops.utils.constant").RCP_LN2
    gk = pad_keys(g.float(), -1, size).contiguous()
    sums, before = import_fla("ops.rwkv6.chunk").chunk_rwkv6_fwd_cumsum(gk, chunk, scale=log2, cu_seqlens=None)
    options["safe_gate"] = safe(min_gate, chunk)
    intra = import_fla(f"{module}.chunk_A_fwd").chunk_dplr_fwd_intra
    A_ab, _, A_ak, A_qb, qg, kg, ag, bg = intra(q=q, k=k, a=a, b=b, gi=sums, ge=before, scale=scale, **options)
    form = import_fla(f"{module}.wy_fast_fwd").prepare_wy_repr_fwd
    w, u, _ = form(ag=ag, A_ab=A_ab, A_ak=A_ak, v=v.contiguous(), **options)
    return {"q": qg, "k": kg, "b": bg, "w": w, "u": u, "gk": sums, "scores": A_qb, "chunk": chunk}


def _kernels() -> Any:
    return importlib.import_module("linear_moe.modeling.ops.recurrences.delta.summary_triton")
