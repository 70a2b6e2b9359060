"""Training spread over ranks is training in one process, for every mixer: weights, gradients, losses, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.config.load import from_dict
from linear_moe.config.schema import ModelConfig
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from tests.distributed.harness import run
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.mixers.common import variants

STEPS = 10
VOCAB = 12  # also the mean length of a document
Results = dict[str, list[Any]]

# Losses of the router that make a visible difference, and a choice that follows the load.
ROUTER = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16, "shared_gate": True}
ROUTER |= {"score": "sigmoid", "expert_bias": True, "bias_update_rate": 0.02, "z_loss": 0.05}
LOCAL = ROUTER | {"aux_loss": 0.3, "sequence_aux_loss": 0.3}
GLOBAL = ROUTER | {"aux_loss": 0.0, "sequence_aux_loss": 0.3, "global_aux_loss": 0.3}


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model in fp32 on packed documents; two micro-batches a step in one process."""
    base: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "pattern": "LL",
            "ffn_size": 32,
            "vocab_size": VOCAB,
            "init_std": 0.1,
            "moe": LOCAL,
        },
        "training": {"sequence_length": 24, "micro_batch": 2, "global_batch": 4, "dtype": "fp32", "steps": 100},
        # Adam's first steps are signs of the gradients, and rounding decides the sign of one that vanishes.
        "optimizer": {"lr": 3e-3, "eps": 1e-4, "clip": 0.5},
        "schedule": {"warmup_steps": 4},
        "data": {"corpus": "synthetic", "isolate_documents": True},
    }
    base["training"]["eval_batches"] = 1
    base["model"] |= model
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base | {"parallel": parallel}


def mixer_model(name: str, which: int, **model: Any) -> dict[str, Any]:
    return {"mixer": {"type": name, **variants(name)[which]}, **model}


def fits_stages(model: dict[str, Any]) -> bool:
    """Whether pipeline stages can share out the layers of this model's mixer."""
    mixer = model["mixer"]
    return not mixer_class(mixer["type"]).crosses_layers(from_dict(ModelConfig, {"mixer": mixer}).mixer)


NAMES = sorted(MIXERS)
# Every mixer alone with experts and its options on, and plain in a dense hybrid.
PURE = {f"{name}-pure": mixer_model(name, -1) for name in NAMES}
DENSE = {f"{name}-dense": mixer_model(name, 0, pattern="LN", ffn="dense") for name in NAMES}
# The first of every family in a hybrid with experts and a dense layer.
FAMILIES = {mixer_class(name).family: name for name in reversed(NAMES)}
HYBRID_PATTERN = {"pattern": "LNLD", "num_layers": 4, "symbols": {"D": {"ffn": "dense"}}}
HYBRID = {f"{name}-hybrid": mixer_model(name, 0) | {"pattern": "LN"} for name in sorted(FAMILIES.values())}
GLOBAL_MODEL = {"gla-global": mixer_model("gla", 0, moe=GLOBAL)}
MODELS: dict[str, dict[str, Any]] = PURE | DENSE | HYBRID | GLOBAL_MODEL

PLAIN = {"optimizer": {"distributed": False}}
OVERLAP = {"optimizer": {"overlap": True}}
# name -> (ranks, replicas of the model, parallel sizes, other sections)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, 1, {"tensor": 2}, {}),
    "tp2-replicated": (2, 1, {"tensor": 2, "tensor_sequence": False}, {}),
    "pp2": (2, 1, {"pipeline": 2}, {}),
    "ep2": (2, 2, {"expert": 2}, {}),
    "tp2-ep2": (2, 1, {"tensor": 2, "expert": 2}, {}),
    "tp2-etp2": (2, 1, {"tensor": 2, "expert_tensor": 2}, {}),
    "dp2": (2, 2, {}, {}),
    "dp2-plain": (2, 2, {}, PLAIN),
    "dp2-overlap": (2, 2, {}, OVERLAP),
    "dp2-plain-overlap": (2, 2, {}, {"optimizer": {"distributed": False, "overlap": True}}),
    "ep2-etp2": (4, 4, {"expert": 2, "expert_tensor": 2}, {}),
    "tp2-pp2-ep2": (4, 1, {"tensor": 2, "pipeline": 2, "expert": 2}, {}),
    "ep2-dp2-overlap": (4, 4, {"expert": 2}, OVERLAP),
    "tp2-ep2-dp2": (4, 2, {"tensor": 2, "expert": 2}, {}),
}
EIGHT = {"training": {"global_batch": 8}}


