"""Tests of the scans' CUDA kernels against the references: outputs, states and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.recurrences.scan import linear_scan
from tests.tolerances import BF16, FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import run
from tests.unit.modeling.ops.recurrences.scans import SCANS, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(not has_fla(), reason="needs flash-linear-attention and triton"),
    pytest.mark.usefixtures("no_autotuning"),
]
OFFSETS = [0, 0, 5, 70, 134, 134, 200]  # empty, short, a block and one token, whole blocks, empty, partial
HALF = {"x", "u", "B", "C"}  # inputs that mixers give in bf16


def compare(scan: str, inputs: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    actual = run(SCANS[scan], {name: x.cuda() for name, x in inputs.items()}, backend="gpu", **options)
    if options:
        options = {name: x.cpu() for name, x in options.items()}
    expected = run(SCANS[scan], {name: x.float() for name, x in inputs.items()}, backend="reference", **options)
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, f"{scan} {name}")


@pytest.mark.parametrize("scan", list(SCANS))
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_match_reference(scan: str, packed: bool) -> None:
    documents = len(OFFSETS) - 1 if packed else None
    inputs = make_inputs(scan, 1 if packed else 2, 200, 96, 16, sequences=documents)
    options = {"cu_seqlens": torch.tensor(OFFSETS, device="cuda")} if packed else {}
    half = {name: x.bfloat16() if name in HALF else x for name, x in inputs.items()}
    compare(scan, half, BF16, **options)
    # with fp32 inputs arithmetic is fp32, but the exponential is a fast one, and matmuls follow PyTorch's own setting
    compare(scan, inputs, 10 * FP32, **options)


@pytest.mark.parametrize(("dim", "size"), [(7, 3), (40, 1), (16, 64)])
def test_selective_scan_of_odd_sizes(dim: int, size: int) -> None:
    for length in (1, 31, 65):
        compare("selective", make_inputs("selective", 2, length, dim, size), 10 * FP32)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("dim", [1, 20, 130])
def test_linear_scan_of_odd_sizes(dim: int, initial: bool) -> None:
    cases: list[tuple[int, list[int] | None]] = [(1, None), (63, None), (65, None), (150, [0, 1, 2, 2, 64, 130, 150])]
    for length, offsets in (*cases, (700, [0, 0, 3, 300, 700, 700])):
        documents = 2 if offsets is None else len(offsets) - 1
        inputs = make_inputs("linear", 2 if offsets is None else 1, length, dim, 1, sequences=documents)
        if not initial:
            del inputs["initial_state"]
        options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets, device="cuda")}
        compare("linear", inputs, 10 * FP32, **options)
        compare("linear", {name: x.bfloat16() if name in HALF else x for name, x in inputs.items()}, BF16, **options)


def test_linear_scan_without_one_of_its_gradients() -> None:
    """Autograd gives no gradient of a result without a loss; those of sums have strides of 0; g is transposed."""
    inputs = make_inputs("linear", 2, 100, 40, 1)
    inputs["g"] = inputs["g"].mT.contiguous().mT
    for i in range(2):
        gradients = []
        for backend, device in (("gpu", "cuda"), ("reference", "cpu")):
            leaves = {name: x.clone().to(device).requires_grad_() for name, x in inputs.items()}
            gradients.append(
                torch.autograd.grad(linear_scan(**leaves, backend=backend)[i].sum(), list(leaves.values()))
            )
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 10 * FP32)


@pytest.mark.parametrize("scan", ["linear", "selective"])
def test_many_blocks(scan: str) -> None:
    """Blocks of tokens hand states to each other; a race between them would show in some runs only."""
    for seed in range(3):
        inputs = make_inputs(scan, 2, 1500, 130, 4, seed=seed)
        if scan == "linear":
            inputs["g"] *= 0.01  # slow decay: the state before a block matters at its end
        compare(scan, {name: x.bfloat16() if name in HALF else x for name, x in inputs.items()}, BF16)


def test_extreme_gates() -> None:
    linear, selective = make_inputs("linear", 2, 200, 96, 16), make_inputs("selective", 2, 200, 96, 16)
    for every, value in ((2, 0.0), (3, -1e-4), (7, -50.0), (31, -1e30), (67, float("-inf"))):
        linear["g"][:, 5::every] = value
    for every, value in ((3, 0.0), (5, 1e-6), (7, 1e6)):
        selective["dt"][:, 5::every] = value
    compare("linear", linear, 10 * FP32)
    compare("selective", selective, 10 * FP32)
