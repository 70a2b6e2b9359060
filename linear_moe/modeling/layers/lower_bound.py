"""Forget gates bounded from below, as in HGRN and HGRN2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.ops.fused.bounded_gate import bounded_gate

BOUNDS = ("learned", "fixed", "none")


class LowerBound(nn.Module):
    """`log f` and `1 - f`, f = b + (1 - b) sigmoid(x), by feature, in a tensor-parallel region (arXiv 2311.04823, 3.2).

    The bound b of layer l of L is l / L at first, 0 in the first layer. Published, all layers' bounds are one softmax
    over layers, summed up, which starts at these values; here each layer learns its own (`sigmoid(logit)`), so that a
    layer's parameters are its own, in whatever pipeline stage.

    Args:
        kind: "learned"; "fixed" at l / L; "none": b = 0.
        features: full (unsplit) number of features, split over the tensor ranks.
    """

    def __init__(self, host: Host, kind: str, features: int, dims: Dims):
        super().__init__()
        bound = 0.0 if kind == "none" else dims.layer / dims.num_layers
        self.initial_logit = math.log(bound / (1 - bound)) if bound else None
        if kind == "learned" and self.initial_logit is not None:
            self.logit = host.parameter(
                features, init=constant(self.initial_logit), axes={0: "tensor"}, decay=False, fp32=True
            )
        else:
            self.register_parameter("logit", None)

    def bound(self, x: Tensor) -> Tensor | None:
        """The bounds' logits `[features / tensor]`, None for b = 0."""
        if self.logit is not None or self.initial_logit is None:
            return self.logit
        return x.new_full((x.shape[-1],), self.initial_logit, dtype=torch.float32)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x, y [..., features / tensor]` -> of the same shape, log f in fp32, between -80 and 0, and in x's dtype
        (1 - f) silu(y), 1 - f without y."""
        return bounded_gate(x, y, self.bound(x))
