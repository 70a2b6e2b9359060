"""Tests of blocks of softmax attention, in tiles and joined, with gradients, against autograd of the definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.ops.attention import blocks
from linear_moe.modeling.ops.attention.blocks import Block, attend, attend_backward, join, put, take
from linear_moe.modeling.ops.attention.softmax import softmax_attention, softmax_attention_reference
from linear_moe.modeling.ops.backends import use_backend
from linear_moe.modeling.ops.sequence import pieces_of
from linear_moe.training.sequence.attention import STRATEGIES
from linear_moe.training.sequence.cut import cut
from linear_moe.training.sequence.exchange import SequenceGroup
from linear_moe.training.sequence.pieces import RankPieces
from tests.tolerances import BF16, BF16_GRADIENT_FLOOR, FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close

CPU = torch.device("cpu")
SCALE = 0.3
QUERIES, KEYS = ((2, 13), (13, 15)), ((0, 14), (12, 17))  # keys 12 and 13 are in both spans


def tensors(queries: int, keys: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, h, d, generator=generator)
        for n, h, d in ((queries, heads, 8), (keys, groups, 8), (keys, groups, 6))
    ]


def seen(block: Block, queries: int, keys: int) -> Tensor:
    """Returns the mask of visible pairs, `[T, S]`, pair by pair from the definition in `Block`."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for (a, b), (c, d) in zip(block.queries, block.keys, strict=True):
        for i in range(b - a):
            for j in range(d - c):
                distance = j - ((d - c) - (b - a)) - i
                late = block.right is not None and distance > block.right
                mask[a + i, c + j] = not late and (block.left is None or distance >= -block.left)
    return mask


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q, k) * SCALE
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return torch.einsum("ths,shv->thv", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


@pytest.fixture(params=[3, 512])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (4, 0), (4, None), (1, 0)])
def test_a_block_and_its_gradients(left: int | None, right: int | None, groups: int) -> None:
    block = Block(QUERIES, KEYS, left, right, CPU)
    q, k, v = tensors(16, 22, groups=groups)
    mask = seen(block, 16, 22)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, sums = definition(*leaves, mask)
    o, lse = attend(q, k, v, block, SCALE)
    assert_close(o, take(expected, block.queries), FP32)
    assert_close(lse, take(sums, block.queries), FP32)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    actual = attend_backward(weights, q, k, v, expected.detach(), sums.detach(), block, SCALE)
    for mine, theirs, spans in zip(actual, gradients, (QUERIES, KEYS, KEYS), strict=True):
        back = torch.zeros_like(theirs)
        put(back, mine, spans, add=True)
        assert_close(back, theirs, FP32)


def test_blocks_of_one_querys_keys_are_joined() -> None:
    q, k, v = tensors(5, 12)
    whole, sums = definition(q, k, v, torch.ones(5, 12, dtype=torch.bool))
    spans = [((0, 5),), ((0, 7),), ((7, 12),)]
    parts = [attend(q, k, v, Block(spans[0], keys, None, None, CPU), SCALE) for keys in spans[1:]]
    o, lse = join(*parts[0], *parts[1])
    assert_close(o, whole, FP32)
    assert_close(lse, sums, FP32)
    nothing = torch.zeros_like(o), torch.full_like(lse, float("-inf"))
    for both in (join(*nothing, o, lse), join(o, lse, *nothing)):
        assert torch.equal(both[0], o) and torch.equal(both[1], lse)
    assert not join(*nothing, *nothing)[0].isnan().any()


def test_tokens_of_spans() -> None:
    x, spans = torch.arange(10), [(1, 3), (3, 4), (7, 9)]
    assert take(x, spans).tolist() == [1, 2, 3, 7, 8]
    put(x, torch.full((5,), 100), spans, add=True)
    assert x.tolist() == [0, 101, 102, 103, 4, 5, 6, 107, 108, 9]
    put(x, torch.arange(5), spans)
    assert x.tolist() == [0, 0, 1, 2, 4, 5, 6, 3, 4, 9]


