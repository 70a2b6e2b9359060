"""Calls of quack's GEMMs, with stand-ins that compute the same in PyTorch and refuse the same arguments."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.checks.experts import check_grouped_gemm
from linear_moe.config.schema import Config
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.moe.experts import Experts
from linear_moe.modeling.ops import experts as ops
from linear_moe.modeling.ops.experts import assign, experts
from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.experts.reference import Reference
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.training.preflight import check_run
from tests.tolerances import FP32, assert_close

NAME = "linear_moe.modeling.ops.experts.quack"


def in_turns(x: Tensor, names: Any, name: str) -> Tensor:
    """Interleaves the two halves of the dimension that is not contiguous, if `name` is among `names`."""
    if name not in (names or ()):
        return x
    dim = x.ndim - 2 if x.stride(-1) == 1 else x.ndim - 1
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def check_call(*tensors: Tensor, cu_seqlens: Tensor, index: Tensor | None, options: dict) -> None:
    for x in tensors:
        strides = sorted(x.stride())
        assert x.data_ptr() % 16 == 0 and strides[0] == 1 and all(s % 4 == 0 for s in strides[1:])
        assert not x.requires_grad
    for x in (cu_seqlens, index):
        assert x is None or (x.dtype == torch.int32 and x.data_ptr() % 16 == 0 and x.is_contiguous())
    assert options["tile_count_semaphore"] is None
    assert index is None or options["cluster_N"] == 1


def product(a: Tensor, b: Tensor, cu_seqlens: Tensor, index: Tensor | None) -> Tensor:
    """Multiplies rows of `a [M, K]` (with `index`: `[any, K]`) by their expert's `b [E, N, K]`.

    Returns `[M, N]`, NaN in rows without an expert.
    """
    assert a.stride(-1) == 1
    rows = a if index is None else a[index]
    out = torch.full((len(rows), b.shape[1]), float("nan"))
    for e, (i, j) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        out[i:j] = rows[i:j] @ b[e].T
    return out


def gemm(
    a: Tensor, b: Tensor, d: Tensor, c: None, cu_seqlens_m: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None, concat_layout: tuple = (), **options: Any,
) -> None:  # fmt: skip
    cu_seqlens = cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m
    assert cu_seqlens is not None and (cu_seqlens_m is None or cu_seqlens_k is None)
    check_call(a, b, d, cu_seqlens=cu_seqlens, index=A_idx, options=options)
    if cu_seqlens_m is not None:
        assert d.stride(-1) == 1
        d.copy_(product(a, in_turns(b, concat_layout, "B"), cu_seqlens, A_idx))
        return
    assert a.stride(-2) == b.stride(-2) == 1
    left = a if A_idx is None else a[:, A_idx]
    bounds = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    out = torch.stack([left[:, i:j] @ b[:, i:j].T for i, j in bounds])
    if (
        "out" in concat_layout
    ):  # d's columns interleave to `out`: d has the even columns of `out` first, then the odd ones
        assert d.stride(-1) != 1
        out = torch.cat([out[..., ::2], out[..., 1::2]], -1)
    d.copy_(out)


def gemm_act(
    a: Tensor, b: Tensor, d: Tensor, c: None, post: Tensor, activation: str, cu_seqlens_m: Tensor,
    A_idx: Tensor | None, concat_layout: tuple, **options: Any,
) -> None:  # fmt: skip
    check_call(a, b, d, post, cu_seqlens=cu_seqlens_m, index=A_idx, options=options)
    assert activation == "swiglu" and options["tile_N"] % 32 == 0
    d.copy_(product(a, in_turns(b, concat_layout, "B"), cu_seqlens_m, A_idx))
    post.copy_(F.silu(d[:, ::2]) * d[:, 1::2])


def gemm_dact(
    a: Tensor, b: Tensor, out: Tensor, preact: Tensor, post: Tensor, activation: str, colvec_scale: Tensor,
    colvec_reduce: Tensor, cu_seqlens_m: Tensor, A_idx: Tensor | None, **options: Any,
) -> None:  # fmt: skip
    check_call(a, b, out, preact, post, colvec_scale, cu_seqlens=cu_seqlens_m, index=A_idx, options=options)
    assert activation == "swiglu"
    used = int(cu_seqlens_m[-1])
    d = product(a, b, cu_seqlens_m, A_idx)
    with torch.enable_grad():
        gates = preact.detach().clone().requires_grad_()
        h = F.silu(gates[:, ::2]) * gates[:, 1::2]
        (dgates,) = torch.autograd.grad(h, gates, d * colvec_scale.unsqueeze(1))
    out.copy_(dgates)
    post.copy_((h * colvec_scale.unsqueeze(1)).detach())
    colvec_reduce.fill_(float("nan"))
    for i, part in enumerate((d * h.detach()).split(options["tile_N"], 1)):
        colvec_reduce[:used, i] = part[:used].sum(1)


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports our module with the stand-ins, and lets `experts` use it."""
    for function in (gemm, gemm_act, gemm_dact):
        module = ModuleType(f"quack.{function.__name__}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    before = sys.modules.pop(NAME, None)
    module = importlib.import_module(NAME)
    assert module.HOPPER["up"].columns % 32 == 0
    small = {product: tile._replace(columns=32) for product, tile in module.HOPPER.items()}
    monkeypatch.setattr(module, "tile", lambda product, device: small[product])
    monkeypatch.setattr(ops, "_products", lambda name, x, ffn: module.Fused(Reference))
    yield module
    sys.modules.pop(NAME)
    if before is not None:
        sys.modules[NAME] = before


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("misaligned", [False, True])
def test_equals_grouped_mm(
    quack: ModuleType, monkeypatch: pytest.MonkeyPatch, by_slot: bool, drop: bool, misaligned: bool
) -> None:
    """Outputs and all gradients equal those with grouped_mm; 80 columns are three tiles of 32, one expert is idle."""
    tokens, num, top_k, hidden, ffn = 21, 5, 2, 24, 80
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        flat = torch.randn(torch.Size(shape).numel() + 1, generator=generator)
        return (flat[1:] if misaligned else flat[:-1]).view(shape)

    index = draw(tokens, num - 1).topk(top_k).indices
    if drop:
        index.view(-1)[::3] = num
    to, shape = assign(index, num), (tokens, top_k)
    if not by_slot:
        to, tokens, shape = Assignment.of_rows(to.counts), tokens * top_k, (tokens * top_k,)
    used = int(to.ends[-1]) if not by_slot else tokens
    inputs = [draw(tokens, hidden), draw(*shape), draw(num, 2, ffn, hidden), draw(num, hidden, ffn)]
    grad = draw(tokens, hidden)
    results = []
    for kind in ("quack", "grouped_mm"):
        if kind == "grouped_mm":
            monkeypatch.setattr(ops, "_products", lambda name, x, ffn: ops.Products(Reference))
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = experts(*leaves, to)
        y, dx, *others = [y, *torch.autograd.grad(y, leaves, grad)]
        results.append([y[:used], dx[:used], *others])
    for what, actual, expected in zip(("y", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert_close(actual, expected, FP32, what)


def test_training_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks before training refuse quack without such a GPU or package, but only if a layer has experts."""
    monkeypatch.chdir(tmp_path)
    config = from_dict(Config, {"run": "run", "data": {"corpus": "synthetic"}, "model": {"vocab_size": 64}})
    check_run(config, 1)
    config.model.moe.experts = "quack"
    with pytest.raises(ConfigError, match=r"model\.moe\.experts = 'quack': needs .*set it to auto"):
        check_run(config, 1)
    config.model.ffn = "dense"
    check_run(config, 1)


def test_refused_where_it_cannot_compute() -> None:
    """Layers with experts=quack raise an error that names a fix; with `auto` they use another implementation."""
    model = ModelConfig(moe=MoEConfig(4, top_k=2, expert_ffn_size=16, experts="quack"))
    with pytest.raises(ConfigError, match=r"model\.moe\.experts = 'quack': multiplies bf16, not fp32.*set it to auto"):
        check_grouped_gemm(model, "fp32")
    check_grouped_gemm(model, "bf16")
    index = torch.zeros(3, 1, dtype=torch.int64)
    for kind in ("quack", "auto"):
        host = Host(torch.bfloat16)
        layer = Experts(MoEConfig(4, expert_ffn_size=16, experts=kind), 16, 0.3, 0.3, host)
        initialize(layer, host, seed=0)
        inputs = (torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, 1), assign(index, 4))
        if kind == "auto":
            assert layer(*inputs).isfinite().all()
            continue
        with pytest.raises(ConfigError, match=r"model\.moe\.experts = 'quack': needs .*set it to auto"):
            layer(*inputs)
        with pytest.raises(ValueError, match="products 'quack' needs"):
            experts(inputs[0], inputs[1], layer.gate_up_proj, layer.down_proj, inputs[2], "quack")
