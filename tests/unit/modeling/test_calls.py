"""Every module with parameters is called in a forward pass, because Megatron's DDP waits for new weights in calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from tests.unit.modeling.mixers.common import variants

VOCABULARY = 64


def model(config: dict[str, object], *stage: object) -> LanguageModel:
    moe = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16, "shared_gate": True}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "pattern": "LL", "ffn_size": 64, "moe": moe}
    built = LanguageModel(from_dict(Config, {"model": sizes | config}).model, VOCABULARY, Host(), *stage)  # type: ignore[arg-type]
    initialize(built, built.host, 1)
    return built


def not_called(built: LanguageModel, hidden: Tensor | None = None) -> set[str]:
    with_parameters = {name: m for name, m in built.named_modules() if list(m.parameters(recurse=False))}
    left = set(with_parameters)
    for name, module in with_parameters.items():
        module.register_forward_pre_hook(lambda *_, name=name: left.discard(name))
    tokens = torch.arange(32).view(2, 16)
    built(tokens, TokenLayout(2, 16), hidden=hidden, labels=tokens).sum().backward()
    return left


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer(name: str) -> None:
    for variant in variants(name):
        assert not not_called(model({"mixer": {"type": name, **variant}}))


def test_tied_embedding_of_a_last_stage() -> None:
    built = model({"tie_embeddings": True}, range(1, 2), False, True)
    assert not not_called(built, torch.ones(32, 32))
    assert list(dict(built.named_parameters()))[-1] == "embedding.weight"
