"""Mixers on pieces of sequences, two of each on one GPU, in bf16, against whole sequences on the CPU in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.training.sequence.exchange import STRATEGIES, Line
from linear_moe.training.sequence.layout import Order, cut
from linear_moe.training.sequence.pieces import layout_of
from tests.gpu.test_mixers import HIDDEN, TOKENS, pair, run
from tests.tolerances import BF16, BF16_GRADIENT_FLOOR, BF16_OVER_CPU, assert_close
from tests.unit.mixers.common import case_ids, cases, packed, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_autotuning"),
]
ORDER = Order(1, "zigzag")
CASES = [
    pytest.param(name, fields, id=key)
    for key, (name, fields) in zip(case_ids(), cases(), strict=True)
    if mixer_class(name).capabilities.sequence_parallel
]


@pytest.mark.parametrize("whole", [Layout(2, TOKENS // 2), packed([70, 1, 129])], ids=["rows", "packed"])
@pytest.mark.parametrize(("name", "fields"), CASES)
def test_pieces_are_the_whole(name: str, fields: dict[str, Any], whole: Layout) -> None:
    gpu, cpu = pair(name, fields)
    device = torch.device("cuda")
    found = cut(whole.batch, whole.length, ORDER, 0, whole.cu_seqlens)
    positions = torch.arange(whole.length).expand(whole.batch, -1) if whole.positions is None else whole.positions
    offsets = None if whole.cu_seqlens is None else torch.tensor(found.offsets).cuda()
    strategy = STRATEGIES[whole.cu_seqlens is None]
    pieces = layout_of(found, Line(ORDER, 0, None, strategy), device, positions.contiguous().cuda(), offsets)
    x, weight = stream(1, TOKENS, HIDDEN).bfloat16(), stream(1, TOKENS, HIDDEN, seed=1).bfloat16()
    y, dx, actual = run(gpu, x.cuda(), pieces, weight)
    expected_y, expected_dx, expected = run(cpu, x.float(), whole, weight)
    assert_close(y, expected_y, BF16, "output")
    floor = BF16_GRADIENT_FLOOR * max(float(gradient.norm()) for gradient in expected.values())
    moved = {key: None if (t := getattr(whole, key)) is None else t.cuda() for key in ("cu_seqlens", "positions")}
    _, whole_dx, on_gpu = run(gpu, x.cuda(), replace(whole, **moved), weight)
    expected |= {"input": expected_dx.double()}
    actual, on_gpu = actual | {"input": dx.double().cpu()}, on_gpu | {"input": whole_dx.double().cpu()}
    for key, gradient in expected.items():
        least = max(float(gradient.norm()), floor)
        error, same = (float((found[key] - gradient).norm()) / least for found in (actual, on_gpu))
        assert error <= max(BF16, BF16_OVER_CPU * same), f"{key}: {error:.1e}, whole sequences {same:.1e}"
