"""Tests of mixers on two pieces of every sequence, on one GPU in bf16, against whole sequences on the CPU in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.ops.attention.blocks import Block, attend, attend_backward, join
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.sequence import attention, exchange
from linear_moe.training.sequence.cut import cut
from linear_moe.training.sequence.exchange import STRATEGIES, SequenceGroup, StateExchange
from linear_moe.training.sequence.pieces import pieces_layout
from tests.gpu.test_mixers import HIDDEN, TOKENS, pair, run
from tests.tolerances import BF16, BF16_GRADIENT_FLOOR, BF16_OVER_CPU, FP32, assert_close
from tests.unit.modeling.mixers.common import case_ids, cases, packed, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_autotuning"),
]
ORDER = PieceOrder(1, "zigzag")
CASES = [
    pytest.param(name, fields, id=key)
    for key, (name, fields) in zip(case_ids(), cases(), strict=True)
    if mixer_class(name).capabilities.sequence_parallel
]


CASES_BY_EXCHANGE = [  # softmax attention with every strategy of exchange
    pytest.param(*case.values, exchanged_by, id=f"{case.id}-{exchanged_by}")
    for case in CASES
    for exchanged_by in (
        attention.STRATEGIES if mixer_class(str(case.values[0])).family == "softmax" else ("all_gather",)
    )
]


@pytest.mark.parametrize("whole", [TokenLayout(2, TOKENS // 2), packed([70, 1, 129])], ids=["rows", "packed"])
@pytest.mark.parametrize(("name", "fields", "exchanged_by"), CASES_BY_EXCHANGE)
def test_pieces_are_the_whole(name: str, fields: dict[str, Any], exchanged_by: str, whole: TokenLayout) -> None:
    gpu, cpu = pair(name, fields)
    device = torch.device("cuda")
    own_cut = cut(whole.batch, whole.length, ORDER, 0, whole.cu_seqlens)
    positions = torch.arange(whole.length).expand(whole.batch, -1) if whole.positions is None else whole.positions
    offsets = None if whole.cu_seqlens is None else torch.tensor(own_cut.offsets).cuda()
    strategy = STRATEGIES[whole.cu_seqlens is None]
    group = SequenceGroup(ORDER, 0, None, strategy, exchanged_by)
    pieces = pieces_layout(own_cut, group, device, positions.contiguous().cuda(), offsets)
    x, weight = stream(1, TOKENS, HIDDEN).bfloat16(), stream(1, TOKENS, HIDDEN, seed=1).bfloat16()
    y, dx, actual = run(gpu, x.cuda(), pieces, weight)
    expected_y, expected_dx, expected = run(cpu, x.float(), whole, weight)
    assert_close(y, expected_y, BF16, "output")
    floor = BF16_GRADIENT_FLOOR * max(float(gradient.norm()) for gradient in expected.values())
    moved = {key: None if (t := getattr(whole, key)) is None else t.cuda() for key in ("cu_seqlens", "positions")}
    _, whole_dx, on_gpu = run(gpu, x.cuda(), replace(whole, **moved), weight)
    expected |= {"input": expected_dx.double()}
    actual, on_gpu = actual | {"input": dx.double().cpu()}, on_gpu | {"input": whole_dx.double().cpu()}
    for key, gradient in expected.items():
        least = max(float(gradient.norm()), floor)
        error, same = (float((computed[key] - gradient).norm()) / least for computed in (actual, on_gpu))
        assert error <= max(BF16, BF16_OVER_CPU * same), f"{key}: {error:.1e}, whole sequences {same:.1e}"


# queries and keys of two blocks. In the first, keys 290 to 299 are in two spans; the second has further keys of the
# first sequence, fewer than its queries
FIRST_BLOCK = ((0, 200), (200, 201), (201, 300)), ((0, 260), (260, 300), (290, 400))
SECOND_BLOCK = ((0, 200),), ((400, 450),)


def two_blocks(tensors: list[Tensor], left: int | None, right: int | None) -> dict[str, Tensor]:
    """Computes the attention to two blocks of keys, joined as the ring joins them, and the gradients of each block."""
    q, k, v, d_o = tensors
    first, second = Block(*FIRST_BLOCK, left, right, q.device), Block(*SECOND_BLOCK, 7, None, q.device)
    scale, blocks = q.shape[-1] ** -0.5, [first, second]
    (o, lse), part = (attend(q, k, v, block, scale) for block in blocks)
    o, joined = o.float(), slice(*SECOND_BLOCK[0][0])
    o[joined], lse[joined] = join(o[joined], lse[joined], *part)
    results = {"output": o, "log-sum-exp": lse}
    for n, block in enumerate(blocks):
        gradients = attend_backward(d_o, q, k, v, o.to(q.dtype), lse, block, scale)
        results |= {f"d{name} of block {n}": x for name, x in zip("qkv", gradients, strict=True)}
    return results


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (40, 0), (40, None)])
@pytest.mark.parametrize(("heads", "groups", "size", "value"), [(4, 2, 64, 64), (4, 4, 40, 24), (2, 1, 192, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_attention(
    dtype: torch.dtype,
    heads: int,
    groups: int,
    size: int,
    value: int,
    left: int | None,
    right: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlashAttention gives the blocks and gradients that tiles give in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = (300, heads, size), (450, groups, size), (450, groups, value), (300, heads, value)
    half = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    expected = two_blocks([x.float() for x in half], left, right)
    for name in ("_tiles_forward", "_tiles_backward"):
        monkeypatch.delattr(f"linear_moe.modeling.ops.attention.blocks.{name}")
    actual = two_blocks([x.cuda() for x in half], left, right)
    for name, x in expected.items():
        assert_close(actual[name].float(), x, 10 * FP32 if name == "log-sum-exp" else BF16, name)


def test_a_ring_keeps_what_its_stream_reads() -> None:
    """Summaries that the caller releases before the ring has read them keep their memory until then."""
    device, line = torch.device("cuda", 0), SequenceGroup(ORDER, 0, None, "ring")
    generator = torch.Generator().manual_seed(0)
    transition, state = (torch.randn(2 * ORDER.count, 64, 128, generator=generator) for _ in range(2))
    expected = StateExchange(line).begin(transition, state)()
    late = exchange._stream(device)
    on_gpu = [transition.to(device), state.to(device)]
    with torch.cuda.stream(late):
        torch.cuda._sleep(200_000_000)  # clock cycles: about 0.1 s
    wait = StateExchange(line).begin(*on_gpu)
    on_gpu.clear()
    overwritten = [torch.full(state.shape, torch.nan, device=device) for _ in range(8)]
    assert not late.query(), "the ring had read them already"
    assert_close(wait().cpu(), expected, FP32)
    assert overwritten
