"""Assignment of layers to pipeline stages."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from typing import Any

import pytest

from linear_moe.config.schema import Config
from linear_moe.layout.pipeline import balanced, default_split, layer_costs, stage_chunks
from linear_moe.modeling.host import Host
from linear_moe.modeling.model import LanguageModel, crossing
from linear_moe.options.load import from_dict
from linear_moe.plan import make_plan, micro_batches_in_flight


def config(parallel: dict[str, Any], **model: Any) -> Config:
    base = {"num_layers": 8, "pattern": "LLLN * 2", "hidden_size": 32, "ffn_size": 64, "vocab_size": 512}
    training = {"sequence_length": 64, "micro_batch": 1, "global_batch": 8}
    data = {"corpus": "synthetic"}
    return from_dict(Config, {"model": base | model, "parallel": parallel, "training": training, "data": data})


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 8])
def test_balanced_is_the_best_of_all_splits(chunks: int) -> None:
    draw = random.Random(chunks)
    for _ in range(20):
        costs, head = [float(draw.randint(1, 9)) for _ in range(8)], float(draw.randint(0, 20))
        largest = []
        for cuts in combinations(range(1, 8), chunks - 1):
            sums = [sum(costs[a:b]) for a, b in pairwise((0, *cuts, 8))]
            largest.append(max(*sums[:-1], sums[-1] + head, 0.0))
        sizes = balanced(costs, head, chunks)
        assert sum(sizes) == 8 and len(sizes) == chunks and min(sizes) >= 1
        ends = [sum(sizes[:i]) for i in range(chunks + 1)]
        sums = [sum(costs[a:b]) for a, b in pairwise(ends)]
        assert max(*sums[:-1], sums[-1] + head, 0.0) == min(largest)


def stage_costs(costs: list[float], head: float, sizes: list[int], stages: int) -> list[float]:
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    chunks = [sum(costs[a:b]) for a, b in pairwise(ends)]
    chunks[-1] += head
    return [sum(chunks[stage::stages]) for stage in range(stages)]


@pytest.mark.parametrize(("stages", "virtual", "layers"), [(2, 2, 10), (2, 3, 10), (3, 2, 11), (4, 2, 11)])
def test_interleaved_chunks_balance_stages(stages: int, virtual: int, layers: int) -> None:
    """The costliest stage, by the sum of its chunks and of the head in the last one, is as cheap as possible."""
    for head in (0.0, 1.5, 3.0, 5.0):
        costs = [1.0] * layers
        cheapest = min(
            max(stage_costs(costs, head, [b - a for a, b in pairwise((0, *cuts, layers))], stages))
            for cuts in combinations(range(1, layers), stages * virtual - 1)
        )
        sizes = balanced(costs, head, stages, virtual)
        assert sum(sizes) == layers and len(sizes) == stages * virtual and min(sizes) >= 1
        assert max(stage_costs(costs, head, sizes, stages)) == cheapest


def test_interleaved_chunks_are_alike() -> None:
    """Chunks have similar costs, because the pipeline fills and drains at the pace of the costliest chunk."""
    assert balanced([1.0] * 12, 0.0, 2, 2) == [3, 3, 3, 3]
    assert balanced([55.2, 55.2, 55.2, 56.8] * 3, 311.0, 2, 2) == [3, 2, 6, 1]


def test_equal_layers_are_shared_out_evenly() -> None:
    assert balanced([1.0] * 8, 0.0, 4) == [2, 2, 2, 2]
    assert sorted(balanced([1.0] * 10, 0.0, 4)) == [2, 2, 3, 3]
    assert balanced([1.0] * 8, 2.0, 2) == [5, 3]
    assert balanced([1.0] * 200, 1.5, 64)[-1] < 3


def test_the_head_and_expensive_layers_count() -> None:
    assert default_split(config({"pipeline": 2}, vocab_size=128, ffn="dense")) == [4, 4]
    assert default_split(config({"pipeline": 2}, vocab_size=2**20, ffn="dense")) == [7, 1]
    wide = {"M": {"mixer": {"type": "gla"}, "ffn": "moe"}}
    moe = {"num_experts": 4, "top_k": 4, "expert_ffn_size": 4096}
    experts_first = config({"pipeline": 2}, pattern="MLLLLLLL", ffn="dense", symbols=wide, moe=moe)
    assert default_split(experts_first) == [1, 7]


def test_layers_cost_what_the_whole_model_does() -> None:
    from linear_moe.layout.flops import flops_per_token

    tree = config({}, ffn="moe")
    head = 2.0 * 512 * 32
    assert 3 * (sum(layer_costs(tree)) + head) == pytest.approx(flops_per_token(tree))


def test_chunks_are_dealt_in_turn() -> None:
    tree = config({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 2, 3, 2]})
    chunks = [stage_chunks(tree, stage) for stage in range(2)]
    assert [[[*chunk.layers] for chunk in stage] for stage in chunks] == [[[0], [3, 4, 5]], [[1, 2], [6, 7]]]
    assert [[(chunk.first, chunk.last) for chunk in stage] for stage in chunks] == [
        [(True, False), (False, False)],
        [(False, False), (False, True)],
    ]


def test_crossing_begins_after_the_first_layer_that_leaves_something() -> None:
    tree = config({}, pattern="NLNLLLLL", mixer={"type": "rwkv7", "expand_v": 2.0})
    assert [crossing(tree.model, end) for end in (0, 1, 2, None)] == [{}, {}, {"v_first": 64}, {"v_first": 64}]


def test_tied_embeddings_are_on_both_ends_once_in_one_process() -> None:
    model = config({}, tie_embeddings=True).model
    parts = [
        LanguageModel(model, 512, Host(device="meta"), range(a, b), a == 0, b == 8) for a, b in ((0, 3), (3, 6), (6, 8))
    ]
    assert ["embedding.weight" in dict(part.named_parameters()) for part in parts] == [True, False, True]
    assert not any(name.startswith("head") for part in parts for name, _ in part.named_parameters())


def test_plan_counts_what_is_in_flight() -> None:
    """Forward passes that wait are those of Megatron-Core's schedule.

    Stage s of S starts 2 (S - s - 1) + (V - 1) S + 1 forward passes before its first backward pass.
    """
    plain = [micro_batches_in_flight(config({"pipeline": 4}), 8, stage) for stage in range(4)]
    assert plain == [[(4,)], [(3,)], [(2,)], [(1,)]]
    tree = config({"pipeline": 2, "virtual_pipeline": 2})
    # Stage 0: forward 0 0 1 1 0, then backward 1, forward 0, backward 1, forward 1, backward 0, ...
    assert set(micro_batches_in_flight(tree, 8, 0)) == {(3, 2), (4, 1)}
    assert set(micro_batches_in_flight(tree, 8, 1)) == {(2, 1), (3, 0)}
    assert micro_batches_in_flight(tree, 2, 0) == [(2, 2)], "two micro-batches: all wait"
    plain, interleaved = (make_plan(config({"pipeline": 2, "virtual_pipeline": v})).memory for v in (1, 2))
    assert interleaved["activations"] > plain["activations"]
