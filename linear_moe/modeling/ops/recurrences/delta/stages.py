"""The delta rule without decay or with one per head, on CUDA, stopped between the WY form and the states.

What comes before pieces of sequences is known only once the WY form of all has been summarised, and what comes behind
them, in the backward pass, once the gradients of their writes have. In stages both are made once for the summary and
the op. The kernels are flash-linear-attention's, in the order of its `chunk_delta_rule` and `chunk_gated_delta_rule`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.backends import import_fla
from linear_moe.modeling.ops.recurrences.delta import summary_triton
from linear_moe.modeling.ops.recurrences.delta.fla import CHUNK
from linear_moe.modeling.ops.sequence import Pieces


class WY(NamedTuple):
    """Chunks of 64 tokens: what they read of a state, what they write to none, how these came about, log2-decays."""

    w: Tensor  # [B, T, H, K]
    u: Tensor  # [B, T, H, V]
    inverse: Tensor  # [B, T, H, 64]
    sums: Tensor | None  # [B, T, H] fp32, since the beginning of the chunk


class Backward:
    """What a backward pass begins with: the WY form once more, and the writes' gradients from outputs of their chunk.

    Made for the gradient of the initial state, which is sent while the op's own backward pass waits, and `take`n by it.
    """

    def __init__(self) -> None:
        self.made: tuple[Tensor, Tensor, Tensor] | None = None

    def make(self, wy: dict[str, Any], q: Tensor, d_o: Tensor, scale: float, packing: dict[str, Any]) -> None:
        """`wy`: k, v, beta, A, the inverse, and g, the sums or None."""
        k, gate = wy["k"], wy["g"]
        if gate is None:
            given = {name: x for name, x in wy.items() if name != "g"}
            w, u = import_fla("ops.delta_rule.wy_fast").recompute_w_u_fwd(**given, **packing)
        else:
            w, u = import_fla("ops.gated_delta_rule.wy_fast").recompute_w_u_fwd(**wy, **packing)
        local = import_fla("ops.common.chunk_o").chunk_bwd_dv_local
        self.made = w, u, local(q=q, k=k, do=d_o, g=gate, scale=scale, chunk_size=CHUNK, **packing)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.made is not None
        made, self.made = self.made, None
        return made


def through(
    pieces: Pieces,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `delta.summary.through`; q, k, g are `delta.gpu.prepared`, of K keys before that."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    with torch.cuda.device_of(v), torch.no_grad():
        packing = {"cu_seqlens": cu_seqlens, "chunk_indices": None}
        if cu_seqlens is not None:
            packing["chunk_indices"] = import_fla("ops.utils.index").prepare_chunk_indices(cu_seqlens, CHUNK)
        made = _wy(k, v, beta, g, packing)

    def summary(k: Tensor, w: Tensor, u: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(k):
            transition, state = summary_triton.scan(k, w, u, sums)
        return transition[:, :, :keys, :keys], state[:, :, :keys]

    def run(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        start = F.pad(initial_state, (0, 0, 0, k.shape[-1] - keys))
        o, final = _Rest.apply(q, k, v, beta, g, made, start, scale, packing, backward)
        return o, final[:, :, :keys]

    backward = Backward()
    # Of packed documents only each piece's first is asked for, cut off from the others.
    gradient = partial(_start_gradient, keys, scale, None if pieces.packed else backward)
    return pieces.through(
        run, (summary, k, made.w, made.u, made.sums), (gradient, q, k, v, beta, made.inverse, made.sums), matrix=True
    )


def _wy(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, packing: dict[str, Any]) -> WY:
    if g is None:
        w, u, inverse = import_fla("ops.delta_rule.wy_fast").prepare_wy_repr_fwd(k=k, v=v, beta=beta, **packing)
        return WY(w, u, inverse, None)
    log2 = import_fla("ops.utils.constant").RCP_LN2
    sums = import_fla("ops.utils").chunk_local_cumsum(g.contiguous(), chunk_size=CHUNK, scale=log2, **packing)
    intra = import_fla("ops.gated_delta_rule.chunk_fwd").chunk_gated_delta_rule_fwd_intra
    w, u, inverse = intra(k=k, v=v, g=sums, beta=beta, chunk_size=CHUNK, **packing)
    return WY(w, u, inverse, sums)


def _start_gradient(
    keys: int,
    scale: float,
    shared: Backward | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    sums: Tensor | None,
    d_o: Tensor,
) -> Tensor:
    q, k, v, beta, inverse, d_o = (x.contiguous() for x in (q, k, v, beta, inverse, d_o))
    backward = shared or Backward()
    with torch.cuda.device_of(v):
        wy = {"k": k, "v": v, "beta": beta, "A": inverse, "g": sums}
        backward.make(wy, q, d_o, scale, {"cu_seqlens": None})
        assert backward.made is not None
        w, _, dv = backward.made
        _, start = summary_triton.scan(k, w, dv, sums, q=q, do=d_o, scale=scale, backwards=True)
    return start[:, :, :keys]


class _Rest(Function):
    """From the WY form on: states and outputs. Its backward pass is the whole op's."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        made: WY,
        initial_state: Tensor,
        scale: float,
        packing: dict[str, Any],
        backward: Backward,
    ) -> tuple[Tensor, Tensor]:
        common: dict[str, Any] = {"k": k, "g": made.sums, "chunk_size": CHUNK, **packing}
        with torch.cuda.device_of(v):
            h, writes, final = import_fla("ops.common.chunk_delta_h").chunk_gated_delta_rule_fwd_h(
                w=made.w, u=made.u, initial_state=initial_state, output_final_state=True, **common
            )
            o = import_fla("ops.common.chunk_o").chunk_fwd_o(q=q, v=writes, h=h, scale=scale, **common)
        ctx.save_for_backward(q, k, v, beta, g, made.inverse, made.sums, initial_state)
        ctx.scale, ctx.packing, ctx.begun = scale, packing, backward
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, inverse, sums, initial_state = ctx.saved_tensors
        d_o, wy = d_o.contiguous(), {"k": k, "v": v, "beta": beta, "A": inverse, "g": sums}
        options: dict[str, Any] = {"k": k, "g": sums, "chunk_size": CHUNK, **ctx.packing}
        reads: dict[str, Any] = {"q": q, "do": d_o, "scale": ctx.scale}
        states = import_fla("ops.common.chunk_delta_h")
        with torch.cuda.device_of(v):
            if ctx.begun.made is None:
                ctx.begun.make(wy, q, d_o, ctx.scale, ctx.packing)
            w, u, dv = ctx.begun.take()
            h, writes, _ = states.chunk_gated_delta_rule_fwd_h(
                w=w, u=u, initial_state=initial_state, output_final_state=False, **options
            )
            dh, _, du = states.chunk_gated_delta_rule_bwd_dhu(
                w=w, dv=dv, h0=initial_state, dht=d_final.contiguous(), **reads, **options
            )
            dq, dk, dw, dg = import_fla("ops.common.chunk_o").chunk_bwd_dqkwg(
                v=writes, w=w, h=h, dv=du, dh=dh, **reads, **options
            )
            wy |= {"dw": dw, "du": du, **ctx.packing}
            if g is None:
                del wy["g"]
                more, dv, dbeta = import_fla("ops.delta_rule.wy_fast").prepare_wy_repr_bwd(**wy)
                dg = None
            else:
                more, dv, dbeta, dg_more = import_fla("ops.gated_delta_rule.wy_fast").prepare_wy_repr_bwd(**wy)
                sums_of = import_fla("ops.utils").chunk_local_cumsum
                dg = sums_of(dg.add_(dg_more), chunk_size=CHUNK, reverse=True, **ctx.packing).to(g.dtype)
            dk.add_(more)
        gradients = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype), dg
        return *gradients, None, None, None, None, None
