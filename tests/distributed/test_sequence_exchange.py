"""The exchange of states by itself: both strategies, in fp32 and bf16, and many exchanges at once, on uneven ranks."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
import torch

from linear_moe.training.sequence.exchange import STRATEGIES, SequenceGroup
from tests.distributed.exchange_cases import KINDS, ROWS, STATE, TRANSITIONS, expected, order_of, own
from tests.distributed.harness import run
from tests.tolerances import BF16_ROUNDING, FP32, assert_close, relative_error

WORLDS = (2, 4)
LAYOUTS = ("contiguous", "zigzag")
PIECES = ("contiguous*3", "zigzag*4")
CASES = list(product(KINDS, LAYOUTS, STRATEGIES, ("fp32", "bf16")))
CASES += list(product(("none", "key", "matrix"), PIECES, STRATEGIES, ("fp32",)))
MANY = {f"many-{layout}-{again}": (layout, again) for layout, again in product((*LAYOUTS, *PIECES), (False, True))}
Results = dict[tuple[int, str], list[Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    names = ("kind", "layout", "strategy", "dtype")
    todo: dict[str, Any] = {"-".join(case): ("exchange_states", dict(zip(names, case, strict=True))) for case in CASES}
    for name, (layout, again) in MANY.items():
        todo[name] = "many_exchanges", {"layout": layout, "again": again}
    return {(world, name): ranks for world in WORLDS for name, ranks in run(world, todo).items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "layout", "strategy", "dtype"), CASES)
def test_states_and_gradients(results: Results, world: int, kind: str, layout: str, strategy: str, dtype: str) -> None:
    assert_states(results[world, f"{kind}-{layout}-{strategy}-{dtype}"], kind, layout, dtype)


def assert_states(ranks: list[Any], kind: str, layout: str, dtype: str) -> None:
    """Asserts that states and gradients are those of one process.

    In bf16 they are off by one rounding, for any number of pieces, and are not exact.
    """
    order = order_of(len(ranks), layout)
    whole = dict(zip(("before", "transition", "state"), expected(kind, order.count), strict=True))
    errors = []
    for rank, result in enumerate(ranks):
        for name, x in ((name, x) for name, x in whole.items() if x is not None):
            actual, wanted = real(result[name]), real(own(x, SequenceGroup(order, rank)))
            rounded = 2 if name == "transition" else 1  # a product of a state and a gradient
            bound = FP32 if dtype == "fp32" else rounded * BF16_ROUNDING
            assert_close(actual, wanted, bound, f"{name} of {rank}")
            errors.append(relative_error(actual, wanted))
    assert dtype == "fp32" or max(errors) > BF16_ROUNDING / 8


def real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "layout", "strategy"), list(product(KINDS, LAYOUTS, STRATEGIES)))
def test_bf16_halves_the_bytes(results: Results, world: int, kind: str, layout: str, strategy: str) -> None:
    for wide, narrow in zip(
        *(results[world, f"{kind}-{layout}-{strategy}-{d}"] for d in ("fp32", "bf16")), strict=True
    ):
        assert wide["sent"] == tuple(2 * n for n in narrow["sent"])
        if strategy == "all_gather":
            elements = 2 if kind == "complex" else 1
            sizes = [ROWS * len(order_of(world, layout).pieces(0)) * prod(s) for s in (STATE, TRANSITIONS[kind])]
            assert wide["sent"] == (4 * elements * sum(sizes), 4 * elements * sizes[0])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "layout"), list(product(KINDS, LAYOUTS)))
def test_what_the_backward_pass_keeps(results: Results, world: int, kind: str, layout: str) -> None:
    """An exchange keeps the states before its pieces, and transitions for the backward pass.

    all_gather keeps the transitions of all pieces behind this rank's first one, ring those of the rank's own pieces.
    """
    order, size = order_of(world, layout), ROWS * prod(TRANSITIONS[kind])
    states = ROWS * order.per_rank * prod(STATE)
    for rank in range(world):
        gathered, ring = (results[world, f"{kind}-{layout}-{s}-fp32"][rank]["kept"] for s in STRATEGIES)
        assert gathered == states + (order.count - 1 - rank) * size
        assert ring == states + order.per_rank * size


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MANY)
def test_many_at_once(results: Results, world: int, name: str) -> None:
    assert_many(results[world, name], MANY[name][0])


def assert_many(ranks: list[Any], layout: str) -> None:
    order = order_of(len(ranks), layout)
    for seed, kind in enumerate(KINDS):
        whole = expected(kind, order.count, seed)
        for rank, result in enumerate(ranks):
            for actual, x, name in zip(result[seed], whole, ("before", "transition", "state"), strict=True):
                if x is None:
                    assert actual is None
                    continue
                assert_close(
                    real(actual), real(own(x, SequenceGroup(order, rank))), FP32, f"{name}, {kind}, rank {rank}"
                )
