"""Training on several ranks with dispatchers, recomputation, overlap and bf16 equals training in one process.

Layouts and mixers are tested in test_layouts.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.tolerances import BF16, FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.modeling.mixers.common import variants

STEPS = 3


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model in fp32, with micro-batches of two sequences; one process has two micro-batches a step."""
    base: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "pattern": "LL",
            "ffn_size": 64,
            "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16},
        },
        "training": {"sequence_length": 32, "micro_batch": 2, "global_batch": 4, "dtype": "fp32"},
        # Adam's first steps follow the signs of the gradients. With a larger eps, rounding does not decide the step of
        # a gradient near 0.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "data": {"tokenizer": {"type": "bytes"}},
    }
    base["model"] |= model
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base | {"parallel": parallel}


MODELS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": {"type": name, **variants(name)[0]}} for name in ("gla", "gated_deltanet", "rwkv7", "mom")},
    "hybrid": {"pattern": "LN", "symbols": {"N": {"ffn": "dense"}}},
    "dense": {"ffn": "dense"},
    "tied": {"tie_embeddings": True},
}
BF16_TRAINING = {"training": {"dtype": "bf16"}}
TP2 = {"tensor": 2}
PARTS = {"recompute": "selective", "recompute_modules": ["norm", "core", "experts", "activation", "logits"]}
MIXER = {"recompute": "selective", "recompute_modules": ["norm", "mixer"], "recompute_layers": 1}

# name -> (model, parallel sizes, other sections)
TWO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gla-ep2-alltoall": ("gla", {"expert": 2}, {"alltoall": {}}),
    "gla-tp2-etp2-alltoall": ("gla", TP2 | {"expert_tensor": 2}, {"alltoall": {}}),
    "gla-tp2-recompute": ("gla", TP2, {"training": {"recompute": "full"}}),
    "hybrid-tp2-recompute-parts": ("hybrid", TP2, {"training": PARTS}),
    "dense-tp2-replicated-recompute-parts": ("dense", TP2 | {"tensor_sequence": False}, {"training": PARTS}),
    "rwkv7-tp2-recompute-parts": ("rwkv7", TP2, {"training": PARTS}),
    "rwkv7-tp2-recompute-mixer": ("rwkv7", TP2, {"training": MIXER}),
    "mom-tp2-recompute-mixer": ("mom", TP2, {"training": MIXER}),
    "hybrid-pp2-recompute-overlap": ("hybrid", {"pipeline": 2}, {"training": PARTS, "optimizer": {"overlap": True}}),
    "gla-dp2-recompute-overlap": ("gla", {}, {"training": PARTS, "optimizer": {"overlap": True}}),
    "tied-tp2-recompute-logits": ("tied", TP2, {"training": PARTS}),
}


def case(model: str, parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    tree = config(MODELS[model], parallel, **{k: v for k, v in sections.items() if k != "alltoall"})
    if "alltoall" in sections:
        tree["model"]["moe"] = tree["model"]["moe"] | {"dispatcher": "alltoall"}
    return "train", {"config": tree, "steps": STEPS}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    plain = {model: case(model, {}, {}) for model, _, _ in TWO.values()}
    one = run(1, plain | {"bf16": case("gated_deltanet", {}, BF16_TRAINING)})
    two = {name: case(*spec) for name, spec in TWO.items()}
    bf16 = {"bf16-tp2-ep2": case("gated_deltanet", {"tensor": 2, "expert": 2}, BF16_TRAINING)}
    return one | run(2, two | bf16)


def losses(ranks: list[Any]) -> torch.Tensor:
    """Loss sums over all replicas, by step. Asserts that the tensor ranks of a replica agree."""
    by_replica: dict[int, torch.Tensor] = {}
    for result in ranks:
        if result["last_stage"]:
            value = torch.stack(result["losses"])
            assert_close(value, by_replica.setdefault(result["data_rank"], value), FP32, "tensor ranks' losses")
    return torch.stack(list(by_replica.values())).sum(0)


def gradients(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """Full gradients, put together from every rank's shards. Asserts that overlapping shards agree."""
    full: dict[str, torch.Tensor] = {}
    for result in ranks:
        for name, (shape, offset, value) in result["gradients"].items():
            target = full.setdefault(name, torch.full(shape, float("nan")))
            place = target[tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))]
            if not place.isnan().any():
                assert_close(value, place, FP32, f"replicas of the gradient of {name}")
            place.copy_(value)
    return full


@pytest.mark.parametrize("name", TWO)
def test_equals_one_process(results: dict[str, list[Any]], name: str) -> None:
    reference = results[TWO[name][0]]
    assert_gradients_close(gradients(results[name]), gradients(reference), FP32, FP32_GRADIENT_FLOOR)
    assert_close(losses(results[name]), losses(reference), FP32, "losses")
    for rank in results[name]:
        assert_close(torch.tensor(rank["norms"]), torch.tensor(reference[0]["norms"]), FP32, "gradient norms")
        for step, expected_losses in enumerate(reference[0]["router"]):
            assert rank["router"][step] == pytest.approx(expected_losses, rel=FP32)


def test_bf16(results: dict[str, list[Any]]) -> None:
    """Training with bf16 weights and collectives stays near the same training in one process."""
    reference, ranks = results["bf16"], results["bf16-tp2-ep2"]
    assert_close(losses(ranks), losses(reference), BF16, "losses")
    assert_close(torch.tensor(ranks[0]["norms"]), torch.tensor(reference[0]["norms"]), BF16, "gradient norms")
