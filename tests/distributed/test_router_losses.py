"""Weights of routers' losses: in every layout they are means over all tokens of a step, counted or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from tests.distributed.harness import run
from tests.distributed.masked import micro_batches
from tests.distributed.test_parallel_training import gradients
from tests.distributed.test_pipeline import config
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_gradients_close

MODEL: dict[str, Any] = {
    "pattern": "LMLL",
    "symbols": {"M": {"mixer": {"type": "mom", "balance_loss": 0.5}, "ffn": "dense"}},
    "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "aux_loss": 0.5, "z_loss": 0.3},
}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
AGAIN = {"training": {"recompute": "selective", "recompute_modules": ["mixer", "ffn"]}}
# name -> (parallel sizes, other sections) on four processes
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp4": ({}, {}),
    "tp2-pp2x2-recompute": (INTERLEAVED | {"tensor": 2}, AGAIN),
    "dp2-pp2-ep2": ({"pipeline": 2, "expert": 2}, {}),
}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    def case(parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "pipeline", {"config": config(MODEL, parallel, **sections), "steps": 1}

    return run(1, {"one": case({}, {})}) | run(4, {name: case(*layout) for name, layout in LAYOUTS.items()})


class RecordingHost(Host):
    """Host that adds up the auxiliary losses of a forward pass: means over its tokens, times their coefficients."""

    total: Tensor | float = 0.0

    def router_losses(
        self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int, layout: TokenLayout
    ) -> Tensor:
        load = F.one_hot(index, 4).float().mean((0, 1))  # Switch Transformer's f_i, as shares of all choices
        balance = 4 * (load * logits.softmax(-1).mean(0)).sum()
        z = logits.exp().sum(-1).log().square().mean()
        self.total = self.total + config.aux_loss * balance + config.z_loss * z
        return weights

    def auxiliary_loss(self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: int) -> Tensor:
        self.total = self.total + coefficient * value
        return carrier


def expected() -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy of the counted tokens plus the mean of the micro-batches' other losses."""
    tree = from_dict(Config, config(MODEL, {}))
    host = RecordingHost()
    model = LanguageModel(tree.model, vocab_size(tree), host)
    initialize(model, host, tree.training.seed)
    batches = list(micro_batches(tree, 0, 0, 1))
    counted = sum(batch["loss_mask"].sum() for batch in batches)
    assert counted < 0.6 * sum(batch["loss_mask"].numel() for batch in batches)
    for batch in batches:
        host.total = 0.0
        logits = model(batch["tokens"], TokenLayout(*batch["tokens"].shape))
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        ((losses * batch["loss_mask"].flatten()).sum() / counted + host.total / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_means_over_all_tokens(results: dict[str, list[Any]], name: str) -> None:
    assert_gradients_close(gradients(results[name]), expected(), FP32, FP32_GRADIENT_FLOOR)
