"""Tests of the fused operations around recurrences: Triton kernels against PyTorch definitions, with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.fused import (
    bounded_gate,
    feature_maps,
    gates,
    norms,
    repeat_heads,
    rotary,
    shift_mix,
    short_conv,
)
from linear_moe.modeling.ops.packing import documents as documents_of
from linear_moe.modeling.ops.packing import first_tokens
from tests.gpu.kernels import DEVICE, HALF, MARKS
from tests.tolerances import BF16_ROUNDING, FP32, assert_close

triton = pytest.importorskip("triton")
from linear_moe.modeling.ops.fused import (  # noqa: E402  imports triton
    bounded_gate_triton,
    feature_maps_triton,
    gates_triton,
    norms_triton,
    repeat_heads_triton,
    rotary_triton,
    shift_mix_triton,
    short_conv_triton,
)

pytestmark = MARKS


def compare(
    kernels: ModuleType, definition: Callable[..., Any], inputs: list[Tensor | None], options: dict[str, Any]
) -> None:
    """Asserts that the kernels have the outputs and gradients of the definition; in bf16, up to a few roundings."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    expected = definition(*leaves, **options)
    several = isinstance(expected, tuple)
    outputs = expected if several else (expected,)
    generator = torch.Generator(DEVICE).manual_seed(1)
    grads = tuple(torch.randn(y.shape, generator=generator, device=DEVICE).to(y.dtype) for y in outputs)
    gradients = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads))
    actual = kernels.forward(*inputs, **options)
    actual_gradients = kernels.backward(grads if several else grads[0], *inputs, **options)
    results = [*(actual if several else (actual,)), *actual_gradients]
    wanted = [*outputs, *(None if x is None else next(gradients) for x in leaves)]
    for i, (a, e) in enumerate(zip(results, wanted, strict=True)):
        assert (a is None) == (e is None), i
        if a is not None and e is not None:
            assert a.dtype == e.dtype, (i, a.dtype, e.dtype)
            assert_close(a, e, FP32 if e.dtype == torch.float32 else HALF, f"{options} {i}")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, step: int = 1) -> Tensor:
    """Draws a tensor; with `step`, the tensor is a view of every `step`-th row of a larger one."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape[0] * step, *shape[1:], generator=generator, device=DEVICE).to(dtype)[::step]


# kind, tokens, features, size of a group, weight, bias, gate's activation, gate first (or the activation of x without a
# gate), heads of the skip connection
NORMS = [
    ("rms", 37, 96, 96, None, False, None, False, None),
    ("rms", 37, 4 * 24, 24, "shared", False, "silu", False, None),
    ("rms", 300, 2 * 128, 128, "full", False, "sigmoid", False, None),
    ("rms", 5, 520, 520, "full", False, "silu", True, 13),
    ("rms", 129, 3 * 64, 64, "shared", False, "identity", True, 6),
    ("rms", 1, 2100, 2100, None, False, "silu", True, None),
    ("rms", 2, 3, 3, "full", False, None, False, 1),
    ("rms", 37, 2 * 24, 24, "shared", False, None, "sigmoid", None),
    ("layer", 5, 520, 520, "full", True, None, "silu", None),
    ("rms", 300, 4 * 128, 128, "shared", False, None, False, None),
    ("layer", 37, 4 * 24, 24, "full", True, "silu", False, None),
    ("layer", 37, 520, 520, "full", True, "sigmoid", True, None),
    ("layer", 129, 3 * 64, 64, "shared", True, None, False, 6),
    ("none", 37, 200, 200, None, False, "silu", False, 200),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "tokens", "width", "size", "weight", "bias", "activation", "gate_first", "heads"), NORMS
)
def test_norm(
    kind: norms.Kind,
    tokens: int,
    width: int,
    size: int,
    weight: str | None,
    bias: bool,
    activation: norms.Activation | None,
    gate_first: bool | norms.Activation,
    heads: int | None,
    dtype: torch.dtype,
) -> None:
    features = size if weight == "shared" else width
    inputs = [
        draw(tokens, width, dtype=dtype, step=2),
        None if weight is None else draw(features, dtype=dtype, seed=2),
        draw(features, dtype=dtype, seed=6) if bias else None,
        None if activation is None else draw(tokens, width, dtype=dtype, seed=3),
        None if heads is None else draw(tokens, width, dtype=dtype, seed=4),
        None if heads is None else draw(heads, seed=5),
    ]
    activation = gate_first if isinstance(gate_first, str) else activation or "silu"
    options = {"eps": 1e-2, "kind": kind, "size": size, "activation": activation, "gate_first": bool(gate_first)}
    compare(norms_triton, norms.definition, inputs, options | {"scale": 0.3})


# rows, features, function, scale, bias, heads of the rate, floor
GATES = [
    (300, 512, "logsigmoid", 1 / 16, False, None, -0.1),
    (37, 8, "softplus", -1.0, True, 8, None),
    (37, 6 * 20, "softplus", -1.0, True, 6, -3.0),
    (1, 1, "sigmoid", 2.0, False, None, None),
    (9, 130, "exp", -1.0, True, None, -5.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "function", "scale", "bias", "heads", "floor"), GATES)
def test_gate(
    rows: int,
    width: int,
    function: gates.Function,
    scale: float,
    bias: bool,
    heads: int | None,
    floor: float | None,
    dtype: torch.dtype,
) -> None:
    inputs = [draw(rows, width, dtype=dtype, step=3), draw(width, seed=2) if bias else None]
    inputs.append(None if heads is None else draw(heads, seed=3))
    compare(gates_triton, gates.definition, inputs, {"function": function, "scale": scale, "floor": floor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_complement(dtype: torch.dtype) -> None:
    x = 30 * draw(37, 130, dtype=dtype, step=2)
    options: dict[str, Any] = {"function": "logsigmoid", "scale": 1 / 8, "floor": -3.0, "complement": True}
    leaf = x.detach().requires_grad_()
    expected = gates.definition(leaf, None, None, **options)
    grads = (draw(37, 130, seed=2), draw(37, 130, dtype=dtype, seed=3))
    wanted = [*expected, *torch.autograd.grad(expected, leaf, grads)]
    dx = gates_triton.backward(grads, x, None, None, **options)[0]
    actual = [*gates_triton.forward(x, None, None, **options), dx]
    for i, (a, e) in enumerate(zip(actual, wanted, strict=True)):
        assert a.dtype == e.dtype, i
        assert_close(a, e, FP32 if e.dtype == torch.float32 else HALF, f"{i}")


def test_gate_far_from_zero() -> None:
    x = torch.tensor([[-1e30, -200.0, -30.0, -1e-8, 0.0, 30.0, 200.0, 1e30]], device=DEVICE)
    for function in ("logsigmoid", "softplus", "sigmoid"):
        compare(gates_triton, gates.definition, [x, None, None], {"function": function, "scale": 1.0, "floor": -80.0})
    compare(gates_triton, gates.definition, [x, None, None], {"function": "exp", "scale": -1.0, "floor": -80.0})
    y = gates_triton.forward(x, None, None, function="softplus", scale=1.0, floor=None)
    assert_close(y[0, 2], torch.tensor(-30.0).exp(), FP32)  # the small term is not lost in a sum with 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(300, 512), (37, 130), (1, 1)])
def test_bounded_gate(rows: int, width: int, bounded: bool, with_input: bool, dtype: torch.dtype) -> None:
    x, y = draw(rows, width, dtype=dtype, step=3), draw(rows, width, dtype=dtype, seed=1, step=2)
    inputs = [x, y if with_input else None, draw(width, seed=2) if bounded else None]
    compare(bounded_gate_triton, bounded_gate.definition, inputs, {})


def test_bounded_gate_far_from_zero() -> None:
    x = torch.tensor([[-1e30, -200.0, -20.0, -1e-8, 0.0, 15.0, 20.0, 200.0, 1e30]], device=DEVICE)
    for bound in (None, -200.0, -20.0, 0.0, 20.0, 200.0):
        for y in (None, x, x.flip(-1)):
            inputs = [x, y, None if bound is None else torch.full_like(x[0], bound)]
            leaves = [t if t is None else t.double().requires_grad_() for t in inputs]
            expected, actual = bounded_gate.definition(*leaves), bounded_gate_triton.forward(*inputs)
            pairs = list(zip(actual, expected, strict=True))
            for grads in ((1.0, 0.0), (0.0, 1.0)):
                given = tuple(torch.full_like(t, grad) for t, grad in zip(actual, grads, strict=True))
                gradients = torch.autograd.grad(
                    expected, [t for t in leaves if t is not None], [t.double() for t in given], True
                )
                actual_gradients = bounded_gate_triton.backward(given, *inputs)
                pairs += zip([t for t in actual_gradients if t is not None], gradients, strict=True)
            for a, e in pairs:
                # element by element: an error of a small gradient would not show in the norm beside a gradient of 1
                for one, truth in zip(a.flatten(), e.flatten(), strict=True):
                    assert_close(one, truth, FP32, f"{bound}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "heads", "size"), [(1, 6, 128), (2, 2, 20), (3, 9, 64), (1, 70, 128)])
def test_repeat_heads(groups: int, heads: int, size: int, dtype: torch.dtype) -> None:
    x = draw(19, groups, size, dtype=dtype, step=2)

    def rounded_once(x: Tensor, weight: Tensor | None, heads: int) -> Tensor:
        """The definition in fp32: in bf16, PyTorch would round the gradient's sum over heads several times."""
        return repeat_heads.definition(x.float(), weight, heads=heads).to(x.dtype)

    for weight in (draw(19, heads, seed=2), None):
        compare(repeat_heads_triton, rounded_once, [x, weight], {"heads": heads})


