"""Tests that every mixer of the registry must pass, whatever it computes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import LinearMixer, Mixer
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from linear_moe.modeling.ops.backends import use_backend
from linear_moe.modeling.tokens import Cache, TokenLayout
from tests.tolerances import BF16, DECODE, FP32, FP32_GRADIENT_FLOOR, assert_close, relative_error
from tests.unit.modeling.mixers.common import build, case_ids, cases, packed, stream

every_case = pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())


class Exchange:
    """Exchange of tensors between two tensor ranks that run in two threads; gradients flow through it."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.given: list[Tensor | None] = [None, None]

    def __call__(self, rank: int, x: Tensor) -> list[Tensor]:
        self.given[rank] = x
        self.barrier.wait()
        both = [t for t in self.given if t is not None]
        self.barrier.wait()
        return both


class Shard(Host):
    """Host of one of two tensor ranks, which split the tokens outside regions, as Megatron's sequence parallelism."""

    def __init__(self, rank: int, exchange: Exchange | None = None):
        super().__init__()
        self.tensor_rank, self.exchange = rank, exchange or Exchange()
        self.tokenwise: set[int] = set()  # ids of parameters whose gradients are summed over the ranks at the end

    def size(self, axis: str) -> int:
        return 2 if axis == "tensor" else 1

    def rank(self, axis: str) -> int:
        return self.tensor_rank if axis == "tensor" else 0

    def parameter(self, *shape: int, tokenwise: bool = False, **options: Any) -> torch.nn.Parameter:
        parameter = super().parameter(*shape, tokenwise=tokenwise, **options)
        if tokenwise:
            self.tokenwise.add(id(parameter))
        return parameter

    def shared(self, weight: Tensor) -> Tensor:
        """Doubles gradients instead of summing them over ranks, which shows that it was called exactly once."""
        weight = weight.view_as(weight)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: 2 * gradient)
        return weight

    def enter(self, x: Tensor) -> Tensor:
        return torch.cat(self.exchange(self.tensor_rank, x))

    def leave(self, y: Tensor) -> Tensor:
        first, second = self.exchange(self.tensor_rank, y)
        return (first + second).chunk(2)[self.tensor_rank]


def on_two_ranks(shards: list[Mixer], x: Tensor, layout: TokenLayout) -> Tensor:
    """Runs the forward passes of both shards in lockstep, each with half of the tokens; returns the whole output."""

    def one(shard: Mixer, tokens: Tensor) -> Tensor:
        assert isinstance(shard.host, Shard)
        try:
            return shard(tokens, replace(layout, shared={}))
        except BaseException:
            shard.host.exchange.barrier.abort()  # the other rank would wait for this one
            raise

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(one, shard, tokens) for shard, tokens in zip(shards, x.chunk(2), strict=True)]
        errors = [rank.exception() for rank in ranks]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return torch.cat([rank.result() for rank in ranks])


