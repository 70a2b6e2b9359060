"""Tests of mixers on two pieces of one row that is so long that every kernel of a piece works in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.sequence.cut import cut
from linear_moe.training.sequence.exchange import SequenceGroup
from linear_moe.training.sequence.pieces import pieces_layout
from tests.gpu.test_mixers import HIDDEN, pair, run
from tests.tolerances import (
    BF16,
    BF16_GRADIENT_FLOOR,
    BF16_OVER_CPU,
    DECODE,
    FP32_GRADIENT_FLOOR,
    assert_close,
    assert_gradients_close,
)
from tests.unit.modeling.mixers.common import build, case_ids, cases, dims, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_autotuning"),
]
LENGTH = 1500
CASES = [
    pytest.param(name, fields, id=key)
    for key, (name, fields) in zip(case_ids(), cases(), strict=True)
    if key.endswith("-0") and mixer_class(name).capabilities.sequence_parallel and mixer_class(name).family != "softmax"
]


def two_pieces() -> TokenLayout:
    order, device = PieceOrder(1, "zigzag"), torch.device("cuda")
    positions = torch.arange(LENGTH, device=device)[None]
    return pieces_layout(cut(1, LENGTH, order, 0), SequenceGroup(order, 0), device, positions, None)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_in_bf16(name: str, fields: dict[str, Any]) -> None:
    gpu, cpu = pair(name, fields)
    x, weight = stream(1, LENGTH, HIDDEN).bfloat16(), stream(1, LENGTH, HIDDEN, seed=1).bfloat16()
    y, dx, actual = run(gpu, x.cuda(), two_pieces(), weight.cuda())
    _, whole_dx, whole = run(gpu, x.cuda(), TokenLayout(1, LENGTH), weight.cuda())
    expected_y, expected_dx, expected = run(cpu, x.float(), TokenLayout(1, LENGTH), weight)
    assert_close(y, expected_y, BF16, "output")
    floor = BF16_GRADIENT_FLOOR * max(float(gradient.norm()) for gradient in expected.values())
    actual |= {"input": dx.double().cpu()}
    whole |= {"input": whole_dx.double().cpu()}
    for key, gradient in (expected | {"input": expected_dx.double()}).items():
        least = max(float(gradient.norm()), floor)
        error, same = (float((computed[key] - gradient).norm()) / least for computed in (actual, whole))
        assert error <= max(BF16, BF16_OVER_CPU * same), f"{key}: {error:.1e}, whole rows {same:.1e}"


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_in_fp32(name: str, fields: dict[str, Any]) -> None:
    mixer = build(name, fields, None, dims(HIDDEN)).cuda()
    x, weight = stream(1, LENGTH, HIDDEN).cuda(), stream(1, LENGTH, HIDDEN, seed=1).cuda()
    y, dx, actual = run(mixer, x, two_pieces(), weight)
    expected_y, expected_dx, expected = run(mixer, x, TokenLayout(1, LENGTH), weight)
    assert_close(y, expected_y, DECODE, "output")
    gradients = expected | {"input": expected_dx.double().cpu()}
    assert_gradients_close(actual | {"input": dx.double().cpu()}, gradients, DECODE, FP32_GRADIENT_FLOOR)
