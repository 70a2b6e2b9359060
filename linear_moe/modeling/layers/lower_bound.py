"""Lower bounds of forget gates, as in HGRN and HGRN2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.ops.fused.bounded_gate import bounded_gate

BOUNDS = ("learned", "fixed", "none")


class LowerBound(nn.Module):
    """Forget gates f = b + (1 - b) sigmoid(x) of each feature, inside a tensor-parallel region (arXiv 2311.04823, 3.2).

    The bound b of layer l of L starts at l / L, which is 0 in the first layer. In the paper, the bounds of all layers
    are cumulative sums of one softmax over layers, with these initial values. Here each layer learns its own bound
    (`sigmoid(logit)`), so that no parameter belongs to layers of several pipeline stages.

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
        """Returns the logits `[features / tensor]` of the bounds; None for b = 0."""
        if self.logit is not None or self.initial_logit is None:
            return self.logit
        return x.new_full((x.shape[-1],), self.initial_logit, dtype=torch.float32)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes log f in fp32, between -80 and 0, and (1 - f) silu(y) (1 - f without y) in x's dtype.

        `x`, `y` and both results have the shape `[..., features / tensor]`.
        """
        return bounded_gate(x, y, self.bound(x))
