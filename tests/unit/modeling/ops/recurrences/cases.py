"""Inputs and gradients of the recurrences, for the tests on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.ops.recurrences.delta.product import delta_product
from linear_moe.modeling.ops.recurrences.dplr import dplr

OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "decay": decay,
    "delta": delta,
    "delta_product": delta_product,
    "dplr": dplr,
}

VARIANTS = [
    ("decay", None),
    ("decay", "constant"),
    ("decay", "scalar"),
    ("decay", "vector"),
    ("decay", "value"),
    ("decay", "scalar+value"),
    ("decay", "vector+value"),
    ("decay", "bonus"),
    ("decay", "constant+bonus"),
    ("decay", "vector+bonus"),
    ("decay", "vector+value+bonus"),
    ("delta", None),
    ("delta", "scalar"),
    ("delta", "vector"),
    ("delta_product", None),
    ("delta_product", "scalar"),
    ("dplr", "vector"),
]
"""Every family with every form of its gates."""

NO_KERNEL = [("decay", "vector+value+bonus"), ("dplr", "vector")]
"""Variants without GPU kernels: "auto" computes these on a GPU by the PyTorch implementation too."""


def make_inputs(
    family: str,
    gate: str | None,
    shape: tuple[int, int, int, int, int],
    *,
    sequences: int | None = None,
    with_state: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws fp32 inputs, by argument name; `shape` is (B, T, H, K, V)."""
    batch, length, heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = {
        "q": normal(batch, length, heads, key_dim),
        "k": normal(batch, length, heads, key_dim),
        "v": normal(batch, length, heads, value_dim),
    }
    if family == "delta":
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        inputs["beta"] = normal(batch, length, heads).sigmoid()
    elif family == "delta_product":
        inputs["k"] = F.normalize(normal(batch, length, 2, heads, key_dim), dim=-1)
        inputs["v"], inputs["beta"] = (
            normal(batch, length, 2, heads, value_dim),
            normal(batch, length, 2, heads).sigmoid(),
        )
    elif family == "dplr":
        inputs["a"] = -F.normalize(normal(batch, length, heads, key_dim), dim=-1)
        inputs["b"] = -inputs["a"] * normal(batch, length, heads, key_dim).sigmoid()
    rows = (batch, length, heads)
    shapes = {"constant": (heads,), "scalar": rows, "vector": (*rows, key_dim), "value": (*rows, value_dim)}
    for form in gate.split("+") if gate is not None else []:
        if form == "bonus":
            inputs["bonus"] = normal(heads, key_dim)
        else:
            inputs["gv" if form == "value" else "g"] = F.logsigmoid(normal(*shapes[form]))
    if with_state:
        inputs["initial_state"] = normal(sequences or batch, heads, key_dim, value_dim)
    return inputs


def set_extreme_gates(inputs: dict[str, Tensor]) -> None:
    """Sets gates of neighbouring tokens (constant gates: of neighbouring heads) to values of many magnitudes."""
    for name in {"g", "gv"} & inputs.keys():
        gate = inputs[name].transpose(0, 1) if inputs[name].ndim > 1 else inputs[name]
        for every, value in ((2, 0.0), (3, -1e-4), (7, -50.0), (31, -1e30), (67, float("-inf"))):
            gate[::every] = value


def tokens(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Cuts out tokens `start:end` of the inputs; those without a dimension of tokens, and the initial state, stay."""
    return {n: x if n == "initial_state" or x.ndim < 3 else x[:, start:end] for n, x in inputs.items()}


def run(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """Returns, by name, output, final state, and the gradients of a loss of both with respect to every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output, state = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in (output, state))
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "final_state": state, **{f"d {n}": x for n, x in zip(leaves, gradients, strict=True)}}
