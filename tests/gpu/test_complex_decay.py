"""Tests of the recurrence with complex decays on GPU kernels against the reference: outputs, states, all gradients."""

from __future__ import annotations

import pytest
import torch

from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.recurrences.complex_decay import complex_decay
from tests.tolerances import BF16, assert_close
from tests.unit.modeling.ops.recurrences.cases import run
from tests.unit.modeling.ops.recurrences.test_complex_decay import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(not has_fla(), reason="needs flash-linear-attention and triton"),
    pytest.mark.usefixtures("no_autotuning"),
]


@pytest.mark.parametrize("offsets", [None, [0, 0, 5, 70, 134, 134, 200]])
def test_kernels_match_reference(offsets: list[int] | None) -> None:
    inputs = make_inputs(1 if offsets else 2, 200, len(offsets) - 1 if offsets else None)
    inputs = {name: x.cuda().to(torch.bfloat16 if name in ("q", "k", "v") else x.dtype) for name, x in inputs.items()}
    cu_seqlens = torch.tensor(offsets, device="cuda") if offsets else None
    actual = run(complex_decay, inputs, cu_seqlens=cu_seqlens, backend="gpu")
    expected = run(complex_decay, inputs, cu_seqlens=cu_seqlens, backend="reference")
    for name in expected:
        assert_close(actual[name], expected[name], BF16, name)
