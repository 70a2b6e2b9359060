"""Gated linear attention against the paper's equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout
from tests.golden.golden import compare_golden
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, stream
from tests.unit.modeling.mixers.truth import LENGTH, compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 4, "gate_normalizer": 4.0},
    {"conv_size": 4, "qkv_bias": True, "expand_k": 1.0},
]


def test_gla_is_the_papers_equations() -> None:
    """Section 4.3 and 4.4 of arXiv 2312.06635, one token and one head at a time, in fp64."""
    ours = build("gla", {"qkv_bias": True, "gate_normalizer": 4.0})
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        x = x.double()
        outputs = []
        for sequence in x:
            states, row = [torch.zeros(4, 8, dtype=torch.float64) for _ in range(4)], []
            for token in sequence:
                q, k, v = (w[f"{n}_proj.weight"] @ token + w[f"{n}_proj.bias"] for n in "qkv")
                low_rank = w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ token) + w["gk_proj.1.bias"]
                alpha = torch.sigmoid(low_rank) ** (1 / 4)
                r = w["g_proj.weight"] @ token
                heads = []
                for h in range(4):
                    key, value = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
                    states[h] = alpha[key, None] * states[h] + torch.outer(k[key], v[value])
                    o = states[h].T @ q[key] / 4**0.5
                    o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                    heads.append(o * r[value] * torch.sigmoid(r[value]))
                row.append(w["o_proj.weight"] @ torch.cat(heads))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_gla_convolution_is_conv1d_with_silu() -> None:
    """GLA with a convolution equals GLA without one on convolved projections."""
    ours = build("gla", {"conv_size": 4})
    x = stream(1, LENGTH)
    inputs, _ = ours.project(x, TokenLayout(1, LENGTH), None)
    for name in "qkv":
        projected = (x @ ours.get_parameter(f"{name}_proj.weight").T).T
        weight = ours.get_parameter(f"{name}_conv1d.weight").unsqueeze(1)
        expected = F.silu(F.conv1d(projected, weight, padding=3, groups=len(weight))[..., :LENGTH]).T
        assert_close(inputs[name].flatten(2)[0], expected, FP32, name)


@pytest.mark.parametrize("recording", ["gla", "gla_conv"])
def test_gla_is_flas(recording: str) -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}
        ours["o_norm.weight"] = ours.pop("g_norm_swish_gate.weight")
        return ours

    fields = {"expand_k": 1.0, "conv_size": 4 if recording == "gla_conv" else 0}
    compare_golden(recording, "gla", fields, names)
