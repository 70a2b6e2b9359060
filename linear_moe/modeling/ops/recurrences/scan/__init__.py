"""Recurrences of single channels, without keys or values: HGRN's, Mamba's and the diagonal S4's.

Their states are `[N, D]`, `[N, D, S]` and, complex as real and imaginary parts, `[N, D, S, 2]`. N is B, or the number
of packed documents (`cu_seqlens`: int64 offsets, B = 1; documents may be empty).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_cu_seqlens, choose, decodes, requested
from linear_moe.modeling.ops.recurrences.scan import chunk, reference, summary, triton
from linear_moe.modeling.ops.recurrences.scan.decode import diagonal_step, linear_step, selective_step

__all__ = [
    "IMPLEMENTATIONS",
    "diagonal_scan",
    "diagonal_step",
    "linear_scan",
    "linear_step",
    "selective_scan",
    "selective_step",
]

IMPLEMENTATIONS = {"reference": reference, "chunk": chunk, "gpu": triton}


def linear_scan(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence h_t = exp(g_t) h_{t-1} + x_t, element by element (HGRN, arXiv 2311.04823).

    Args:
        x: `[B, T, D]`.
        g: `[B, T, D]` log-decay, at most 0 (minus infinity forgets everything).
        initial_state: `[N, D]` fp32, zeros unless given.
        cu_seqlens, backend: as for `recurrences.decay.decay`, except that "gpu" is Triton kernels of our own; decoding
            updates `initial_state` in place too.

    Returns:
        `h [B, T, D]` in x's dtype and the final state `[N, D]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without Triton.
    """
    state = _check({"x": x, "g": g}, {"g": tuple(x.shape)}, (), initial_state, cu_seqlens)
    backend = requested(backend)
    if backend == "auto" and decodes(x.shape[1], initial_state, cu_seqlens):
        return linear_step(x, g, state=state)
    implementations = {name: module.linear_scan for name, module in IMPLEMENTATIONS.items()}
    implementation = choose(backend, implementations, x, None)
    if (pieces := sequence.current(initial_state)) is not None:
        return summary.linear(pieces, implementation, x, g, cu_seqlens)
    return implementation(x, g, initial_state=initial_state, cu_seqlens=cu_seqlens)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the selective state space model of Mamba (arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t for each channel.

    Args:
        u: `[batch, T, D]`.
        dt: `[batch, T, D]` step sizes, at least 0.
        A: `[D, S]` fp32, at most 0.
        B, C: `[batch, T, S]`, the same for all channels.
        initial_state: `[N, D, S]` fp32, zeros unless given.
        cu_seqlens, backend: as for `recurrences.decay.decay`, except that "gpu" is Triton kernels of our own; decoding
            updates `initial_state` in place too.

    Returns:
        `y [batch, T, D]` in u's dtype and the final state `[N, D, S]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without Triton.
    """
    inner = (*u.shape[:2], A.shape[-1])
    shapes = {"dt": tuple(u.shape), "B": inner, "C": inner, "A": (u.shape[-1], A.shape[-1])}
    state = _check({"u": u, "dt": dt, "A": A, "B": B, "C": C}, shapes, A.shape[-1:], initial_state, cu_seqlens)
    backend = requested(backend)
    if backend == "auto" and decodes(u.shape[1], initial_state, cu_seqlens):
        return selective_step(u, dt, A, B, C, state=state)
    implementations = {name: module.selective_scan for name, module in IMPLEMENTATIONS.items()}
    implementation = choose(backend, implementations, u, None)
    if (pieces := sequence.current(initial_state)) is not None:
        return summary.selective(pieces, implementation, u, dt, A, B, C, cu_seqlens)
    return implementation(u, dt, A, B, C, initial_state=state, cu_seqlens=cu_seqlens)


def diagonal_scan(
    u: Tensor,
    log_a: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a diagonal state space model with S complex states for each channel (S4D, arXiv 2206.11893).

    h_t = exp(log_a) h_{t-1} + u_t,  y_t = Re(c h_t).

    Args:
        u: `[B, T, D]`.
        log_a: `[D, S, 2]` fp32: log-decay, at most 0, and angle.
        c: `[D, S, 2]` fp32: real and imaginary part.
        initial_state: `[N, D, S, 2]` fp32, zeros unless given.
        cu_seqlens, backend: as for `recurrences.decay.decay`; decoding updates `initial_state` in place too.

    Returns:
        `y [B, T, D]` in u's dtype and the final state `[N, D, S, 2]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit.
    """
    shape = (u.shape[-1], *log_a.shape[1:])
    state = _check({"u": u, "log_a": log_a, "c": c}, {"log_a": shape, "c": shape}, shape[1:], initial_state, cu_seqlens)
    backend = requested(backend)
    if backend == "auto" and decodes(u.shape[1], initial_state, cu_seqlens):
        return diagonal_step(u, log_a, c, state=state)
    implementations = {name: module.diagonal_scan for name, module in IMPLEMENTATIONS.items()}
    implementation = choose(backend, implementations, u, None)
    if (pieces := sequence.current(initial_state)) is not None:

        def summarised(u: Tensor) -> tuple[Tensor, Tensor]:
            start = log_a.new_zeros(len(u), *log_a.shape)
            _, final = implementation(u, log_a, c, initial_state=start, cu_seqlens=None)
            g, theta = (log_a.double() * u.shape[1]).unbind(-1)  # fp64, for the angles of many tokens
            kept = torch.polar(g.exp(), theta).to(torch.complex64).expand(len(u), -1, -1)
            return kept, torch.view_as_complex(final.contiguous())

        state = torch.view_as_real(pieces.states(summarised, u))
    return implementation(u, log_a, c, initial_state=state, cu_seqlens=cu_seqlens)


def _check(
    inputs: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    state_size: tuple[int, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Raises ValueError for inputs that do not fit; returns the initial state, or zeros if it is None.

    Args:
        inputs: tensors by name, the first of them `[B, T, D]`.
        shapes: shapes that the other inputs must have, by name.
        state_size: dimensions of a state behind `[N, D]`.
    """
    name, first = next(iter(inputs.items()))
    if first.ndim != 3 or first.shape[1] == 0:
        raise ValueError(f"{name} must be [B, T, D] with T at least 1, got {tuple(first.shape)}")
    for name, x in inputs.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if name in shapes and tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(x.shape)}")
    sequences = first.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, *first.shape[:2])
        sequences = len(cu_seqlens) - 1
    shape = (sequences, first.shape[-1], *state_size)
    if initial_state is None:
        return first.new_zeros(shape, dtype=torch.float32)
    if tuple(initial_state.shape) != shape or initial_state.dtype != torch.float32:
        raise ValueError(
            f"initial_state must be float32 {shape}, got {initial_state.dtype} {tuple(initial_state.shape)}"
        )
    return initial_state
