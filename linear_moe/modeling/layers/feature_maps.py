"""Feature maps of linear attention as modules, which hold the parameters of the trained maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.host import Host, Init
from linear_moe.modeling.layers.initializers import uniform
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.ops.fused.feature_maps import dpfp, elu_plus_one, hedgehog

POSITIVE = ("elu", "relu", "softmax", "dpfp", "hedgehog", "t2r")
"""Maps whose features are never negative, so that their products can be normalised."""
TRAINED = ("hedgehog", "t2r", "elementwise_product")
"""Maps with weights."""
FEATURE_MAPS = (*POSITIVE, "swish", "elementwise_product", "identity")

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "swish": F.silu,
    "softmax": partial(F.softmax, dim=-1),
    "identity": lambda x: x,
}
# Elements that the backward pass keeps for each feature of x, the map's output included.
_KEPT = {
    "elu": 2,
    "relu": 1,
    "swish": 2,
    "softmax": 1,
    "identity": 1,
    "hedgehog": 3,
    "t2r": 2,
    "elementwise_product": 4,
}


class FeatureMap(nn.Module):
    """Feature map phi of each head, `[B, T, H, dim]` -> `[B, T, H, size]`, inside a tensor-parallel region.

    "elu" (elu + 1, arXiv 2006.16236), "relu", "swish", "softmax" over the features, "dpfp" (arXiv 2102.11174),
    "hedgehog" (arXiv 2402.04347; its linear map starts as the identity), "t2r" (arXiv 2103.13076),
    "elementwise_product" of two linear maps, "identity". All heads share one set of weights, under
    flash-linear-attention's names.

    Args:
        nu: number of shifts of "dpfp".

    Attributes:
        size: features per head.
        kept: elements per head and token that the backward pass needs, the features included.
    """

    def __init__(self, name: str, host: Host, dim: int, nu: int = 4):
        super().__init__()
        self.name, self.nu = name, nu
        self.size = dim * {"dpfp": 2 * nu, "hedgehog": 2}.get(name, 1)
        self.kept = dim * (4 + 4 * nu if name == "dpfp" else _KEPT[name])

        def linear(bias: bool, init: Init) -> Linear:
            return Linear(host, dim, dim, split="shared", bias=bias, init=init)

        if name == "hedgehog":
            self.layer = linear(True, lambda t, _: nn.init.eye_(t))
        elif name == "t2r":
            self.layer = linear(False, uniform(dim**-0.5))
        elif name == "elementwise_product":
            self.layer1, self.layer2 = linear(True, uniform(dim**-0.5)), linear(True, uniform(dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "dpfp":
            return dpfp(x, self.nu)
        if self.name == "hedgehog":
            return hedgehog(self.layer(x))
        if self.name == "t2r":
            return self.layer(x).relu()
        if self.name == "elementwise_product":
            return self.layer1(x) * self.layer2(x)
        return _FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name
