"""Tests of the diagonal plus rank one family and of several writes per token, beyond the tests of all families."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.ops.recurrences.delta.product import delta_product
from linear_moe.modeling.ops.recurrences.dplr import dplr
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import make_inputs, run, set_extreme_gates

SHAPE = (2, 70, 2, 16, 8)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], FP32, name)


@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_delta_with_a_decay_per_channel_is_dplr(backend: str) -> None:
    inputs = make_inputs("delta", "vector", SHAPE)
    set_extreme_gates(inputs)

    def as_dplr(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        written = beta[..., None] * k
        return dplr(q, written, v, g.exp() * k, -written, g, initial_state=initial_state, backend=backend)

    compare(run(as_dplr, inputs), run(delta, inputs, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_several_writes_are_as_many_tokens(backend: str) -> None:
    """Two writes of a token equal two tokens of the delta rule, the second without decay, the first without a query."""
    inputs = make_inputs("delta_product", "scalar", SHAPE)

    def as_delta(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, g = torch.stack([0 * q, q], 2).flatten(1, 2), torch.stack([g, 0 * g], 2).flatten(1, 2)
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        o, state = delta(q, k, v, beta, g, initial_state=initial_state, backend="reference")
        return o[:, 1::2], state

    compare(run(delta_product, inputs, backend=backend), run(as_delta, inputs))


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("same_key", [False, True])
def test_extreme_rates(rate: float, same_key: bool) -> None:
    """Chunks match the reference for extreme rates of erasing, b = -rate a.

    Gates are mixed, but 0 for a rate of 2: this reflects the state, which would grow with gates.
    """
    inputs = make_inputs("dplr", "vector", SHAPE)
    set_extreme_gates(inputs)
    if rate > 1:
        inputs["g"] = torch.zeros_like(inputs["g"])
    if same_key:
        inputs["a"] = inputs["a"][:, :1].expand_as(inputs["a"]).contiguous()
    inputs["b"] = -rate * inputs["a"]
    compare(run(dplr, inputs, backend="chunk"), run(dplr, inputs, backend="reference"))


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_extreme_strengths_of_several_writes(strength: float) -> None:
    inputs = make_inputs("delta_product", "scalar", SHAPE)
    set_extreme_gates(inputs)
    inputs["k"] = F.normalize(inputs["k"][:, :1].expand_as(inputs["k"]), dim=-1).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], strength)
    compare(run(delta_product, inputs, backend="chunk"), run(delta_product, inputs, backend="reference"))


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs("dplr", "vector", (2, 8, 2, 4, 4))
    for name, value, message in [
        ("a", inputs["a"][..., :3], "a must be"),
        ("b", inputs["b"][:, :4], "b must be"),
        ("g", inputs["g"][..., 0], "g must be"),
        ("initial_state", inputs["initial_state"][:1], "initial_state must be float32"),
        ("backend", "gpu", "needs CUDA tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            dplr(**{**inputs, name: value})  # type: ignore[arg-type]
    inputs = make_inputs("delta_product", "scalar", (2, 8, 2, 4, 4))
    for name, value, message in [
        ("k", inputs["k"][:, :, 0], r"k and v must be \[B, T, n, H, K\]"),
        ("v", inputs["v"][:, :, :1], r"k and v must be \[B, T, n, H, K\]"),
        ("k", inputs["k"][:, :4], "q and k must both be"),
        ("beta", inputs["beta"][:, :, :1], "beta must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            delta_product(**{**inputs, name: value})
