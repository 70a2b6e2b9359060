"""Short causal depthwise convolution over tokens, with a state: the last W - 1 inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.backends import check_cu_seqlens, decodes, has_fla, import_fla
from linear_moe.modeling.ops.fused.norms import l2_norm
from linear_moe.modeling.ops.kernels import has_triton, on_kernels, stand_in, stood_in
from linear_moe.modeling.ops.packing import documents, on_device

ACTIVATIONS = ("silu", None)
KERNEL_TAPS = 4  # taps (W) that our kernels take at most
KERNEL_NORM = 128  # channels of a group that our kernels normalise at most: those of one warp


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state: Tensor | None = None,
    before: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = True,
    norm_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Short causal convolution, y[t] = activation(bias + sum_w weight[:, w] x[t - (W - 1) + w]).

    The inputs before a row or document are its state, or zeros. With `norm_size`, `l2_norm` is applied to y in each
    group of so many neighbouring channels. On CUDA, our Triton kernels compute calls without a state (training), and
    those of flash-linear-attention, where installed, calls with a state. Sums are in fp32.

    Args:
        x: `[B, T, C]`.
        weight: `[C, W]`, the last column for the token itself.
        bias: `[C]`.
        activation: "silu" or None.
        state: `[N, C, W - 1]`, the inputs before each sequence, oldest first; N is B, or the number of documents.
            With T = 1, no `cu_seqlens` and gradients disabled it is UPDATED IN PLACE and returned.
        before: `[N, W - 1, C]` fp32, the tokens before each local sequence of pieces, if the caller has them already
            (see `tokens_before`). None: pieces, if there are any, are asked for them.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; documents may be empty.
        output_state: whether the caller needs the final state; if not, None may be returned for it.
        norm_size: channels of a group that is normalised, a divisor of C; None: no norm.

    Returns:
        `y [B, T, C]` in x's dtype and the final state `[N, C, W - 1]` in the dtype of `state` (x's if None), or None;
        both differentiable in every input.

    Raises:
        ValueError: shapes or an activation that do not fit.
    """
    _check(x, weight, bias, activation, state, cu_seqlens)
    if norm_size is not None and x.shape[2] % norm_size:
        raise ValueError(f"norm_size must divide C = {x.shape[2]}, got {norm_size}")
    width = weight.shape[1]
    on_kernel = (stood_in() or (x.is_cuda and has_triton())) and state is None and 1 < width <= KERNEL_TAPS
    if norm_size is not None and not (on_kernel and norm_size <= KERNEL_NORM):
        options: Any = {"state": state, "before": before, "cu_seqlens": cu_seqlens, "output_state": output_state}
        y, final = short_conv(x, weight, bias, activation=activation, **options)
        return l2_norm(y, size=norm_size), final
    if before is None and state is None and width > 1 and sequence.current() is not None:
        ((x, before),) = tokens_before([x], width - 1)
    if before is not None and not on_kernel:
        state = before.mT.to(x.dtype)
    if state is not None and decodes(x.shape[1], state, cu_seqlens):
        window = torch.cat([state, x.mT.to(state.dtype)], dim=-1)  # [B, C, W]
        state.copy_(window[..., 1:])
        y = (window.float() * weight.float()).sum(-1)[:, None]
        return _finish(y, bias, activation).to(x.dtype), state
    if stood_in():
        final = _last(x, width - 1, cu_seqlens) if output_state else None
        return stand_in([torch.zeros_like(x)], kept(x, weight, bias), (x, weight, bias)), final
    if on_kernel:
        document = None if cu_seqlens is None else documents(cu_seqlens, x.shape[1])
        first = None if cu_seqlens is None else cu_seqlens[document].int()
        document = None if before is None or document is None else document.int()
        arguments: Any = (x, weight, bias, before, first, document)
        y = on_kernels("short_conv_triton", *arguments, activation=activation, norm_size=norm_size)
        return y, _last(x, width - 1, cu_seqlens) if output_state else None
    if x.is_cuda and width > 1 and has_fla():
        return _kernel(x, weight, bias, activation, state, cu_seqlens)
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = x.new_zeros(sequences, x.shape[2], width - 1)
    before = state.mT.float()  # [N, W - 1, C]
    if cu_seqlens is None:
        inputs = torch.cat([before, x.float()], dim=1)
        final = inputs[:, inputs.shape[1] - (width - 1) :]
        y = _convolve(inputs, weight.float())
    else:
        y, final = _packed(x.float(), weight.float(), before, cu_seqlens)
    return _finish(y, bias, activation).to(x.dtype), final.mT.to(state.dtype)


