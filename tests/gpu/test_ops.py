"""Tests of the CUDA kernels against the references, in bf16: outputs, states and all gradients.

Each op is tested at one shape, because every further shape compiles every kernel again.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.fused.short_conv import short_conv
from tests.tolerances import BF16, BF16_CANCELLING, BF16_SAME, FP32, assert_close
from tests.unit.modeling.ops.recurrences import test_gsa
from tests.unit.modeling.ops.recurrences.cases import NO_KERNEL, OPS, VARIANTS, make_inputs, run, set_extreme_gates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("no_autotuning"),
]
needs_fla = pytest.mark.skipif(not has_fla(), reason="needs flash-linear-attention")

KERNELS = [variant for variant in VARIANTS if variant not in NO_KERNEL]
LENGTH, HEADS, DIM = 200, 2, 64
OFFSETS = [0, 0, 5, 70, 134, 134, LENGTH]  # empty, short, a chunk and one token, a whole chunk, empty, partial


def to_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves inputs to the GPU: activations in bf16; gates, beta and states in fp32, as mixers give them."""
    return {n: x.cuda().to(torch.bfloat16 if n in ("q", "k", "v", "x") else torch.float32) for n, x in inputs.items()}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, case: str) -> None:
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, (case, name)
        constant = name == "d g" and expected[name].ndim == 1
        assert_close(actual[name], expected[name], BF16_CANCELLING if constant else tolerance, f"{case} {name}")


@needs_fla
@pytest.mark.parametrize(("family", "gate"), KERNELS)
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_match_reference(family: str, gate: str | None, packed: bool) -> None:
    cu_seqlens = torch.tensor(OFFSETS, device="cuda") if packed else None
    shape = (1 if packed else 2, LENGTH, HEADS, DIM, DIM)
    inputs = to_gpu(make_inputs(family, gate, shape, sequences=len(OFFSETS) - 1 if packed else None))
    actual = run(OPS[family], inputs, backend="gpu", cu_seqlens=cu_seqlens)
    compare(actual, run(OPS[family], inputs, backend="reference", cu_seqlens=cu_seqlens), BF16, f"{family} {gate}")


@needs_fla
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("values", [1, 33])
def test_odd_value_sizes(values: int, packed: bool) -> None:
    """The kernels take odd numbers of values; one column of values is the normaliser of linear attention."""
    cu_seqlens = torch.tensor(OFFSETS, device="cuda") if packed else None
    shape = (1 if packed else 2, LENGTH, HEADS, DIM, values)
    inputs = to_gpu(make_inputs("decay", None, shape, sequences=len(OFFSETS) - 1 if packed else None))
    actual = run(OPS["decay"], inputs, backend="gpu", cu_seqlens=cu_seqlens)
    compare(actual, run(OPS["decay"], inputs, backend="reference", cu_seqlens=cu_seqlens), BF16, f"V = {values}")


@needs_fla
@pytest.mark.parametrize(("family", "gate"), KERNELS)
def test_auto_takes_the_kernels_for_bf16_and_keeps_fp32_exact(
    family: str, gate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(family, gate, (2, LENGTH, HEADS, DIM, DIM))
    exact = {n: x.cuda() for n, x in inputs.items()}
    compare(run(OPS[family], exact), run(OPS[family], exact, backend="reference"), FP32, f"{family} {gate} fp32")
    half = to_gpu(inputs)
    compare(run(OPS[family], half), run(OPS[family], half, backend="gpu"), BF16_SAME, f"{family} {gate} bf16")


@needs_fla
@pytest.mark.parametrize(("family", "gate"), NO_KERNEL)
def test_what_has_no_kernel_says_so_and_runs(family: str, gate: str) -> None:
    inputs = to_gpu(make_inputs(family, gate, (2, LENGTH, HEADS, DIM, DIM)))
    with pytest.raises(ValueError, match="there is no kernel for"):
        OPS[family](**inputs, backend="gpu")
    compare(run(OPS[family], inputs), run(OPS[family], inputs, backend="reference"), BF16_SAME, f"{family} {gate}")


@needs_fla
@pytest.mark.parametrize(("family", "gate"), [v for v in KERNELS if v[1] not in (None, "bonus")])
def test_kernels_with_extreme_gates(family: str, gate: str) -> None:
    inputs = to_gpu(make_inputs(family, gate, (2, LENGTH, HEADS, DIM, DIM)))
    set_extreme_gates(inputs)
    actual = run(OPS[family], inputs, backend="gpu")
    compare(actual, run(OPS[family], inputs, backend="reference"), BF16, f"{family} {gate}")


@needs_fla
def test_constant_gates_that_are_not_trained() -> None:
    inputs = to_gpu(make_inputs("decay", "constant", (2, LENGTH, HEADS, DIM, DIM)))
    decay = partial(OPS["decay"], g=inputs.pop("g"))
    compare(run(decay, inputs, backend="gpu"), run(decay, inputs, backend="reference"), BF16, "constant")


@needs_fla
@pytest.mark.parametrize("slots", [64, 24])  # 64 slots have a kernel of their own, 24 take two of the decay family
@pytest.mark.parametrize("packed", [False, True])
def test_gsa_kernels_match_reference(slots: int, packed: bool) -> None:
    sizes = {"q": DIM, "k": DIM, "v": DIM, "s": slots, "g": slots}
    inputs = test_gsa.make_inputs(1 if packed else 2, LENGTH, len(OFFSETS) - 1 if packed else None, sizes)
    inputs["s"] = 1 - inputs["g"].exp()
    half = {n: x.cuda().to(torch.bfloat16 if n in ("q", "k", "v", "s") else torch.float32) for n, x in inputs.items()}
    cu_seqlens = torch.tensor(OFFSETS, device="cuda") if packed else None
    actual, expected = (
        test_gsa.run(half, scale=0.1, cu_seqlens=cu_seqlens, backend=backend) for backend in ("gpu", "reference")
    )
    compare(actual, expected, BF16, f"gsa {slots} slots")


@pytest.mark.parametrize(("family", "gate"), VARIANTS)
def test_step_updates_the_state_in_place(family: str, gate: str | None) -> None:
    inputs = to_gpu(make_inputs(family, gate, (2, 1, HEADS, DIM, DIM)))
    with torch.no_grad():
        expected = OPS[family](**inputs, backend="reference")
        o, state = OPS[family](**inputs)
    assert state is inputs["initial_state"]
    assert_close(state, expected[1], FP32)
    assert_close(o, expected[0], BF16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_short_conv_matches_cpu(packed: bool, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    channels, width = HEADS * DIM, 4
    inputs = {
        "x": torch.randn(1 if packed else 2, LENGTH, channels, generator=generator).bfloat16(),
        "weight": torch.randn(channels, width, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "state": torch.randn(len(OFFSETS) - 1 if packed else 2, channels, width - 1, generator=generator).bfloat16(),
    }
    cu_seqlens = torch.tensor(OFFSETS) if packed else None
    conv = partial(short_conv, activation=activation)
    expected = run(conv, inputs, cu_seqlens=cu_seqlens)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    actual = run(conv, on_gpu, cu_seqlens=None if cu_seqlens is None else cu_seqlens.cuda())
    compare(actual, expected, BF16, f"short_conv {activation}")
