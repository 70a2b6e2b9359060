"""Trained memories by mini-batches: products within them, the recurrence of the weights between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.fast_weights.reference import with_one
from linear_moe.modeling.ops.packing import Chunks, on_device, segment_sums

States = tuple[Tensor, ...]


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    state: Tensor,
    gradient: Tensor | None,
    *,
    skip: int,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """See `linear_moe.modeling.ops.fast_weights.ttt`; `skip` is the first token's place in its mini-batch.

    The dual form (section 2.5): a mini-batch's gradients need only the weights it starts from, so weights advance by
    one product per mini-batch, and every token reads its start weights and, through q k^T, the gradients before it.
    """
    dtype, size = v.dtype, len(scale)
    chunks = Chunks(q, cu_seqlens, size, skip)
    w, b = (x.float().repeat(chunks.batch, 1)[:, None] for x in (weight, bias))  # [X, 1, D]
    q, k, v, rate = (chunks.split(x.float()) for x in (q, k, v, rate[..., None]))  # [N, X, C, ...]
    keys, queries, scale = with_one(k), with_one(q), scale.float()[:, None]
    rated, errors = rate * keys, w * (k + b - v)
    parts = zip(keys, queries, errors, (-scale[-1] * rated).mT.contiguous(), strict=True)
    square, earlier = w * w, None if gradient is None else gradient.flatten(0, 1)
    inner: list[Tensor] = []
    reads: list[Tensor] = []  # here and not of all at once, so that autograd keeps one copy of the weights

    def advance(n: int, state: Tensor) -> Tensor:
        key, query, error, step = next(parts)
        reads.append(query @ state)
        inner.append(_inner_gradient(key @ state, error, square, eps))
        if n == 0 and earlier is not None:
            state = state - scale[-1] * earlier
        return torch.baddbmm(state, step, inner[n])

    before, after = chunks.walk(advance, state)
    inners = torch.stack(inner)
    z = torch.stack(reads) - (scale * (queries @ rated.mT).tril()) @ inners
    if earlier is not None:
        z = torch.cat([z[:1] - scale * (queries[:1] @ earlier), z[1:]])
    o = q + F.layer_norm(z, z.shape[-1:], eps=eps) * w + b
    last, complete = _last_chunks(chunks, q.device)
    gradients = torch.stack([rated[n].mT @ inner[n] for n in last])
    if earlier is not None and chunks.count == 1:
        gradients = gradients + earlier
    final = torch.where(complete, after, torch.stack([before[n] for n in last]).view_as(after))
    return chunks.join(o).to(dtype), (final, gradients.view_as(after).masked_fill(complete, 0.0))


def _inner_gradient(z: Tensor, error: Tensor, square: Tensor, eps: float) -> Tensor:
    """`reference.inner_gradient` by LayerNorm's fused kernels: normalised z has the gradient weight^2 z + error."""
    normed, mean, inverse_std = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    slope = torch.addcmul(error, square, normed)
    return torch.ops.aten.native_layer_norm_backward(
        slope, z, z.shape[-1:], mean, inverse_std, None, None, [True, False, False]
    )[0]


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    keep: Tensor,
    momentum: Tensor,
    state: Tensor,
    surprise: Tensor,
    start: Tensor,
    *,
    skip: int,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """See `linear_moe.modeling.ops.fast_weights.titans`; `skip` is the first token's place in its chunk.

    Within a chunk all errors are of one memory M_c, so M and S are linear in M_c, S_c and the errors, with coefficients
    that are sums of products of gates (section 3.2): one scan carries M and S, stacked to `[2K, V]`, between chunks.
    """
    dtype, keys = v.dtype, q.shape[-1]
    chunks = Chunks(q, cu_seqlens, chunk_size, skip)
    q, k, v, rate = (chunks.split(x.float()) for x in (q, k, v, rate[..., None]))  # [N, X, C, ...]
    tokens = chunks.split(torch.ones_like(keep, dtype=torch.float32))[..., None, :]  # 0 in empty slots: they add no S
    keep, momentum = chunks.split(keep.float()), chunks.split(momentum.float())  # [N, X, C]
    kept, carried = segment_sums(keep).exp() * tokens, segment_sums(momentum).exp()  # of M, S of token j, in i >= j
    written = kept @ carried  # of what token j adds to S, in M of token i
    kept_start, carried_start = (x.cumsum(-1).exp()[..., None] for x in (keep, momentum))
    added_start = kept @ carried_start
    zero = torch.zeros_like(kept_start[..., -1, :])
    ends = [x[..., -1, :] for x in (kept_start, added_start, carried_start)]
    gates = torch.stack([ends[0], ends[1], zero, ends[2]], -1).unflatten(-1, (2, 2)).squeeze(-3)  # [N, X, 2, 2]
    downhill = -2 * rate * k
    steps = torch.cat([downhill * x[..., -1, :, None] for x in (written, carried)], -1).mT.contiguous()  # [N, X, 2K, C]
    queries = torch.cat([q * kept_start, q * added_start], -1)
    parts = zip(k, v, queries, gates, steps, strict=True)
    errors: list[Tensor] = []
    reads: list[Tensor] = []  # here and not of all at once, so that autograd keeps one copy of the states

    def advance(n: int, states: Tensor) -> Tensor:
        key, value, query, gate, step = next(parts)
        reads.append(query @ states)
        at = start.flatten(0, 1) if n == 0 and cu_seqlens is None else states[:, :keys]
        errors.append(torch.baddbmm(value, key, at, beta=-1))
        decayed = gate @ states.view(len(states), 2, -1)
        return torch.baddbmm(decayed.view_as(states), step, errors[n])

    before, after = chunks.walk(advance, torch.cat([state, surprise], 2))
    o = torch.stack(reads) + (written * (q @ downhill.mT)) @ torch.stack(errors)
    last, complete = _last_chunks(chunks, q.device)
    memory, surprise = after.split(keys, 2)
    begun = torch.stack([before[n][:, :keys] for n in last]).view_as(memory)
    if chunks.count == 1 and cu_seqlens is None:
        begun = start
    return chunks.join(o).to(dtype), (memory, surprise, torch.where(complete, memory, begun))


def _last_chunks(chunks: Chunks, device: torch.device) -> tuple[list[int], Tensor]:
    """Of every document (or of all rows): its last chunk's index, and whether that is full `[S, 1, 1, 1]`."""
    complete = on_device(torch.tensor(chunks.complete).view(-1, 1, 1, 1), device)
    return [max(end - 1, 0) for _, end in chunks.spans], complete
