"""Tests that the trainer's steps on two GPUs over NCCL equal those on one, also when resumed in another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.distributed.test_parallel_training import config, gradients
from tests.tolerances import BF16_SAME, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

STEPS, SAVED = 4, 2
# The tests run in fp32. They take softmax attention, which needs no kernels to be compiled, and sequential experts,
# because grouped GEMMs on a GPU are for bf16.
MODEL: dict[str, Any] = {"hidden_size": 64, "num_layers": 4, "pattern": "NNNN", "tie_embeddings": True}
OVERLAP = {"optimizer": {"overlap": True}}
MUON = {"optimizer": {"type": "muon", "overlap": True}}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2-etp2": ({"tensor": 2, "expert_tensor": 2}, {}),
    "tp2-ep2": ({"tensor": 2, "expert": 2}, {}),
    "tp2-replicated": ({"tensor": 2, "tensor_sequence": False}, {"model": {"ffn": "dense"}}),
    "pp2": ({"pipeline": 2}, {}),
    "pp2-interleaved": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "ep2": ({"expert": 2}, OVERLAP),
    "dp2": ({}, OVERLAP),
    "dp2-plain": ({}, {"optimizer": {"distributed": False}}),
    "dp2-muon": ({}, MUON),
}
RESUMED = ("pp2", "dp2", "tp2-ep2")
REFERENCES = {"tp2-replicated": "dense", "dp2-muon": "muon"}  # for all other layouts "one"


def tree(parallel: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    others = {name: section for name, section in sections.items() if name != "model"}
    run_config = config(MODEL | sections.get("model", {}), parallel, **others)
    run_config["model"]["moe"] = run_config["model"]["moe"] | {"experts": "sequential"}
    run_config["training"] = run_config["training"] | {"global_batch": 8}
    return run_config


def training(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return "pipeline", {"config": tree(*LAYOUTS[name]), "steps": STEPS, **options}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = str(tmp_path_factory.mktemp("run"))
    sections: dict[str, Any] = {"one": {}, "dense": {"model": {"ffn": "dense"}}, "muon": MUON}
    one = {name: ("pipeline", {"config": tree({}, section), "steps": STEPS}) for name, section in sections.items()}
    two = {name: training(name) for name in LAYOUTS}
    two["tp2-ep2"] = training("tp2-ep2", save_at=SAVED, save_to=root)
    for name in RESUMED:
        function, arguments = training(name, load=True)
        two[f"resumed-{name}"] = function, arguments | {"config": arguments["config"] | {"run": root}}
    return run(1, one, 100) | run(2, two, 200)


def assert_same(ranks: list[Any], expected: list[dict[str, Any]]) -> None:
    """Asserts that every rank has the expected results of all steps: losses, gradient norms, tokens, router losses."""
    for rank in ranks:
        assert len(rank["results"]) == len(expected)
        for key in ("loss", "gradient_norm", "tokens"):
            actual, wanted = (torch.tensor([float(r[key]) for r in results]) for results in (rank["results"], expected))
            assert_close(actual, wanted, BF16_SAME, key)
        for step, wanted_step in zip(rank["results"], expected, strict=True):
            assert step.get("router", {}) == pytest.approx(wanted_step.get("router", {}), rel=BF16_SAME)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_gpu(results: dict[str, list[Any]], name: str) -> None:
    (reference,), ranks = results[REFERENCES.get(name, "one")], results[name]
    assert_gradients_close(gradients(ranks), gradients([reference]), BF16_SAME, FP32_GRADIENT_FLOOR)
    assert_same(ranks, reference["results"])


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_in_another_layout(results: dict[str, list[Any]], name: str) -> None:
    ranks = results[f"resumed-{name}"]
    assert all(rank["first"] == SAVED for rank in ranks)
    assert_same(ranks, results["tp2-ep2"][0]["results"][SAVED:])