def tokens_before(xs: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    """Returns, for pieces of sequences, the `count` tokens of each x before every local sequence, by one exchange.

    Args:
        xs: tensors `[B, T, C]` of the local tokens.
        count: number of tokens.

    Returns:
        For each x, a view of x, which only the caller may use, in place of x, and the tokens before, oldest first:
        `[N, count, C]` fp32.
    """
    pieces = sequence.current()
    assert pieces is not None
    inside = pieces.length < count  # only through such short pieces do earlier tokens reach the piece behind
    pairs = [(x, x) if pieces.packed else _Tail.apply(x, count) for x in xs]
    summary = partial(last_tokens, count=count, matrix=inside)
    before = pieces.states(summary, *(tail for _, tail in pairs), matrix=inside)
    return [(x, part) for (x, _), part in zip(pairs, before.split([x.shape[2] for x in xs], 2), strict=True)]


class _Tail(Function):
    """A view of x and a copy of its last `count` tokens, whose gradient is added in place to the gradient of x.

    Autograd's own slice would pad this gradient with zeros to the size of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.count = count
        return x.view_as(x), x[:, -count:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, d_tail: Tensor) -> tuple[Tensor, None]:
        if not (dx.is_cuda and dx.is_contiguous()):  # only a kernel's output is ours to overwrite
            dx = dx.clone(memory_format=torch.contiguous_format)
        dx[:, -ctx.count :].add_(d_tail)
        return dx, None


def last_tokens(*xs: Tensor, count: int, matrix: bool = True) -> tuple[Tensor | None, Tensor]:
    """Computes the summary of a window `[N, count, C]`, whose state are the last tokens of `x [N, T, C]`.

    Args:
        xs: x, in parts of its channels.
        count: tokens of a window.
        matrix: whether to return the transition, which shifts a window by T tokens. Without it nothing of an earlier
            window is left behind x, because T >= count or a sequence begins with x.
    """
    missing = max(count - xs[0].shape[1], 0)
    state = F.pad(torch.cat([x[:, -count:] for x in xs], 2), (0, 0, missing, 0)).float()
    if not matrix:
        return None, state
    shift = torch.eye(missing, device=state.device)
    return F.pad(shift, (count - missing, 0, 0, count - missing)).expand(len(state), -1, -1), state


def _last(x: Tensor, history: int, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the last `history` inputs of every sequence, with zeros before its first: `[N, C, history]`."""
    if cu_seqlens is None:
        return F.pad(x, (0, 0, history, 0))[:, x.shape[1] :].mT if x.shape[1] < history else x[:, -history:].mT
    places = cu_seqlens[1:, None] + torch.arange(-history, 0, device=x.device)
    inside = places >= cu_seqlens[:-1, None]
    return x[0][places.clamp(min=0)].where(inside[..., None], x.new_zeros(())).mT


def _packed(x: Tensor, weight: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Computes one convolution over all documents, each preceded by its state `before [documents, W - 1, C]`."""
    documents, history, channels = before.shape
    offsets = cu_seqlens.cpu()
    places = torch.arange(history) + (offsets[:-1] + history * torch.arange(documents))[:, None]
    ends = (offsets[1:] + history * torch.arange(1, documents + 1))[:, None]
    tokens = torch.arange(x.shape[1]) + history * torch.arange(1, documents + 1).repeat_interleave(offsets.diff())
    places, ends, tokens = (on_device(t, x.device) for t in (places, ends, tokens))
    inputs = x.new_zeros(x.shape[1] + history * documents, channels)
    inputs = inputs.index_copy(0, places.flatten(), before.reshape(-1, channels)).index_copy(0, tokens, x[0])
    final = inputs[ends - history + torch.arange(history, device=x.device)]
    return _convolve(inputs[None], weight).index_select(1, tokens - history), final


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves `x [B, W - 1 + T, C]` to `[B, T, C]` by shifted products, on CPU twice as fast as grouped `conv1d`."""
    length = x.shape[1] - weight.shape[1] + 1
    y = x[:, :length] * weight[:, 0]
    for w in range(1, weight.shape[1]):
        y = torch.addcmul(y, x[:, w : w + length], weight[:, w])
    return y


def _finish(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = y if bias is None else y + bias.float()
    return y if activation is None else F.silu(y)


def kept(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Tensors that our kernels and those of flash-linear-attention keep: their inputs."""
    return [x, weight, bias]


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, final = import_fla("modules.causal_conv1d").causal_conv1d(
        x=x,
        weight=weight,
        bias=bias,
        initial_state=None if state is None else F.pad(state, (1, 0)),  # fla's state has W inputs, the oldest unused
        output_final_state=True,
        activation=activation,
        cu_seqlens=cu_seqlens,
    )
    return y.to(x.dtype), final[..., 1:].to(x.dtype if state is None else state.dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if x.ndim != 3 or x.shape[1] == 0 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"x must be [B, T, C] and weight [C, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias must be [C] = {tuple(x.shape[2:])}, got {tuple(bias.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (sequences, x.shape[2], weight.shape[1] - 1)
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state must be [N, C, W - 1] = {shape}, got {tuple(state.shape)}")
