"""Gated DeltaNet against Qwen3-Next's module with the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout
from tests.golden.golden import compare_golden
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, stream
from tests.unit.modeling.mixers.truth import compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "num_v_heads": 4, "allow_neg_eigval": True, "conv_size": 3, "head_dim": 8, "expand_v": 1.5},
]


@pytest.mark.parametrize("v_heads", [2, 4])
def test_gated_deltanet_is_qwen3_nexts(v_heads: int) -> None:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=1, linear_num_key_heads=2, linear_num_value_heads=v_heads,
        rms_norm_eps=dims().norm_eps, linear_key_head_dim=8, linear_value_head_dim=16, linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, layer_idx=0).eval()
    ours = build("gated_deltanet", {"num_heads": 2, "num_v_heads": v_heads, "head_dim": 8})
    randomise(ours)
    own = dict(ours.state_dict())

    def by_key_head(*names: str) -> Tensor:
        return torch.cat([own[f"{n}_proj.weight"].view(2, -1, 32) for n in names], dim=1).flatten(0, 1)

    weights = {name: own[name] for name in ("A_log", "dt_bias")}
    weights |= {"norm.weight": own["o_norm.weight"], "out_proj.weight": own["o_proj.weight"]}
    weights["in_proj_qkvz.weight"], weights["in_proj_ba.weight"] = (
        by_key_head("q", "k", "v", "g"),
        by_key_head("b", "a"),
    )
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "qkv"]).unsqueeze(1)
    load(theirs, weights)
    compare(ours, theirs)


def test_gated_deltanet_is_flas() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}

    compare_golden("gated_deltanet", "gated_deltanet", {"head_dim": 64, "expand_v": 1.0}, names)


def test_negative_eigenvalues() -> None:
    """allow_neg_eigval gives writes twice the strength, and changes nothing else (arXiv 2411.12537)."""
    mixers = [build("gated_deltanet", {"allow_neg_eigval": option}) for option in (False, True)]
    less, more = (mixer.project(stream(1, 5), TokenLayout(1, 5), None)[0] for mixer in mixers)
    assert_close(more.pop("beta"), 2 * less.pop("beta"), FP32)
    assert all(torch.equal(more[name], less[name]) for name in less)


@pytest.mark.parametrize(("name", "slowest"), [("gated_deltanet", 0.0), ("gated_deltaproduct", 0.0), ("kda", 1.0)])
def test_initial_decays_are_mamba_2s(name: str, slowest: float) -> None:
    """Rates uniform up to 16, steps log-uniform between 1/1000 and 1/10."""
    mixer = build(name, {"num_heads": 512, "head_dim": 1, "expand_v": 1.0})
    state = mixer.state_dict()
    rates, steps = state["A_log"].exp(), F.softplus(state["dt_bias"])
    assert slowest <= float(rates.min()) < slowest + 0.5 and 15.5 < float(rates.max()) <= 16
    assert float(rates.mean()) == pytest.approx((slowest + 16) / 2, rel=0.1)
    assert 1e-3 <= float(steps.min()) < 1.1e-3 and 0.09 < float(steps.max()) <= 0.1 + 1e-6
    assert float(steps.log().mean()) == pytest.approx(-2 * math.log(10), rel=0.05)


@pytest.mark.parametrize("name", ["gated_deltanet", "gated_deltaproduct"])
def test_default_head_size_is_three_quarters(name: str) -> None:
    """The default head size is 3/4 hidden_size / num_heads, as flash-linear-attention's 256 for 2048 / 6."""
    assert len(build(name, {}).get_parameter("q_proj.weight")) == 24
