"""Inputs of the scans, for the tests on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.scan import diagonal_scan, linear_scan, selective_scan

SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "linear": linear_scan,
    "selective": selective_scan,
    "diagonal": diagonal_scan,
}
BY_TOKEN = {"x", "g", "u", "dt", "B", "C"}
"""Names of the inputs that have a dimension of tokens, `[B, T, ...]`."""


def make_inputs(
    scan: str, batch: int, length: int, dim: int, size: int, *, sequences: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Draws fp32 inputs, by argument name, with initial states for `sequences` sequences (None: the batch)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, sequences = (batch, length, dim), sequences or batch
    if scan == "linear":
        return {"x": normal(*tokens), "g": F.logsigmoid(normal(*tokens)), "initial_state": normal(sequences, dim)}
    if scan == "selective":
        return {
            "u": normal(*tokens),
            "dt": F.softplus(normal(*tokens)),
            "A": -normal(dim, size).exp(),
            "B": normal(batch, length, size),
            "C": normal(batch, length, size),
            "initial_state": normal(sequences, dim, size),
        }
    angles = 100 * normal(dim, size)  # many turns per token, as in S4D-Inv
    return {
        "u": normal(*tokens),
        "log_a": torch.stack([-0.1 * normal(dim, size).exp(), angles], dim=-1),
        "c": normal(dim, size, 2),
        "initial_state": normal(sequences, dim, size, 2),
    }


def separately(scan: str, offsets: list[int], backend: str = "reference") -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a function that scans every packed document by itself."""

    def function(**whole: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            state = whole["initial_state"][n : n + 1]
            if end > start:
                cut = {name: x[:, start:end] if name in BY_TOKEN else x for name, x in whole.items()}
                output, state = SCANS[scan](**{**cut, "initial_state": state}, backend=backend)
                outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return function
