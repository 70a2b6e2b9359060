"""Mamba-2 against Hugging Face's module with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {"head_dim": 8, "state_size": 8, "num_groups": 2},
    {"head_dim": 16, "state_size": 4, "num_groups": 4, "expand": 4, "conv_size": 3},
]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_is_hugging_faces(groups: int) -> None:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=groups, expand=2, conv_kernel=4, chunk_size=4,
        num_hidden_layers=1, layer_norm_epsilon=dims().norm_eps,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = build("mamba2", {"head_dim": 8, "state_size": 8, "num_groups": groups})
    randomise(ours)
    own = dict(ours.state_dict())
    weights = {name: own[name] for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")}
    weights["in_proj.weight"] = torch.cat([own[f"{n}_proj.weight"] for n in ("z", "x", "B", "C", "dt")])
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "xBC"]).unsqueeze(1)
    weights["conv1d.bias"] = torch.cat([own[f"{n}_conv1d.bias"] for n in "xBC"])
    load(theirs, weights)
    compare(ours, theirs)


def test_mamba2_is_flas() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        inner, states = 256, 64
        ours = {name: theirs[name] for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")}
        parts = theirs["in_proj.weight"].split([inner, inner, states, states, inner // 64])
        ours |= {f"{n}_proj.weight": part for n, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True)}
        for kind in ("weight", "bias"):
            parts = theirs[f"conv1d.{kind}"].split([inner, states, states])
            ours |= {f"{n}_conv1d.{kind}": part.squeeze() for n, part in zip("xBC", parts, strict=True)}
        return ours

    compare_golden("mamba2", "mamba2", {"state_size": 64}, names)