class Flash:
    """A stand-in for FlashAttention's ops, which checks their arguments and computes with tiles."""

    def __init__(self) -> None:
        self.calls = 0

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, window_size_left: int, window_size_right: int
    ) -> Block:
        queries, keys, longest_query, longest_key, dropout, causal, *_ = rest
        self.calls += 1
        assert queries.dtype == keys.dtype == torch.int32 and dropout == 0.0
        assert longest_query >= queries.diff().max() > 0 and longest_key >= keys.diff().max() > 0
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        assert len(q) == queries[-1] and len(k) == len(v) == keys[-1]
        assert causal == ((window_size_left, window_size_right) == (-1, 0))
        if window_size_left >= 0 and window_size_right < 0:
            window_size_right = longest_key  # FlashAttention's kernel does so
        limits = [None if n < 0 else n for n in (window_size_left, window_size_right)]
        return Block(tuple(pairwise(queries.tolist())), tuple(pairwise(keys.tolist())), *limits, CPU)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **limits: int) -> tuple[Any, ...]:
        block = self.block(q, k, v, *rest, **limits)
        o, lse = blocks._tiles_forward(q, k, v, block, scale)
        assert lse.isfinite().all(), "a query that sees no key"
        return o.to(q.dtype), lse.mT.contiguous(), None, None, None

    def backward(
        self,
        d_o: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        *rest: Any,
        scale: float,
        **limits: int,
    ) -> tuple[Tensor, ...]:
        block = self.block(q, k, v, *rest, **limits)
        assert d_o.shape == o.shape == q.shape and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
        gradients = blocks._tiles_backward(d_o, q, k, v, o, lse.mT, block, scale)
        return tuple(x.to(q.dtype) for x in gradients)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    stand_in = Flash()
    monkeypatch.setattr(blocks, "suits_flash", lambda q: True)
    for name in ("forward", "backward"):
        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{name}", getattr(stand_in, name))
    return stand_in


def passes(q: Tensor, k: Tensor, v: Tensor, run: Any) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)
    weights = torch.randn(o.numel(), generator=torch.Generator().manual_seed(1)).view(o.shape)
    gradients = torch.autograd.grad((o * weights).sum(), leaves)
    return o.detach(), dict(zip("qkv", gradients, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "floor"),
    [(torch.float32, FP32, FP32_GRADIENT_FLOOR), (torch.bfloat16, BF16, BF16_GRADIENT_FLOOR)],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("window", [None, 1, 5, 9, 20])
@pytest.mark.parametrize("documents", [None, [0, 3, 17, 17, 32], [0, 14, 32]])
def test_pieces_on_one_process(
    strategy: str,
    window: int | None,
    documents: list[int] | None,
    dtype: torch.dtype,
    tolerance: float,
    floor: float,
    flash: Flash,
) -> None:
    """Two zigzag pieces on one rank give what whole sequences give, with FlashAttention and with the reference."""
    rows, order = 1 if documents else 2, PieceOrder(1, "zigzag")
    offsets = None if documents is None else torch.tensor(documents)
    own_cut = cut(rows, 32, order, 0, offsets)
    local = None if documents is None else torch.tensor(own_cut.offsets)
    shape = (1, 32) if documents else (4, 16)
    q, k, v = (x.view(rows, 32, *x.shape[1:]).to(dtype) for x in tensors(32 * rows, 32 * rows))
    expected = passes(
        *(x.float() for x in (q, k, v)), lambda *x: softmax_attention_reference(*x, cu_seqlens=offsets, window=window)
    )

    def of_pieces(*x: Tensor) -> Tensor:
        with pieces_of(RankPieces(own_cut, SequenceGroup(order, 0, attention=strategy), CPU)):
            o = softmax_attention(*(t.reshape(*shape, *t.shape[2:]) for t in x), cu_seqlens=local, window=window)
        return o.view(rows, 32, *o.shape[2:])

    for backend in ("auto", "reference"):
        before = flash.calls
        with use_backend(backend):
            o, gradients = passes(q, k, v, of_pieces)
        assert {x.dtype for x in (o, *gradients.values())} == {dtype}
        assert_close(o, expected[0], tolerance, backend)
        assert_gradients_close(gradients, expected[1], tolerance, floor)
        calls = flash.calls - before
        assert (calls > 0) == (backend == "auto" and strategy != "ulysses")
        assert strategy != "all_gather" or backend != "auto" or calls == 2, "one call each way"
