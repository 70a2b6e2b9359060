"""Tensors that kernels keep for their backward pass on a GPU, against the `kept` functions beside the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.modeling.host import Host
from linear_moe.modeling.ops.attention.softmax import softmax_attention
from linear_moe.modeling.ops.fused import norms
from linear_moe.modeling.ops.fused.feature_maps import taylor
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.grouping import Grouping
from linear_moe.modeling.ops.fused.normalizer import normalized
from linear_moe.modeling.ops.fused.norms import norm
from linear_moe.modeling.ops.fused.rotary import rotate
from linear_moe.modeling.ops.fused.short_conv import short_conv
from linear_moe.modeling.ops.kernels import stand_ins
from linear_moe.modeling.ops.recurrences.complex_decay import complex_decay
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.ops.recurrences.delta.product import delta_product
from linear_moe.modeling.ops.recurrences.dplr import dplr
from linear_moe.modeling.ops.recurrences.gsa import gsa
from linear_moe.modeling.ops.recurrences.scan import diagonal_scan, linear_scan, selective_scan
from linear_moe.plan.saved import mixer_saved
from tests.unit.modeling.mixers.common import build, case_ids, cases, dims
from tests.unit.modeling.mixers.test_saved import kept_bytes, on_meta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_autotuning"),
]
B, T, H, K, V, W, C = 2, 256, 4, 64, 128, 3, 512  # rows, tokens, heads, keys, values, writes or groups, channels
BF16, FP32 = torch.bfloat16, torch.float32
KEY, VALUE, HEAD = (B, T, H, K), (B, T, H, V), (B, T, H)
ROW = (B, T, C)

# name -> (the operation, its inputs' shapes and dtypes, options)
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
QKV: Shapes = {"q": (KEY, BF16), "k": (KEY, BF16), "v": (VALUE, BF16)}
SCAN: Shapes = {"u": (ROW, BF16), "dt": (ROW, FP32), "A": ((C, 16), FP32), "B": ((B, T, 16), BF16)}
OPS: dict[str, tuple[Callable[..., Any], Shapes, dict[str, Any]]] = {
    "decay": (decay, QKV, {}),
    "decay-odd-keys": (decay, QKV | {"q": ((B, T, H, 24), BF16), "k": ((B, T, H, 24), BF16)}, {}),
    "decay-head": (decay, QKV | {"g": (HEAD, FP32)}, {"bounded": True}),
    "decay-channel": (decay, QKV | {"g": (KEY, FP32)}, {"bounded": True}),
    "decay-values": (decay, QKV | {"g": (KEY, FP32), "gv": (VALUE, FP32)}, {"bounded": True}),
    "decay-bonus": (decay, QKV | {"g": (KEY, FP32), "bonus": ((H, K), FP32)}, {"bounded": True}),
    "delta": (delta, QKV | {"beta": (HEAD, FP32)}, {}),
    "delta-head": (delta, QKV | {"beta": (HEAD, FP32), "g": (HEAD, FP32)}, {"bounded": True}),
    "delta-channel": (delta, QKV | {"beta": (HEAD, FP32), "g": (KEY, FP32)}, {"bounded": True}),
    "delta_product": (
        delta_product,
        {"q": (KEY, BF16), "k": ((B, T, W, H, K), BF16), "v": ((B, T, W, H, V), BF16), "beta": ((B, T, W, H), FP32)}
        | {"g": (HEAD, FP32)},
        {"bounded": True},
    ),
    "dplr": (dplr, QKV | {"a": (KEY, BF16), "b": (KEY, BF16), "g": (KEY, FP32)}, {"min_gate": -0.6}),
    "gsa": (gsa, QKV | {"s": (KEY, BF16), "g": (KEY, FP32)}, {"bounded": True}),
    "gsa-two-passes": (gsa, QKV | {"s": ((B, T, H, 24), BF16), "g": ((B, T, H, 24), FP32)}, {"bounded": True}),
    "complex_decay": (complex_decay, QKV | {"g": (KEY, FP32), "theta": (KEY, FP32)}, {}),
    "linear_scan": (linear_scan, {"x": (ROW, BF16), "g": (ROW, FP32)}, {}),
    "selective_scan": (selective_scan, SCAN | {"C": ((B, T, 16), BF16)}, {}),
    "diagonal_scan": (diagonal_scan, {"u": (ROW, BF16), "log_a": ((C, 8, 2), FP32), "c": ((C, 8, 2), FP32)}, {}),
    "softmax": (softmax_attention, QKV | {"v": (KEY, BF16)}, {}),
    "softmax-groups": (
        softmax_attention,
        {"q": (KEY, BF16), "k": ((B, T, 2, K), BF16), "v": ((B, T, 2, K), BF16)},
        {},
    ),
    "softmax-wide-keys": (softmax_attention, QKV | {"q": (VALUE, BF16), "k": (VALUE, BF16), "v": (KEY, BF16)}, {}),
    "softmax-window": (softmax_attention, QKV | {"v": (KEY, BF16)}, {"window": 20}),
    "normalized": (
        lambda q, k, v: normalized(decay, q, k, v, eps=1e-3, scale=1.0, states={}, cu_seqlens=None)[0],
        QKV,
        {},
    ),
    "taylor": (lambda x: taylor(x, pad=True), {"x": ((B, T, H, 16), BF16)}, {}),
    "short_conv": (short_conv, {"x": (ROW, BF16), "weight": ((C, 4), BF16), "bias": ((C,), BF16)}, {}),
    "short_conv-norm": (short_conv, {"x": (ROW, BF16), "weight": ((C, 4), BF16)}, {"norm_size": 64}),
    "short_conv-long": (short_conv, {"x": (ROW, BF16), "weight": ((C, 7), BF16)}, {"output_state": False}),
    "norm": (norm, {"x": ((B, 8 * T, C), BF16), "weight": ((C,), BF16)}, {"eps": 1e-5}),
    "norm-gate": (norm, {"x": (ROW, BF16), "weight": ((C,), BF16), "gate": (ROW, BF16)}, {"eps": 1e-5}),
    "gate": (gate, {"x": (ROW, BF16)}, {"function": "softplus", "scale": -1.0}),
    "grouping": (
        lambda x, weights: _grouped(x, weights),
        {"x": ((B, T, H, 1, V), BF16), "weights": ((B, T, W), FP32)},
        {},
    ),
    "rotate": (
        lambda x, cos, sin: rotate(x, cos.detach(), sin.detach()),
        {"x": (KEY, BF16), "cos": ((1, T, 1, K // 2), FP32), "sin": ((1, T, 1, K // 2), FP32)},
        {},
    ),
}


def _grouped(x: Tensor, weights: Tensor) -> Tensor:
    chosen = torch.arange(W, device=x.device).ne(0).expand(B, T, W)
    grouping = Grouping(chosen, None)
    return grouping.combine(grouping.collect(x), weights)


def op_bytes(name: str, device: str) -> int:
    """Bytes of the storages that an operation keeps, its inputs among them."""
    op, shapes, options = OPS[name]
    inputs = {}
    for key, (shape, dtype) in shapes.items():
        x = torch.rand(shape, dtype=dtype, device=device)
        gates = key in ("g", "gv", "log_a", "A")  # at most 0, and above what every kernel takes
        inputs[key] = (-0.5 * x if gates else x).requires_grad_()
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage._cdata if t.is_meta else storage.data_ptr()] = storage
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        op(**inputs, **options)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    real = op_bytes(name, "cuda")
    with stand_ins():
        stated = op_bytes(name, "meta")
    assert stated == pytest.approx(real, rel=0.01, abs=1024)


@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_mixer(name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All norms are our kernels here, as they are in training with its many tokens."""
    monkeypatch.setattr(norms, "KERNEL_ELEMENTS", 0)
    at, length = dims(256), 4096
    real = build(name, fields, Host(dtype=torch.bfloat16), at).cuda()
    measured = mixer_saved(on_meta(name, fields, at, torch.bfloat16)).of(length)
    assert measured == pytest.approx(kept_bytes(real, length, "cuda"), rel=0.02)
    measured = mixer_saved(on_meta(name, fields, at, torch.bfloat16), ("core",)).of(length)
    assert measured == pytest.approx(kept_bytes(real, length, "cuda", ("core",)), rel=0.02)
