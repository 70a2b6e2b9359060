"""Tests of our kernels for summaries of pieces, and for gradients of initial states, against PyTorch."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.packing import segment_sums
from linear_moe.modeling.ops.recurrences import scan
from linear_moe.modeling.ops.recurrences.delta import chunk, delta, fla, product
from linear_moe.modeling.ops.recurrences.dplr import dplr
from tests.gpu.kernels import DEVICE, INTERPRETED, MARKS
from tests.tolerances import BF16, FP32, assert_close

pytest.importorskip("triton")
decay_kernels = importlib.import_module("linear_moe.modeling.ops.recurrences.decay.summary_triton")
decay_summary = importlib.import_module("linear_moe.modeling.ops.recurrences.decay.summary")
scan_kernels = importlib.import_module("linear_moe.modeling.ops.recurrences.scan.summary_triton")
delta_kernels = importlib.import_module("linear_moe.modeling.ops.recurrences.delta.summary_triton")
delta_summary = importlib.import_module("linear_moe.modeling.ops.recurrences.delta.summary")
dplr_summary = importlib.import_module("linear_moe.modeling.ops.recurrences.dplr.summary")

pytestmark = MARKS
TF32 = 2e-3  # tolerance of products of fp32 tensors on a GPU, which drops the last 13 bits of the factors
SHAPES = [(2, 150, 2, 24, 20), (1, 64, 1, 16, 80), (1, 7, 2, 40, 136)]  # rows, tokens, heads, keys, values
NAMES = ("none", "constant", "head", "key", "value", "both")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gates(gate: str, rows: int, length: int, heads: int, keys: int, values: int) -> tuple[Tensor | None, Tensor | None]:
    """Draws g and gv; at one token, g forgets nearly everything."""
    shapes = {"constant": (1, 1, heads), "head": (rows, length, heads)}
    shapes |= dict.fromkeys(("key", "both"), (rows, length, heads, keys))
    g = -draw(*shapes[gate], seed=8).abs() / 4 if gate in shapes else None
    if gate == "constant":
        assert g is not None
        return g.expand(rows, length, heads), None
    if g is not None:
        g[0, length // 2] = -80.0
    return g, -draw(rows, length, heads, values, seed=9).abs() / 4 if gate in ("value", "both") else None


@pytest.mark.parametrize("programs", [264, 8])
@pytest.mark.parametrize("gate", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decayed_sums(shape: tuple[int, ...], gate: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decay_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(decay_summary, "on_kernel", lambda v: False)
    rows, length, heads, keys, values = shape
    q, k = (draw(rows, length, heads, keys, seed=i) for i in (1, 2))
    v, d_o = (draw(rows, length, heads, values, seed=i) for i in (3, 4))
    g, gv = gates(gate, *shape)
    left_and_sum = decay_kernels.weighted_sum(k, v, g, gv, floor=-80.0, backwards=False, exclusive=False)
    for actual, expected in zip(left_and_sum, decay_summary.summary(k, v, g, gv), strict=True):
        assert_close(actual, expected, TF32, gate)
    for before_gate in (False, True):
        options = {"floor": -80.0, "backwards": True, "exclusive": before_gate}
        _, actual = decay_kernels.weighted_sum(q, d_o, g, gv, **options)
        assert_close(actual, decay_summary.gradient(1.0, before_gate, q, g, gv, d_o), TF32, gate)


def wy(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, d_o: Tensor, scale: float) -> dict[str, Any]:
    """Computes the arguments of `scan`, in chunks of 64 tokens, from the definition of the WY form."""
    whole = torch.zeros_like(k) if g is None else (g if g.ndim == 4 else g[..., None].expand(k.shape))
    parts: list[dict[str, Tensor]] = []
    for q_c, k_c, v_c, b_c, g_c, d_c in zip(*(x.split(64, 1) for x in (q, k, v, beta, whole, d_o)), strict=True):
        q_c, k_c, v_c, g_c, d_c = (x.transpose(1, 2) for x in (q_c, k_c, v_c, g_c, d_c))
        b_c, sums = b_c.transpose(1, 2), g_c.cumsum(2)
        between = segment_sums(g_c.mT).exp().movedim(2, -1)  # [N, H, C, C, K]
        similarity = torch.einsum("bhik,bhjk,bhijk->bhij", k_c, k_c, between)
        scores = scale * torch.einsum("bhik,bhjk,bhijk->bhij", q_c, k_c, between)
        inverse = chunk.unit_lower_inverse(b_c[..., None] * similarity) * b_c[..., None, :]
        made = {"w": inverse @ (k_c * sums.exp()), "u": inverse @ v_c, "dv": scores.mT @ d_c, "sums": sums}
        made |= {"k": k_c * (sums[:, :, -1:] - sums).exp(), "q": q_c * sums.exp()}
        parts.append({name: x.transpose(1, 2) for name, x in made.items()})
    form: dict[str, Any] = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    sums = form.pop("sums") / math.log(2)
    if g is None or g.ndim == 3:
        form |= {"k": k, "q": q}
    return form | {"g": sums[..., 0] if g is not None and g.ndim == 3 else None, "gk": sums if whole is g else None}


def by_running(inputs: tuple[Any, ...], d_o: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes transition, state and the gradient of the initial state in fp32 by running the op in chunks."""
    op = partial(delta if inputs[1].ndim == 4 else product.delta_product, backend="chunk")
    inputs = tuple(None if x is None else x.float() for x in inputs)
    gradient = sequence.gradient_by_running(op, scale, *inputs, d_o.float())
    return (*delta_summary._by_running(op, *inputs), gradient)


