"""The decay family with complex decays: a magnitude and an angle per key channel and token (GateLoop)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, requested
from linear_moe.modeling.ops.packing import Chunks, by_token, separately
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.pairwise import pairwise

SEGMENT = 64  # tokens of a segment, with the kernels
MAX_ROWS = 2**15  # segments in one call of the kernels, whose grids have at most 65,535 programs along an axis


def complex_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    theta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence with complex decays (GateLoop, arXiv 2311.01927).

    S_t = diag(exp(g_t + i theta_t)) S_{t-1} + k_t v_t^T,  o_t = Re(S_t^T q_t).

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H, K]` log-decay, at most 0.
        theta: `[B, T, H, K]` angles.
        initial_state: `[N, H, 2K, V]` fp32, real parts before imaginary ones; zeros unless given.
        cu_seqlens, backend: as for `recurrences.decay.decay`; decoding updates `initial_state` in place too.

    Returns:
        `o [B, T, H, V]` in v's dtype and the final state `[N, H, 2K, V]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    shape = tuple(q.shape)
    check_inputs(q, k, v, {"g": (g, (shape,)), "theta": (theta, (shape,))}, None, cu_seqlens)
    state_shape = (len(q) if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[2], 2 * q.shape[3], v.shape[3])
    state = q.new_zeros(state_shape, dtype=torch.float32) if initial_state is None else initial_state
    if tuple(state.shape) != state_shape or state.dtype != torch.float32:
        raise ValueError(f"initial_state must be float32 {state_shape}, got {state.dtype} {tuple(state.shape)}")
    backend = requested(backend)
    if backend == "auto" and decodes(q.shape[1], initial_state, cu_seqlens):
        return step(q, k, v, g, theta, state=state)
    implementation = choose(backend, IMPLEMENTATIONS, v, None)
    if (pieces := sequence.current(initial_state)) is not None:
        before = pieces.states(_summary, k, v, g, theta)
        state = torch.cat([before.real, before.imag], dim=2)
    with sequence.pieces_of(None):  # implementations call `decay` on segments, as on whole sequences
        return implementation(q, k, v, g, theta, initial_state=state, cu_seqlens=cu_seqlens)


def _summary(k: Tensor, v: Tensor, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the summary (see `ops.sequence.Summary`): complex transition `[N, H, K, 1]` and state `[N, H, K, V]`."""
    left, kept = sequence.remaining(g)
    sums = theta.double().flip(1).cumsum(1).flip(1).remainder(2 * math.pi).float()  # unbounded angles
    after = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], 1)
    k = k.float() * left
    turned = torch.complex(k * after.cos(), k * after.sin())  # the gradient of `polar` assumes k >= 0
    state = torch.einsum("nthk,nthv->nhkv", turned, v.to(turned.dtype))
    return torch.polar(kept, sums[:, 0])[..., None], state


@torch.no_grad()
def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, theta: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, 2K, V]` (fp32) IN PLACE by one token; inputs as `complex_decay` with T = 1."""
    q, k, value, g, theta = (x[:, 0, :, :].float() for x in (q, k, v, g, theta))
    real, imaginary = state.chunk(2, dim=2)
    a = torch.polar(g.exp(), theta)[..., None]
    turned = a * torch.complex(real, imaginary)
    real.copy_(turned.real).addcmul_(k[..., None], value[..., None, :])
    imaginary.copy_(turned.imag)
    return torch.einsum("bhk,bhkv->bhv", q, real).unsqueeze(1).to(v.dtype), state


def _reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, theta: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in fp32."""

    def tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        real, imaginary = state.chunk(2, dim=2)
        for q_t, k_t, v_t, g_t, theta_t in by_token(q, k, v, g, theta):
            decay = g_t[..., None].exp()
            cos, sin = decay * theta_t[..., None].cos(), decay * theta_t[..., None].sin()
            update = k_t[..., None] * v_t[..., None, :]
            real, imaginary = cos * real - sin * imaginary + update, sin * real + cos * imaginary
            outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, real))
        return torch.stack(outputs, dim=1), torch.cat([real, imaginary], dim=2)

    inputs = [x.float() for x in (q, k, v, g, theta)]
    if cu_seqlens is None:
        o, state = tokens(initial_state, *inputs)
    else:
        o, state = separately(tokens, inputs, initial_state, cu_seqlens)
    return o.to(v.dtype), state


def _segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    theta: Tensor,
    *,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence with real decays within short segments and complex decays between segments.

    Within a segment the angles are moved into q and k: with the angles' running sums phi, Re(exp(i (phi_i - phi_j))) is
    cos phi_i cos phi_j + sin phi_i sin phi_j. The whole sequence could be one segment, but then the gradient of an
    angle would be a sum over all later tokens of terms that cancel, with all of their rounding errors.

    With the kernels only the inputs are saved for the backward pass, which computes the intermediate tensors again:
    they are many times as large as the inputs.

    Args:
        size: tokens of a segment; None: a size that is fast in PyTorch.
    """
    inputs = (q, k, v, g, theta, initial_state, cu_seqlens, backend, size)
    if torch.is_grad_enabled() and backend == "gpu":
        return checkpoint(_forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    return _forward(*inputs)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    theta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """See `_segments`."""
    chunks, dtype = Chunks(q, cu_seqlens, size), v.dtype
    q, k, v, g, theta = (chunks.split(x) for x in (q, k, v, g.float(), theta.float()))  # [N, B*H, C, D]
    # fp64, because angles are not bounded and only the remainder of whole turns matters
    phi = theta.double().cumsum(-2).remainder(2 * math.pi).float()
    cos, sin = phi.cos(), phi.sin()
    rotated_q, rotated_k = (torch.cat([x * cos, x * sin], dim=-1) for x in (q, k))
    gates = torch.cat([g, g], dim=-1)
    if backend == "chunk":
        v = v.float()
        [[scores]], [reads], [ends], kept = pairwise([rotated_q], [rotated_k], gates)
        o, local, kept = scores @ v, ends.mT @ v, kept.chunk(2, dim=2)[0]
    else:
        # v in fp32, and so all products: a rotation of all queries and keys of a segment by one angle changes nothing,
        # so sums of the angles' gradients cancel, and in bf16 mostly rounding errors would be left
        inputs = (rotated_q, rotated_k, v.float(), gates)
        parts = zip(*(x.flatten(0, 1).unsqueeze(2).split(MAX_ROWS) for x in inputs), strict=True)
        results = zip(*(decay(*part, scale=1.0, backend=backend) for part in parts), strict=True)
        o, local = (x[0] if len(x) == 1 else torch.cat(x) for x in results)
        kept = g.cumsum(-2).exp()
        reads, kept = torch.cat([q * kept * cos, q * kept * sin], dim=-1), kept[..., -1, :, None]
    # the state that a segment adds: sums of k v^T at angles -phi, rotated to the segment's end
    cosines, sines = local.view(*v.shape[:2], 2, -1, v.shape[-1]).unbind(2)
    end = torch.complex(cos[..., -1, :], sin[..., -1, :])[..., None]
    start = torch.complex(*initial_state.chunk(2, dim=2))
    before, final = chunks.carry(torch.complex(cosines, -sines) * end, kept * end, start)
    o = o.view_as(v) + reads @ torch.cat([before.real, -before.imag], dim=-2)
    return chunks.join(o).to(dtype), torch.cat([final.real, final.imag], dim=2)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": _reference,
    "chunk": partial(_segments, backend="chunk", size=None),
    "gpu": partial(_segments, backend="gpu", size=SEGMENT),
}
