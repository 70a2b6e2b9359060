"""Tests of the exchange of states over NCCL: those of `tests/distributed/test_sequence_exchange.py` on two GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run
from tests.distributed.test_sequence_exchange import CASES, MANY, assert_many, assert_states

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    arguments = {"states": {"-".join(case): case for case in CASES}, "many": MANY}
    return run(2, {"exchanges": ("exchanges_on_gpus", arguments)}, 200)["exchanges"]


@pytest.mark.parametrize(("kind", "layout", "strategy", "dtype"), CASES)
def test_states_and_gradients(results: list[dict[str, Any]], kind: str, layout: str, strategy: str, dtype: str) -> None:
    assert_states([rank[f"{kind}-{layout}-{strategy}-{dtype}"] for rank in results], kind, layout, dtype)


@pytest.mark.parametrize("name", MANY)
def test_many_at_once(results: list[dict[str, Any]], name: str) -> None:
    assert_many([rank[name] for rank in results], MANY[name][0])
