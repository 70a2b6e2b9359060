"""Kimi Delta Attention against Hugging Face's module with the same weights, and flash-linear-attention's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.mixers.base import Layout
from tests.golden.golden import compare_golden
from tests.tolerances import FP32, assert_close
from tests.unit.mixers.common import build, dims, stream
from tests.unit.mixers.truth import LENGTH, compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 2.0, "allow_neg_eigval": True, "conv_size": 0},
    {"lower_bound": -5.0, "gate_bias": False, "conv_size": 3},
]


@pytest.mark.parametrize("heads", [2, 4])
def test_kda_is_kimi_linears(heads: int) -> None:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=32, num_hidden_layers=1, linear_num_heads=heads, linear_head_dim=8, linear_conv_kernel_dim=4,
        rms_norm_eps=dims().norm_eps, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = KimiLinearDeltaAttention(config, layer_idx=0).eval()
    ours = build("kda", {"num_heads": heads, "head_dim": 8, "gate_bias": False})
    randomise(ours)
    own = dict(ours.state_dict())
    same = ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")
    weights = {f"{name}.weight": own[f"{name}.weight"] for name in same}
    for i, place in enumerate("ab"):
        weights[f"forget_gate.f_{place}_proj.weight"] = own[f"f_proj.{i}.weight"]
        weights[f"g_{place}_proj.weight"] = own[f"g_proj.{i}.weight"]
    weights |= {"forget_gate.A_log": own["A_log"].view(1, 1, -1, 1), "forget_gate.dt_bias": own["dt_bias"]}
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "qkv"]).unsqueeze(1)
    load(theirs, weights)
    compare(ours, theirs)


def test_kda_is_flas() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}

    compare_golden("kda", "kda", {"head_dim": 64}, names)


def test_bounded_gate() -> None:
    """g = lower_bound * sigmoid(A (f + dt_bias)), per value head."""
    ours = build("kda", {"lower_bound": -3.0})
    randomise(ours)
    w, x = ours.state_dict(), stream(1, LENGTH)
    inputs, _ = ours.project(x, Layout(1, LENGTH), None)
    f = (F.linear(F.linear(x, w["f_proj.0.weight"]), w["f_proj.1.weight"]) + w["dt_bias"]).view(LENGTH, 4, 8)
    expected = torch.stack([-3.0 / (1 + torch.exp(-w["A_log"][h].exp() * f[:, h])) for h in range(4)], dim=1)
    assert_close(inputs["g"][0], expected, FP32)


def test_negative_eigenvalues() -> None:
    """Writes of twice the strength, and nothing else, where beta may pass 1 (arXiv 2411.12537)."""
    mixers = [build("kda", {"allow_neg_eigval": option}) for option in (False, True)]
    less, more = (mixer.project(stream(1, 5), Layout(1, 5), None)[0] for mixer in mixers)
    assert_close(more.pop("beta"), 2 * less.pop("beta"), FP32)
    assert all(torch.equal(more[name], less[name]) for name in less)
