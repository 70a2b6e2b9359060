"""Training with sequences shared out over ranks has the losses of one process, step by step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.harness import ROOT, environment, run
from tests.distributed.test_parallel_training import config as tiny
from tests.tolerances import BF16_SAME, FP32, assert_close

STEPS = 10
MOE, DENSE = {}, {"ffn": "dense"}
HYBRID = {
    "pattern": "LLMN",
    "num_layers": 4,
    "mixer": {"type": "gated_deltanet"},
    "symbols": {"M": {"mixer": {"type": "mamba2", "head_dim": 16, "num_groups": 2}}},
    "attention": {"type": "attention", "num_kv_heads": 2},
}
ROUTERS = {  # all losses of routers, the experts' bias, and a mixture of memories
    "pattern": "LMLN",
    "num_layers": 4,
    "symbols": {"M": {"mixer": {"type": "mom", "balance_loss": 0.3}}},
    "moe": {
        "num_experts": 4,
        "expert_ffn_size": 32,
        "aux_loss": 0.3,
        "z_loss": 0.1,
        "sequence_aux_loss": 0.2,
        "global_aux_loss": 0.1,
        "expert_bias": True,
        "bias_update_rate": 0.05,
    },
}
CAPACITY = {"num_experts": 4, "expert_ffn_size": 32, "capacity_factor": 1.0, "expert_bias": True}
MEMORIES = {
    "pattern": "ABN",
    "num_layers": 3,
    "symbols": {
        "A": {"mixer": {"type": "ttt_linear", "mini_batch_size": 4}},
        "B": {"mixer": {"type": "titans", "chunk_size": 4}},
    },
}
RECOMPUTE = {"recompute": "full"}
PARTS = {"recompute": "selective", "recompute_modules": ["norm", "core", "experts", "activation", "logits"]}

# name -> (model, training, isolated documents); sequences of 27 and 30 tokens do not divide into pieces, and are padded
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "gla": (MOE, {}, False),
    "hybrid": (HYBRID, PARTS, True),
    "padded": (HYBRID | DENSE, RECOMPUTE | {"sequence_length": 30}, True),
    "routers": (ROUTERS, {"sequence_length": 27}, True),
    "memories": (MEMORIES, PARTS | {"sequence_length": 30}, True),
    "memories-rows": (MEMORIES | DENSE, RECOMPUTE, False),
    "drop": ({"moe": CAPACITY | {"drop_policy": "position"}}, {"sequence_length": 27}, True),
    "drop-pad": ({"moe": CAPACITY | {"capacity_pad": True}}, RECOMPUTE | {"sequence_length": 27}, False),
    "routers-rows": (ROUTERS, RECOMPUTE | {"sequence_length": 27}, False),
}
# name -> (model, ranks, parallel sizes)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gla-sp2": ("gla", 2, {"sequence": 2, "sequence_exchange": "ring"}),
    "hybrid-sp2": ("hybrid", 2, {"sequence": 2}),
    "padded-sp2": ("padded", 2, {"sequence": 2, "sequence_layout": "contiguous"}),
    "hybrid-sp4": ("hybrid", 4, {"sequence": 4}),
    "hybrid-sp2-tp2": ("hybrid", 4, {"sequence": 2, "tensor": 2}),
    "hybrid-sp2-pp2": ("hybrid", 4, {"sequence": 2, "pipeline": 2}),
    "hybrid-sp2-ep2": ("hybrid", 2, {"sequence": 2, "expert": 2}),
    "hybrid-sp2-tp2-ulysses": ("hybrid", 4, {"sequence": 2, "tensor": 2, "sequence_attention": "ulysses"}),
    "padded-sp4": ("padded", 4, {"sequence": 4, "sequence_exchange": "ring", "sequence_attention": "ring"}),
    "routers-sp2": ("routers", 2, {"sequence": 2, "expert": 2}),
    "memories-sp2": ("memories", 2, {"sequence": 2}),
    "padded-pieces": ("padded", 1, {"sequence_pieces": 3}),
    "routers-pieces": ("routers", 1, {"sequence_pieces": 3}),
    "drop-pieces": ("drop", 1, {"sequence_pieces": 3}),
    "hybrid-tp2-pieces": ("hybrid", 2, {"tensor": 2, "sequence_pieces": 3}),
    "hybrid-sp2-pieces": ("hybrid", 2, {"sequence": 2, "sequence_pieces": 4, "sequence_attention": "ring"}),
    "drop-pad-sp2-ep2": ("drop-pad", 2, {"sequence": 2, "expert": 2, "sequence_layout": "contiguous"}),
}
MORE: dict[str, tuple[str, int, dict[str, Any]]] = {  # only with -m slow: takes minutes
    "gla-sp2-dp2": ("gla", 4, {"sequence": 2}),
    "hybrid-sp2-ring": ("hybrid", 2, {"sequence": 2, "sequence_attention": "ring"}),
    "routers-rows-sp2": ("routers-rows", 2, {"sequence": 2, "sequence_layout": "contiguous"}),
    "routers-sp4": ("routers", 4, {"sequence": 4, "sequence_layout": "contiguous", "sequence_exchange": "ring"}),
    "routers-rows-sp4": ("routers-rows", 4, {"sequence": 4, "expert": 4}),
    "memories-rows-sp2-dp2": ("memories-rows", 4, {"sequence": 2, "sequence_layout": "contiguous"}),
    "memories-sp2-pp2": ("memories", 4, {"sequence": 2, "pipeline": 2}),
    "memories-rows-sp4": ("memories-rows", 4, {"sequence": 4, "sequence_exchange": "ring"}),
    "drop-sp2": ("drop", 2, {"sequence": 2}),
    "drop-pad-sp2-tp2": ("drop-pad", 4, {"sequence": 2, "tensor": 2, "expert": 2}),
    "drop-sp4": ("drop", 4, {"sequence": 4, "sequence_layout": "contiguous", "expert": 2}),
    "routers-sp2-tp2": ("routers", 4, {"sequence": 2, "tensor": 2, "expert": 2}),
    "routers-rows-sp2-pp2": ("routers-rows", 4, {"sequence": 2, "pipeline": 2}),
    "routers-tp2-pieces": ("routers", 2, {"tensor": 2, "expert": 2, "sequence_pieces": 3}),
    "padded-pp2-pieces": ("padded", 2, {"pipeline": 2, "sequence_pieces": 3}),
    "hybrid-sp2-bf16": ("hybrid", 2, {"sequence": 2, "sequence_dtype": "bf16"}),
}


def tree(model: str, parallel: dict[str, Any], cache: Path) -> dict[str, Any]:
    fields, training, isolate = MODELS[model]
    data = {"corpus": "synthetic", "tokenizer": {"type": "bytes"}, "isolate_documents": isolate, "cache": str(cache)}
    training = {"steps": STEPS, "eval_batches": 1} | training
    # With overlap, DDP reduces a gradient as soon as it is ready. Gradients that are put off (modeling/deferred.py) are
    # ready later than others.
    rest = {"schedule": {"warmup_steps": 2}, "optimizer": {"overlap": parallel.get("sequence", 1) > 1}}
    return tiny({"vocab_size": 24} | fields, parallel, data=data, training=training, **rest)


def outcomes(cases: dict[str, tuple[str, int, dict[str, Any]]], cache: Path) -> dict[str, list[Any]]:
    def case(model: str, parallel: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "sequence_training", {"config": tree(model, parallel, cache), "steps": STEPS}

    results = run(1, {model: case(model, {}) for model, _, _ in cases.values()})
    for world in sorted({ranks for _, ranks, _ in cases.values()}):
        results |= run(
            world, {name: case(model, sizes) for name, (model, ranks, sizes) in cases.items() if ranks == world}
        )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return outcomes(CASES, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return outcomes(MORE, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(results: dict[str, list[Any]], name: str) -> None:
    compare(results, CASES[name][0], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_losses_are_those_of_one_process(more_results: dict[str, list[Any]], name: str) -> None:
    compare(more_results, MORE[name][0], name)


def compare(results: dict[str, list[Any]], model: str, name: str) -> None:
    (one,) = results[model]
    expected = torch.tensor(one["losses"])
    assert len(expected) == STEPS + 1 and bool((expected[:, 1][:-1] > 0).all())
    tolerance = BF16_SAME if name.endswith("bf16") else FP32  # with bf16 only the exchanged states are rounded
    for rank in results[name]:
        actual = torch.tensor(rank["losses"])
        for column, what in enumerate(("losses", "gradient norms", "counted tokens")):
            assert_close(actual[:, column], expected[:, column], tolerance, f"{name}: {what}")
        for step, (mine, whole) in enumerate(zip(rank["router"], one["router"], strict=True)):
            assert mine.keys() == whole.keys()
            for key, value in whole.items():
                assert mine[key] == pytest.approx(value, rel=10 * tolerance), f"{name}: {key} of step {step}"
        if tolerance == FP32:  # with rounded states a router may choose other experts
            assert rank["routing"] == one["routing"], name


def losses_of(run_folder: Path, config: dict[str, Any], ranks: int) -> list[tuple[int, float]]:
    """Runs the command `train` on `ranks` ranks, and returns (step, loss) of its steps and validations."""
    path = run_folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | {"run": str(run_folder)}))
    command = ["-m", "linear_moe", "train", str(path), "logging.tensorboard=false"]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    metrics = run_folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r.get("event") in (None, "validation")]


def test_the_command_and_resuming_on_other_ranks(tmp_path: Path) -> None:
    """The command trains on two ranks with the losses of one process; so does a resume of this run on one rank."""
    configs = [tree("hybrid", {"sequence": ranks}, tmp_path / "data") for ranks in (1, 2)]
    one, two = (losses_of(tmp_path / f"run{n}", configs[n] | {"checkpoint": {"every": 5}}, n + 1) for n in (0, 1))
    assert [step for step, _ in one] == [*range(1, STEPS + 1), STEPS]  # and a validation
    shutil.rmtree(tmp_path / "run1" / "checkpoints" / f"step_{STEPS:08d}")
    resumed = losses_of(tmp_path / "run1", configs[0] | {"checkpoint": {"every": 5}}, 1)
    for actual in (two, one[:5] + resumed):
        assert [step for step, _ in actual] == [step for step, _ in one]
        for (step, loss), (_, expected) in zip(actual, one, strict=True):
            assert loss == pytest.approx(expected, rel=FP32), step
