"""Sequence parallelism: every mixer that declares it gives the numbers of one process, whoever holds which tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.training.sequence.layout import Order, cut, share
from tests.distributed.harness import run
from tests.distributed.sequence_cases import LENGTH, ROWS, one_pass, settings, stream, whole_layout
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.mixers.common import build, case_ids, cases

WORLDS = (2, 4)
IDS = dict(zip(case_ids(), cases(), strict=True))
SPLIT = [key for key, (name, _) in IDS.items() if mixer_class(name).capabilities.sequence_parallel]
Results = dict[int, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """Of the tests that were asked for."""
    chosen = [
        item.callspec.params["key"] for item in request.session.items if "key" in getattr(item, "fixturenames", ())
    ]  # type: ignore[attr-defined]
    todo = {key: ("sequence_mixer", dict(zip(("name", "fields"), IDS[key], strict=True))) for key in chosen}
    firsts = {key: case for key, case in todo.items() if key.endswith("-0")}
    return {4: run(4, todo), 2: run(2, firsts)}


def joined(parts: list[Tensor], order: Order, packed: bool) -> Tensor:
    """Tokens of all ranks -> in order of time."""
    rows = 1 if packed else ROWS
    places = [share(torch.arange(rows * LENGTH).view(rows, -1), cut(rows, LENGTH, order, r)) for r in range(len(parts))]
    whole = torch.empty(rows * LENGTH, parts[0].shape[-1])
    for part, place in zip(parts, places, strict=True):
        whole[place.flatten()] = part.flatten(0, 1)
    return whole.view(rows, LENGTH, -1)


@pytest.mark.parametrize("key", SPLIT)
def test_mixer_is_that_of_one_process(results: Results, key: str) -> None:
    mixer = build(*IDS[key])
    for packed in (False, True):
        expected = one_pass(mixer, stream(packed, 0), stream(packed, 1), whole_layout(packed))
        for world, found in results.items():
            for layout, strategy, whether in settings():
                if key not in found or whether != packed:
                    continue
                ranks = [rank[f"{layout}-{strategy}-{packed}"] for rank in found[key]]
                actual = dict(ranks[0])
                for name in ("output", "tokens"):
                    actual[name] = joined([rank[name] for rank in ranks], Order(world, layout), packed)
                what = f"{key} on {world} ranks, {layout}, {strategy}, packed: {packed}"
                assert_close(actual.pop("output"), expected["output"], FP32, what)
                gradients = {name: x for name, x in expected.items() if name != "output"}
                assert_gradients_close(actual, gradients, FP32, FP32_GRADIENT_FLOOR)
