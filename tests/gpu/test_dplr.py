"""Tests in bf16 of the kernels of the diagonal plus rank one family, which need a bound of the gates."""

from __future__ import annotations

import pytest
import torch

from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.recurrences.dplr import dplr
from tests.gpu.test_ops import DIM, HEADS, LENGTH, OFFSETS, compare, to_gpu
from tests.tolerances import BF16
from tests.unit.modeling.ops.recurrences.cases import make_inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(not has_fla(), reason="needs flash-linear-attention"),
    pytest.mark.usefixtures("no_autotuning"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("min_gate", [-0.61, -5.0])
def test_kernels_match_reference(min_gate: float, packed: bool) -> None:
    cu_seqlens = torch.tensor(OFFSETS, device="cuda") if packed else None
    shape = (1 if packed else 2, LENGTH, HEADS, DIM, DIM)
    inputs = make_inputs("dplr", "vector", shape, sequences=len(OFFSETS) - 1 if packed else None)
    inputs["g"] = inputs["g"].clamp(min=min_gate)
    inputs["g"][:, ::7] = min_gate
    inputs["g"][:, 3::7] = 0.0
    inputs = {n: x.to(torch.bfloat16) if n in ("a", "b") else x for n, x in to_gpu(inputs).items()}
    actual = run(dplr, inputs, backend="gpu", cu_seqlens=cu_seqlens, min_gate=min_gate)
    expected = run(dplr, inputs, backend="reference", cu_seqlens=cu_seqlens)
    compare(actual, expected, BF16, f"min_gate {min_gate}")
