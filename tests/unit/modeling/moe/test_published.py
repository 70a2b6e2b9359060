"""Whole layers against transformers' Mixtral, Qwen2-MoE, DeepSeek-V2 and -V3 blocks with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.ffn import MoE
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.moe.config import MoEConfig
from tests.tolerances import FP32, assert_close

HIDDEN, EXPERTS, FFN, SHARED = 32, 12, 16, 24
QWEN = {"normalize_top_k": False, "shared_ffn_size": SHARED, "shared_gate": True}
DEEPSEEK = {"normalize_top_k": False, "shared_ffn_size": 2 * FFN, "routed_scaling_factor": 2.5, "top_k": 3}
GROUPS = {"num_groups": 4, "top_k_groups": 2}
THEIR_DEEPSEEK = {"moe_intermediate_size": FFN, "n_routed_experts": EXPERTS, "n_shared_experts": 2}
THEIR_DEEPSEEK |= {"num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
THEIR_GROUPS = {"n_group": 4, "topk_group": 2}
V3 = {"score": "sigmoid", "group_score": "sum_top_2", "expert_bias": True}
MIXTRAL = {"intermediate_size": FFN, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
THEIR_QWEN = {"moe_intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": 2}
THEIR_QWEN |= {"shared_expert_intermediate_size": SHARED}

# Name -> transformers' module and block, its configuration, and our configuration.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral:Mixtral", "SparseMoeBlock", MIXTRAL, {"top_k_first": True}),
    "mixtral-normalised": ("mixtral:Mixtral", "SparseMoeBlock", MIXTRAL, {}),
    "qwen2_moe": ("qwen2_moe:Qwen2Moe", "SparseMoeBlock", THEIR_QWEN | {"norm_topk_prob": False}, QWEN),
    "qwen2_moe-normalised": (
        "qwen2_moe:Qwen2Moe",
        "SparseMoeBlock",
        THEIR_QWEN | {"norm_topk_prob": True},
        QWEN | {"normalize_top_k": True},
    ),
    "deepseek_v2-lite": ("deepseek_v2:DeepseekV2", "Moe", THEIR_DEEPSEEK | {"topk_method": "greedy"}, DEEPSEEK),
    "deepseek_v2": (
        "deepseek_v2:DeepseekV2",
        "Moe",
        THEIR_DEEPSEEK | THEIR_GROUPS | {"topk_method": "group_limited_greedy"},
        DEEPSEEK | GROUPS,
    ),
    "deepseek_v3": (
        "deepseek_v3:DeepseekV3",
        "MoE",
        THEIR_DEEPSEEK | THEIR_GROUPS | {"norm_topk_prob": True},
        DEEPSEEK | GROUPS | V3 | {"normalize_top_k": True},
    ),
    "deepseek_v3-unnormalised": (
        "deepseek_v3:DeepseekV3",
        "MoE",
        THEIR_DEEPSEEK | {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        DEEPSEEK | V3 | {"group_score": "max"},
    ),
}


def published(model: str, block: str, config: dict[str, Any]) -> nn.Module:
    module, _, name = model.partition(":")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    return getattr(modeling, name + block)(getattr(configuration, f"{name}Config")(hidden_size=HIDDEN, **config))


def names(ours: str) -> str:
    """Transformers' name of one of our parameters; shared experts are one FFN in transformers and here."""
    if ours == "router.expert_bias":
        return "gate.e_score_correction_bias"
    return ours.replace("router.", "gate.")


def tensors(theirs: nn.Module) -> dict[str, Tensor]:
    state = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    return {name.replace("shared_experts.", "shared_expert."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_published_one(name: str, experts: str) -> None:
    """Outputs and gradients of all weights and of the input equal those of the published block."""
    model, block, their_config, fields = CASES[name]
    theirs = published(model, block, their_config)
    moe = MoEConfig(**{"num_experts": EXPERTS, "top_k": 2, "expert_ffn_size": FFN, "experts": experts} | fields)
    config = ModelConfig(hidden_size=HIDDEN, moe=moe, init_std=0.3)
    host = Host(torch.float32)
    ours = MoE(config, layer_dims(config, 0), host)
    initialize(ours, host, seed=1)
    if ours.router.expert_bias is not None:  # the bias is so large that it changes the choice
        ours.router.expert_bias.data.copy_(torch.linspace(-0.3, 0.3, EXPERTS).roll(5))
    state = tensors(theirs)
    weights = {names(key): value for key, value in ours.named_parameters()}
    assert state.keys() == weights.keys()
    with torch.no_grad():
        for key, value in weights.items():
            state[key].copy_(value.reshape(state[key].shape))

    x = torch.randn(2, 30, HIDDEN, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = ours(inputs[0].flatten(0, 1)).view_as(x)
    expected = theirs(inputs[1])
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(out, expected, FP32, "output")
    factor = torch.linspace(-1, 1, out.numel()).view_as(out)
    for result in (out, expected):
        (result * factor).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, FP32, "gradient of the input")
    for key, value in weights.items():
        if value.requires_grad:
            assert_close(value.grad, state[key].grad.reshape(value.shape), FP32, f"gradient of {key}")
    if moe.expert_bias:
        plain = ours.router.forward(x.flatten(0, 1))[1]
        ours.router.expert_bias.data.zero_()
        assert (plain != ours.router.forward(x.flatten(0, 1))[1]).any()
