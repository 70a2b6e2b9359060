"""Tests of gated slot attention: formula, chunk = reference with states and gradients, packed, step, extreme gates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.gsa import gsa
from tests.tolerances import FP32, assert_close

SIZES = {"q": 12, "k": 12, "v": 8, "s": 10, "g": 10}
OFFSETS = [0, 0, 5, 70, 134, 134, 135, 200]


def make_inputs(
    batch: int, length: int, sequences: int | None = None, sizes: dict[str, int] = SIZES
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(batch, length, 2, size, generator=generator) for name, size in sizes.items()}
    inputs["g"] = F.logsigmoid(inputs["g"])
    inputs["keys"] = torch.randn(sequences or batch, 2, sizes["k"], sizes["s"], generator=generator)
    inputs["values"] = torch.randn(sequences or batch, 2, sizes["s"], sizes["v"], generator=generator)
    return inputs


def run(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Returns the output, the final states and all gradients, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    tokens = {name: x for name, x in leaves.items() if name in SIZES}
    output, (keys, values) = gsa(**tokens, initial_states=(leaves["keys"], leaves["values"]), **options)
    generator = torch.Generator().manual_seed(1)
    results = [output, keys, values]
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), weights)
    return {"output": output, "final keys": keys, "final values": values} | {
        f"d {name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def documents(inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, Tensor]]]:
    for n, (start, end) in enumerate(pairwise(OFFSETS)):
        tokens = {name: inputs[name][:, start:end] for name in SIZES}
        yield tokens, (inputs["keys"][n : n + 1], inputs["values"][n : n + 1])


def test_reference_is_the_formula() -> None:
    inputs = {name: x.double() for name, x in make_inputs(1, 7).items()}
    keys, values, outputs = inputs["keys"][0, 0], inputs["values"][0, 0], []
    for t in range(7):
        q, k, v, s, g = (inputs[name][0, t, 0] for name in SIZES)
        keys = keys * g.exp() + torch.outer(k, s)
        values = g.exp()[:, None] * values + torch.outer(s, v)
        outputs.append(values.T @ torch.softmax(0.3 * keys.T @ q, 0))
    actual = run({name: x.float() for name, x in inputs.items()}, scale=0.3, backend="reference")
    assert_close(actual["output"][0, :, 0], torch.stack(outputs), FP32)
    assert_close(actual["final keys"][0, 0], keys, FP32)
    assert_close(actual["final values"][0, 0], values, FP32)


@pytest.mark.parametrize("gates", ["moderate", 0.0, -50.0, float("-inf")])
def test_chunk_matches_reference(gates: Any) -> None:
    inputs = make_inputs(2, 70)
    if gates != "moderate":
        inputs["g"][:, ::3] = gates
    expected, actual = (run(inputs, backend=backend) for backend in ("reference", "chunk"))
    for name in expected:
        assert_close(actual[name], expected[name], FP32, name)


def test_packed_documents_match_separate_ones() -> None:
    inputs = make_inputs(1, OFFSETS[-1], len(OFFSETS) - 1)
    tokens, states = {name: inputs[name] for name in SIZES}, (inputs["keys"], inputs["values"])
    o, final = gsa(**tokens, initial_states=states, cu_seqlens=torch.tensor(OFFSETS), backend="chunk")
    apart = [
        gsa(**t, initial_states=s, backend="reference") if t["q"].numel() else (None, s) for t, s in documents(inputs)
    ]
    assert_close(o, torch.cat([y for y, _ in apart if y is not None], 1), FP32)
    for n in (0, 1):
        assert_close(final[n], torch.cat([s[n] for _, s in apart]), FP32)


@torch.no_grad()
def test_step_updates_both_states_in_place() -> None:
    inputs = make_inputs(3, 9)
    tokens, states = {name: inputs[name] for name in SIZES}, (inputs["keys"].clone(), inputs["values"].clone())
    expected, final = gsa(**tokens, initial_states=(inputs["keys"], inputs["values"]), backend="reference")
    for t in range(9):
        o, returned = gsa(**{name: x[:, t : t + 1] for name, x in tokens.items()}, initial_states=states)
        assert returned[0] is states[0] and returned[1] is states[1]
        assert_close(o, expected[:, t : t + 1], FP32)
    for actual, state in zip(states, final, strict=True):
        assert_close(actual, state, FP32)


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs(2, 5)
    tokens, states = {name: inputs[name] for name in SIZES}, (inputs["keys"], inputs["values"])
    for name, value, message in [
        ("s", inputs["s"][:, :4], r"v must be \[B, T, H, V\]"),
        ("g", inputs["g"][..., :4], "g must be"),
        ("k", inputs["k"][..., :4], "q and k must both be"),
        ("initial_states", states[::-1], "initial_state must be float32"),
        ("backend", "gpu", "needs CUDA tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            gsa(**{**tokens, "initial_states": states, name: value})
