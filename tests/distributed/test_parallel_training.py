"""Training spread over ranks = training in one process: losses of several steps and the first step's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.tolerances import BF16, FP32, assert_close

# Every mixer with its options on, so that shared and split biases, norms and convolutions are all there.
MIXERS: dict[str, dict[str, Any]] = {
    "gla": {"type": "gla", "conv_size": 4, "qkv_bias": True},
    "gated_deltanet": {"type": "gated_deltanet"},
    "mamba2": {"type": "mamba2", "head_dim": 16, "num_groups": 2, "state_size": 16},
    "attention": {"type": "attention", "num_kv_heads": 2, "qk_norm": True, "output_gate": True},
}
STEPS = 3


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model in fp32 with micro-batches of two sequences, two of them a step in one process."""
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
        "optimizer": {"lr": 1e-3},
        "data": {"tokenizer": {"type": "bytes"}},
    }
    base["model"] |= model
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base | {"parallel": parallel}


HYBRID = {"pattern": "LN", "symbols": {"N": {"ffn": "dense"}}}
DENSE = {"ffn": "dense"}
MODELS: dict[str, dict[str, Any]] = {name: {"mixer": mixer} for name, mixer in MIXERS.items()}
MODELS |= {"hybrid": HYBRID, "dense": DENSE}
BF16_TRAINING = {"training": {"dtype": "bf16"}}
TP2 = {"tensor": 2}

# name -> (model, parallel sizes, other sections)
TWO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{name}-tp2": (name, TP2, {}) for name in MIXERS},
    **{f"{name}-pp2": (name, {"pipeline": 2}, {}) for name in MIXERS},
    "gla-dp2": ("gla", {}, {}),
    "gla-dp2-no-zero": ("gla", {}, {"optimizer": {"distributed": False}}),
    "gla-dp2-overlap": ("gla", {}, {"optimizer": {"overlap": True}}),
    "gla-ep2": ("gla", {"expert": 2}, {}),
    "gla-ep2-allgather": ("gla", {"expert": 2}, {"allgather": {}}),
    "gla-tp2-ep2": ("gla", {"tensor": 2, "expert": 2}, {}),
    "gla-tp2-etp2": ("gla", {"tensor": 2, "expert_tensor": 2}, {}),
    "gla-tp2-recompute": ("gla", TP2, {"training": {"recompute": "full"}}),
    "dense-tp2-replicated": ("dense", TP2 | {"tensor_sequence": False}, {}),
}
FOUR: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hybrid-tp2-ep2-dp2": ("hybrid", {"tensor": 2, "expert": 2}, {}),
    "hybrid-tp2-ep4": ("hybrid", {"tensor": 2, "expert": 4}, {}),
    "hybrid-tp2-ep2-etp2": ("hybrid", {"tensor": 2, "expert": 2, "expert_tensor": 2}, {}),
    "hybrid-tp2-pp2": ("hybrid", {"tensor": 2, "pipeline": 2}, {}),
    "hybrid-pp2-ep2-overlap": ("hybrid", {"pipeline": 2, "expert": 2}, {"optimizer": {"overlap": True}}),
}


def case(model: str, parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    tree = config(MODELS[model], parallel, **{k: v for k, v in sections.items() if k != "allgather"})
    if "allgather" in sections:
        tree["model"]["moe"] = tree["model"]["moe"] | {"dispatcher": "allgather"}
    return "train", {"config": tree, "steps": STEPS}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    one = run(1, {name: case(name, {}, {}) for name in MODELS} | {"bf16": case("gated_deltanet", {}, BF16_TRAINING)})
    bf16 = {"bf16-tp2-ep2": case("gated_deltanet", {"tensor": 2, "expert": 2}, BF16_TRAINING)}
    two = run(2, {name: case(*spec) for name, spec in TWO.items()} | bf16)
    four = run(4, {name: case(*spec) for name, spec in FOUR.items()})
    return one | two | four


def losses(ranks: list[Any]) -> torch.Tensor:
    """Loss sums of all replicas, per step; replicas of a replica (tensor ranks) must agree."""
    by_replica: dict[int, torch.Tensor] = {}
    for result in ranks:
        if result["last_stage"]:
            value = torch.stack(result["losses"])
            assert_close(value, by_replica.setdefault(result["data_rank"], value), FP32, "tensor ranks' losses")
    return torch.stack(list(by_replica.values())).sum(0)


def gradients(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """Full gradients, put together from every rank's shards; where shards overlap they must agree."""
    full: dict[str, torch.Tensor] = {}
    for result in ranks:
        for name, (shape, offset, value) in result["gradients"].items():
            target = full.setdefault(name, torch.full(shape, float("nan")))
            place = target[tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))]
            if not place.isnan().any():
                assert_close(value, place, FP32, f"replicas of the gradient of {name}")
            place.copy_(value)
    return full


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_equals_one_process(results: dict[str, list[Any]], name: str) -> None:
    reference = results[(TWO | FOUR)[name][0]]
    expected = gradients(reference)
    actual = gradients(results[name])
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(actual[parameter], gradient, FP32, f"gradient of {parameter}")
    assert_close(losses(results[name]), losses(reference), FP32, "losses")
    for rank in results[name]:
        assert_close(torch.tensor(rank["norms"]), torch.tensor(reference[0]["norms"]), FP32, "gradient norms")
        for step, expected_losses in enumerate(reference[0]["router"]):
            assert rank["router"][step] == pytest.approx(expected_losses, rel=FP32)


def test_bf16(results: dict[str, list[Any]]) -> None:
    """bf16 weights and collectives, fp32 gates and gradients: near the same training in one process."""
    reference, ranks = results["bf16"], results["bf16-tp2-ep2"]
    assert_close(losses(ranks), losses(reference), BF16, "losses")
    assert_close(torch.tensor(ranks[0]["norms"]), torch.tensor(reference[0]["norms"]), BF16, "gradient norms")
