"""Muon and bf16 moments: equal results in every layout, through checkpoints in other layouts, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.training import platform
from tests.distributed.harness import all_tensors, run
from tests.distributed.test_checkpoint import config as checkpoint_config
from tests.tolerances import BF16_MOMENTS, BF16_SAME, FP32, assert_close, relative_error

STEPS = 4
MUON: dict[str, Any] = {"type": "muon", "lr": 3e-3, "eps": 1e-4}
HALF: dict[str, Any] = {"moments": "bf16"}
PLAIN: dict[str, Any] = {"distributed": False}
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "dp2": (2, {}, {}),
    "dp2-overlap": (2, {}, {"overlap": True}),
    "dp2-plain": (2, {}, PLAIN),
    "tp2": (2, {"tensor": 2}, {}),
    "ep2": (2, {"expert": 2}, {}),
    "pp2": (2, {"pipeline": 2}, {}),
    "tp2-etp2-plain": (2, {"tensor": 2, "expert_tensor": 2}, PLAIN),
    "tp2-ep2-dp2": (4, {"tensor": 2, "expert": 2}, {}),
}
# name -> (processes, dtype, parallel sizes, optimizer)
RESUME: dict[str, tuple[int, str, dict[str, int], dict[str, Any]]] = {
    "muon-dp2": (2, "bf16", {}, MUON),
    "muon-tp2-half": (2, "fp32", {"tensor": 2}, MUON | HALF),
    "adamw-dp2-half": (2, "bf16", {}, HALF),
    "adamw-dp2-half-plain": (2, "bf16", {}, HALF | PLAIN),
}
MLA = {"type": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
Results = dict[str, list[Any]]


def config(folder: Path, dtype: str, parallel: dict[str, int], optimizer: dict[str, Any]) -> dict[str, Any]:
    """A model of Mamba2 and MLA, whose parameters are split by rows, by columns or not at all.

    One of its parameters consists of two matrices, head by head.
    """
    return checkpoint_config(folder, dtype, parallel, optimizer=optimizer, model={"attention": MLA})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("optimizers")

    def write(name: str, optimizer: dict[str, Any]) -> Any:
        _, parallel, options = LAYOUTS[name]
        return config(root / name, "fp32", parallel, optimizer | options)

    def reread(layout: str, moments: str = "fp32") -> Any:
        _, parallel, options = LAYOUTS[layout]
        tree = config(root / "tp2-ep2-dp2", "fp32", parallel, MUON | options | {"moments": moments})
        return "rewrite", {"config": tree, "run": str(root / f"again-{layout}-{moments}"), "after": 3}

    outcomes: Results = {}
    for world in (4, 2, 1):
        cases: dict[str, Any] = {
            name: ("write", {"config": write(name, MUON), "steps": STEPS, "after": 3})
            for name, (size, *_) in LAYOUTS.items()
            if size == world
        }
        for name, (size, dtype, parallel, optimizer) in RESUME.items():
            if size == world:
                tree = config(root / name, dtype, parallel, optimizer)
                cases[name] = ("resume", {"config": tree, "before": 3, "after": 5})
        cases |= {f"again-{name}": reread(name) for name in ("one", "dp2") if LAYOUTS[name][0] == world}
        if world == 1:
            cases["again-half"] = reread("one", "bf16")
            for name, half in {"exact": {}, "half": HALF}.items():
                for kind, optimizer in {"adamw": {"lr": 3e-3}, "muon": MUON}.items():
                    tree = config(root / f"{kind}-{name}", "fp32", {}, optimizer | half)
                    cases[f"{kind}-{name}"] = ("write", {"config": tree, "steps": 20, "after": 3})
        outcomes |= run(world, cases)
    return outcomes


def losses(ranks: list[Any]) -> Tensor:
    return torch.tensor(ranks[0]["results"], dtype=torch.float64)


def test_which_parameters_are_muons(results: Results) -> None:
    """Linear maps have Muon's momentum in the checkpoint, and all other parameters have AdamW's moments."""
    keys = all_tensors(results["one"][0]["folder"]).keys()
    by_moment = {
        moment: {key.removeprefix(f"optimizer.{moment}.") for key in keys if key.startswith(f"optimizer.{moment}.")}
        for moment in ("momentum", "exp_avg", "exp_avg_sq")
    }
    assert by_moment["exp_avg"] == by_moment["exp_avg_sq"] and not by_moment["exp_avg"] & by_moment["momentum"]
    trained = {key.removeprefix("model.") for key in keys if key.startswith("model.") and "expert_bias" not in key}
    assert by_moment["exp_avg"] | by_moment["momentum"] == trained
    linear = ("_proj.weight", "_proj", "_proj_with_mqa.weight")
    assert by_moment["momentum"] == {name for name in trained if name.endswith(linear)}
    assert {"embedding.weight", "head.weight", "layers.0.ffn.router.weight"} <= by_moment["exp_avg"]
    assert "layers.0.ffn.shared_expert_gate.weight" in by_moment["exp_avg"], "one row: a vector"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_muon_in_every_layout(results: Results, layout: str) -> None:
    """Weights and optimizer state after some steps, all losses and all gradient norms are those of one process."""
    expected, actual = (all_tensors(results[name][0]["folder"]) for name in ("one", layout))
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert_close(actual[key], value, FP32, key)
    assert_close(losses(results[layout]), losses(results["one"]), FP32, "losses and norms")


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_muon_checkpoint_in_another_layout(results: Results, layout: str) -> None:
    before, ranks = results["tp2-ep2-dp2"], results[f"again-{layout}"]
    expected, actual = all_tensors(before[0]["folder"]), all_tensors(ranks[0]["folder"])
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert_close(losses(ranks), losses(before), FP32, "losses and norms")


def test_other_moments_are_loaded_rounded(results: Results) -> None:
    expected, actual = (all_tensors(results[name][0]["folder"]) for name in ("tp2-ep2-dp2", "again-half"))
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value.to(torch.bfloat16) if key.startswith("optimizer.") else value), key


@pytest.mark.parametrize("name", RESUME)
def test_resume_is_exact(results: Results, name: str) -> None:
    for rank in results[name]:
        assert rank["step"] == 3
        went_on, again = rank["results"]
        assert went_on == again and len({loss for loss, _ in went_on}) == 5
        expected, actual = rank["weights"]
        for parameter, (_, value) in expected.items():
            assert torch.equal(actual[parameter][1], value), parameter


def test_replicas_round_alike(results: Results) -> None:
    """Replicas stay equal without the distributed optimizer, where each of them rounds its own copy of the moments."""
    first, second = (rank["weights"][0] for rank in results["adamw-dp2-half-plain"])
    for name, (_, value) in first.items():
        assert torch.equal(second[name][1], value), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bf16_moments_train_alike(results: Results, kind: str) -> None:
    """After 20 steps, weights and losses with bf16 moments are near those with fp32 moments."""
    runs = [results[f"{kind}-{name}"] for name in ("exact", "half")]
    exact, half = (all_tensors(ranks[0]["folder"]) for ranks in runs)
    assert exact.keys() == half.keys()
    for key, value in half.items():
        assert value.dtype is (torch.bfloat16 if key.startswith("optimizer.") else torch.float32), key
    weights = [torch.cat([v.flatten() for k, v in t.items() if k.startswith("model.")]) for t in (half, exact)]
    assert_close(*weights, BF16_MOMENTS, "weights")
    assert relative_error(*weights) > 0, "moments were rounded"
    assert_close(losses(runs[1])[:, 0], losses(runs[0])[:, 0], BF16_SAME, "losses")


def test_multi_tensor_functions() -> None:
    """The stand-ins for Apex's kernels compute what plain arithmetic computes."""
    platform.install()
    from linear_moe.training.optimizer.build import _foreach_copy, _foreach_norm, _foreach_scale

    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4), (1,), (17,))]
    flat = torch.cat([t.flatten() for t in tensors])
    flag = torch.zeros(1, dtype=torch.int)
    norm, _ = _foreach_norm(2048, flag, [tensors], False)
    assert norm.shape == (1,)
    assert_close(norm[0], flat.double().norm(), FP32)
    others = [torch.zeros_like(t) for t in tensors]
    _foreach_scale(2048, flag, [tensors, others], 0.5)
    assert torch.equal(torch.cat([t.flatten() for t in others]), flat * 0.5)
    _foreach_scale(2048, flag, [tensors, tensors], 0.5)
    assert torch.equal(torch.cat([t.flatten() for t in tensors]), flat * 0.5)
    rounded = [torch.zeros_like(t, dtype=torch.bfloat16) for t in tensors]
    _foreach_copy(tensors, rounded)
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(rounded, tensors, strict=True))
