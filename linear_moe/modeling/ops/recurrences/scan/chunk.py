"""The scans in PyTorch on any device: many chunks of tokens at once, then the states from chunk to chunk."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.kernels import stood_in
from linear_moe.modeling.ops.packing import Chunks, on_device


def restart(x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns `x, g` for which one scan of the whole row from zero equals a scan of every document by itself.

    A document's first token gets a gate that forgets everything before, and its input includes the (decayed) initial
    state of the document. The function does not wait for the device.
    """
    if cu_seqlens is None:
        if initial_state is None:
            return x, g
        first = x[:, :1] + g[:, :1].exp() * initial_state.unsqueeze(1)
        return torch.cat([first, x[:, 1:]], dim=1), g
    length = x.shape[1]
    if initial_state is not None:
        starts = cu_seqlens[:-1].clamp(max=length - 1)  # an empty last document begins at T
        inherited = g[0].index_select(0, starts).exp() * initial_state
        inherited = inherited.where(cu_seqlens.diff()[:, None] > 0, inherited.new_zeros(()))
        x = x.index_add(1, starts, inherited.unsqueeze(0))
    inside = torch.ones(length + 1, dtype=torch.bool, device=x.device).index_fill(0, cu_seqlens, False)[:-1]
    return x, g.masked_fill(~inside[:, None], float("-inf"))


