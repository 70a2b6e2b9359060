"""S4D against its convolution kernel, and its initial state matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.options.errors import ConfigError
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import LENGTH, compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {"state_size": 8},
    {"state_size": 6, "init": "inv", "discretization": "bilinear", "glu": False},
    {"state_size": 4, "init": "real", "dt_min": 0.01, "dt_max": 0.5},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_s4_is_the_papers_convolution(fields: dict[str, Any]) -> None:
    """Section 3 of arXiv 2206.11893: the kernel from powers of the discretised A, applied by FFT, in fp64."""
    ours = build("s4", fields)
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        A, dt = -w["log_A_real"].exp() + 1j * w["A_imag"], w["log_dt"].exp()[:, None]
        if fields.get("discretization") == "bilinear":
            discrete_A, discrete_B = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
        else:
            discrete_A, discrete_B = (dt * A).exp(), (dt * A).expm1() / A
        powers = torch.stack([discrete_A**n for n in range(LENGTH)], dim=-1)
        kernel = 2 * torch.einsum("hn,hnl->hl", (w["C"][..., 0] + 1j * w["C"][..., 1]) * discrete_B, powers).real
        u, size = x.double().transpose(1, 2), 2 * LENGTH
        y = torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(kernel, size), size)[..., :LENGTH]
        y = F.gelu(y + w["D"][:, None] * u)
        y = F.conv1d(y, w["o_proj.weight"][..., None], w["o_proj.bias"])
        return (F.glu(y, dim=1) if fields.get("glu", True) else y).transpose(1, 2)

    compare(ours, theirs)


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("lin", [-0.5, -0.5 + 1j * math.pi, -0.5 + 2j * math.pi]),
        ("inv", [-0.5 + 6j / math.pi * (6 / n - 1) for n in (1, 3, 5)]),
        ("real", [-1, -2, -3]),
    ],
)
def test_initial_state_matrices(init: str, expected: list[complex]) -> None:
    mixer = build("s4", {"state_size": 6, "init": init})
    A = torch.complex(-mixer.get_parameter("log_A_real").exp(), mixer.get_parameter("A_imag"))
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.complex64).expand(32, -1))
    dt = mixer.get_parameter("log_dt").exp()
    assert 0.001 <= dt.min().item() < 0.01 < dt.max().item() <= 0.1


@pytest.mark.parametrize(("field", "value"), [("state_size", 7), ("dt_min", 0.2)])
def test_impossible_options(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.mixer\.{field} = {value}"):
        mixer_class("s4").validate(mixer_config("s4", **{field: value}), dims(), 1, "model.mixer")
