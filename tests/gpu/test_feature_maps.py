"""Tests of the kernels of feature maps and of their normaliser against the PyTorch definitions, with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.fused import feature_maps, normalizer
from linear_moe.modeling.ops.recurrences.decay import decay
from tests.gpu.kernels import DEVICE, HALF, INTERPRETED, MARKS
from tests.tolerances import BF16_ROUNDING, FP32, assert_close

triton = pytest.importorskip("triton")
from linear_moe.modeling.ops.fused import (  # noqa: E402  imports triton
    normalizer_triton,
    quadratic_map_triton,
)

pytestmark = MARKS
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Asserts that `actual` is close to `expected`, a result in fp32, rounded once to `dtype`."""
    assert actual.dtype == dtype, what
    assert_close(actual, expected.to(dtype), FP32 if dtype == torch.float32 else HALF, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "series", "eps", "gamma", "beta", "width"),
    [
        (16, True, None, False, False, 192),
        (16, False, 0.1, True, True, 192),
        (5, True, None, False, False, 21),
        (3, False, None, True, True, 6),
        (4, False, None, False, True, 64),
        (6, False, 0.1, False, False, 21),
        (2, False, 0.1, True, False, 3),
        (1, False, None, True, False, 1),
        (1, True, None, False, False, 3),
        (33, True, None, False, False, 640),
    ],
)
def test_quadratic_map(
    size: int, series: bool, eps: float | None, gamma: bool, beta: bool, width: int, dtype: torch.dtype
) -> None:
    x = draw(2, 19, 3, 2 * size, dtype=dtype)[..., ::2]
    inputs = [x, 1 + draw(size, dtype=dtype, seed=1) if gamma else None, draw(size, dtype=dtype) if beta else None]
    options: dict[str, Any] = {"eps": eps, "series": series, "width": width}
    leaves = [t if t is None else t.float().requires_grad_() for t in inputs]
    expected = feature_maps.quadratic_definition(*leaves, **options)
    grad = draw(*expected.shape, dtype=dtype, seed=2)
    gradients = torch.autograd.grad(expected, [t for t in leaves if t is not None], grad.float())
    close(quadratic_map_triton.forward(*inputs, **options), expected, dtype, "features")
    actual = [t for t in quadratic_map_triton.backward(grad, *inputs, **options) if t is not None]
    for i, (a, e) in enumerate(zip(actual, gradients, strict=True)):
        close(a, e, dtype, f"gradient {i}")


@pytest.mark.parametrize("size", [7, 64, 200, 256])
def test_every_pair_of_channels_is_found(size: int) -> None:
    """The channels are integers with exact products, which differ, so that the product of a wrong pair shows."""
    x = (torch.arange(size, device=DEVICE) * 37 % 4093).float()[None]
    expected = feature_maps.quadratic_definition(x, None, None, eps=None, series=False, width=size * (size + 1) // 2)
    actual = quadratic_map_triton.forward(x, None, None, eps=None, series=False, width=expected.shape[-1])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


# rows, tokens, heads, features, lengths of packed documents
TOTALS = [
    (2, 100, 2, 24, None),
    (1, 1, 1, 64, None),
    (2, 128, 1, 70, None),
    (1, 330, 2, 16, [0, 1, 62, 0, 1, 64, 65, 0, 137, 0]),
    (1, 200, 1, 8, [200]),
    (1, 9000, 1, 3, [100, 8500, 400]),
]


# The interpreter cannot multiply matrices in bf16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "heads", "size", "documents"), TOTALS)
def test_totals(
    batch: int, length: int, heads: int, size: int, documents: list[int] | None, dtype: torch.dtype
) -> None:
    """The totals and their gradients equal those of `decay` for values of 1, in fp32.

    Losses use some or all of the results, q and k among them, which other operations may use too.
    """
    q, k = (draw(batch, length, heads, size, dtype=dtype, seed=i).exp().requires_grad_() for i in range(2))
    offsets = None if documents is None else torch.tensor([0, *documents], device=DEVICE).cumsum(0)
    wide = [t.detach().float().requires_grad_() for t in (q, k)]
    ones = torch.ones(batch, length, heads, 1, device=DEVICE)
    expected, sums = decay(*wide, ones, scale=0.3, cu_seqlens=offsets, backend="chunk")
    *same, total, final = normalizer_triton.totals(q, k, 0.3, offsets)
    assert all(torch.equal(a, b) for a, b in zip(same, (q, k), strict=True))
    assert_close(total, expected, FP32, "total")
    assert_close(final, sums, FP32, "sums")
    weights = [draw(*t.shape, seed=5 + i) for i, t in enumerate((q, k, total, final))]
    for used in ((2,), (0, 1, 2, 3), (3,)):
        outputs, truth = (*same, total, final), (*wide, expected, sums)
        losses = [sum((t[i] * weights[i].to(t[i].dtype)).sum() for i in used) for t in (outputs, truth)]
        actual = torch.autograd.grad(losses[0], (q, k), retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(losses[1], wide, retain_graph=True, materialize_grads=True)
        for name, a, e in zip("qk", actual, wanted, strict=True):
            # the kernel rounds queries times gradients before it sums them
            assert_close(a, e, FP32 if dtype == torch.float32 else 2 * BF16_ROUNDING, f"gradient of {name}, {used}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 20, 128])
def test_divide(size: int, dtype: torch.dtype) -> None:
    o, total = draw(2, 150, 3, size, dtype=dtype), draw(2, 150, 3, 1, seed=1).exp()
    leaves = [t.float().requires_grad_() for t in (o, total)]
    expected = normalizer.divide(*leaves, eps=0.1)
    grad = draw(*o.shape, dtype=dtype, seed=2)
    do, dtotal = torch.autograd.grad(expected, leaves, grad.float())
    close(normalizer_triton.forward(o, total, eps=0.1), expected, dtype, "quotient")
    actual_do, actual_dtotal = normalizer_triton.backward(grad, o, total, eps=0.1)
    close(actual_do, do, dtype, "gradient of o")
    close(actual_dtotal, dtotal, torch.float32, "gradient of total")
