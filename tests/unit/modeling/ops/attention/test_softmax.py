"""Tests of softmax attention: the fused path against the reference, the reference against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.attention import softmax
from linear_moe.modeling.ops.attention.softmax import softmax_attention, softmax_attention_reference
from linear_moe.modeling.ops.backends import use_backend
from tests.tolerances import BF16, FP32, assert_close


def tensors(batch: int, length: int, keys: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads, 8), (batch, keys, groups, 8), (batch, keys, groups, 6)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


CASES: list[tuple[int, int, dict[str, Any]]] = [
    (10, 10, {}),
    (10, 10, {"window": 3}),
    (10, 10, {"window": 99, "scale": 0.7}),
    (10, 10, {"cu_seqlens": torch.tensor([0, 4, 4, 5, 10])}),
    (10, 10, {"cu_seqlens": torch.tensor([0, 4, 10]), "window": 2}),
    (3, 12, {"positions": torch.tensor([[4, 5, 6]])}),
    (1, 12, {"positions": torch.tensor([[11]]), "window": 4}),
]


@pytest.mark.parametrize(("length", "keys", "options"), CASES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_equals_reference(length: int, keys: int, options: dict[str, Any], groups: int) -> None:
    inputs = tensors(1, length, keys, groups=groups)
    actual, expected = softmax_attention(*inputs, **options), softmax_attention_reference(*inputs, **options)
    assert_close(actual, expected, FP32)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((o * weight).sum(), inputs) for o in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, FP32)
    half = [t.detach().bfloat16() for t in inputs]
    assert_close(softmax_attention(*half, **options), softmax_attention_reference(*half, **options), BF16)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("length", "keys", "options"), [case for case in CASES if "positions" not in case[2]])
def test_what_variable_length_attention_is_given(
    length: int, keys: int, options: dict[str, Any], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed documents, and rows with a window, go to variable-length FlashAttention without a `[T, S]` mask.

    The reference takes the place of its kernel.
    """
    calls = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *args: Any, window_size: tuple[int, int], **given: Any) -> Tensor:
        calls.append(args)
        offsets, same, longest, _ = args
        assert offsets is same and offsets.dtype == torch.int32 and longest >= offsets.diff().max()
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 8 and given.pop("enable_gqa", False) == (groups < 4)
        (behind, ahead), (q, k, v) = window_size, (t.unsqueeze(0) for t in (q, k, v))
        assert ahead == 0
        window = None if behind < 0 else behind + 1
        return softmax_attention_reference(q, k, v, cu_seqlens=offsets.long(), window=window, **given)[0]

    monkeypatch.setattr(softmax, "suits_flash", lambda q: True)
    monkeypatch.setattr(softmax, "_varlen", lambda: (varlen_attn, {"window_size", "scale", "enable_gqa"}))
    inputs = tensors(1 if "cu_seqlens" in options else 3, length, keys, groups=groups)
    actual, expected = softmax_attention(*inputs, **options), softmax_attention_reference(*inputs, **options)
    assert_close(actual, expected, FP32)
    assert bool(calls) == ("cu_seqlens" in options or options.get("window", keys) < keys)


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(1, 10, 10)
    expected = softmax_attention_reference(*inputs)
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    with use_backend("reference"):
        assert torch.equal(softmax_attention(*inputs), expected)


@pytest.mark.parametrize(("length", "keys", "options"), CASES)
def test_reference_is_the_definition(length: int, keys: int, options: dict[str, Any]) -> None:
    q, k, v = (t.detach().double() for t in tensors(1, length, keys))
    offsets = options.get("cu_seqlens", torch.tensor([0, keys])).tolist()
    expected = torch.zeros(1, length, 4, 6, dtype=torch.float64)
    for t in range(length):
        at = int(options["positions"][0, t]) if "positions" in options else t
        start = max(n for n in offsets if n <= at)
        seen = slice(max(start, at + 1 - options.get("window", keys)), at + 1)
        for h in range(4):
            weights = (k[0, seen, h // 2] @ q[0, t, h] * options.get("scale", 8**-0.5)).exp()
            expected[0, t, h] = weights @ v[0, seen, h // 2] / weights.sum()
    assert_close(softmax_attention_reference(q, k, v, **options), expected, FP32)


def test_rows_at_different_positions_of_a_cache() -> None:
    q, k, v = (t.detach() for t in tensors(3, 2, 9))
    positions = torch.tensor([[0, 1], [4, 5], [7, 8]])
    together = softmax_attention(q, k, v, positions=positions)
    for row, (start, end) in enumerate(positions.tolist()):
        history = softmax_attention_reference(
            q[row : row + 1, :],
            k[row : row + 1, : end + 1],
            v[row : row + 1, : end + 1],
            positions=positions[row : row + 1],
        )
        assert_close(together[row : row + 1], history, FP32, str(start))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}),
        ([(1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 1, 8)], {}),
        ([(1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], {}),
        ([(2, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)], {"cu_seqlens": torch.tensor([0, 4])}),
    ],
)
def test_refuses_what_does_not_fit(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fit together|batch of 1"):
        softmax_attention(*(torch.zeros(shape) for shape in shapes), **options)