def last(h: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Returns `h [B, T, D]` at each document's last token, and the initial state of empty documents: `[N, D]`."""
    if cu_seqlens is None:
        return h[:, -1]
    ends = h[0].index_select(0, (cu_seqlens[1:] - 1).clamp(min=0))
    return ends.where(cu_seqlens.diff()[:, None] > 0, h.new_zeros(()) if initial_state is None else initial_state)


class _Scan(Function):
    """The scan h_t = a_t h_{t-1} + x_t from zero; `a, x [B, T, D]` fp32, 0 <= a <= 1."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = _scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        dx = _scan(F.pad(a[:, 1:], (0, 0, 0, 1)), dh, backwards=True)
        return dx * F.pad(h[:, :-1], (0, 0, 1, 0)), dx


def _scan(a: Tensor, x: Tensor, backwards: bool = False) -> Tensor:
    """Scans about sqrt(T) chunks of sqrt(T) tokens: token by token in all chunks at once, then chunk by chunk."""
    batch, length, dim = x.shape
    size = 1 << math.isqrt(length - 1).bit_length()
    count = -(-length // size)
    kept, h = x.new_zeros(2, batch, count * size, dim)  # kept: the product of a from the chunk's start
    kept[:, :length], h[:, :length] = a, x
    kept, h = (t.view(batch, count, size, dim) for t in (kept, h))
    step = -1 if backwards else 1
    for i in range(size)[::step][1:]:
        h[:, :, i].addcmul_(kept[:, :, i], h[:, :, i - step])
        kept[:, :, i].mul_(kept[:, :, i - step])
    end = 0 if backwards else size - 1
    for n in range(count)[::step][1:]:
        h[:, n].addcmul_(kept[:, n], h[:, n - step, end, None])
    return h.view(batch, count * size, dim)[:, :length]


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.linear_scan`."""
    inputs, gates = restart(x.float(), g.float(), initial_state, cu_seqlens)
    h = _Scan.apply(gates.exp(), inputs)
    return h.to(x.dtype), last(h, initial_state, cu_seqlens)


BLOCK = 32  # tokens whose states selective_scan holds at a time; the states between blocks are saved


def _spans(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Returns (document, first token, end) of every block, in order."""
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [
        (n, t, min(t + BLOCK, end))
        for n, (start, end) in enumerate(pairwise(offsets))
        for t in range(start, end, BLOCK)
    ]


def _block(dt: Tensor, A: Tensor, du: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the decays and the states of one block, `[t, b, S, D]` each.

    Args:
        dt, du: `[t, b, D]`; du is dt times u.
        A: `[S, D]`; B: `[t, b, S]`.
        state: `[b, S, D]`, the state before the block.
    """
    decays = (dt[..., None, :] * A).exp_()
    states = B[..., None] * du[..., None, :]
    for now, decay in zip(states.unbind(), decays.unbind(), strict=True):
        state = now.addcmul_(decay, state)
    return decays, states


class _SelectiveScan(Function):
    """The autograd function of `selective_scan`, in fp32, with time first and channels last.

    The inputs are `u, dt [T, b, D]`, `A [S, D]`, `B, C [T, b, S]` and states `[N, S, D]`; the batch b is N, or 1 with
    packed documents. Only the states between blocks are saved; the backward pass computes the states within blocks
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        spans, final, y = _spans(len(u), cu), initial_state.clone(), torch.empty_like(u)
        before, du = initial_state.new_empty(len(spans), u.shape[1], *A.shape), dt * u
        for i, (n, start, end) in enumerate(spans):
            current, t = final if cu is None else final[n : n + 1], slice(start, end)
            before[i] = current
            _, states = _block(dt[t], A, du[t], B[t], before[i])
            y[t] = (C[t, :, None, :] @ states).squeeze(-2)
            current.copy_(states[-1])
        ctx.save_for_backward(u, dt, A, B, C, before)
        ctx.spans, ctx.packed = spans, cu is not None
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, before = ctx.saved_tensors
        grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(x) for x in (u, dt, B, C))
        grad_A, grad_state, du = torch.zeros_like(A), dfinal.clone(), dt * u
        for i in range(len(ctx.spans) - 1, -1, -1):
            n, start, end = ctx.spans[i]
            carried, t = grad_state[n : n + 1] if ctx.packed else grad_state, slice(start, end)
            decays, states = _block(dt[t], A, du[t], B[t], before[i])
            grad_C[t] = (dy[t, :, None, :] @ states.mT).squeeze(-2)
            dh = C[t, ..., None] * dy[t, :, None, :]
            dh[-1] += carried
            by_token, factors = dh.unbind(), decays.unbind()
            for j in range(len(dh) - 1, 0, -1):
                by_token[j - 1].addcmul_(factors[j], by_token[j])
            torch.mul(decays[0], dh[0], out=carried)
            grad_B[t] = (du[t, :, None, :] @ dh.mT).squeeze(-2)
            grad_du = (B[t, :, None, :] @ dh).squeeze(-2)
            exponent = decays.mul_(dh)  # the gradient of dt A: decay x state before x gradient of the state
            exponent[0] *= before[i]
            exponent[1:] *= states[:-1]
            grad_u[t] = grad_du * dt[t]
            grad_dt[t] = (exponent * A).sum(-2).addcmul_(grad_du, u[t])
            grad_A += (exponent * dt[t, :, None, :]).sum((0, 1))
        return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_state, None


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.selective_scan`."""
    by_time = [x.float().transpose(0, 1).contiguous() for x in (u, dt, B, C)]
    # channels last, so that factors which all channels share multiply whole rows
    start = initial_state.mT.contiguous()
    y, state = _SelectiveScan.apply(*by_time[:2], A.mT.contiguous(), *by_time[2:], start, cu_seqlens)
    return y.transpose(0, 1).to(u.dtype), state.mT.contiguous()


def diagonal_scan(
    u: Tensor, log_a: Tensor, c: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.diagonal_scan`. A convolution computes the outputs of a chunk, from the state before it."""
    # a GPU is faster with few steps from chunk to chunk than with little work within chunks
    tokens_at_once = 128 if (u.is_cuda or stood_in()) and cu_seqlens is None else None
    chunks, (batch, _, dim) = Chunks(u.unsqueeze(-1), cu_seqlens, tokens_at_once), u.shape
    size, count = chunks.size, chunks.count
    # fp64, because an angle times a number of tokens is large and only the remainder of whole turns matters
    exponents = torch.view_as_complex(log_a.double())[..., None] * torch.arange(size + 1, device=u.device)
    powers = exponents.exp().to(torch.complex64)  # [D, S, C + 1]
    weights = torch.view_as_complex(c.contiguous())[..., None]
    kernel = (weights * powers[..., :size]).real.sum(1)  # [D, C]: effect of an input on outputs from its token on
    toeplitz = F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-1)  # [D, C, C]: at (i, j) kernel[i - j]
    to_end = torch.view_as_real(powers[..., :size].flip(-1)).transpose(1, 2).flatten(2)  # [D, C, S*2]
    read = torch.view_as_real((weights * powers[..., 1:]).conj().resolve_conj()).permute(0, 1, 3, 2)  # re(w p s)

    x = chunks.split(u.float().unsqueeze(-1)).view(count, batch, dim, size)
    lengths = _lengths(chunks, u.shape[1], cu_seqlens)
    # `to_end` expects a chunk's last token in the last slot: the last chunk of a document is rolled to the right
    places = on_device(torch.arange(size).sub((size - lengths)[:, None]).remainder(size), u.device)
    ended = x.gather(-1, places[:, None, None].expand_as(x))
    sums = (ended.movedim(2, 0).flatten(1, 2) @ to_end).view(dim, count, batch, -1, 2).movedim(0, 2)
    updates = torch.view_as_complex(sums.contiguous()).flatten(1, 2)  # [N, B*D, S]
    across = torch.stack([powers[..., n] for n in lengths.tolist()]).repeat(1, batch, 1)
    before, final = chunks.carry(updates, across, torch.view_as_complex(initial_state.contiguous()))
    states = torch.view_as_real(before).view(count, batch, dim, -1).movedim(2, 0).flatten(1, 2)  # [D, N*B, S*2]
    y = x.movedim(2, 0).flatten(1, 2) @ toeplitz.mT + states @ read.flatten(1, 2)
    y = y.view(dim, count, batch, size).movedim(0, 2).reshape(count, batch * dim, size, 1)
    return chunks.join(y).squeeze(-1).to(u.dtype), torch.view_as_real(final)


def _lengths(chunks: Chunks, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the number of tokens in each chunk, `[N]`, on the CPU."""
    documents = [length] if cu_seqlens is None else cu_seqlens.diff().tolist()
    lengths = torch.full((chunks.count,), chunks.size)
    for tokens, (first, end) in zip(documents, chunks.spans, strict=True):
        if tokens:
            lengths[end - 1] = tokens - (end - 1 - first) * chunks.size
    return lengths