def decode(mixer: Mixer, x: Tensor, batch: int, prefill: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Feeds rows `x [batch * length, hidden]` through a cache: `prefill` tokens at once, then one by one."""
    rows = x.view(batch, -1, x.shape[-1])
    length = rows.shape[1]
    cache = mixer.init_cache(batch, length + 3, x.dtype, x.device)
    outputs, start = [], 0
    with torch.no_grad():
        for n in [prefill] * bool(prefill) + [1] * (length - prefill):
            positions = torch.arange(start, start + n).expand(batch, n)
            y = mixer(rows[:, start : start + n].flatten(0, 1), TokenLayout(batch, n, positions=positions), cache)
            outputs.append(y.view(batch, n, -1))
            start += n
    return torch.cat(outputs, 1).flatten(0, 1), cache


@every_case
def test_causal_and_rows_independent(name: str, fields: dict[str, Any]) -> None:
    mixer, x = build(name, fields), stream(3, 9)
    full = mixer(x, TokenLayout(3, 9)).view(3, 9, -1)
    alone = torch.stack([mixer(row, TokenLayout(1, 9)) for row in x.view(3, 9, -1)])
    assert_close(full, alone, FP32)
    changed = x.clone().view(3, 9, -1)
    changed[:, 5:] += 1.0
    after = mixer(changed.flatten(0, 1), TokenLayout(3, 9)).view(3, 9, -1)
    assert_close(after[:, :5], full[:, :5], FP32)
    assert relative_error(after[:, 5:], full[:, 5:]) > 1e-2


def outputs_and_gradients(mixer: Mixer, x: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """Returns, by name, the output, and the gradients of the input and of every parameter for a loss of the output."""
    x = x.clone().requires_grad_()
    y = mixer(x, layout)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    parameters = dict(mixer.named_parameters())
    # One token from a zero state need not depend on its gates: their gradients are zeros.
    inputs = [x, *parameters.values()]
    dx, *gradients = torch.autograd.grad((y * weight).sum(), inputs, materialize_grads=True)
    return {"output": y, "d input": dx} | {f"d {n}": g for n, g in zip(parameters, gradients, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Asserts that two results of `outputs_and_gradients` agree; see FP32_GRADIENT_FLOOR."""
    floor = FP32_GRADIENT_FLOOR * max(float(x.norm()) for key, x in expected.items() if key.startswith("d "))
    for key, x in expected.items():
        error = float((actual[key] - x).detach().norm()) / max(float(x.detach().norm()), floor * key.startswith("d "))
        assert error <= FP32, f"{what}, {key}: {error:.2e}"  # also fails for NaN


@every_case
@pytest.mark.parametrize("batch", [1, 3])
def test_chunk_equals_reference(name: str, fields: dict[str, Any], batch: int) -> None:
    mixer = build(name, fields)
    for length in (1, 17, 63, 64, 65, 200):
        x, results = stream(batch, length), {}
        for backend in ("reference", "chunk"):
            with use_backend(backend):
                results[backend] = outputs_and_gradients(mixer, x, TokenLayout(batch, length))
        assert_same(results["chunk"], results["reference"], f"{length} tokens")


@every_case
def test_chunk_equals_reference_packed(name: str, fields: dict[str, Any]) -> None:
    mixer, layout, results = build(name, fields), packed([0, 5, 65, 0, 64, 1, 17, 0]), {}
    for backend in ("reference", "chunk"):
        with use_backend(backend):
            results[backend] = outputs_and_gradients(mixer, stream(1, layout.length), layout)
    assert_same(results["chunk"], results["reference"])


@every_case
def test_packed_equals_separate_documents(name: str, fields: dict[str, Any]) -> None:
    mixer, lengths = build(name, fields), [5, 1, 9, 2]
    x = stream(1, sum(lengths)).requires_grad_()
    weight = stream(1, sum(lengths), seed=1)
    together = mixer(x, packed(lengths))
    apart = torch.cat([mixer(document, TokenLayout(1, len(document))) for document in x.split(lengths)])
    assert_close(together, apart, FP32)
    inputs = [x, *mixer.parameters()]
    actual = torch.autograd.grad((together * weight).sum(), inputs)
    expected = torch.autograd.grad((apart * weight).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, FP32)
    assert relative_error(mixer(x, TokenLayout(1, sum(lengths))), apart) > 1e-2  # boundaries matter


@every_case
@pytest.mark.parametrize("prefill", [0, 1, 2, 6])
def test_decoding_equals_full_forward(name: str, fields: dict[str, Any], prefill: int) -> None:
    mixer, x = build(name, fields), stream(3, 9)
    step_by_step, _ = decode(mixer, x, 3, prefill)
    assert_close(step_by_step, mixer(x, TokenLayout(3, 9)), DECODE)


@every_case
def test_prefill_in_two_pieces(name: str, fields: dict[str, Any]) -> None:
    mixer, x = build(name, fields), stream(2, 9)
    rows, cache = x.view(2, 9, -1), mixer.init_cache(2, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [
            mixer(rows[:, a:b].flatten(0, 1), TokenLayout(2, b - a, positions=torch.arange(a, b).expand(2, -1)), cache)
            for a, b in ((0, 4), (4, 9))
        ]
        assert_close(
            torch.cat([p.view(2, -1, 32) for p in pieces], 1).flatten(0, 1), mixer(x, TokenLayout(2, 9)), DECODE
        )


@every_case
def test_state_shapes_are_those_used(name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(name, fields), stream(3, 5)
    seen = []
    if isinstance(mixer, LinearMixer):
        recurrence = mixer.recurrence

        def spy(*args: Any) -> tuple[Tensor, Cache]:
            o, states = recurrence(*args)
            seen.append({name: (tuple(state.shape), state.dtype) for name, state in states.items()})
            return o, states

        monkeypatch.setattr(mixer, "recurrence", spy)
    shapes = mixer.state_shapes(3, 8)
    _, cache = decode(mixer, x, 3, prefill=4)
    assert set(cache) == set(shapes) and all(bool(state.any()) for state in cache.values())
    assert isinstance(mixer, LinearMixer) == bool(seen)
    for states in seen:
        assert states == {name: shapes[name] for name in states}


@every_case
def test_gradients_reach_every_parameter(name: str, fields: dict[str, Any]) -> None:
    mixer, x = build(name, fields), stream(2, 7).requires_grad_()
    (mixer(x, TokenLayout(2, 7)) * stream(2, 7, seed=1)).sum().backward()
    for parameter_name, parameter in [("x", x), *mixer.named_parameters()]:
        gradient = parameter.grad
        assert gradient is not None and bool(gradient.isfinite().all()), parameter_name
        assert float(gradient.norm()) > 1e-6, parameter_name


@every_case
def test_two_tensor_ranks_equal_one(name: str, fields: dict[str, Any]) -> None:
    full, x, weight, exchange = build(name, fields), stream(2, 7), stream(2, 7, seed=1), Exchange()
    hosts = [Shard(rank, exchange) for rank in (0, 1)]
    shards = [build(name, fields, host, tensor=2) for host in hosts]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    actual, expected = on_two_ranks(shards, inputs[0], TokenLayout(2, 7)), full(inputs[1], TokenLayout(2, 7))
    assert_close(actual, expected, FP32)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert_close(inputs[0].grad, inputs[1].grad, FP32, "x")
    assert sum(p.numel() for p in shards[0].parameters()) < sum(p.numel() for p in full.parameters())
    for key, parameter in full.named_parameters():
        parts = [shard.get_parameter(key) for shard in shards]
        grads = [part.grad for part in parts if part.grad is not None]
        axes = parameter.spec.axes  # type: ignore[attr-defined]
        assert len(grads) == 2 and parameter.grad is not None
        joined = torch.cat(grads, dim=next(iter(axes))) if axes else grads[0] + grads[1]
        shared = not axes and not any(id(part) in host.tokenwise for part, host in zip(parts, hosts, strict=True))
        assert_close(joined, parameter.grad * (2 if shared else 1), FP32, key)
    for key, (shape, _) in full.state_shapes(2, 8).items():
        local = torch.Size(shards[0].state_shapes(2, 8)[key][0]).numel()
        split = key not in full.unsplit_states
        assert local * (2 if split else 1) == torch.Size(shape).numel(), key


@every_case
def test_bf16(name: str, fields: dict[str, Any]) -> None:
    half = build(name, fields, Host(dtype=torch.bfloat16))
    single = build(name, fields)
    single.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    x = stream(2, 9).bfloat16()
    actual = half(x, TokenLayout(2, 9))
    assert actual.dtype == torch.bfloat16
    assert_close(actual, single(x.float(), TokenLayout(2, 9)), BF16)
    step_by_step, cache = decode(half, x, 2, prefill=4)
    assert_close(step_by_step, actual, BF16)
    assert {k: v.dtype for k, v in cache.items()} == {
        k: kind or torch.bfloat16 for k, (_, kind) in half.state_shapes(2, 8).items()
    }
    for key, parameter in half.named_parameters():
        expected = torch.float32 if parameter.spec.fp32 else torch.bfloat16  # type: ignore[attr-defined]
        assert parameter.dtype == expected, key


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_at_extreme_inputs(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs and gradients are finite for huge inputs (gates of 0 and 1, one-hot softmaxes) and for zeros."""
    mixer = build(name, fields, Host(dtype=dtype))
    for length, size in ((66, 1e3), (9, 0.0)):
        x = (size * stream(2, length)).to(dtype)
        for key, result in outputs_and_gradients(mixer, x, TokenLayout(2, length)).items():
            assert bool(result.isfinite().all()), (size, key)
        assert bool(decode(mixer, x, 2, prefill=length - 2)[0].isfinite().all()), size


@every_case
def test_estimates_scale_with_sizes(name: str, fields: dict[str, Any]) -> None:
    full, shard = build(name, fields), build(name, fields, Shard(0), tensor=2)
    assert full.recurrence_flops(64) == shard.recurrence_flops(64) > 0  # over all heads
    assert full.recurrence_flops(128) >= full.recurrence_flops(64)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_declarations(name: str) -> None:
    cls = mixer_class(name)
    assert cls.Config().type == name
    assert cls.formula and cls.paper.startswith("arXiv ") and cls.family
    assert cls.capabilities.tensor_parallel and cls.capabilities.packing and cls.capabilities.decoding