def test_layouts_that_autograd_makes() -> None:
    """The kernels take the gradients of sums, whose strides are 0, and transposed inputs."""
    x, weight, column = draw(6, 2, 20), draw(8, 6, seed=2).T, draw(20, 6, seed=3).T
    calls: list[tuple[ModuleType, list[Tensor | None], dict[str, Any]]] = [
        (repeat_heads_triton, [x, weight], {"heads": weight.shape[-1]}),
        (gates_triton, [column, None, None], {"function": "softplus", "scale": 1.0, "floor": None}),
        (bounded_gate_triton, [column, column, None], {}),
        (feature_maps_triton, [column], {}),
    ]
    for kernels, inputs, options in calls:
        dense = [t if t is None else t.contiguous() for t in inputs]
        y, wanted = kernels.forward(*inputs, **options), kernels.forward(*dense, **options)
        ones = torch.ones((), device=DEVICE)
        several = isinstance(y, tuple)
        grad = tuple(ones.expand_as(t) for t in y) if several else ones.expand_as(y)
        dense_grad = tuple(torch.ones_like(t) for t in y) if several else torch.ones_like(y)
        pairs = list(zip(y, wanted, strict=True)) if several else [(y, wanted)]
        gradients = kernels.backward(grad, *inputs, **options)
        pairs += zip(gradients, kernels.backward(dense_grad, *dense, **options), strict=True)
        for actual, expected in pairs:
            if expected is not None:
                assert_close(actual, expected, FP32, kernels.__name__)


