"""Summaries of pieces for the delta family, and gradients of their initial states.

On CUDA, kernels of our own compute both from the WY form of the chunks, which flash-linear-attention's kernels make.
Elsewhere both come from running the op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import import_fla
from linear_moe.modeling.ops.recurrences.delta.fla import CHUNK, prepared

Op = Callable[..., tuple[Tensor, Tensor]]
"""Function `op(q, k, v, beta, g, scale=..., initial_state=..., cu_seqlens=...) -> (o, final_state)`."""


def through(
    pieces: sequence.Pieces,
    op: Op,
    *inputs: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    bounded: bool,
    kernels: bool,
    expand: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs `op` on pieces of sequences.

    Args:
        inputs: q, k, v, beta, g.
        scale, cu_seqlens, bounded: as for `delta`.
        kernels: whether `op` is the one of the GPU kernels.
        expand: function of q, k, v, beta, g that returns them with one write per token, for the kernels; None: each
            token has one write already.
    """
    q, k, v, beta, g = inputs
    assert q is not None and k is not None and v is not None and beta is not None
    keys = q.shape[-1]
    summary: Callable[..., Any] = partial(_by_running, op)
    gradient: Callable[..., Any] = partial(sequence.gradient_by_running, op, scale)
    if kernels:
        q, k, g = prepared(q, k, v, g, bounded)
        if expand is None and (g is None or g.ndim == 3):
            stages = importlib.import_module("linear_moe.modeling.ops.recurrences.delta.stages")
            run_stages: Callable[..., tuple[Tensor, Tensor]] = stages.through
            return run_stages(pieces, q, k, v, beta, g, keys=keys, scale=scale, cu_seqlens=cu_seqlens)
        summary, gradient = partial(_on_kernels, keys, expand), partial(_gradient_on_kernels, keys, scale, expand)

    def run(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        o, final = op(q, k, v, beta, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return o, final[:, :, :keys]

    given = (q, k, v, beta, g)
    return pieces.through(run, (summary, *given), (gradient, *given), matrix=True)


def _by_running(op: Op, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the `Summary` by running `op`."""

    def run(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return op(torch.zeros_like(q), k, v, beta, g, scale=1.0, initial_state=initial_state, cu_seqlens=None)

    return sequence.affine(run, k, v, beta, g)


def _on_kernels(keys: int, expand: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Computes the `Summary` by kernels; `inputs` are prepared, and had `keys` key channels before."""
    q, k, v, beta, g = inputs if expand is None else expand(*inputs)
    with torch.cuda.device_of(v):
        form = _wy(q, k, v, beta, g)
        transition, state = _kernels().scan(form["k"], form["w"], form["u"], form["g"], form["gk"])
    return transition[:, :, :keys, :keys], state[:, :, :keys]


def _gradient_on_kernels(keys: int, scale: float, expand: Any, *inputs: Any) -> Tensor:
    """Computes the `Gradient` by kernels; `inputs` are prepared, had `keys` key channels before, and end with d_o."""
    *inputs, d_o = inputs  # type: ignore[assignment]
    q, k, v, beta, g = inputs if expand is None else expand(*inputs)
    if expand is not None:  # outputs come after a token's last write
        writes = k.shape[1] // d_o.shape[1]
        d_o = F.pad(d_o.unsqueeze(2), (0, 0, 0, 0, writes - 1, 0)).flatten(1, 2)
    with torch.cuda.device_of(v):
        form = _wy(q, k, v, beta, g, scale)
        given: dict[str, Any] = {"q": form["q"], "do": d_o.contiguous(), "scale": scale}
        if form["scores"] is None:
            dv = import_fla("ops.common.chunk_o").chunk_bwd_dv_local(k=k, g=form["g"], chunk_size=CHUNK, **given)
        else:
            dv = _kernels().local(form["scores"], d_o)
        _, start = _kernels().scan(form["k"], form["w"], dv, form["g"], form["gk"], backwards=True, **given)
    return start[:, :, :keys]


def _wy(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float = 1.0) -> dict[str, Any]:
    """Returns the WY form and log2-decays since the beginning of the chunk, as `summary_triton.scan` takes them.

    The dictionary has w, u, k, q, the decays per head "g" or per key channel "gk" (the other is None), and, with "gk",
    the scores of the chunks, as `summary_triton.local` takes them.
    """
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    form: dict[str, Any] = {"q": q, "k": k, "g": None, "gk": None, "scores": None}
    options: dict[str, Any] = {"v": v, "beta": beta, "cu_seqlens": None, "chunk_size": CHUNK}
    if g is None:
        form["w"], form["u"], _ = import_fla("ops.delta_rule.wy_fast").prepare_wy_repr_fwd(k=k, **options)
        return form
    log2 = import_fla("ops.utils.constant").RCP_LN2
    g = import_fla("ops.utils").chunk_local_cumsum(g.contiguous(), chunk_size=CHUNK, scale=log2)
    if g.ndim == 3:
        form["w"], form["u"], _ = import_fla("ops.gated_delta_rule.chunk_fwd").chunk_gated_delta_rule_fwd_intra(
            k=k, g=g, **options
        )
        return form | {"g": g}
    made = import_fla("ops.kda.chunk_intra").chunk_kda_fwd_intra(
        q=q, k=k, gk=g, scale=scale, disable_recompute=True, **options
    )
    return form | dict(zip(("w", "u", "q", "k", "scores"), made, strict=False)) | {"gk": g}


def _kernels() -> Any:
    return importlib.import_module("linear_moe.modeling.ops.recurrences.delta.summary_triton")
