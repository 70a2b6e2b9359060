"""The tolerances of every comparison in this repository, in CI and out, and the one way of comparing."""

from __future__ import annotations

from torch import Tensor

FP32 = 1e-5  # two fp32 computations of the same thing
DECODE = 1e-4  # step-by-step decoding against the full forward pass, fp32
BF16 = 2e-2  # a bf16 kernel against the fp32 reference of the same bf16 inputs, outputs and gradients


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error ‖actual - expected‖ / ‖expected‖ in fp64; NaN anywhere gives NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Raises unless the relative error is within `tolerance` (NaN never is)."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"
