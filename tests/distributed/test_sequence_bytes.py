"""What sequence parallelism sends: counted at the collectives, as docs/sequence_parallelism.md says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from linear_moe.modeling.mixers.base import Mixer
from tests.distributed.harness import run
from tests.distributed.sequences import HIDDEN, ROWS
from tests.unit.mixers.common import build

LENGTHS = (16, 32, 64, 128)
FP32_BYTES = 4
MIXERS: dict[str, dict[str, Any]] = {
    "lightning": {},
    "gla": {"expand_k": 1.0},
    "gated_deltanet": {},
    "mamba2": {"head_dim": 16, "state_size": 8},
    "hgrn": {},
    "mom": {"memory": "gla"},
    "titans": {"chunk_size": 8},
    "ttt_linear": {"mini_batch_size": 8},
    "attention": {"num_kv_heads": 2},
}
WORLDS = (2, 4)
SETTINGS = [("zigzag", "all_gather"), ("contiguous", "all_gather"), ("contiguous", "ring"), ("zigzag", "ring")]
CASES = [(name, *setting) for name in MIXERS for setting in SETTINGS]


def state_sizes(mixer: Mixer) -> list[tuple[int, int | None]]:
    """Elements of every state that the mixer carries, and of its transition; None: it has none, and is handed over."""
    sizes: list[tuple[int, int | None]] = []
    for name, (shape, _) in mixer.state_shapes(1, 1).items():
        if name.startswith("conv"):
            _, channels, history = shape
            sizes.append((channels * history, getattr(mixer, "memories", 1) * history * history))
            continue
        if mixer.config.type == "ttt_linear":
            sizes.append((math.prod(shape), None))
            continue
        kept = {
            "lightning": lambda h, k, v: h,
            "mamba2": lambda h, k, v: h,
            "gla": lambda h, k, v: h * k,
            "gated_deltanet": lambda h, k, v: h * k * k,
            "mom": lambda h, k, v: h * k,
            "titans": lambda h, k, v: 3 * h * k * k,  # of three such states, one matrix on all
            "hgrn": math.prod,
        }[mixer.config.type]
        sizes.append((math.prod(shape), kept(*shape[1:]) if mixer.config.type != "hgrn" else math.prod(shape)))
    return sizes


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, str, str, str, int], list[tuple[int, int]]]:
    found = {}
    for world in WORLDS:
        cases = {(*case, length): case for case in CASES for length in LENGTHS}
        names = ("name", "fields", "layout", "strategy", "length")
        todo: dict[str, Any] = {}
        for name, layout, strategy, length in cases:
            values = (name, MIXERS[name], layout, strategy, length)
            todo[f"{name}-{layout}-{strategy}-{length}"] = "sequence_bytes", dict(zip(names, values, strict=True))
        ranks = run(world, todo)
        found |= {(world, *key): ranks["-".join(map(str, key))] for key in cases}
    return found


@pytest.mark.parametrize(("name", "layout", "strategy"), CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_the_formula(results: Any, world: int, name: str, layout: str, strategy: str) -> None:
    mixer, per_rank = build(name, MIXERS[name]), 2 if layout == "zigzag" else 1
    last = per_rank * world - 1
    for length in LENGTHS:
        for rank, sent in enumerate(results[world, name, layout, strategy, length]):
            if name == "attention":  # keys and values of its own tokens; the gradients of everyone's
                own = ROWS * length // world * 2 * 2 * (HIDDEN // 4) * FP32_BYTES
                assert sent == (own, world * own)
                continue
            sizes = state_sizes(mixer)
            handed = ROWS * FP32_BYTES * sum(n for n, m in sizes if m is None)
            pairs = [(n, m) for n, m in sizes if m is not None]
            states, transitions = (ROWS * FP32_BYTES * sum(column) for column in zip(*pairs, strict=True))
            pieces = (rank, last - rank)[:per_rank]
            onwards = sum(piece != last and not (per_rank == 2 and piece == world - 1) for piece in pieces)
            back = sum(piece != 0 and not (per_rank == 2 and piece == world) for piece in pieces)
            if strategy == "all_gather":
                expected = (per_rank * (states + transitions), per_rank * states)
            else:
                expected = (onwards * states, back * states)
            assert sent == (expected[0] + onwards * handed, expected[1] + back * handed)
