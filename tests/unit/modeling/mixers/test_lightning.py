"""Lightning attention against Hugging Face's module with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "head_dim": 8, "activation": "relu", "slopes": "transnormer"},
    {"activation": "identity"},
]


@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_is_hugging_faces(layer: int) -> None:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, head_dim=16, num_hidden_layers=4, block_size=4, hidden_act="silu"
    )
    theirs = MiniMaxLightningAttention(config, layer)
    theirs.norm.variance_epsilon = dims().norm_eps
    ours = build("lightning", {"head_dim": 16}, at=replace(dims(), layer=layer, num_layers=4))
    randomise(ours)
    own = dict(ours.state_dict())
    qkv = torch.stack([own.pop(f"{n}_proj.weight").view(4, 16, 32) for n in "qkv"], 1)
    buffers = {name: value for name, value in theirs.state_dict().items() if "slope" in name or "decay" in name}
    load(theirs, own | buffers | {"qkv_proj.weight": qkv.flatten(0, 2)})
    compare(ours, lambda x: theirs(x, None, None)[0])


def test_transnormer_slopes() -> None:
    """Section 3.2 of arXiv 2307.14995: head h of H in layer l of L decays by exp(-8 h / H (1 - l / L))."""
    ours = build("lightning", {"slopes": "transnormer"}, at=replace(dims(), layer=1, num_layers=4))
    expected = torch.tensor([1.0, *(2.718281828 ** (-8 * h / 4 * 0.75) for h in (1, 2, 3))])
    assert_close(ours.log_decay(torch.device("cpu")).exp(), expected, FP32)
