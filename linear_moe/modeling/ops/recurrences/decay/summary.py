"""Summaries of pieces for the decay family, and gradients of their initial states, in closed form.

Each of the two is a sum over tokens of outer products: of keys and values, decayed until the end of the piece, and of
queries and the outputs' gradients, decayed from its beginning. On CUDA, Triton kernels sum in one pass over the inputs.
"""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_moe.modeling.ops.kernels import has_triton
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.ops.sequence import remaining


def summary(k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the `Summary` of inputs of `decay`: transition `[N, H, K or 1, V or 1]`, state `[N, H, K, V]`, fp32."""
    if on_kernel(v):
        return _kernel(k, v, g, gv, backwards=False, before_gate=False)
    return _closed_form(k, v, g, gv)


def differentiable(k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes `summary` with gradients, for `Pieces.states`.

    Only the inputs are kept for the backward pass: the decayed fp32 tensors are much larger.
    """
    if not torch.is_grad_enabled():
        return summary(k, v, g, gv)
    result: tuple[Tensor, Tensor] = checkpoint(_closed_form, k, v, g, gv, use_reentrant=False, preserve_rng_state=False)
    return result


def _closed_form(k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = k.float(), v.float()
    transition = k.new_ones(k.shape[0], k.shape[2], 1, 1)
    if g is not None:
        left, kept = remaining(_by_channel(g, k))
        k, transition = k * left, transition * kept[..., None]
    if gv is not None:
        left, kept = remaining(gv)
        v, transition = v * left, transition * kept[..., None, :]
    return transition, torch.einsum("nthk,nthv->nhkv", k, v)


def gradient(
    scale: float,
    before_gate: bool,
    q: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    d_o: Tensor,
) -> Tensor:
    """Computes the `Gradient` of the initial state, `[N, H, K, V]` fp32, from that of the outputs, `d_o [N, T, H, V]`.

    Args:
        before_gate: whether outputs read the state before their own token's gates, as with a bonus.
    """
    if on_kernel(d_o):
        return _kernel(q, d_o, g, gv, backwards=True, before_gate=before_gate)[1] * scale
    from_start = partial(_from_start, before_gate=before_gate)
    q = q.float() if g is None else q.float() * from_start(_by_channel(g, q))
    d_o = d_o.float() if gv is None else d_o.float() * from_start(gv)
    return torch.einsum("nthk,nthv->nhkv", q, d_o) * scale


def on_kernel(v: Tensor) -> bool:
    """Whether the Triton kernels sum, by the rule of `choose` for "auto": for 16-bit tensors on CUDA."""
    return v.is_cuda and v.element_size() == 2 and has_triton()


def _kernel(
    k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, *, backwards: bool, before_gate: bool
) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("linear_moe.modeling.ops.recurrences.decay.summary_triton")
    g = g.expand(k.shape[:3]) if g is not None and g.ndim == 1 else g
    with torch.cuda.device_of(v):
        total, state = kernels.weighted_sum(k, v, g, gv, floor=MIN_GATE, backwards=backwards, exclusive=before_gate)
    return total, state


def _by_channel(g: Tensor, k: Tensor) -> Tensor:
    """Expands g, of any form, to `[B, T, H, K]` or `[B, T, H, 1]`."""
    return g if g.ndim == 4 else g.expand(k.shape[:3])[..., None]


def _from_start(g: Tensor, before_gate: bool) -> Tensor:
    """Returns the factors `[N, T, ...]` by which the log-decays g shrink a state from before the rows to each token."""
    sums = g.float().cumsum(1)
    if before_gate:
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    return sums.exp()
