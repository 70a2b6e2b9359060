"""Linear layer: an `nn.Linear` whose weight is split over the tensor ranks as its `split` says."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from linear_moe.modeling.deferred import linear
from linear_moe.modeling.host import Host, Init, Matrices, constant, normal

Split = Literal["column", "row", "partial", "shared"] | None

_AXES: dict[Split, tuple[dict[int, str], dict[int, str]]] = {
    "column": ({0: "tensor"}, {0: "tensor"}),
    "row": ({1: "tensor"}, {}),
    "partial": ({1: "tensor"}, {}),
    "shared": ({}, {}),
    None: ({}, {}),
}


class Linear(nn.Linear):
    """Linear layer `y = x W^T + b` with `W [out_features, in_features]`, both full (unsplit) sizes.

    Args:
        split: how the tensor ranks share the weight, and where the layer stands in a tensor-parallel region:
            "column": inside; this rank's rows, `x [N, in] -> [N, out / tensor]`;
            "row": ends the region; this rank's columns, `x [N, in / tensor] -> [n, out]` through `host.leave`;
            "partial": inside; as "row", but the caller sums over ranks, `x [N, in / tensor] -> [N, out]`; has no bias;
            "shared": inside; every rank has the whole weight and uses the result for its own heads only;
            None: outside; the whole weight on this rank's tokens, `x [n, in] -> [n, out]`.
        bias: whether there is a bias, initially zero; the bias of "row" is added once, after the sum over ranks.
        std: standard deviation of the initial weight.
        init: initialiser of the weight, in place of the normal distribution.
        matrices: linear maps that the weight consists of (default: one); None: no linear map, as in embeddings and
            routers, which Muon does not update.
    """

    def __init__(
        self,
        host: Host,
        in_features: int,
        out_features: int,
        *,
        split: Split = None,
        bias: bool = False,
        std: float = 0.02,
        init: Init | None = None,
        matrices: Matrices | None = Matrices(),  # noqa: B008 - frozen
    ):
        assert not (bias and split == "partial"), "every rank's part would have the bias"
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate and draw the full weight
        self.host, self.split, self.in_features, self.out_features = host, split, in_features, out_features
        weight_axes, bias_axes = _AXES[split]
        self.weight = host.parameter(
            out_features,
            in_features,
            init=init or normal(std),
            axes=weight_axes,
            tokenwise=split is None,
            matrices=matrices,
        )
        if bias:
            self.bias = host.parameter(
                out_features, init=constant(0.0), axes=bias_axes, decay=False, tokenwise=split in (None, "row")
            )
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.split == "row":
            y = self.host.leave(linear(self, x, weight))
            return y if bias is None else y + bias
        if self.split == "shared":
            weight = self.host.shared(weight)
            bias = bias if bias is None else self.host.shared(bias)
        return linear(self, x, weight, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self.split}"
