"""Mamba against Hugging Face's module and flash-linear-attention's layer with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build
from tests.unit.modeling.mixers.truth import compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {"state_size": 4},
    {"state_size": 3, "expand": 3, "dt_rank": 5, "conv_size": 2, "conv_bias": False, "bias": True},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_mamba_is_hugging_faces(fields: dict[str, Any]) -> None:
    from transformers.models.mamba.configuration_mamba import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = build("mamba", fields)
    options: Any = ours.config
    config = MambaConfig(
        hidden_size=32, state_size=options.state_size, expand=int(options.expand), conv_kernel=options.conv_size,
        use_bias=options.bias, use_conv_bias=options.conv_bias, time_step_rank=options.dt_rank or 2,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = MambaMixer(config, layer_idx=0).eval()
    randomise(ours)
    weights = dict(ours.state_dict())
    for kind in ["weight"] + ["bias"] * options.bias:
        weights[f"in_proj.{kind}"] = torch.cat([weights.pop(f"{name}_proj.{kind}") for name in "uz"])
    weights["dt_proj.bias"] = weights.pop("dt_bias")
    weights["conv1d.weight"] = weights["conv1d.weight"].unsqueeze(1)
    load(theirs, weights)
    compare(ours, theirs)


def test_mamba_is_flash_linear_attentions() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {key: value for key, value in theirs.items() if key not in ("in_proj.weight", "dt_proj.bias")}
        ours["u_proj.weight"], ours["z_proj.weight"] = theirs["in_proj.weight"].chunk(2)
        return ours | {"dt_bias": theirs["dt_proj.bias"], "conv1d.weight": theirs["conv1d.weight"].squeeze(1)}

    compare_golden("mamba", "mamba", {}, names)
