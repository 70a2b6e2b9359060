"""The interface of the experts' matrix products, and PyTorch's grouped ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.experts.assignment import Assignment

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class Products:
    """The GEMMs and what surrounds them: by grouped_mm, of rows that were gathered.

    Others have the same methods. `gate_up [M, 2F]` is passed between these only, so its columns' order is their own.

    Args:
        around: the functions above, or the kernels for them.
    """

    def __init__(self, around: Any):
        self.around = around

    def up(self, x: Tensor, proj: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
        """Tokens `[n, D]` and `proj [E, 2, F, D]` -> gate_up, and the activation h `[M, F]`."""
        rows = self.around.collect(x, to)
        gate_up = grouped_mm(rows, proj.flatten(1, 2).transpose(1, 2), offs=to.ends)
        del rows
        return gate_up, self.around.activate(gate_up, weights, to)

    def down(self, h: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """h and `proj [E, D, F]` -> rows `[M, D]`."""
        return grouped_mm(h, proj.transpose(1, 2), offs=to.ends)

    def combine(self, y: Tensor, weights: Tensor, to: Assignment) -> Tensor:
        """Rows from `down` -> tokens `[n, D]`; weighted here unless h was."""
        return self.around.combine(y, to)

    def gather(self, tokens: Tensor, to: Assignment) -> Tensor:
        """Gradients of tokens, as `down_backward` and `down_gradient` take them."""
        return self.around.collect(tokens, to)

    def down_backward(
        self, dy: Tensor, proj: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment
    ) -> tuple[Tensor, Tensor]:
        """-> weighted h `[M, F]` and the gradient of `weights`. `gate_up` becomes its own gradient."""
        h = grouped_mm(dy, proj, offs=to.ends)
        return h, self.around.activate_backward(h, gate_up, weights, to)

    def down_gradient(self, dy: Tensor, h: Tensor, to: Assignment) -> Tensor:
        """-> the gradient of the projection, `[E, D, F]`."""
        return grouped_mm(dy.t(), h, offs=to.ends)

    def up_backward(self, gate_up: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """The gradient of gate_up and `proj [E, 2, F, D]` -> that of the rows `[M, D]`."""
        return grouped_mm(gate_up, proj.flatten(1, 2), offs=to.ends)

    def up_gradient(self, gate_up: Tensor, x: Tensor, to: Assignment) -> Tensor:
        """The gradient of gate_up and tokens `[n, D]` -> the gradient of the projection, `[E, 2, F, D]`."""
        dproj = grouped_mm(gate_up.t(), self.around.collect(x, to), offs=to.ends)
        return dproj.view(len(dproj), 2, -1, x.shape[1])
