"""Tests of the short convolution on CPU against one sum per token, across documents and steps of decoding."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.fused.short_conv import short_conv
from tests.tolerances import BF16_SAME, FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import run

OFFSETS = [0, 0, 1, 3, 10, 10, 40]  # empty, shorter than the window, longer


def make_inputs(batch: int, length: int, width: int, *, sequences: int | None = None, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = {"x": (batch, length, 6), "weight": (6, width), "state": (sequences or batch, 6, width - 1)}
    if bias:
        shapes["bias"] = (6,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def naive(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    past = x.new_zeros(x.shape[0], x.shape[2], width - 1) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([past, x[:, t, :, None]], dim=-1)
        y = torch.einsum("bcw,cw->bc", window, weight) + (0 if bias is None else bias)
        outputs.append(F.silu(y) if activation else y)
        past = window[..., 1:]
    return torch.stack(outputs, dim=1), past


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: object) -> None:
    for name in expected:
        assert_close(actual[name], expected[name], FP32, f"{case} {name}")


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_matches_one_sum_per_token(width: int, bias: bool, activation: str | None) -> None:
    for batch, length in ((1, 1), (3, 2), (2, 33)):
        inputs = make_inputs(batch, length, width, bias=bias)
        if width == 1:
            del inputs["state"]  # an empty state has no gradient
            inputs["state"] = torch.zeros(batch, 6, 0)
        options = {"activation": activation}
        compare(run(partial(short_conv, **options), inputs), run(partial(naive, **options), inputs), (batch, length))
        state = inputs.pop("state")
        y, final = short_conv(**inputs, activation=activation)
        expected, expected_final = naive(**inputs, state=torch.zeros_like(state), activation=activation)
        assert_close(y, expected, FP32)
        assert torch.equal(final, expected_final)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_match_separate_ones(with_state: bool) -> None:
    documents = list(pairwise(OFFSETS))
    inputs = make_inputs(1, OFFSETS[-1], 4, sequences=len(documents), bias=True)
    if not with_state:
        del inputs["state"]

    def separate(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pieces, states = [], []
        for n, (start, end) in enumerate(documents):
            final = x.new_zeros(1, 6, 3) if state is None else state[n : n + 1]
            if end > start:
                piece, final = naive(x[:, start:end], weight, bias, state=final, activation="silu")
                pieces.append(piece)
            states.append(final)
        return torch.cat(pieces, dim=1), torch.cat(states)

    compare(run(short_conv, inputs, cu_seqlens=torch.tensor(OFFSETS)), run(separate, inputs), with_state)


def test_step_updates_the_state_in_place() -> None:
    inputs = make_inputs(2, 9, 4, bias=True)
    expected, expected_state = naive(**inputs, activation="silu")
    x, state = inputs.pop("x"), inputs.pop("state")
    with torch.no_grad():
        for t in range(9):
            y, returned = short_conv(x[:, t : t + 1], **inputs, state=state)
            assert returned is state
            assert_close(y, expected[:, t : t + 1], FP32)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("step", [False, True])
def test_normalises_groups_of_channels(step: bool) -> None:
    inputs = make_inputs(2, 1 if step else 9, 4, bias=True)
    before = inputs["state"].clone()
    expected, state = naive(**inputs, activation="silu")
    with torch.no_grad():
        y, final = short_conv(**inputs, norm_size=3)
    assert final is not None and (final is inputs["state"]) == step
    heads = expected.unflatten(-1, (2, 3))
    assert_close(y, (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2), FP32)
    assert torch.equal(final, state) and not torch.equal(final, before)


def test_half_precision_is_summed_in_fp32() -> None:
    inputs = {name: x.bfloat16() for name, x in make_inputs(2, 33, 4, bias=True).items()}
    y, final = short_conv(**inputs)
    expected, expected_final = naive(**{name: x.float() for name, x in inputs.items()}, activation="silu")
    assert y.dtype == final.dtype == torch.bfloat16
    assert_close(y, expected.bfloat16(), BF16_SAME)
    assert torch.equal(final, expected_final.bfloat16())


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs(2, 9, 4, bias=True)
    wrong = [
        ("activation", "gelu", "activation must be"),
        ("weight", inputs["weight"][:3], "x must be"),
        ("bias", inputs["bias"][:3], "bias must be"),
        ("state", inputs["state"][..., :2], "state must be"),
        ("cu_seqlens", torch.tensor([0, 9]), "need B = 1"),
        ("norm_size", 4, "norm_size must divide"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            short_conv(**{**inputs, name: value})