@pytest.mark.parametrize(("programs", "least"), [(264, 8), (264, 1), (12, 1)])
@pytest.mark.parametrize("gate", ["none", "head", "key"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scan(shape: tuple[int, ...], gate: str, programs: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(delta_kernels, "LEAST", least)
    rows, length, heads, keys, values = shape
    q, k = (F.normalize(draw(rows, length, heads, keys, seed=i), dim=-1) for i in (1, 2))
    v, d_o = (draw(rows, length, heads, values, seed=i) for i in (3, 4))
    beta = draw(rows, length, heads, seed=5).sigmoid()
    g = None if gate == "none" else -draw(*(k.shape[:3] if gate == "head" else k.shape), seed=6).abs() / 8
    made = wy(q, k, v, beta, g, d_o, 0.3)
    given = (made["k"], made["w"])
    transition, state = delta_kernels.scan(*given, made["u"], made["g"], made["gk"])
    backwards: dict[str, Any] = {"q": made["q"], "do": d_o, "scale": 0.3, "backwards": True}
    _, start = delta_kernels.scan(*given, made["dv"], made["g"], made["gk"], **backwards)
    expected = by_running((q, k, v, beta, g), d_o, 0.3)
    for name, x, y in zip(("transition", "state", "gradient"), (transition, state, start), expected, strict=True):
        assert_close(x, y, 10 * FP32 if INTERPRETED else 3 * TF32, name)


@pytest.mark.parametrize("chunk", [16, 64])
def test_scan_of_dplr(chunk: int) -> None:
    """The kernels match the recurrence from chunk to chunk that `delta/summary_triton.py` describes."""
    rows, length, heads, keys, values = 2, 150, 2, 24, 20
    q, k, b, w = (draw(rows, length, heads, keys, seed=i) / 8 for i in range(4))
    v, u, d_o, dv = (draw(rows, length, heads, values, seed=i) for i in range(4, 8))
    gk = -draw(rows, length, heads, keys, seed=8).abs() / 8
    state, after = torch.randn(2, rows, heads, keys, values, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    final, start = state, after
    last = [x[:, -1] for x in gk.split(chunk, 1)]

    def by_chunk(*tensors: Tensor) -> list[list[Tensor]]:
        return [[x.transpose(1, 2) for x in parts] for parts in zip(*(x.split(chunk, 1) for x in tensors), strict=True)]

    forth, back = by_chunk(k, b, w, v, u), by_chunk(q, b, w, d_o, dv)
    for kept, (k_c, b_c, w_c, v_c, u_c) in zip(last, forth, strict=True):
        final = final * kept.exp2()[..., None] + b_c.mT @ (u_c + w_c @ final) + k_c.mT @ v_c
    for kept, (q_c, b_c, w_c, d_c, dv_c) in zip(last[::-1], back[::-1], strict=True):
        start = start * kept.exp2()[..., None] + 0.3 * q_c.mT @ d_c + w_c.mT @ (dv_c + b_c @ start)
    options: dict[str, Any] = {"gk": gk, "sign": 1, "chunk": chunk}
    transition, adds = delta_kernels.scan(b, w, u, q=k, do=v, **options)
    tolerance = 10 * FP32 if INTERPRETED else 3 * TF32
    assert_close(transition @ state + adds, final, tolerance, "forwards")
    transition, adds = delta_kernels.scan(b, w, dv, q=q, do=d_o, scale=0.3, backwards=True, **options)
    assert_close(transition @ after + adds, start, tolerance, "backwards")


@pytest.mark.parametrize("chunk", [16, 64])
def test_local_gradients_of_writes(chunk: int) -> None:
    scores, d_o = draw(2, 150, 3, chunk, seed=1), draw(2, 150, 3, 20, seed=2)
    expected = torch.zeros_like(d_o)
    for i in range(0, 150, chunk):
        part = scores[:, i : i + chunk, :, : 150 - i].transpose(1, 2).tril()
        expected[:, i : i + chunk] = (part.mT @ d_o[:, i : i + chunk].transpose(1, 2)).transpose(1, 2)
    assert_close(delta_kernels.local(scores, d_o), expected, TF32)


@pytest.mark.skipif(INTERPRETED or not has_fla(), reason="needs flash-linear-attention's kernels")
@pytest.mark.usefixtures("no_autotuning")
@pytest.mark.parametrize("min_gate", [-0.61, -5.0])
def test_dplr_from_the_kernels(min_gate: float) -> None:
    rows, length, heads, keys, values = 2, 700, 3, 64, 64
    q, k, a = (F.normalize(draw(rows, length, heads, keys, seed=i), dim=-1).bfloat16() for i in range(3))
    v, d_o = (draw(rows, length, heads, values, seed=i).bfloat16() for i in (3, 4))
    b, g = -a * draw(rows, length, heads, keys, seed=5).sigmoid().bfloat16() / 8, -draw(*k.shape, seed=6).abs() / 500
    inputs = (q, k, v, a, b, g)
    actual = dplr_summary._on_kernels(min_gate, *inputs)
    actual += (dplr_summary._gradient_on_kernels(min_gate, 0.3, *inputs, d_o),)
    op, wide = partial(dplr, backend="chunk"), [x.float() for x in inputs]
    expected = dplr_summary._by_running(op, *wide)
    expected += (sequence.gradient_by_running(op, 0.3, *wide, d_o.float()),)
    for name, x, y in zip(("transition", "state", "gradient"), actual, expected, strict=True):
        assert_close(x, y, BF16, name)


@pytest.mark.skipif(INTERPRETED or not has_fla(), reason="needs flash-linear-attention's kernels")
@pytest.mark.usefixtures("no_autotuning")
@pytest.mark.parametrize("gate", ["none", "head", "key", "product", "product head"])
@pytest.mark.parametrize("keys", [64, 96])
def test_delta_from_the_kernels(gate: str, keys: int) -> None:
    """The kernels match the op in bf16; the inputs give transitions that neither vanish nor stay the identity."""
    rows, length, heads, values, writes = 2, 700, 3, 128, 2
    q = F.normalize(draw(rows, length, heads, keys, seed=1), dim=-1).bfloat16()
    several = (writes,) if "product" in gate else ()
    k = F.normalize(draw(rows, length, *several, heads, keys, seed=2), dim=-1).bfloat16()
    v, d_o = draw(rows, length, *several, heads, values, seed=3).bfloat16(), draw(rows, length, heads, values, seed=4)
    beta = draw(*k.shape[:-1], seed=5).sigmoid() / 8
    shape = {"head": (rows, length, heads), "key": q.shape}.get(gate.split()[-1])
    g = None if shape is None else -draw(*shape, seed=6).abs() / 500
    inputs, d_o = (q, k, v, beta, g), d_o.bfloat16()
    expand = product._one_by_one if "product" in gate else None
    q_p, k_p, g_p = fla.prepared(q, k, v, g, True)
    given = (q_p, k_p, v, beta, g_p)
    actual = delta_summary._on_kernels(keys, expand, *given)
    actual += (delta_summary._gradient_on_kernels(keys, 0.3, expand, *given, d_o),)
    for name, x, y in zip(("transition", "state", "gradient"), actual, by_running(inputs, d_o, 0.3), strict=True):
        assert_close(x, y, BF16, f"{gate} {name}")


@pytest.mark.parametrize("programs", [1056, 2])
@pytest.mark.parametrize("shape", [(2, 37, 40, 16), (1, 70, 130, 5), (2, 5, 3, None)])
def test_sums_of_channels(shape: tuple[Any, ...], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels match the scans; shapes are rows, tokens, channels, states (None: HGRN, which has one state)."""
    monkeypatch.setattr(scan_kernels, "PROGRAMS", programs)
    rows, length, channels, states = shape
    u, d_y = (draw(rows, length, channels, seed=i) for i in (1, 2))
    if states is None:
        g = -draw(rows, length, channels, seed=3).abs()
        g[0, length // 2] = float("-inf")
        run = partial(scan.linear_scan, u, g, backend="chunk")
        summary, back = scan_kernels.weighted_sum(u, None, g, None), (d_y, None, g, None)
        summary = tuple(x.squeeze(-1) for x in summary)
    else:
        dt, A = draw(rows, length, channels, seed=3).abs(), -draw(channels, states, seed=4).abs()
        B, C = (draw(rows, length, states, seed=i) for i in (5, 6))
        run = partial(scan.selective_scan, u, dt, A, B, C, backend="chunk")
        summary, back = scan_kernels.weighted_sum(u, B, dt, A, factor=True), (d_y, C, dt, A)
    start = draw(*summary[0].shape, seed=7)
    assert_close(summary[0] * start + summary[1], run(initial_state=start)[1], 10 * FP32, "state")
    _, gradient = scan_kernels.weighted_sum(*back, backwards=True)
    expected = sequence.start_gradient(lambda state: run(initial_state=state), torch.zeros_like(start), d_y)
    assert_close(gradient.view_as(expected), expected, 10 * FP32, "gradient")


def test_start_gradient() -> None:
    start, weight = torch.zeros(2, 3), torch.randn(3, 4)
    d_start = sequence.start_gradient(lambda state: (state @ weight, state), start, torch.ones(2, 4))
    assert_close(d_start, weight.sum(1).expand(2, 3), FP32)
