"""The memory of a rank that `linear-moe plan` computes is the memory that the ranks of real layouts hold."""

from __future__ import annotations

from typing import Any

import pytest

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.processes import parallel_layout
from linear_moe.options.load import from_dict
from linear_moe.plan import memory as plan_memory
from linear_moe.plan.activations import activation_bytes
from linear_moe.plan.memory import state_bytes
from linear_moe.plan.ranks import RankModels, rank_chunks
from tests.distributed.harness import run

PLAIN = {"optimizer": {"distributed": False}}
MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 128, "shared_ffn_size": 64, "expert_bias": True}
SENT = {"model": {"moe": MOE | {"dispatcher": "alltoall"}}}
# name -> (ranks, parallel sizes, other sections)
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "dp2": (2, {}, {}),
    "dp2-plain": (2, {}, PLAIN),
    "dp2-buckets": (2, {}, {"optimizer": {"overlap": True}}),
    "dp2-muon": (2, {}, {"optimizer": {"type": "muon", "moments": "bf16"}}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2-etp2": (2, {"tensor": 2, "expert_tensor": 2}, {}),
    "pp2x2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pp2-dp2-tied": (4, {"pipeline": 2}, {"model": {"tie_embeddings": True}}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}, {}),
    "ep2-etp2-alltoall": (4, {"expert": 2, "expert_tensor": 2}, SENT),
    "tp2-pp2-ep2-fp32": (4, {"tensor": 2, "pipeline": 2, "expert": 2}, {"training": {"dtype": "fp32"}}),
    "dp4-fp32-plain": (4, {}, PLAIN | {"training": {"dtype": "fp32"}}),
}
BUCKETS = {"dp2-buckets": 200_000}  # elements of a DDP bucket; other layouts have Megatron-Core's default


def config(parallel: dict[str, int], sections: dict[str, Any]) -> dict[str, Any]:
    """A hybrid model with a dense layer and a shared expert; its vocabulary is so small that logits hardly count."""
    model = {
        "hidden_size": 256,
        "num_layers": 4,
        "pattern": "LNDL",
        "symbols": {"D": {"ffn": "dense"}},
        "ffn_size": 512,
        "moe": MOE,
        "vocab_size": 32,
    } | sections.get("model", {})
    training = {"sequence_length": 64, "micro_batch": 2, "global_batch": 16} | sections.get("training", {})
    rest = {name: section for name, section in sections.items() if name not in ("model", "training")}
    return {"model": model, "parallel": parallel, "training": training, "data": {"corpus": "synthetic"}} | rest


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    cases = {
        name: ("memory", {"config": config(sizes, rest), "bucket": BUCKETS.get(name)})
        for name, (_, sizes, rest) in LAYOUTS.items()
    }
    held: dict[str, list[Any]] = {}
    for world in (2, 4):
        held |= run(world, {name: case for name, case in cases.items() if LAYOUTS[name][0] == world})
    return held


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_what_ranks_hold(results: dict[str, list[Any]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in BUCKETS:
        monkeypatch.setattr(plan_memory, "bucket_size", lambda *_: BUCKETS[name])
    world, sizes, rest = LAYOUTS[name]
    tree = from_dict(Config, config(sizes, rest))
    layout = parallel_layout(tree, world)
    model = RankModels(tree, vocab_size(tree))(tree.parallel)
    for rank in results[name]:
        chunks = rank_chunks(tree, model, rank["stage"])
        planned = state_bytes(tree, layout, chunks, rank["stage"], rank["place"])
        assert planned == {kind: rank[kind] for kind in planned}
        activations = activation_bytes(tree, layout, chunks, rank["stage"])["activations"]
        assert activations == pytest.approx(rank["activations"], rel=0.08)


def test_models_are_freed(results: dict[str, list[Any]]) -> None:
    assert {(name, rank["left"]) for name, ranks in results.items() for rank in ranks if rank["left"]} == set()
