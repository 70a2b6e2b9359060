"""Tests of the PyTorch definitions of fused operations: values, gradients, saved tensors and refused inputs.

tests/gpu/test_fused.py compares the CUDA kernels with these definitions.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.fused.bounded_gate import bounded_gate
from linear_moe.modeling.ops.fused.gates import gate, gate_and_complement
from linear_moe.modeling.ops.fused.norms import l2_norm, norm
from linear_moe.modeling.ops.fused.repeat_heads import repeat_heads
from linear_moe.modeling.ops.fused.shift_mix import shift_mix
from linear_moe.modeling.ops.kernels import on_kernels
from tests.tolerances import BF16_ROUNDING, FP64, assert_close

ROWS, HEADS, SIZE = 3, 2, 4
WIDTH = HEADS * SIZE


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def normalised(u: Tensor, eps: float) -> Tensor:
    """Computes the RMS norm of each head by its formula."""
    heads = [u[:, i : i + SIZE] for i in range(0, WIDTH, SIZE)]
    return torch.cat([h / (h.pow(2).mean(1, keepdim=True) + eps).sqrt() for h in heads], 1)


def test_norm_by_its_formula() -> None:
    x, z, skip = (draw(ROWS, WIDTH, seed=i) for i in range(3))
    w, head_weight, d = draw(WIDTH, seed=3), draw(SIZE, seed=4), draw(HEADS, seed=5)
    silu, common = z / (1 + (-z).exp()), {"eps": 0.1, "size": SIZE}
    actual = norm(x, w, None, z, **common)
    assert_close(actual, normalised(x, 0.1) * w * silu, FP64)
    actual = norm(x, head_weight, None, z, activation="sigmoid", scale=3.0, **common)
    assert_close(actual, 3 * normalised(x, 0.1) * head_weight.repeat(HEADS) * z.sigmoid(), FP64)
    actual = norm(x, w, None, z, skip, d, gate_first=True, **common)
    assert_close(actual, normalised((x + d.repeat_interleave(SIZE) * skip) * silu, 0.1) * w, FP64)
    assert_close(norm(x, None, None, z, activation="identity", **common), normalised(x, 0.1) * z, FP64)
    assert_close(norm(x, w, skip[0], z, kind="none", **common), (x * w + skip[0]) * silu, FP64)
    centred = torch.cat([h - h.mean(1, keepdim=True) for h in x.split(SIZE, 1)], 1)
    assert_close(norm(x, w, skip[0], z, kind="layer", **common), (normalised(centred, 0.1) * w + skip[0]) * silu, FP64)
    assert_close(norm(x, w, gate_first=True, **common), normalised(x / (1 + (-x).exp()), 0.1) * w, FP64)
    assert_close(l2_norm(x, eps=0.3), x / (x.pow(2).sum(1, keepdim=True) + 0.3).sqrt(), FP64)
    assert_close(l2_norm(x, eps=0.4, size=SIZE), normalised(x, 0.1) / 2, FP64)


def test_gate_by_its_formula() -> None:
    x, bias, rate = draw(ROWS, WIDTH), draw(WIDTH, seed=1), draw(HEADS, seed=2)
    y = x + bias
    expected = -rate.exp().repeat_interleave(SIZE) * (1 + y.exp()).log()
    assert_close(gate(x, "softplus", scale=-1.0, bias=bias, log_rate=rate), expected, FP64)
    assert_close(gate(x, "logsigmoid", scale=1 / 16), (1 / (1 + (-x).exp())).log() / 16, FP64)
    assert_close(gate(x, "sigmoid", scale=2.0), 2 / (1 + (-x).exp()), FP64)
    assert_close(gate(x, "exp", scale=-1.0, bias=bias, floor=-1.0), (-y.exp()).clamp(min=-1), FP64)
    assert gate(x.bfloat16(), "exp").dtype == torch.float32
    g, rest = gate_and_complement(x, "logsigmoid", scale=1 / 8, floor=-0.1)
    assert_close(g, gate(x, "logsigmoid", scale=1 / 8, floor=-0.1), FP64)
    assert_close(rest, 1 - g.exp(), FP64)


@pytest.mark.parametrize("function", ["logsigmoid", "softplus", "exp"])
def test_gates_at_the_floor_have_no_gradient(function: Any) -> None:
    x = torch.tensor([[-1e4, 1e4]]).requires_grad_()
    y = gate(x, function, scale=1.0 if function == "logsigmoid" else -1.0, floor=-80.0)
    y.sum().backward()
    assert sorted(y.flatten().tolist()) == [-80.0, 0.0]
    assert x.grad is not None and not x.grad.any()


def test_bounded_gate_by_its_formula() -> None:
    x, logit, y = draw(ROWS, WIDTH), draw(WIDTH, seed=1), draw(ROWS, WIDTH, seed=2)
    bound = 1 / (1 + (-logit).exp())
    for b, given in ((0.0, None), (bound, logit)):
        f = b + (1 - b) / (1 + (-x).exp())
        log_gate, rest = bounded_gate(x, None, given)
        assert_close(log_gate, f.log(), FP64)
        assert_close(rest, 1 - f, FP64)
        assert_close(bounded_gate(x, y, given)[1], (1 - f) * y / (1 + (-y).exp()), FP64)
    assert [t.dtype for t in bounded_gate(x.bfloat16(), y.bfloat16())] == [torch.float32, torch.bfloat16]
    assert bounded_gate(x - 1e4)[0].eq(-80).all()


def test_repeat_heads_by_its_formula() -> None:
    x, weight = draw(ROWS, 2, SIZE), draw(ROWS, 6, seed=1)
    assert_close(repeat_heads(x, weight), torch.stack([weight[:, h, None] * x[:, h // 3] for h in range(6)], 1), FP64)
    assert_close(repeat_heads(x, heads=6), repeat_heads(x, torch.ones_like(weight)), FP64)
    for wrong in ({}, {"heads": 5}, {"weight": weight, "heads": 6}):
        with pytest.raises(ValueError, match="heads"):
            repeat_heads(x, **wrong)  # type: ignore[arg-type]


def test_shift_mix_by_its_formula() -> None:
    x, share, more, state = draw(2, 5, WIDTH), draw(3, WIDTH, seed=1), draw(3, 2, 5, WIDTH, seed=2), draw(2, WIDTH)
    for start in (torch.zeros_like(state), state):
        for i, y in enumerate(shift_mix(x, share, more, state=None if start is not state else state)):
            for t in range(5):
                before = start if t == 0 else x[:, t - 1]
                weight = share[i] + more[i][:, t]
                assert_close(y[:, t], x[:, t] * (1 - weight) + before * weight, FP64)
    offsets = torch.tensor([0, 0, 2, 5])
    packed = shift_mix(x[:1], share, cu_seqlens=offsets)
    for start, end in ((0, 2), (2, 5)):
        for y, alone in zip(packed, shift_mix(x[:1, start:end], share), strict=True):
            assert_close(y[:, start:end], alone, FP64)


CALLS: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    (lambda x, w, z, s, d: norm(x, w, None, z, s, d, eps=0.1, size=SIZE, gate_first=True), [(ROWS, WIDTH), (WIDTH,),
     (ROWS, WIDTH), (ROWS, WIDTH), (HEADS,)]),
    (lambda x, w, b, z: norm(x, w, b, z, eps=0.1, size=SIZE, kind="layer"), [(ROWS, WIDTH), (SIZE,), (SIZE,),
     (ROWS, WIDTH)]),
    (lambda x, b, r: gate(x, "softplus", bias=b, log_rate=r), [(ROWS, WIDTH), (WIDTH,), (HEADS,)]),
    (repeat_heads, [(ROWS, 2, SIZE), (ROWS, 4)]),
    (lambda x, share, more: shift_mix(x, share, more)[1], [(2, ROWS, WIDTH), (2, WIDTH), (2, 2, ROWS, WIDTH)]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "shapes"), CALLS)
def test_gradients_and_what_is_saved(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs)
    assert [id(t) for t in saved] == [id(t) for t in inputs]
    inputs[0] = inputs[0].detach()  # x may need no gradient, only the weights
    (gradient,) = torch.autograd.grad(function(*inputs).sum(), inputs[1])
    assert gradient.shape == inputs[1].shape
    half = [t.detach().bfloat16() for t in inputs]
    actual, expected = function(*half), function(*(t.double() for t in half))
    assert_close(actual, expected, BF16_ROUNDING)  # rounded once


def test_kernels_are_launched_where_their_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        seen.append(x)
        yield
        seen.append(x)

    kernels = types.SimpleNamespace(forward=lambda x: x + len(seen))  # adds 1 within `device_of`
    monkeypatch.setitem(sys.modules, "linear_moe.modeling.ops.fused.stub_triton", kernels)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(2)
    assert on_kernels("stub_triton", x).tolist() == [1, 1] and all(t is x for t in seen) and len(seen) == 2


@pytest.mark.parametrize(
    ("function", "shapes", "options", "message"),
    [
        (norm, [(3, 8)], {"size": 3}, "size"),
        (norm, [(3, 8), (3,)], {}, "weight"),
        (norm, [(3, 8), (8,), (4,)], {"size": 4}, "bias"),
        (norm, [(3, 8), (8,), (8,), (3, 4)], {}, "gate"),
        (norm, [(3, 8), (8,), (8,), (3, 8), (3, 8)], {}, "skip_weight"),
        (norm, [(3, 8)], {"activation": "tanh"}, "activation"),
        (gate, [(3, 8)], {"function": "tanh"}, "function"),
        (gate, [(3, 8)], {"function": "exp", "bias": torch.ones(4)}, "bias"),
        (gate, [(3, 8)], {"function": "exp", "log_rate": torch.ones(3)}, "log_rate"),
        (bounded_gate, [(3, 8), (3, 8), (4,)], {}, "logit"),
        (repeat_heads, [(3, 2, 4), (3, 5)], {}, "weight"),
        (shift_mix, [(1, 3, 4), (7, 4)], {}, "share"),
        (shift_mix, [(1, 3, 4), (2, 4), (2, 3, 4)], {}, "more"),
        (shift_mix, [(1, 3, 4), (2, 4)], {"state": torch.ones(3, 4)}, "state"),
    ],
)
def test_what_does_not_fit_is_refused(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(*(torch.ones(shape) for shape in shapes), **options)
