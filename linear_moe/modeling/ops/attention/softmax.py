"""Causal softmax attention with grouped query heads: packed documents, sliding window, key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import requested
from linear_moe.modeling.ops.kernels import stand_in, stood_in


def visible(
    length: int,
    keys: int,
    device: torch.device,
    *,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns the mask `[1 or B, T, S]` (bool) of the keys that each query sees.

    A query sees the keys of its document that are not later than itself and within `window` (arguments as for
    `softmax_attention`).
    """
    slots = torch.arange(keys, device=device)
    at = slots[:length].unsqueeze(0) if positions is None else positions
    mask = slots <= at.unsqueeze(-1)
    if window is not None:
        mask = mask & (slots > at.unsqueeze(-1) - window)
    if cu_seqlens is not None:
        document = torch.bucketize(slots, cu_seqlens[1:].to(device), right=True)
        mask = mask & (document[:length, None] == document)
    return mask


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Definition of softmax attention in fp32: `o_t = sum_s softmax_s(q_t . k_s scale) v_s` over the visible keys s.

    The arguments are those of `softmax_attention`.
    """
    mask = visible(q.shape[1], k.shape[1], q.device, cu_seqlens=cu_seqlens, positions=positions, window=window)
    k, v = (t.float().repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)


@cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """Returns PyTorch's variable-length FlashAttention (torch >= 2.10; None: it is missing) and its parameters' names.

    Later releases have more parameters.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def takes_groups() -> bool:
    """Whether the packed FlashAttention lets heads of queries share keys and values, instead of repeating these."""
    varlen = _varlen()
    return varlen is not None and "enable_gqa" in varlen[1]


def suits_flash(q: Tensor) -> bool:
    """Whether FlashAttention takes queries like `q`: 16-bit floats on CUDA with heads of up to 256 channels."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
) -> Tensor | None:
    """Runs variable-length FlashAttention over packed documents, or over rows; None: this PyTorch cannot.

    Args:
        offsets: int32 `[documents + 1]`, of the queries and of the keys. The queries of a document are its last tokens.
        longest: tokens of the longest document, in queries and in keys.
    """
    if (function_and_parameters := _varlen()) is None:
        return None
    varlen_attn, parameters = function_and_parameters
    extra: dict[str, Any] = {}
    if "window_size" in parameters:
        extra["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None and "is_causal" in parameters:
        extra["is_causal"] = True
    else:
        return None
    if scale is not None:
        if "scale" not in parameters:
            return None
        extra["scale"] = scale
    if q.shape[2] != k.shape[2]:
        if takes_groups():
            extra["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    batch, length = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(q, k, v, *offsets, *longest, **extra).unflatten(0, (batch, length))


def one_size(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, multiple: int
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Pads the heads of q, k and v to one size, a multiple of `multiple`, as FlashAttention takes them.

    Returns:
        q, k, v and `scale`, which becomes that of the unpadded heads where it was None and q is padded.
    """
    size, width = q.shape[-1], max(q.shape[-1], v.shape[-1])
    width = -(-width // multiple) * multiple
    if size < width and scale is None:
        scale = size**-0.5
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    return q, k, v, scale


def aligned(x: Tensor) -> Tensor:
    """Returns `x`, copied if one of its heads does not begin at a multiple of 16 bytes.

    FlashAttention loads 16 bytes at a time from where a head begins, without a check of the alignment.
    """
    starts = [x.storage_offset(), *(s for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)]
    return (
        x
        if x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in starts)
        else x.clone(memory_format=torch.contiguous_format)
    )


def kept(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> list[Tensor]:
    """Tensors that FlashAttention keeps: its inputs, its output and in fp32 the normalisers' logarithms."""
    return [q, k, v, o, q.new_empty(q.shape[:3], dtype=torch.float32)]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_document: int | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal softmax attention, `q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] -> o [B, T, H, V]`.

    G divides H, and head h reads group h // (H / G). PyTorch's fused kernels compute the attention: for packed
    documents and windows its variable-length FlashAttention on a GPU in half precision; elsewhere, and with a cache,
    its scaled dot product attention with a dense `[T, S]` mask. Within `use_backend("reference")` the definition does.

    Args:
        scale: factor of the scores; None: 1 / sqrt(D).
        cu_seqlens: `[documents + 1]` offsets of packed documents, B = 1.
        max_document: tokens of the longest document, an integer on the host; None: T.
        positions: `[B, T]` positions of the queries when k, v are a cache whose slot s holds position s; None: k and v
            belong to the queries' tokens, S = T.
        window: a query sees itself and the `window - 1` tokens before it; None: all tokens before it.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or (positions is None and q.shape[1] != k.shape[1]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together: they must be "
            "[B, T, H, D], [B, S, G, D] and [B, S, G, V] where G divides H and, without a cache, S = T"
        )
    if cu_seqlens is not None and (q.shape[0] != 1 or positions is not None):
        raise ValueError("packed documents need a batch of 1 and no cache")
    if positions is None and (pieces := sequence.current()) is not None:
        return pieces.attention(q, (k, v), lambda k, v: (k, v), (), scale, window)
    visibility: dict[str, Any] = {"cu_seqlens": cu_seqlens, "positions": positions, "window": window}
    if requested("auto") == "reference":
        return softmax_attention_reference(q, k, v, scale=scale, **visibility)
    value_dim = v.shape[-1]
    plain = cu_seqlens is None and positions is None and (window is None or window >= q.shape[1])
    if positions is None:
        q, k, v, scale = one_size(q, k, v, scale, 1 if plain else 8)
    if q.is_cuda or stood_in():
        q, k, v = (aligned(t) for t in (q, k, v))
    if stood_in():
        if not (plain or takes_groups()):
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        q, k, v, scale = one_size(q, k, v, scale, 8)  # PyTorch pads by itself before it calls FlashAttention
        o = q.new_zeros(*q.shape[:3], v.shape[-1])
        return stand_in([o], kept(q, k, v, o), (q, k, v))[..., :value_dim]
    if positions is None and not plain and suits_flash(q):
        ends = torch.arange(q.shape[0] + 1, device=q.device) * q.shape[1] if cu_seqlens is None else cu_seqlens
        offsets, longest = ends.to(torch.int32), max_document or q.shape[1]
        packed = _packed(q, k, v, scale, (offsets, offsets), (longest, longest), window)
        if packed is not None:
            return packed[..., :value_dim]
    mask = None if plain else visible(q.shape[1], k.shape[1], q.device, **visibility)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[..., :value_dim]


def latent_attention(
    q: Tensor,
    latent: Tensor,
    expand: sequence.Expand,
    parameters: Sequence[Tensor],
    *,
    cu_seqlens: Tensor | None = None,
    max_document: int | None = None,
) -> Tensor:
    """Softmax attention whose keys and values are computed from a smaller tensor, `latent [B, S, ...]` (MLA).

    Args:
        expand: function `latent -> k [B, S, G, D], v [B, S, G, V]` that treats each token by itself.
        parameters: all parameters that `expand` uses.
        q, cu_seqlens, max_document: as for `softmax_attention`.
    """
    if (pieces := sequence.current()) is not None:
        return pieces.attention(q, (latent,), expand, parameters, None, None)
    return softmax_attention(q, *expand(latent), cu_seqlens=cu_seqlens, max_document=max_document)


IMPLEMENTATIONS = {"reference": softmax_attention_reference, "sdpa": softmax_attention}
