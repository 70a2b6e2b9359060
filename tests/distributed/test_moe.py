"""Routing spread over ranks equals routing in one process: losses in all scopes, biases, capacity, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linear_moe.modeling.tokens import TokenLayout
from tests.distributed.harness import run
from tests.distributed.test_parallel_training import config, gradients, losses
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close

STEPS = 3
GROUPED = {"num_experts": 8, "top_k": 2, "num_groups": 4, "top_k_groups": 2}
MOE: dict[str, dict[str, Any]] = {
    # All options of DeepSeek-V3's routing, and losses that are large enough to show in the results.
    "v3": GROUPED
    | {"score": "sigmoid", "group_score": "sum_top_2", "expert_bias": True, "bias_update_rate": 0.05, "aux_loss": 0.0}
    | {"sequence_aux_loss": 0.1, "routed_scaling_factor": 2.5},
    "v2": GROUPED
    | {"normalize_top_k": False, "sequence_aux_loss": 0.1, "shared_gate": True}
    | {"overlap_shared_expert": True},
    "mixtral": {"num_experts": 4, "top_k_first": True, "aux_loss": 0.0, "global_aux_loss": 0.1},
    "drop": {"num_experts": 4, "capacity_factor": 1.0},
    "drop-last": {"num_experts": 4, "capacity_factor": 0.75, "drop_policy": "position"},
    "pad": {"num_experts": 4, "capacity_factor": 1.0, "capacity_pad": True, "expert_bias": True},
}
PARALLEL: dict[str, tuple[int, dict[str, int]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2-etp2": (2, {"tensor": 2, "expert_tensor": 2}),
    "etp2": (2, {"expert_tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-ep4": (4, {"tensor": 2, "expert": 4}),
    "tp2-ep2-etp2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
}
MOE["alltoall"] = MOE["v3"] | {"dispatcher": "alltoall"}
COVERED = [
    *(("v3", parallel) for parallel in PARALLEL),
    *(("v2", parallel) for parallel in ("tp2", "ep2")),
    *(("alltoall", parallel) for parallel in ("ep2", "tp2-etp2", "tp2-ep2-etp2")),
    *(("drop", parallel) for parallel in PARALLEL),
    *(("drop-last", parallel) for parallel in ("tp2", "ep2")),
    *(("pad", parallel) for parallel in ("tp2", "ep2", "tp2-etp2", "etp2", "tp2-ep4")),
    *(("mixtral", parallel) for parallel in ("tp2", "tp2-etp2", "pp2")),
]
# Dropless experts on expert ranks alone: (parallel.expert, implementation of experts). Micro-batches have one sequence,
# so that four replicas have the micro-batches of one process.
EXPERT = [(expert, experts) for expert in (1, 2, 4) for experts in ("sequential", "grouped")]
RECOMPUTED = ("v3", "mixtral", "drop")
# Kinds of activation recomputation: whole layers, the channel mixer alone, parts of layers.
FULL = {"recompute": "full", "recompute_modules": ["logits"]}
FFN = {"recompute": "selective", "recompute_modules": ["ffn", "norm"]}
PARTS = {"recompute": "selective", "recompute_modules": ["norm", "core", "experts", "activation", "logits"]}
RECOMPUTED_PARALLEL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "recompute-v3-tp2": ("v3", "tp2", FFN),
    "recompute-v3-ep2": ("v3", "ep2", FULL),
    "recompute-v2-tp2": ("v2", "tp2", PARTS),
    "recompute-mixtral-pp2": ("mixtral", "pp2", FFN),  # one micro-batch is recomputed after the forward pass of another
    "recompute-drop-tp2": ("drop", "tp2", FULL),
    "recompute-drop-pp2": ("drop", "pp2", FFN),
    "recompute-pad-ep2": ("pad", "ep2", FFN),
    "recompute-pad-tp2-etp2": ("pad", "tp2-etp2", PARTS),
}


def case(moe: str, parallel: dict[str, int], **training: Any) -> tuple[str, dict[str, Any]]:
    tree = config({}, parallel, training=training)
    tree["model"]["moe"] = tree["model"]["moe"] | MOE[moe]
    return "train", {"config": tree, "steps": STEPS}


def expert_case(expert: int, experts: str) -> tuple[str, dict[str, Any]]:
    tree = config({}, {"expert": expert}, training={"micro_batch": 1})
    tree["model"]["moe"] = tree["model"]["moe"] | {"num_experts": 8, "aux_loss": 0.1, "experts": experts}
    return "train", {"config": tree, "steps": STEPS}


def expert_cases(world: int) -> dict[str, Any]:
    return {f"ep{expert}-{kind}": expert_case(expert, kind) for expert, kind in EXPERT if expert == world}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    one = {moe: case(moe, {}) for moe in MOE} | {
        f"{moe}-recompute-{how}": case(moe, {}, **options)
        for moe in RECOMPUTED
        for how, options in {"full": FULL, "ffn": FFN}.items()
    }
    trainings = run(
        1,
        one
        | {"mixtral-4": case("mixtral", {}, micro_batch=4), "drop-4": case("drop", {}, micro_batch=4)}
        | expert_cases(1)
        | sequence_losses(1),
    )
    for world in (2, 4):
        sizes = {name: sizes for name, (ranks, sizes) in PARALLEL.items() if ranks == world}
        spread = {f"{moe}-{name}": case(moe, sizes[name]) for moe, name in COVERED if name in sizes}
        if world == 2:
            spread |= {"mixtral-global": case("mixtral", {"expert": 2})} | sequence_losses(2)
            spread |= {n: case(moe, sizes[p], **how) for n, (moe, p, how) in RECOMPUTED_PARALLEL.items()}
        trainings |= run(world, spread | expert_cases(world))
    return trainings


def assert_equal_training(ranks: list[Any], reference: list[Any]) -> None:
    assert_gradients_close(gradients(ranks), gradients(reference), FP32, FP32_GRADIENT_FLOOR)
    assert_close(losses(ranks), losses(reference), FP32, "losses")
    for rank in ranks:
        for step, (routing, expected) in enumerate(zip(rank["routing"], reference[0]["routing"], strict=True)):
            assert rank["router"][step] == pytest.approx(reference[0]["router"][step], rel=FP32)
            assert [layer.layer for layer in routing] == [0, 1]
            assert routing == expected  # exactly: loads are integers, and all ranks update biases alike


@pytest.mark.parametrize(("moe", "parallel"), COVERED, ids=lambda name: name)
def test_equals_one_process(results: dict[str, list[Any]], moe: str, parallel: str) -> None:
    assert_equal_training(results[f"{moe}-{parallel}"], results[moe])


@pytest.mark.parametrize(("expert", "experts"), EXPERT[1:])
def test_experts_spread_alone(results: dict[str, list[Any]], expert: int, experts: str) -> None:
    """Experts on 1, 2 and 4 ranks, computed in a loop or grouped, equal the loop in one process."""
    ranks = results[f"ep{expert}-{experts}"]
    name = "layers.0.ffn.experts.down_proj"
    for i, rank in enumerate(ranks):
        _, (first, *_), gradient = rank["gradients"][name]
        assert (first, len(gradient)) == (8 // expert * i, 8 // expert), "every rank has experts of its own"
    assert_equal_training(ranks, results["ep1-sequential"])


@pytest.mark.parametrize("moe", RECOMPUTED)
@pytest.mark.parametrize("how", ["full", "ffn"])
def test_recomputed_layers_count_once(results: dict[str, list[Any]], moe: str, how: str) -> None:
    assert_equal_training(results[f"{moe}-recompute-{how}"], results[moe])


@pytest.mark.parametrize("name", RECOMPUTED_PARALLEL)
def test_recomputed_over_ranks(results: dict[str, list[Any]], name: str) -> None:
    """Training on several ranks with recomputation is that of one process which keeps all activations."""
    assert_equal_training(results[name], results[RECOMPUTED_PARALLEL[name][0]])


def test_global_loss_sees_all_replicas(results: dict[str, list[Any]]) -> None:
    """Two replicas with half a batch each and the global loss train like one process with the whole batch at once.

    The loss sees all choices of the step so far, on all replicas. So layouts differ only if they route other
    micro-batches at the same time.
    """
    ranks, whole = results["mixtral-global"], results["mixtral-4"]
    name = "global_balancing_loss"
    for rank in ranks:
        for step, expected in zip(rank["router"], whole[0]["router"], strict=True):
            assert step[name] == pytest.approx(expected[name], rel=FP32)
            assert expected[name] == pytest.approx(expected["load_balancing_loss"], rel=FP32)
        assert rank["routing"] == whole[0]["routing"]
    local = results["mixtral"][0]["router"][0]  # in one process, the first of two micro-batches sees its own load only
    assert local[name] != pytest.approx(local["load_balancing_loss"], rel=FP32)
    assert_gradients_close(gradients(ranks), gradients(whole), FP32, FP32_GRADIENT_FLOOR)
    assert_close(losses(ranks), losses(whole), FP32, "losses")


def test_biases_follow_the_load(results: dict[str, list[Any]]) -> None:
    """Each step adds the update rate to the biases of experts below the mean load, and takes it from the others."""
    biases = torch.zeros(2, 8)
    for step in results["v3"][0]["routing"]:
        for layer in step:
            biases[layer.layer] += 0.05 * torch.sign(1 - torch.tensor(layer.load))
            assert_close(torch.tensor(layer.bias), biases[layer.layer], FP32, "bias")
    assert biases.abs().sum() > 0


def test_idle_steps(results: dict[str, list[Any]]) -> None:
    """`idle` counts the steps since an expert was last chosen, 0 if it was chosen in this step."""
    before = [[0] * 8, [0] * 8]
    for step in results["v3"][0]["routing"]:
        for layer in step:
            expected = [0 if load else idle + 1 for load, idle in zip(layer.load, before[layer.layer], strict=True)]
            assert layer.idle == expected
            before[layer.layer] = layer.idle
            assert sum(layer.load) == pytest.approx(8)


def test_dropped_fraction(results: dict[str, list[Any]]) -> None:
    for name, least in (("drop", 0.01), ("drop-last", 0.25), ("pad", 0.01)):
        for step in results[name][0]["routing"]:
            assert all(least <= layer.dropped < 0.6 for layer in step)
    # With one micro-batch a step, all choices above the capacity are dropped, and here the capacity is the mean load.
    for step in results["drop-4"][0]["routing"]:
        for layer in step:
            assert layer.dropped == pytest.approx(sum(max(load - 1, 0) for load in layer.load) / 4)
    assert all(layer.dropped == 0 for step in results["v3"][0]["routing"] for layer in step)


LENGTHS = (5, 0, 3, 8)
LAYOUTS = {
    "rows": TokenLayout(4, 4),
    "packed": TokenLayout(1, 16, torch.tensor([0, 5, 5, 8, 16]), max_document=8),
}
LOGITS = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


def sequence_losses(world: int) -> dict[str, Any]:
    tree = config({}, {"tensor": world})
    tree["model"]["moe"] = tree["model"]["moe"] | {"aux_loss": 0.0, "z_loss": 0.0, "sequence_aux_loss": 0.5}
    return {
        f"sequence-{name}-{world}": ("router_losses", {"config": tree, "logits": LOGITS, "layout": layout})
        for name, layout in LAYOUTS.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2])
def test_sequence_loss(results: dict[str, list[Any]], name: str, world: int) -> None:
    """The sequence loss is DeepSeek-V2's equations 23 to 25 in every sequence; documents weigh by their tokens."""
    logits = LOGITS.clone().requires_grad_()
    total = torch.zeros(())
    for part in logits.split(LENGTHS if name == "packed" else (4,) * 4):
        if len(part):
            scores = part.softmax(1)
            f = 4 / (2 * len(part)) * torch.bincount(part.topk(2).indices.flatten(), minlength=4)
            total = total + len(part) * (f * scores.mean(0)).sum()
    (0.5 * total).backward()
    ranks = results[f"sequence-{name}-{world}"]
    assert_close(torch.cat([rank["gradient"] for rank in ranks]), logits.grad, FP32, "gradient of the logits")
    for rank in ranks:
        assert rank["logged"]["sequence_balancing_loss"] == pytest.approx(total.item() / 16, rel=FP32)
