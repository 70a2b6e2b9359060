"""The delta rule on CUDA, without decay or with a decay per head, in two stages: the WY form, then states and outputs.

The initial states of pieces are known only after the WY forms of all pieces have been summarised. In the backward pass,
the gradients of their final states are known only after the gradients of all pieces' writes have been summarised. With
two stages, the summary and the op share the WY form, and likewise the gradients of the writes. The kernels are
flash-linear-attention's, in the order of its `chunk_delta_rule` and `chunk_gated_delta_rule`.
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
    """The WY form of chunks of 64 tokens: from the state S before its chunk, a token writes u - w S."""

    w: Tensor  # [B, T, H, K]
    u: Tensor  # [B, T, H, V]
    inverse: Tensor  # [B, T, H, 64], the inverted matrix that gave w and u
    sums: Tensor | None  # [B, T, H] fp32, log2-decays since the beginning of the chunk


class Backward:
    """The first stage of a backward pass: w and u again, and the gradients of writes from outputs of their own chunk.

    The stage is computed for the gradient of the initial state, which is sent to other ranks while the op's own
    backward pass waits; this pass then takes the result.
    """

    def __init__(self) -> None:
        self.made: tuple[Tensor, Tensor, Tensor] | None = None

    def make(self, wy: dict[str, Any], q: Tensor, d_o: Tensor, scale: float, packing: dict[str, Any]) -> None:
        """Computes the stage.

        Args:
            wy: k, v, beta, the inverse as "A", and the sums of log2-decays (or None) as "g".
            q, d_o, scale: queries, gradient of the outputs, and factor of the scores.
            packing: offsets of packed documents, as keyword arguments of the kernels.
        """
        k, gate = wy["k"], wy["g"]
        if gate is None:
            given = {name: x for name, x in wy.items() if name != "g"}
            w, u = import_fla("ops.delta_rule.wy_fast").recompute_w_u_fwd(**given, **packing)
        else:
            w, u = import_fla("ops.gated_delta_rule.wy_fast").recompute_w_u_fwd(**wy, **packing)
        local = import_fla("ops.common.chunk_o").chunk_bwd_dv_local
        self.made = w, u, local(q=q, k=k, do=d_o, g=gate, scale=scale, chunk_size=CHUNK, **packing)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns w, u and the gradients of the writes from `make`, and releases them."""
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
    """Runs the op on pieces of sequences, in stages: see `delta.summary.through`.

    Args:
        q, k, g: as `delta.fla.prepared` returns them.
        v, beta, scale, cu_seqlens: as for `delta`.
        keys: number K of key channels before `prepared` padded them.
    """
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
    # With packed documents the gradient is asked for only of each piece's first one, so the op cannot share the stage.
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
    """The second stage, from the WY form to states and outputs; its backward pass is that of the whole op."""

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
                dk_wy, dv, dbeta = import_fla("ops.delta_rule.wy_fast").prepare_wy_repr_bwd(**wy)
                dg = None
            else:
                dk_wy, dv, dbeta, dg_wy = import_fla("ops.gated_delta_rule.wy_fast").prepare_wy_repr_bwd(**wy)
                sums_of = import_fla("ops.utils").chunk_local_cumsum
                dg = sums_of(dg.add_(dg_wy), chunk_size=CHUNK, reverse=True, **ctx.packing).to(g.dtype)
            dk.add_(dk_wy)
        gradients = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype), dg
        return *gradients, None, None, None, None, None
