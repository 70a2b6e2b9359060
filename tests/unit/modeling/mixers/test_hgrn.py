"""HGRN against flash-linear-attention's layer, and its lower bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout
from tests.golden.golden import compare_golden
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, stream
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [{}, {"conv_size": 4, "conv_bias": True, "expand": 0.5, "lower_bound": "none"}]


def test_hgrn_is_flash_linear_attentions() -> None:
    def bounds(mixer: Any, layout: TokenLayout, tensors: dict[str, Tensor]) -> None:
        mixer.lower_bound.bound = lambda x: tensors["input.lower_bound"].logit()

    compare_golden("hgrn", "hgrn", {"lower_bound": "fixed"}, dict, bounds)


@pytest.mark.parametrize(("kind", "taps"), [("learned", 0), ("fixed", 3), ("none", 0)])
def test_hgrn_is_the_papers_equations(kind: str, taps: int) -> None:
    """Section 3 of arXiv 2311.04823 without phases, one token at a time, in fp64; the third of four layers.

    The convolutions are linear, as in flash-linear-attention, and on the input and the forget gate.
    """
    options = {"lower_bound": kind} | ({"conv_size": taps, "conv_bias": True} if taps else {})
    ours = build("hgrn", options, at=replace(dims(), layer=2, num_layers=4))
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}
    assert ("lower_bound.logit" in w) == (kind == "learned")
    gamma = {"learned": w.get("lower_bound.logit", torch.zeros(())).sigmoid(), "fixed": 0.5, "none": 0.0}[kind]

    def projected(name: str, sequence: Tensor, t: int) -> Tensor:
        tokens = [w[f"{name}_proj.weight"] @ token for token in sequence[max(0, t - taps + 1) : t + 1]]
        if not taps:
            return w[f"{name}_proj.weight"] @ sequence[t]
        filters = w[f"{name}_conv1d.weight"].unbind(1)[taps - len(tokens) :]
        return w[f"{name}_conv1d.bias"] + sum(a * b for a, b in zip(filters, tokens, strict=True))

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            h, row = torch.zeros(32, dtype=torch.float64), []
            for t, token in enumerate(sequence):
                i, f, gate = projected("i", sequence, t), projected("f", sequence, t), w["g_proj.weight"] @ token
                forget = gamma + (1 - gamma) * f.sigmoid()
                h = forget * h + (1 - forget) * i * i.sigmoid()
                o = h / (h.square().mean() + dims().norm_eps).sqrt() * w["g_norm.weight"]
                row.append(w["o_proj.weight"] @ (o * gate * gate.sigmoid()))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_bounds_start_at_the_published_values(layer: int) -> None:
    """Bounds start at layer / layers, which is the cumulative sum of a softmax of zeros over layers."""
    at = replace(dims(), layer=layer, num_layers=4)
    x = stream(2, 3)
    for kind in ("learned", "fixed"):
        mixer = build("hgrn", {"lower_bound": kind}, at=at)
        expected = layer / 4 + (1 - layer / 4) * (x @ mixer.get_parameter("f_proj.weight").T).sigmoid()
        assert_close(mixer.project(x, TokenLayout(2, 3), None)[0]["g"].flatten(0, 1).exp(), expected, FP32, kind)
        assert (kind == "learned" and layer > 0) == ("lower_bound.logit" in mixer.state_dict())
