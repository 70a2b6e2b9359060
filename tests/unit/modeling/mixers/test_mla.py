"""Multi-head latent attention against Hugging Face's DeepSeek-V2 and DeepSeek-V3 modules with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, stream
from tests.unit.modeling.mixers.truth import LENGTH, compare, load, randomise

SIZES = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
VARIANTS: list[dict[str, Any]] = [
    SIZES,
    {**SIZES, "num_heads": 2, "q_lora_rank": 16, "v_head_dim": 12, "rope_interleave": False},
    {"kv_lora_rank": 32, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "rope_base": 100.0},
]


@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        ("V2", {}, {}),
        ("V2", {"q_lora_rank": 16, "rope_base": 500.0}, {}),
        ("V3", {"q_lora_rank": 16}, {"rope_interleave": True}),
        ("V3", {"v_head_dim": 16, "rope_interleave": False}, {"rope_interleave": False}),
    ],
)
def test_mla_is_hugging_faces(family: str, fields: dict[str, Any], options: dict[str, Any]) -> None:
    fields = {"q_lora_rank": None, **SIZES, **fields}
    name = f"deepseek_{family.lower()}"
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    config = getattr(configuration, f"Deepseek{family}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope_base", 10000.0)},
        **{key: fields[key] for key in ("q_lora_rank", *SIZES)}, **options,
    )  # fmt: skip
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    attention = getattr(module, f"Deepseek{family}Attention")(config, layer_idx=0).eval()
    for part in attention.children():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = dims().norm_eps
    ours = build("mla", fields)
    randomise(ours)
    load(attention, dict(ours.state_dict()))
    rotary = getattr(module, f"Deepseek{family}RotaryEmbedding")(config)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]

    def theirs(x: Tensor) -> Tensor:
        angles = rotary(x, torch.arange(LENGTH).unsqueeze(0))
        return attention(x, position_embeddings=angles, attention_mask=mask)[0]

    compare(ours, theirs)


@pytest.mark.parametrize("fields", VARIANTS)
def test_flops_are_those_of_visible_pairs(fields: dict[str, Any]) -> None:
    ours: Any = build("mla", fields)
    head = 2 * (ours.config.qk_nope_head_dim + ours.config.qk_rope_head_dim) + 2 * ours.config.v_head_dim
    assert ours.recurrence_flops(50) == pytest.approx(ours.num_heads * head * (50 * 51 / 2) / 50)


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_attention_to_latents_is_attention_to_expanded_ones(fields: dict[str, Any]) -> None:
    ours: Any = build("mla", fields)
    positions = torch.arange(5).expand(2, -1)
    inputs, _ = ours.project(stream(2, 5), TokenLayout(2, 5, positions=positions), None)
    absorbed = ours._attend_to_latents(inputs["q"], inputs["latent"], positions)
    assert_close(absorbed, ours.mix(inputs, TokenLayout(2, 5), None), FP32)


@torch.no_grad()
def test_decoding_takes_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes the way with fewer multiplications for each head and slot of the cache.

    Queries are multiplied with latents, or latents are expanded and queries are multiplied with the keys and values.
    """
    ours: Any = build("mla", VARIANTS[2])
    to_latents: list[int] = []
    attend = ours._attend_to_latents
    monkeypatch.setattr(ours, "_attend_to_latents", lambda *args: to_latents.append(1) or attend(*args))
    rank, nope, rope, value = 32, 4, 4, 8
    for length in range(1, 12):
        to_latents.clear()
        positions = torch.arange(length).unsqueeze(0)
        cache = ours.init_cache(1, 16, torch.float32, torch.device("cpu"))
        ours(stream(1, length), TokenLayout(1, length, positions=positions), cache)
        absorbed = length * (rank + rope + rank)
        expanded = rank * (nope + value) + length * (nope + rope + value)
        assert bool(to_latents) == (absorbed < expanded), length
