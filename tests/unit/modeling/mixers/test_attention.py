"""Softmax attention against Hugging Face's modules with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.attention.softmax import visible
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import LENGTH, compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "rope": False, "window": 20},
    {"num_kv_heads": 2, "qkv_bias": True, "rotary_fraction": 0.5, "rope_base": 100.0, "window": 3},
    {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "output_gate": True},
]


@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_flops_are_those_of_visible_pairs(window: int | None) -> None:
    ours: Any = build("attention", {"window": window, "num_kv_heads": 2, "head_dim": 6})
    for length in (1, 3, 50):
        pairs = int(visible(length, length, torch.device("cpu"), window=window).sum())
        assert ours.recurrence_flops(length) == pytest.approx(4 * (2 * 6 + 2 * 6) * pairs / length)


@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        ("llama", {"num_kv_heads": 2}, {}),
        ("qwen2", {"num_kv_heads": 1, "qkv_bias": True, "rope_base": 500.0}, {}),
        ("qwen3", {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True}, {"head_dim": 16}),
        (
            "qwen3_next",
            {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "output_gate": True, "rotary_fraction": 0.25},
            {"head_dim": 16, "layer_types": ["full_attention"]},
        ),
    ],
)
def test_attention_is_hugging_faces(family: str, fields: dict[str, Any], options: dict[str, Any]) -> None:
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_next": "Qwen3Next"}[family]
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configuration, prefix + "Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=fields["num_kv_heads"],
        rms_norm_eps=dims().norm_eps, attn_implementation="eager",
        rope_parameters={
            "rope_type": "default", "rope_theta": fields.get("rope_base", 10000.0),
            "partial_rotary_factor": fields.get("rotary_fraction", 1.0),
        },
        **options,
    )  # fmt: skip
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    attention = getattr(module, prefix + "Attention")(config, layer_idx=0).eval()
    ours = build("attention", fields)
    randomise(ours)
    own = dict(ours.state_dict())
    if family == "qwen3_next":
        query, gate = own["q_proj.weight"].view(4, 16, 32), own.pop("g_proj.weight").view(4, 16, 32)
        own["q_proj.weight"] = torch.cat((query, gate), dim=1).flatten(0, 1)
        own |= {name: own[name] - 1.0 for name in ("q_norm.weight", "k_norm.weight")}
    load(attention, own)
    rotary = getattr(module, prefix + "RotaryEmbedding")(config)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]

    def theirs(x: Tensor) -> Tensor:
        angles = rotary(x, torch.arange(LENGTH).unsqueeze(0))
        return attention(x, position_embeddings=angles, attention_mask=mask)[0]

    compare(ours, theirs)
