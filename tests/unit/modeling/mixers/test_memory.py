"""`activation_elements` against what autograd saves, the kernels replaced by stand-ins that save what they save."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers import conv
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.tokens import TokenLayout
from tests.unit.modeling.mixers.common import build, case_ids, cases, dims

LENGTH, HIDDEN = 32, 256


class Saves(torch.autograd.Function):
    """An op that returns something like its first input and saves the tensors after it."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def recurrence(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, None]:
    """Saves its inputs, the gate's running sum and, where the gate is per channel or a delta rule, 64 a head."""
    if options.get("gv") is not None:  # token by token: its inputs and the output in fp32
        return Saves.apply(v, q, k, v, *args, options["g"], options["gv"], torch.empty(v.shape)), None
    gates = [*args, *(options[name] for name in ("beta", "g") if options.get(name) is not None)]
    sums = [torch.empty_like(gates[-1])] if gates else []
    chunk = [torch.empty(*q.shape[:3], 64, dtype=v.dtype)] if len(gates) == 2 or any(g.ndim == 4 for g in sums) else []
    return Saves.apply(v, q, k, v, *gates, *sums, *chunk), None


def delta_product(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Saves its inputs and, for every write, the gate's running sum and 64 a head."""
    sums = [] if g is None else [torch.empty_like(beta)]
    return Saves.apply(v[:, :, 0], q, k, v, beta, *sums, torch.empty(*beta.shape, 64, dtype=v.dtype)), None


def saves_inputs(*inputs: Tensor, **options: Any) -> tuple[Tensor, None]:
    """Of q, k, v and others."""
    inputs = (*inputs, *(x for x in options.values() if isinstance(x, Tensor)))
    return Saves.apply(inputs[2], *inputs), None


def gsa(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, tuple[None, None]]:
    """Saves its inputs, the scores of slots, in fp32 their softmax and the scores within a chunk of 64."""
    scores = [torch.empty_like(s), torch.empty_like(g), torch.empty(*q.shape[:3], 64)]
    return Saves.apply(v, q, k, v, s, g, *scores), (None, None)


def linear_scan(x: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Saves the gate and its output, which what comes after it saves too."""
    return Saves.apply(x, g), None


def selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Saves its inputs and the states before every 32 tokens."""
    return Saves.apply(u, u, dt, A, B, C, torch.empty(len(u), -(-u.shape[1] // 32), *A.shape)), None


def diagonal_scan(u: Tensor, log_a: Tensor, c: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Its input in fp32 twice, and the states before every 32 tokens twice."""
    states = [torch.empty(len(u), -(-u.shape[1] // 32), *c.shape) for _ in range(2)]
    return Saves.apply(u, log_a, c, *(u.float() for _ in range(2)), *states), None


OPS = {
    "complex_decay": saves_inputs,
    "decay": recurrence,
    "delta": recurrence,
    "delta_product": delta_product,
    "diagonal_scan": diagonal_scan,
    "dplr": saves_inputs,
    "gsa": gsa,
    "linear_scan": linear_scan,
    "selective_scan": selective_scan,
}


def kernels(cls: type[Mixer]) -> Iterator[tuple[Any, str, Any]]:
    """Where a mixer finds its recurrence's kernels: an object, its attribute, and what stands in for it."""
    module, stand_ins = sys.modules[cls.__module__], {cls.family: recurrence} | OPS
    yield from ((module, op, stand_in) for op, stand_in in stand_ins.items() if hasattr(module, op))
    if (declared := getattr(cls, "op", None)) is not None:
        yield cls, "op", stand_ins[getattr(declared, "func", declared).__name__]


@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_activation_elements(name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for place, attribute, stand_in in kernels(mixer_class(name)):
        monkeypatch.setattr(place, attribute, stand_in)
    monkeypatch.setattr(conv, "short_conv", lambda x, weight, bias, **_: (Saves.apply(x, x), None))
    rms_norm = lambda x, *_, **__: Saves.apply(x, x, torch.empty(x.shape[:-1]))  # noqa: E731  the GPU's fused kernel
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    mixer = build(name, fields, Host(dtype=torch.bfloat16), dims(HIDDEN))
    # of two lengths, so that what does not depend on the tokens does not count
    measured = (saved_bytes(mixer, 2 * LENGTH) - saved_bytes(mixer, LENGTH)) / 2 / LENGTH
    assert mixer.activation_elements() == pytest.approx(measured, rel=0.15)
    mixer.host.activations = Activations(["core"])
    without = (saved_bytes(mixer, 2 * LENGTH) - saved_bytes(mixer, LENGTH)) / 2 / LENGTH
    assert mixer.core_elements() == pytest.approx(measured - without, abs=0.15 * measured)


def saved_bytes(mixer: Mixer, length: int) -> int:
    x = torch.randn(length, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    outside = {t.untyped_storage().data_ptr() for t in (x, *mixer.parameters())}
    saved: dict[int, Any] = {}  # keeps the storages alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mixer.host.activations.layer(0, mixer, x, TokenLayout(1, length))
    return sum(s.nbytes() for address, s in saved.items() if address not in outside)