def covered() -> list[tuple[str, str]]:
    """Which model runs in which layouts."""
    pairs = [(name, "tp2") for name in PURE]
    pairs += [(name, "pp2") for name, model in PURE.items() if fits_stages(model)]
    pairs += [(name, "tp2-replicated") for name in DENSE]
    for name, model in (HYBRID | GLOBAL_MODEL).items():
        layouts = [layout for layout in LAYOUTS if layout != "tp2-replicated"]
        if name not in ("gla-global", "based-hybrid"):  # every option of data parallelism once
            layouts = ["ep2", "dp2", "ep2-etp2", "tp2-pp2-ep2"]
        pairs += [(name, layout) for layout in layouts if fits_stages(model) or "pp2" not in layout]
    return pairs


COVERED = covered()


def sections_of(model: str, layout: dict[str, Any]) -> dict[str, Any]:
    return layout | (EIGHT if model in HYBRID | GLOBAL_MODEL else {})


def reference_name(model: str, replicas: int) -> str:
    """A loss of all replicas' load sees as much at a time as one process with their micro-batches merged."""
    return f"{model}-of-{replicas}" if model in GLOBAL_MODEL else model


def references() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for model, layout in COVERED:
        replicas = LAYOUTS[layout][1] if model in GLOBAL_MODEL else 1
        tree = config(MODELS[model], {}, **sections_of(model, {}))
        tree["training"]["micro_batch"] *= replicas
        cases[reference_name(model, replicas)] = "follow", {"config": tree, "steps": STEPS, "replicas": replicas}
    return cases


def spread(world: int) -> dict[str, Any]:
    cases = {}
    for model, layout in COVERED:
        ranks, _, parallel, sections = LAYOUTS[layout]
        if ranks == world:
            tree = config(MODELS[model], parallel, **sections_of(model, sections))
            cases[f"{model}-{layout}"] = "follow", {"config": tree, "steps": STEPS}
    return cases


@pytest.fixture(scope="module")
def results() -> Results:
    return run(1, references()) | run(2, spread(2)) | run(4, spread(4))


def together(ranks: list[Any], key: str) -> dict[str, Tensor]:
    """Full tensors from every rank's pieces; where two hold the same elements, they are the same numbers."""
    full: dict[str, Tensor] = {}
    for rank in ranks:
        for name, (shape, index, value) in rank[key].items():
            flat = full.setdefault(name, torch.full(shape, torch.nan)).view(-1)
            known = flat[index]
            assert torch.equal(torch.where(known.isnan(), value, known), value), f"replicas of {key} {name} differ"
            flat[index] = value
    return full


def numbers(result: dict[str, Any]) -> dict[str, Tensor]:
    found = {key: torch.tensor([step[key] for step in result["steps"]]) for key in ("loss", "tokens", "gradient_norm")}
    return found | {"validation": torch.tensor(result["validation"])}


def assert_same_steps(result: dict[str, Any], expected: dict[str, Any], without: str = "") -> None:
    actual, reference = numbers(result), numbers(expected)
    for key, value in reference.items():
        assert_close(actual[key].double(), value.double(), 0.0 if key == "tokens" else FP32, key)
    for step, other in zip(result["steps"], expected["steps"], strict=True):
        router = {key: value for key, value in other["router"].items() if key != without}
        assert {key: step["router"][key] for key in router} == pytest.approx(router, rel=FP32)
        assert step["routing"] == other["routing"]  # whole numbers; the biases, too, are equal on all ranks


@pytest.mark.parametrize(("model", "layout"), COVERED, ids=lambda name: name)
def test_equals_one_process(results: Results, model: str, layout: str) -> None:
    ranks, (reference,) = results[f"{model}-{layout}"], results[reference_name(model, LAYOUTS[layout][1])]
    initial, expected = together(ranks, "initial"), together([reference], "initial")
    assert initial.keys() == expected.keys()
    assert all(torch.equal(initial[name], value) for name, value in expected.items())
    actual, expected = together(ranks, "gradients"), together([reference], "gradients")
    assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)
    for rank in ranks:
        # How its own micro-batches are balanced depends on how many there are.
        assert_same_steps(rank, reference, "load_balancing_loss" if model in GLOBAL_MODEL else "")
    final, expected = together(ranks, "final"), together([reference], "final")
    for name, value in expected.items():
        assert_close(final[name], value, 10 * FP32, f"{name} after {STEPS} steps")