# rows, tokens, channels, taps, bias, activation, lengths of packed documents, size of the groups normalised
CONVS = [
    (2, 37, 200, 4, False, "silu", None, None),
    (3, 5, 20, 3, True, None, None, None),
    (1, 70, 128, 4, True, "silu", [0, 1, 2, 0, 40, 27, 0], None),
    (1, 1, 33, 2, False, "silu", None, None),
    (2, 300, 256, 4, True, "silu", None, None),
    (2, 37, 3 * 96, 4, False, "silu", None, 96),
    (3, 5, 20, 3, True, None, None, 10),
    (1, 70, 256, 4, True, "silu", [0, 1, 2, 0, 40, 27, 0], 128),
    (1, 1, 33, 2, False, "silu", None, 1),
    (2, 300, 128, 4, False, "silu", None, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(("batch", "length", "channels", "taps", "bias", "activation", "documents", "norm"), CONVS)
def test_short_conv(
    batch: int,
    length: int,
    channels: int,
    taps: int,
    bias: bool,
    activation: str | None,
    documents: list[int] | None,
    norm: int | None,
    continued: bool,
    dtype: torch.dtype,
) -> None:
    """The kernels match the PyTorch version on the CPU; with `continued`, inputs precede the sequences."""
    inputs = [draw(batch, length, channels, dtype=dtype), draw(channels, taps, dtype=dtype, seed=2)]
    inputs += [draw(channels, dtype=dtype, seed=3)] if bias else []
    offsets = None if documents is None else torch.tensor([0, *documents], device=DEVICE).cumsum(0)
    first = None if offsets is None else first_tokens(offsets, length)
    document = None if offsets is None else documents_of(offsets, length).int()
    before = draw(batch if documents is None else len(documents), taps - 1, channels, seed=5) if continued else None
    inputs += [before] if before is not None else []
    leaves = [x.detach().cpu().requires_grad_() for x in inputs]
    packed = None if offsets is None else offsets.cpu()
    # fp32 with a norm: the kernel does not round what it normalises, PyTorch would
    wide = [x.float() if norm else x for x in leaves]
    options: dict[str, Any] = {"activation": activation, "norm_size": norm}
    start = wide.pop().mT if continued else None
    expected, state = short_conv.short_conv(*wide, state=start, cu_seqlens=packed, **options)
    expected = expected.to(dtype)
    grad = draw(*expected.shape, dtype=dtype, seed=4)
    gradients = torch.autograd.grad(expected, leaves, grad.cpu())
    padded: list[Tensor | None] = [*inputs[:2], inputs[2] if bias else None, before, first, document]
    actual = [short_conv_triton.forward(*padded, **options)]  # type: ignore[arg-type]
    actual += [x for x in short_conv_triton.backward(grad, *padded, **options) if x is not None]  # type: ignore[arg-type]
    for i, (a, e) in enumerate(zip(actual, [expected, *gradients], strict=True)):
        assert a.dtype == e.dtype
        lost = 4 if norm == 1 else 1  # in a group of one channel, gradients are differences of nearly equal numbers
        assert_close(a, e, lost * FP32 if dtype == torch.float32 else HALF, f"{i}")
    assert state is not None
    if not continued:
        assert_close(short_conv._last(inputs[0], taps - 1, offsets), state, FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "dim", "size"), [(1, 8, 64, 64), (2, 3, 20, 12), (2, 1, 96, 96)])
def test_rotate(rows: int, heads: int, dim: int, size: int, dtype: torch.dtype) -> None:
    wide = draw(2, 37, heads, dim + 8, dtype=dtype)  # x is a slice of it, as of one projection for several tensors
    x = wide[..., 8:].detach().requires_grad_()
    angles = 30 * draw(rows, 37, 1, size // 2, seed=2)
    expected = rotary.definition(x.float(), angles.cos(), angles.sin()).to(dtype)  # rounded once, as its gradient is
    assert_close(
        rotary_triton.rotate(x, angles.cos(), angles.sin()), expected, FP32 if dtype == torch.float32 else HALF
    )
    (gradient,) = torch.autograd.grad(expected, x, wide[..., :dim])
    actual = rotary_triton.rotate(wide[..., :dim], angles.cos(), -angles.sin())
    assert actual.dtype == dtype
    assert_close(actual, gradient, FP32 if dtype == torch.float32 else HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elu_plus_one(dtype: torch.dtype) -> None:
    inputs: list[Tensor | None] = [30 * draw(5, 7, 100, dtype=dtype, step=2)]
    compare(feature_maps_triton, feature_maps.elu_definition, inputs, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(
    ("count", "more", "batch", "length", "width", "documents"),
    [
        (5, True, 2, 37, 72, None),
        (6, False, 1, 70, 128, [0, 1, 2, 0, 40, 27, 0]),
        (1, False, 3, 1, 20, None),
        (1, True, 1, 1, 3, None),
    ],
)
def test_shift_mix(
    count: int,
    more: bool,
    batch: int,
    length: int,
    width: int,
    documents: list[int] | None,
    continued: bool,
    dtype: torch.dtype,
) -> None:
    offsets = None if documents is None else torch.tensor([0, *documents], device=DEVICE).cumsum(0)
    leaves = [draw(batch, length, width, dtype=dtype), draw(count, width, dtype=dtype, seed=2)]
    leaves += [draw(count, batch, length, width, dtype=dtype, seed=3)] if more else []
    leaves += [draw(batch if documents is None else len(documents), width, seed=5)] if continued else []
    leaves = [x.requires_grad_() for x in leaves]
    first, document = None, None
    if offsets is not None:
        first, document = first_tokens(offsets, length), documents_of(offsets, length).int()

    def arguments(x: Tensor, share: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        rest = iter(others)
        return x, share, next(rest) if more else None, next(rest) if continued else None, first, document

    expected = shift_mix.definition(*arguments(*leaves))
    grads = tuple(draw(batch, length, width, dtype=dtype, seed=4 + i) for i in range(count))
    wanted = [*expected, *torch.autograd.grad(expected, leaves, grads)]
    inputs = arguments(*(x.detach() for x in leaves))
    actual = [
        *shift_mix_triton.forward(*inputs),
        *(x for x in shift_mix_triton.backward(grads, *inputs) if x is not None),
    ]
    for i, (a, e) in enumerate(zip(actual, wanted, strict=True)):
        assert a.dtype == e.dtype, i
        assert_close(a, e, FP32 if dtype == torch.float32 else 4 * BF16_ROUNDING, f"{i}")  # every step is rounded
