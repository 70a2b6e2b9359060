"""RMSNorm (arXiv 1910.07467) and LayerNorm, inside and outside tensor-parallel regions, over all features or groups."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.ops.fused import norms
from linear_moe.modeling.ops.fused.norms import l2_norm as l2_norm


class RMSNorm(nn.Module):
    """Norm `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, or over each of its `groups`.

    Args:
        dim: full (unsplit) size of the last dimension and of the weight.
        split: None: outside tensor-parallel regions, on this rank's tokens;
            "shared": inside; one weight for every head, each rank applies it to its own heads;
            "column": inside; features, weight and groups are split over the tensor ranks. A single group spans the
                ranks: the sum of its squares is a collective, for `x [..., dim / tensor]` of all tokens.
        groups: number of groups of `dim / groups` neighbouring features, each of which is normalised by itself.
    """

    def __init__(
        self,
        host: Host,
        dim: int,
        eps: float = 1e-5,
        *,
        split: Literal["column", "shared"] | None = None,
        groups: int = 1,
    ):
        super().__init__()
        assert dim % groups == 0, (dim, groups)
        self.host, self.eps, self.split, self.group_size = host, eps, split, dim // groups
        self.spans_ranks = split == "column" and groups == 1 and host.size("tensor") > 1
        if split == "column" and groups > 1:
            host.split(groups)
        axes = {0: "tensor"} if split == "column" else {}
        self.weight = host.parameter(dim, init=constant(1.0), axes=axes, decay=False, tokenwise=split is None)

    def forward(self, x: Tensor, activation: norms.Activation | None = None) -> Tensor:
        """Normalises `x [..., C]`, or `activation(x)` in the same pass."""
        weight = self.host.shared(self.weight) if self.split == "shared" else self.weight
        if self.spans_ranks:
            x = x if activation is None else norms.ACTIVATIONS[activation](x)
            squares = self.host.sum(x.float().square().sum(-1).reshape(-1, 1)).view(*x.shape[:-1], 1)
            return (x * torch.rsqrt(squares / self.group_size + self.eps)).to(x.dtype) * weight
        first: Any = {} if activation is None else {"activation": activation, "gate_first": True}
        return norms.norm(x, weight, eps=self.eps, size=self.group_size, **first)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, eps={self.eps}, split={self.split}"


class GatedRMSNorm(RMSNorm):
    """Norm and output gate of a mixer: `norm(x) * weight * activation(gate)`.

    With `gate_first`, the norm is that of `x * activation(gate)`, times the weight. On CUDA it is one kernel, which
    saves only x and the gate.

    Args:
        dim, eps, split, groups: as for RMSNorm. A weight with the size of one head serves all heads of a wider gate.
    """

    def __init__(
        self,
        host: Host,
        dim: int,
        eps: float = 1e-5,
        *,
        split: Literal["column", "shared"] | None = None,
        groups: int = 1,
        activation: norms.Activation = "silu",
        gate_first: bool = False,
    ):
        super().__init__(host, dim, eps, split=split, groups=groups)
        self.activation, self.gate_first = activation, gate_first

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor, skip: Tensor | None = None, skip_weight: Tensor | None = None
    ) -> Tensor:
        """Normalises and gates `x`, which has as many elements as `gate [..., C]`; the result has the gate's shape.

        With `skip` (as many elements) and `skip_weight [heads]`, `x + skip_weight * skip` takes the place of x.
        """
        x, skip = x.reshape(gate.shape), None if skip is None else skip.reshape(gate.shape)
        if self.spans_ranks:
            assert skip is None
            a = norms.ACTIVATIONS[self.activation](gate)
            return super().forward(x * a) if self.gate_first else super().forward(x) * a
        weight = self.host.shared(self.weight) if self.split == "shared" else self.weight
        options: Any = {"size": self.group_size, "activation": self.activation, "gate_first": self.gate_first}
        return norms.norm(x, weight, None, gate, skip, skip_weight, eps=self.eps, **options)


class LayerNorm(nn.Module):
    """Norm `(x - mean) / sqrt(variance + eps) * weight + bias` over groups of features (arXiv 1607.06450).

    With one group for each head, this is the group norm of RWKV.

    Args:
        dim: full (unsplit) size of the last dimension, the weight and the bias.
        split, groups: as for RMSNorm.
    """

    def __init__(
        self,
        host: Host,
        dim: int,
        eps: float = 1e-5,
        *,
        split: Literal["column", "shared"] | None = None,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        assert dim % groups == 0, (dim, groups)
        self.host, self.eps, self.split, self.group_size = host, eps, split, dim // groups
        self.spans_ranks = split == "column" and groups == 1 and host.size("tensor") > 1
        if split == "column" and groups > 1:
            host.split(groups)
        vector = partial(
            host.parameter, dim, axes={0: "tensor"} if split == "column" else {}, decay=False, tokenwise=split is None
        )
        self.weight = vector(init=constant(1.0))
        if bias:
            self.bias = vector(init=constant(0.0))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Returns `norm(x)` in the shape of x, or with a gate `norm(x) * silu(gate)` in the shape of the gate."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        x = x if gate is None else x.reshape(gate.shape)
        if self.split == "shared":
            weight, bias = self.host.shared(weight), bias if bias is None else self.host.shared(bias)
        if self.spans_ranks:
            centred = x.float() - self._mean(x.float())
            y = (centred * torch.rsqrt(self._mean(centred.square()) + self.eps)).to(x.dtype) * weight
            y = y if bias is None else y + bias
            return y if gate is None else y * F.silu(gate)
        return norms.norm(x, weight, bias, gate, eps=self.eps, kind="layer", size=self.group_size)

    def _mean(self, x: Tensor) -> Tensor:
        """Mean over the features of all tensor ranks."""
        return self.host.sum(x.sum(-1).reshape(-1, 1)).view(*x.shape[:-1], 1) / self.group_size

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, eps={self.eps}, split={self.split}"
