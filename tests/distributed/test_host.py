"""The Megatron host's collectives and dispatchers on strided tensors, and on ranks that receive no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.distributed.test_parallel_training import config
from tests.tolerances import FP32, assert_close

EXPERTS, TOKENS, WIDTH = 4, 8, 32


def routing(only: int | None) -> torch.Tensor:
    """Routing map of two random experts per token; with `only`, all tokens go to experts `only` and `only` + 1.

    Ranks that have neither of these two experts then get no token.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    if only is not None:
        chosen = torch.tensor([only, only + 1]).expand(TOKENS, 2)
    return torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)


ROUTINGS = {"mixed": routing(None), "first-rank": routing(0), "second-rank": routing(2)}
FACTORS = [torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)]
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    replicated = config({"ffn": "dense"}, {"tensor": 2, "tensor_sequence": False})
    cases: dict[str, Any] = {
        "strided": ("strided_gradients", {"config": replicated, "weight": torch.randn(8, WIDTH), "factors": FACTORS})
    }
    for score in ("softmax", "sigmoid"):
        tree = config({}, {"tensor": 2})
        tree["model"]["moe"] = tree["model"]["moe"] | {"score": score, "aux_loss": 0.1, "z_loss": 0.01}
        cases[f"losses-{score}"] = ("router_losses", {"config": tree, "logits": X[0, :, :EXPERTS]})
    loss = {"config": config({}, {"tensor": 2}), "x": X[0], "weight": FACTORS[0]}
    cases["auxiliary"] = ("auxiliary_loss", loss)
    for dispatcher in ("alltoall", "allgather"):
        tree = config({}, {"expert": 2})
        tree["model"]["moe"] = tree["model"]["moe"] | {"dispatcher": dispatcher}
        for name, chosen in ROUTINGS.items():
            cases[f"{dispatcher}-{name}"] = ("dispatch", {"config": tree, "x": list(X), "routing_map": [chosen] * 2})
    return run(2, cases)


def test_sums_over_tensor_ranks_of_strided_tensors(results: dict[str, list[Any]]) -> None:
    for rank in results["strided"]:
        assert_close(rank["transposed"], sum(FACTORS).T, FP32, "gradient of a shared weight")
        assert_close(rank["expanded"], sum(FACTORS).sum().expand(8, WIDTH), FP32, "gradient of a region's input")
        assert_close(rank["left"], sum(FACTORS).T, FP32, "output of a region")


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_dispatch(results: dict[str, list[Any]], dispatcher: str, name: str) -> None:
    chosen = ROUTINGS[name]
    factors = torch.arange(1.0, EXPERTS + 1)
    for rank, result in enumerate(results[f"{dispatcher}-{name}"]):
        scale = (chosen * factors).sum(1, keepdim=True) / 2  # every token goes to two experts, with weights of a half
        y = X[rank] * scale
        assert_close(result["y"], y, FP32, "outputs")
        assert_close(result["dx"], 2 * y * scale, FP32, "gradient of the tokens")
        dprobs = (2 * y * X[rank]).sum(1, keepdim=True) * factors * chosen
        assert_close(result["dprobs"], dprobs, FP32, "gradient of the probabilities")
        assert result["counts"].tolist() == (2 * chosen.sum(0))[2 * rank : 2 * rank + 2].tolist()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_losses(results: dict[str, list[Any]], score: str) -> None:
    """The losses are Switch Transformer's equation 4 and ST-MoE's equation 5, times the tokens of the micro-batch."""
    logits = X[0, :, :EXPERTS].clone().requires_grad_()
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    share = torch.bincount(logits.topk(2).indices.flatten(), minlength=EXPERTS) / (2 * TOKENS)
    balance = EXPERTS * (share * (scores / scores.sum(1, keepdim=True)).mean(0)).sum()
    z = logits.logsumexp(1).square().mean()
    (TOKENS * (0.1 * balance + 0.01 * z)).backward()
    ranks = results[f"losses-{score}"]
    assert_close(torch.cat([rank["gradient"] for rank in ranks]), logits.grad, FP32, "gradient of the logits")
    for rank in ranks:
        assert rank["logged"]["load_balancing_loss"] == pytest.approx(balance.item(), rel=FP32)
        assert rank["logged"]["router_z_loss"] == pytest.approx(z.item(), rel=FP32)


def test_auxiliary_loss(results: dict[str, list[Any]]) -> None:
    """A mixer's loss counts once, not once per tensor rank, and weighs as a mean over the micro-batch's tokens."""
    x, weight = X[0].clone().requires_grad_(), FACTORS[0].clone().requires_grad_()
    value = (x @ weight).square().mean()
    (0.1 * value * TOKENS).backward()
    ranks = results["auxiliary"]
    assert_close(torch.cat([rank["dx"] for rank in ranks]), x.grad, FP32, "gradient of the tokens")
    for rank in ranks:
        assert_close(rank["dweight"], weight.grad, FP32, "gradient of the shared weight")
        logged, again = rank["logged"]
        assert logged == pytest.approx({"some_loss": value.item(), "other_loss": value.item() + 1}, rel=FP32)
        assert again == {}
