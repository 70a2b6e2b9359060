"""The tolerances of every comparison in this repository, in CI and out, and the one way of comparing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FP32 = 1e-5  # two fp32 computations of the same thing
DECODE = 1e-4  # step-by-step decoding against the full forward pass, fp32
FP64 = 1e-10  # two fp64 computations of the same thing
BF16 = 2e-2  # a bf16 kernel against the fp32 reference of the same bf16 inputs, outputs and gradients
BF16_SAME = 1e-3  # the same fp32 arithmetic in another order, rounded to bf16: a few elements round the other way
BF16_MOMENTS = 5e-3  # all weights after 20 steps with bf16 moments; seen: AdamW 1.4e-3, Muon 8e-4
BF16_ROUNDING = 2**-8  # one rounding to bf16, whose significand has 8 bits
# One parameter's gradient in bf16 is a sum of products of rounded factors; where they cancel, what is left can be small
# and its error is not. A norm below this share of the largest parameter gradient's counts as this share. (Mixers
# computed in bf16 on a CPU: gradients' norms from 1e-2 of the largest upwards, errors of the small ones up to 6e-4.)
BF16_GRADIENT_FLOOR = 5e-2
# Where bf16 itself loses more than BF16 (ReLU's sign, squares of small numbers): a kernel's gradients may be this many
# times as far from fp32 as those of the same mixer in bf16 on a CPU, which rounds inputs and outputs of the recurrence
# but nothing inside it.
BF16_OVER_CPU = 2.5
BF16_CANCELLING = 5e-2  # the gradient of one constant for all tokens: their products cancel
FP32_GRADIENT_FLOOR = 0.1  # the same in fp32: what normalises one token cancels the gradient of its query and key


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error ‖actual - expected‖ / ‖expected‖ in fp64; NaN anywhere gives NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Raises unless the relative error is within `tolerance` (NaN never is)."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_gradients_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, floor: float
) -> None:
    """Raises unless they are of the same parameters and every relative error is within `tolerance`.

    A norm below `floor` times the largest one counts as that: see BF16_GRADIENT_FLOOR.
    """
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    least = floor * max(float(x.norm()) for x in expected.values())
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        error = float((actual[name] - x).norm()) / max(float(x.norm()), least)
        assert error <= tolerance, f"gradient of {name}: relative error {error:.2e} > {tolerance:.0e}"  # NaN is not
