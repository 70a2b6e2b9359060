"""The interface of the experts' GEMMs, and its implementation by PyTorch's grouped_mm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.experts.assignment import Assignment

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class Products:
    """The experts' GEMMs and the operations around them, by grouped_mm on gathered rows.

    Subclasses implement the same methods otherwise. Only methods of one class pass `gate_up [M, 2F]` to each other, so
    each class may order its columns as it likes.

    Args:
        around: the operations around the GEMMs: `experts.reference.Reference` or the module `experts.triton`.
    """

    def __init__(self, around: Any):
        self.around = around

    def up(self, x: Tensor, proj: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
        """Multiplies the rows of `x [n, D]` by `proj [E, 2, F, D]`: gate_up, and its activation h `[M, F]`."""
        rows = self.around.collect(x, to)
        gate_up = grouped_mm(rows, proj.flatten(1, 2).transpose(1, 2), offs=to.ends)
        del rows
        return gate_up, self.around.activate(gate_up, weights, to)

    def down(self, h: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """Multiplies `h [M, F]` by `proj [E, D, F]`: the experts' outputs by rows, `[M, D]`."""
        return grouped_mm(h, proj.transpose(1, 2), offs=to.ends)

    def combine(self, y: Tensor, weights: Tensor, to: Assignment) -> Tensor:
        """Sums the rows `y [M, D]` from `down` to tokens `[n, D]`, with `weights` if h was not weighted."""
        return self.around.combine(y, to)

    def gather(self, tokens: Tensor, to: Assignment) -> Tensor:
        """Returns gradients of tokens `[n, D]` in the form that `down_backward` and `down_gradient` take."""
        return self.around.collect(tokens, to)

    def down_backward(
        self, dy: Tensor, proj: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted h `[M, F]` and the gradient of `weights`; `gate_up` is overwritten with its gradient."""
        h = grouped_mm(dy, proj, offs=to.ends)
        return h, self.around.activate_backward(h, gate_up, weights, to)

    def down_gradient(self, dy: Tensor, h: Tensor, to: Assignment) -> Tensor:
        """Returns the gradient of the down projection, `[E, D, F]`."""
        return grouped_mm(dy.t(), h, offs=to.ends)

    def up_backward(self, gate_up: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """Returns the gradient of the rows `[M, D]`, from that of gate_up (in `gate_up`) and `proj [E, 2, F, D]`."""
        return grouped_mm(gate_up, proj.flatten(1, 2), offs=to.ends)

    def up_gradient(self, gate_up: Tensor, x: Tensor, to: Assignment) -> Tensor:
        """Returns the gradient of the up projection `[E, 2, F, D]`, from that of gate_up (in `gate_up`) and `x`."""
        dproj = grouped_mm(gate_up.t(), self.around.collect(x, to), offs=to.ends)
        return dproj.view(len(dproj), 2, -1, x.shape[1])
