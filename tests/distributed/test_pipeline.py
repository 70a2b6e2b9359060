"""Pipelines equal one process: uneven and interleaved stages, tied embeddings, tensors that cross stages, other splits.

test_layouts.py has every family of mixers in a pipeline, interleaved too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.distributed.test_parallel_training import gradients
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close

STEPS, FEW = 10, 3
SAVED, RESUMED = 2, 6  # step after which a run is saved, and last step of the run


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model of four layers in fp32, trained on eight sequences a step in micro-batches of two."""
    tree: dict[str, Any] = {
        "model": {
            "hidden_size": 16,
            "num_layers": 4,
            "num_heads": 2,
            "pattern": "LLLL",
            "ffn_size": 32,
            "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16},
        },
        "training": {"sequence_length": 16, "micro_batch": 2, "global_batch": 8, "dtype": "fp32"},
        # Adam's first steps follow the signs of the gradients. With a larger eps, rounding does not decide the step of
        # a gradient near 0.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "data": {"tokenizer": {"type": "bytes"}},
        "parallel": parallel,
    }
    for name, section in {"model": model, **sections}.items():
        tree[name] = tree.get(name, {}) | section
    return tree


MODELS: dict[str, dict[str, Any]] = {
    "moe-tied": {"tie_embeddings": True, "moe": {"shared_ffn_size": 16, "expert_bias": True, "global_aux_loss": 0.01}},
    "dense-tied": {"tie_embeddings": True, "ffn": "dense"},
    "crossing": {"mixer": {"type": "rwkv7"}, "ffn": "dense"},
    # RWKV-7 in the second and fourth layer: the values of the second cross the third layer, which does not use them.
    "late-crossing": {"pattern": "NLNL", "mixer": {"type": "rwkv7", "expand_v": 2.0}, "ffn": "dense"},
    "hybrid": {"pattern": "LNLL", "symbols": {"N": {"ffn": "dense"}}},
}


def steps(model: str) -> int:
    """Number of steps: many where stages share state, such as the experts' bias or two copies of the embedding."""
    return STEPS if model == "moe-tied" else FEW


UNEVEN = {"pipeline": 2, "pipeline_layers": [3, 1]}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
DEEP = {"pipeline": 4}
OVERLAP = {"optimizer": {"overlap": True}}
PLAIN = {"optimizer": {"distributed": False}}
# name -> (model, parallel sizes, other sections)
TWO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{model}-interleaved": (model, INTERLEAVED, {}) for model in MODELS},
    "hybrid-uneven": ("hybrid", UNEVEN, {}),
    "moe-tied-uneven": ("moe-tied", UNEVEN, PLAIN),
    "crossing-uneven": ("crossing", UNEVEN, {}),
    "crossing-interleaved-recompute": ("crossing", INTERLEAVED, {"training": {"recompute": "full"}}),
}
FOUR: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "moe-tied-pp4": ("moe-tied", DEEP, {}),
    "late-crossing-pp4": ("late-crossing", DEEP, {}),
    "dense-tied-interleaved-dp2-overlap": ("dense-tied", INTERLEAVED, OVERLAP),
    # With stages of different sizes, the replicas of the two stages cut the tied embedding at different elements, and
    # with overlap they gather it only when it is used.
    "dense-tied-uneven-dp2-overlap": ("dense-tied", UNEVEN, OVERLAP),
    "dense-tied-tp2-interleaved": ("dense-tied", INTERLEAVED | {"tensor": 2}, {}),
    "hybrid-interleaved-ep2": ("hybrid", INTERLEAVED | {"expert": 2}, OVERLAP),
    "crossing-tp2-interleaved": ("crossing", INTERLEAVED | {"tensor": 2}, {}),
    "crossing-tp2-uneven-replicated": ("crossing", UNEVEN | {"tensor": 2, "tensor_sequence": False}, {}),
}
CASES = TWO | FOUR
# Splits of the layers over stages: one of them saves a run, and all of them resume it.
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "uneven": (2, UNEVEN),
    "interleaved": (2, INTERLEAVED),
    "pp4": (4, DEEP),
}
WRITER = "interleaved"

Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("splits")

    def training(model: str, parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "pipeline", {"config": config(MODELS[model], parallel, **sections), "steps": steps(model)}

    def split(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
        tree = config(MODELS["moe-tied"], SPLITS[name][1]) | {"run": str(root)}
        return "pipeline", {"config": tree, "steps": RESUMED, **options}

    def resumed(world: int) -> dict[str, tuple[str, dict[str, Any]]]:
        names = [name for name, (ranks, _) in SPLITS.items() if ranks == world]
        return {f"resumed-{name}": split(name, load=True) for name in names}

    two = {name: training(*case) for name, case in TWO.items()}
    two["saved"] = split(WRITER, save_at=SAVED, save_to=str(root))
    done = run(2, two | resumed(2))
    done |= run(1, {model: training(model, {}, {}) for model in MODELS} | resumed(1))
    return done | run(4, {name: training(*case) for name, case in FOUR.items()} | resumed(4))


def assert_same(ranks: list[Any], expected: list[dict[str, Any]]) -> None:
    """Asserts that the results of every step and of the validation are the expected ones on every rank."""
    for rank in ranks:
        assert len(rank["results"]) == len(expected)
        for key in ("loss", "gradient_norm", "tokens"):
            actual, wanted = (torch.tensor([float(r[key]) for r in results]) for results in (rank["results"], expected))
            assert_close(actual, wanted, FP32, key)
        for step, wanted_step in zip(rank["results"], expected, strict=True):
            assert step.get("router", {}) == pytest.approx(wanted_step.get("router", {}), rel=FP32)
            assert step.get("routing") == wanted_step.get("routing")


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(results: Results, name: str) -> None:
    model, parallel, _ = CASES[name]
    (reference,), ranks = results[model], results[name]
    assert_gradients_close(gradients(ranks), gradients([reference]), FP32, FP32_GRADIENT_FLOOR)
    assert_same(ranks, reference["results"])
    losses = [result["loss"] for result in reference["results"]]
    assert len(set(losses)) == steps(model) + 1
    chunks = {tuple(chunk) for rank in ranks for chunk in rank["layers"]}
    assert len(chunks) == parallel["pipeline"] * parallel.get("virtual_pipeline", 1)
    assert sorted(layer for chunk in chunks for layer in chunk) == [0, 1, 2, 3]


def test_chunks_are_dealt_in_turn(results: Results) -> None:
    by_stage = {rank["stage"]: rank["layers"] for rank in results["hybrid-interleaved"]}
    assert by_stage == {0: [[0], [2]], 1: [[1], [3]]}
    by_stage = {rank["stage"]: rank["layers"] for rank in results["hybrid-uneven"]}
    assert by_stage == {0: [[0, 1, 2]], 1: [[3]]}


@pytest.mark.parametrize("name", SPLITS)
def test_resumes_in_another_split(results: Results, name: str) -> None:
    went_on = results["saved"][0]["results"][SAVED:]
    ranks = results[f"resumed-{name}"]
    assert all(rank["first"] == SAVED for rank in ranks)
    assert_same(ranks, went_on)
    if name == WRITER:
        assert [rank["results"] for rank in ranks] == [rank["results"][SAVED:] for rank in results["saved"]]
