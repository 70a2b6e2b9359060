"""The kernels of feature maps and of their normaliser against the PyTorch definitions, with every gradient."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops import feature_maps
from tests.tolerances import BF16_ROUNDING, BF16_SAME, FP32, assert_close

triton = pytest.importorskip("triton")
from linear_moe.modeling.ops import quadratic_map_gpu  # noqa: E402  it imports triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels on a CPU
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = 2 * BF16_ROUNDING if INTERPRETED else BF16_SAME  # the interpreter truncates
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA"),
]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Against an fp32 result rounded once."""
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
    close(quadratic_map_gpu.forward(*inputs, **options), expected, dtype, "features")
    found = [t for t in quadratic_map_gpu.backward(grad, *inputs, **options) if t is not None]
    for i, (a, e) in enumerate(zip(found, gradients, strict=True)):
        close(a, e, dtype, f"gradient {i}")


@pytest.mark.parametrize("size", [7, 64, 200, 256])
def test_every_pair_of_channels_is_found(size: int) -> None:
    """Channels so that a wrong pair's product shows: integers, their products exact."""
    x = (torch.arange(size, device=DEVICE) * 37 % 4093).float()[None]
    expected = feature_maps.quadratic_definition(x, None, None, eps=None, series=False, width=size * (size + 1) // 2)
    actual = quadratic_map_gpu.forward(x, None, None, eps=None, series=False, width=expected.shape[-1])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
