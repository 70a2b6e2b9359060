"""Tests of the choice of an implementation, which all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.recurrences.complex_decay import complex_decay
from linear_moe.modeling.ops.recurrences.gsa import gsa
from tests.unit.modeling.ops.recurrences import cases, scans, test_complex_decay, test_fast_weights, test_gsa

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    **{
        f"{family}-{gate}": (cases.OPS[family], cases.make_inputs(family, gate, (2, 40, 2, 8, 8)))
        for family, gate in cases.VARIANTS
    },
    **{f"{name}-scan": (scan, scans.make_inputs(name, 2, 40, 4, 3)) for name, scan in scans.SCANS.items()},
    **{name: (test_fast_weights.op(name), test_fast_weights.make_inputs(name, 2, 40)) for name in ("ttt", "titans")},
    "complex_decay": (complex_decay, test_complex_decay.make_inputs(2, 40)),
    "gsa": (partial(gsa, scale=0.1), {n: x for n, x in test_gsa.make_inputs(2, 40).items() if n in test_gsa.SIZES}),
}


def run(name: str, autocast: bool) -> list[Tensor]:
    """Returns the output, the final states and all gradients; the backward pass is outside of `autocast`, as usual."""
    op, inputs = CALLS[name]
    leaves = {key: x.detach().clone().requires_grad_() for key, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = op(**leaves)
    results = [output, *(state if isinstance(state, tuple) else [state])]
    total = torch.stack([x.square().sum() for x in results]).sum()
    return [*results, *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("name", CALLS)
def test_arithmetic_is_the_same_within_autocast(name: str) -> None:
    """The matmuls of recurrences must stay in fp32 within `torch.autocast`, which trainers use."""
    for actual, expected in zip(run(name, True), run(name, False), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
