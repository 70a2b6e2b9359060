"""Bytes that sequence parallelism sends, counted at the collectives.

They are compared with the formulas of docs/sequence_parallelism.md and with `linear-moe plan`. The sizes of states are
written down here once more, to check the sizes that `plan` derives from the mixers.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.plan.needs import mixer_needs
from linear_moe.plan.traffic import SequenceSplit, layer_sent
from linear_moe.training.sequence.attention import STRATEGIES
from tests.distributed.harness import run
from tests.distributed.sequences import HIDDEN, ROWS
from tests.unit.modeling.mixers.common import build, dims

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
}
WORLDS = (2, 4)
SETTINGS = [("zigzag", "all_gather"), ("contiguous", "all_gather"), ("contiguous", "ring"), ("zigzag", "ring")]
CASES = [(name, *setting) for name in MIXERS for setting in SETTINGS]
WINDOW = 3
SOFTMAX: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"num_kv_heads": 2}),
    "window": ("attention", {"num_kv_heads": 2, "window": WINDOW}),
    "mla": ("mla", {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}),
}
LAYOUTS = ("contiguous", "zigzag")
ATTENTION = [(name, layout, attention) for name in SOFTMAX for layout in LAYOUTS for attention in STRATEGIES]


def state_sizes(mixer: Mixer, length: int) -> list[tuple[int, int | None]]:
    """Number of elements of every state that the mixer carries, and of its transition over a piece of `length` tokens.

    The second number is None for a state without a transition, which is handed from piece to piece.
    """
    sizes, joined = list[tuple[int, int | None]](), False
    for name, (shape, _) in mixer.state_shapes(1, 1).items():
        if name.startswith("conv"):
            _, channels, history = shape
            if memories := getattr(mixer, "memories", 0):  # a memory may have no token in a piece: always a transition
                sizes.append((channels * history, memories * history * history))
            else:  # convolutions of one input send their states in one message
                before, _ = sizes.pop() if joined else (0, 0)
                sizes.append((before + channels * history, history * history if length < history else 0))
                joined = hasattr(mixer, f"{name.removeprefix('conv_')}_conv1d")
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
            "titans": lambda h, k, v: 3 * h * k * k,  # a matrix 3K x 3K for three stacked states, so 3 K^2 for each
            "hgrn": math.prod,
        }[mixer.config.type]
        sizes.append((math.prod(shape), kept(*shape[1:]) if mixer.config.type != "hgrn" else math.prod(shape)))
    return sizes


def planned(name: str, world: int, layout: str, length: int, rank: int, **ways: str) -> tuple[int, int]:
    """Bytes that a rank sends in the forward and backward pass of a layer, as `linear-moe plan` computes them."""
    mixer, fields = SOFTMAX.get(name) or (name, MIXERS[name])
    module, order = (
        mixer_class(mixer)(mixer_config(mixer, **fields), dims(), Host(torch.float32, "meta")),
        PieceOrder(world, layout),
    )
    needs = mixer_needs(module, tokens=length // order.count)
    ways = {"exchange": "all_gather", "attention": "all_gather"} | ways
    return layer_sent(needs, SequenceSplit(order, ROWS, ROWS * length // world, **ways), rank)


@pytest.fixture(scope="module")
def results() -> dict[tuple[Any, ...], list[tuple[int, int]]]:
    by_case = {}
    names = ("name", "layout", "strategy", "attention")
    values = [*((*case, "all_gather") for case in CASES), *((n, layout, "all_gather", a) for n, layout, a in ATTENTION)]
    for world in WORLDS:
        todo: dict[str, Any] = {}
        for value, length in product(values, LENGTHS):
            name, fields = SOFTMAX.get(value[0]) or (value[0], MIXERS[value[0]])
            given = dict(zip(names, value, strict=True)) | {"name": name, "fields": fields, "length": length}
            todo["-".join(map(str, (*value, length)))] = "sequence_bytes", given
        by_case |= {(world, *key.split("-")): ranks for key, ranks in run(world, todo).items()}
    return by_case


@pytest.mark.parametrize(("name", "layout", "strategy"), CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_the_formula(results: Any, world: int, name: str, layout: str, strategy: str) -> None:
    mixer, per_rank = build(name, MIXERS[name]), 2 if layout == "zigzag" else 1
    last = per_rank * world - 1
    for length in LENGTHS:
        for rank, sent in enumerate(results[world, name, layout, strategy, "all_gather", str(length)]):
            assert sent == planned(name, world, layout, length, rank, exchange=strategy)
            sizes = state_sizes(mixer, length // (last + 1))
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


@pytest.mark.parametrize(("name", "layout", "attention"), ATTENTION)
@pytest.mark.parametrize("world", WORLDS)
def test_bytes_of_softmax_attention(results: Any, world: int, name: str, layout: str, attention: str) -> None:
    """Bytes follow from the elements per token: keys and values, G (D + V), or a latent; in Ulysses q, k, v and o."""
    config: Any = build(*SOFTMAX[name]).config
    if name != "mla":
        heads, kv_heads, size, value = 4, config.num_kv_heads, HIDDEN // 4, HIDDEN // 4
        shared = kv_heads * (size + value)
    else:
        heads = kv_heads = 4
        size, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        shared = config.kv_lora_rank + config.qk_rope_head_dim
    for length in LENGTHS:
        tokens = ROWS * length // world * FP32_BYTES
        own = tokens * shared
        there, back = tokens * (heads * size + max(kv_heads, world) * (size + value)), tokens * heads * value
        expected = {
            "all_gather": (own, own + world * own),
            "ring": ((world - 1) * own, 2 * (world - 1) * own),
            "ulysses": (there + back, there + back),
        }[attention]
        for rank, sent in enumerate(results[world, name, layout, "all_gather", attention, str(length)]):
            if name == "window" and attention == "all_gather":
                last = (2 if layout == "zigzag" else 1) * world - 1
                pieces = {rank, last - rank} if layout == "zigzag" else {rank}
                onwards = sum(piece != last and piece + 1 not in pieces for piece in pieces)
                back = sum(piece != 0 and piece - 1 not in pieces for piece in pieces)
                halo = ROWS * (WINDOW - 1) * shared * FP32_BYTES
                expected = halo * onwards, halo * (onwards + back)
            assert sent == expected == planned(name, world, layout, length, rank, attention=attention)
