"""ShortConv: nn.Conv1d's arithmetic, its state in the cache, its channels over tensor ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.layers.conv import ShortConv, conv_states
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import DECODE, FP32, assert_close


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_convolution_and_decoding(size: int, activation: str | None, bias: bool) -> None:
    host = Host()
    conv = ShortConv(host, 6, size, name="conv", bias=bias, activation=activation)  # type: ignore[arg-type]
    initialize(conv, host, seed=0)
    assert float(conv.weight.abs().max()) <= size**-0.5
    if bias:
        conv.bias.data.copy_(torch.arange(6.0))
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    expected = F.conv1d(x.mT, conv.weight.unsqueeze(1), conv.bias, padding=size - 1, groups=6)[..., :9].mT
    expected = expected if activation is None else F.silu(expected)
    assert_close(conv(x, TokenLayout(2, 9)), expected, FP32)
    shapes = conv_states(nn.ModuleDict({"conv": conv}), batch=2)
    assert shapes == {"conv": ((2, 6, size - 1), None)}
    cache = {"conv": torch.zeros(shapes["conv"][0])}
    state = cache["conv"]
    with torch.no_grad():
        pieces = [conv(piece, TokenLayout(2, piece.shape[1]), cache) for piece in x.split([3, 1, 1, 4], dim=1)]
    assert_close(torch.cat(pieces, 1), expected, DECODE)
    assert cache["conv"] is state  # in place
    assert_close(state, x.mT[..., 9 - (size - 1) :], FP32)
