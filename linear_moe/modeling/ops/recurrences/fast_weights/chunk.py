"""Trained memories by mini-batches: products within them, the recurrence of the weights between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.packing import Chunks, on_device, segment_sums
from linear_moe.modeling.ops.recurrences.fast_weights.reference import with_one
from linear_moe.modeling.ops.recurrences.fast_weights.walk import TTT, TitansState

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
    """See `recurrences.fast_weights.ttt`; `skip` is the first token's place in its mini-batch.

    This is the dual form (section 2.5). The gradients of a mini-batch need only the weights from which it starts, so
    the weights advance by one product per mini-batch. Every token reads the mini-batch's start weights and, through
    q k^T, the gradients of the tokens up to itself.
    """
    dtype, size = v.dtype, len(scale)
    chunks = Chunks(q, cu_seqlens, size, skip)
    w, b = (x.float().repeat(chunks.batch, 1)[:, None] for x in (weight, bias))  # [X, 1, D]
    q, k, v, rate = (chunks.split(x.float()) for x in (q, k, v, rate[..., None]))  # [N, X, C, ...]
    keys, queries, scale = with_one(k), with_one(q), scale.float()[:, None]
    rated, errors = rate * keys, w * (k + b - v)
    earlier = None if gradient is None else gradient.flatten(0, 1)
    starts = state.reshape(len(chunks.spans), -1, *state.shape[2:])
    change = None if earlier is None else -scale[-1] * earlier
    steps = (-scale[-1] * rated).mT.contiguous()
    before, inner, after = TTT.apply(keys, errors, steps, w * w, starts, change, chunks.spans, eps)
    z = queries @ before - (scale * (queries @ rated.mT).tril()) @ inner
    if earlier is not None:
        z = torch.cat([z[:1] - scale * (queries[:1] @ earlier), z[1:]])
    o = q + F.layer_norm(z, z.shape[-1:], eps=eps) * w + b
    last, complete = _last_chunks(chunks, q.device)
    gradients = (rated[last].mT @ inner[last]).view_as(state)
    if earlier is not None and chunks.count == 1:
        gradients = gradients + gradient
    final = torch.where(complete, after.view_as(state), before[last].view_as(state))
    return chunks.join(o).to(dtype), (final, gradients.masked_fill(complete, 0.0))


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
    """See `recurrences.fast_weights.titans`; `skip` is the first token's place in its chunk.

    Within a chunk all errors are those of one memory M_c, so M and S are linear in M_c, S_c and the errors, with
    coefficients that are sums of products of gates (section 3.2). One scan carries M and S, stacked to `[2K, V]`, from
    chunk to chunk.
    """
    dtype, keys = v.dtype, q.shape[-1]
    chunks = Chunks(q, cu_seqlens, chunk_size, skip)
    q, k, v, rate = (chunks.split(x.float()) for x in (q, k, v, rate[..., None]))  # [N, X, C, ...]
    # 0 in empty slots, in which S must not be added to M
    tokens = chunks.split(torch.ones_like(keep, dtype=torch.float32))[..., None, :]
    keep, momentum = chunks.split(keep.float()), chunks.split(momentum.float())  # [N, X, C]
    # at (i, j) with i >= j: the share at token i of an addition to M, and of an addition to S, at token j
    kept, carried = segment_sums(keep).exp() * tokens, segment_sums(momentum).exp()
    written = kept @ carried  # the share in M at token i of an addition to S at token j
    kept_start, carried_start = (x.cumsum(-1).exp()[..., None] for x in (keep, momentum))
    added_start = kept @ carried_start
    zero = torch.zeros_like(kept_start[..., -1, :])
    ends = [x[..., -1, :] for x in (kept_start, added_start, carried_start)]
    gates = torch.stack([ends[0], ends[1], zero, ends[2]], -1).unflatten(-1, (2, 2)).squeeze(-3)  # [N, X, 2, 2]
    downhill = -2 * rate * k
    steps = torch.cat([downhill * x[..., -1, :, None] for x in (written, carried)], -1).mT.contiguous()  # [N, X, 2K, C]
    queries = torch.cat([q * kept_start, q * added_start], -1)
    states = torch.cat([state, surprise], 2)
    starts = states.reshape(len(chunks.spans), -1, *states.shape[2:])
    at = start.flatten(0, 1) if cu_seqlens is None else None
    before, errors, after = TitansState.apply(k, v, gates, steps, starts, at, chunks.spans)
    o = queries @ before + (written * (q @ downhill.mT)) @ errors
    last, complete = _last_chunks(chunks, q.device)
    memory, surprise = after.view_as(states).split(keys, 2)
    begun = before[last][:, :, :keys].reshape(memory.shape)
    if chunks.count == 1 and cu_seqlens is None:
        begun = start
    return chunks.join(o).to(dtype), (memory, surprise, torch.where(complete, memory, begun))


def _last_chunks(chunks: Chunks, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the index `[S]` of each span's last chunk, and whether the chunk is full, `[S, 1, 1, 1]`.

    A span is a document, or all rows together.
    """
    complete = on_device(torch.tensor(chunks.complete).view(-1, 1, 1, 1), device)
    return on_device(torch.tensor([max(end - 1, 0) for _, end in chunks.spans]), device), complete
