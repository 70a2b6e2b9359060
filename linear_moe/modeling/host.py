"""Host: the interface between a model and the process groups around it, implemented here for a single process.

The model, its layers, mixers and experts are written once against `Host`. In a single process every group has one
member, so `enter` and `leave` are identities; `training/host.py` overrides them with Megatron-Core's collectives.

The residual stream is `[tokens, hidden]`. Between `enter` and `leave` a rank sees all tokens and its share of heads or
columns; outside it sees its share of tokens (all of them unless activations are sharded by tokens).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.ops.fused.cross_entropy import cross_entropy
from linear_moe.modeling.ops.fused.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from linear_moe.modeling.moe.config import MoEConfig
    from linear_moe.modeling.moe.dispatch import Dispatcher
    from linear_moe.modeling.tokens import TokenLayout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes by their names in a config."""

Init = Callable[[Tensor, torch.Generator], Any]
"""Function that fills a full (unsharded) fp32 tensor in place from a generator."""


@dataclass(frozen=True)
class Matrices:
    """Division of a parameter `[..., rows, columns]` into matrices, each a linear map of its own.

    Along `dim`, the parameter is a sequence of `repeat` runs, for example one for each head. Each run consists of one
    slice of every matrix, and a matrix is the concatenation of its slices in all runs.

    Attributes:
        sizes: sizes of the slices of one run, one for each matrix; (): the parameter is a single matrix.
        repeat: number of runs.
        dim: -2 if the matrices are stacked as rows, -1 if they stand side by side as columns.
    """

    sizes: tuple[int, ...] = ()
    repeat: int = 1
    dim: int = -2

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Splits a whole parameter `[..., rows, columns]` into its matrices."""
        if not self.sizes:
            return (x,)
        first = x.dim() + self.dim
        return tuple(piece.flatten(first, first + 1) for piece in self._runs(x, first).split(self.sizes, first + 1))

    def join(self, matrices: tuple[Tensor, ...]) -> Tensor:
        """Joins matrices to a whole parameter; the inverse of `split`."""
        if not self.sizes:
            return matrices[0]
        first = matrices[0].dim() + self.dim
        return torch.cat([self._runs(m, first) for m in matrices], first + 1).flatten(first, first + 1)

    def _runs(self, x: Tensor, dim: int) -> Tensor:
        return x.unflatten(dim, (self.repeat, -1))


@dataclass(frozen=True)
class ParameterSpec:
    """Specification of a parameter, attached to it as `parameter.spec`, for initialising, sharding, saving, optimising.

    Attributes:
        shape: the full, unsharded shape.
        axes: dimension -> the parallel axis that splits it: "tensor", "expert" (always dimension 0) or "expert_tensor".
        init: initialiser of the full tensor.
        decay: whether weight decay applies.
        fp32: whether the parameter is kept in fp32 even in a bf16 model.
        matrices: linear maps in the parameter's last two dimensions; None: it is a vector, table or filter instead.
    """

    shape: tuple[int, ...]
    init: Init
    axes: Mapping[int, str] = field(default_factory=dict)
    decay: bool = True
    fp32: bool = False
    matrices: Matrices | None = None

    @property
    def by_expert(self) -> bool:
        """Whether dimension 0 counts experts."""
        return self.axes.get(0) == "expert"


def normal(std: float) -> Init:
    """Normal distribution with mean 0."""
    return lambda t, g: t.normal_(0.0, std, generator=g)


def constant(value: float) -> Init:
    return lambda t, g: t.fill_(value)


def spec_of(parameter: Tensor) -> ParameterSpec:
    """Returns the specification that `Host.parameter` attached to a parameter."""
    return cast(Any, parameter).spec


class Host:
    """Host of a model in one process, without process groups.

    Args:
        dtype: dtype of the parameters (None: torch's default); parameters declared fp32 stay fp32.
        device: device of the parameters (None: torch's current default, so that `torch.device("meta")` works as a
            context).
        activations: recomputation of activations; None: all activations are kept for the backward pass.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        activations: Activations | None = None,
    ):
        self.dtype, self.device, self.activations = dtype, device, activations or Activations()

    # -- groups ---------------------------------------------------------------------------------------------------
    def size(self, axis: str) -> int:
        """Number of ranks along a parallel axis: "tensor", "expert" or "expert_tensor"."""
        return 1

    def rank(self, axis: str) -> int:
        """Index of this rank along a parallel axis."""
        return 0

    def split(self, total: int, axis: str = "tensor") -> int:
        """Size of this rank's share of `total` heads, columns or experts; the validation has checked divisibility."""
        assert total % self.size(axis) == 0, (total, axis, self.size(axis))
        return total // self.size(axis)

    # -- parameters -----------------------------------------------------------------------------------------------
    def parameter(
        self,
        *shape: int,
        init: Init,
        axes: Mapping[int, str] | None = None,
        decay: bool = True,
        fp32: bool = False,
        tokenwise: bool = False,
        trained: bool = True,
        matrices: Matrices | None = None,
    ) -> nn.Parameter:
        """Makes an uninitialised parameter, this rank's share of the full `shape`; `initialize` fills it.

        Args:
            init, axes, decay, fp32, matrices: see ParameterSpec.
            tokenwise: the parameter is not split, and is used outside `enter`..`leave`, on this rank's tokens only.
            trained: the parameter is trained by gradients; else it has no gradient, weight decay or optimizer state.
        """
        spec = ParameterSpec(tuple(shape), init, dict(axes or {}), decay, fp32, matrices)
        local = [self.split(n, spec.axes[d]) if d in spec.axes else n for d, n in enumerate(shape)]
        kind = torch.float32 if fp32 else self.dtype
        parameter = nn.Parameter(torch.empty(local, dtype=kind, device=self.device), requires_grad=trained)
        cast(Any, parameter).spec = spec
        return parameter

    # -- tensor parallelism ---------------------------------------------------------------------------------------
    def enter(self, x: Tensor) -> Tensor:
        """Begins a tensor-parallel region: this rank's tokens `[n, D]` -> all `[N, D]`; backward sums gradients."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """Ends a tensor-parallel region: sums `[N, D]` over the tensor ranks, returns this rank's tokens `[n, D]`."""
        return y

    def sum(self, y: Tensor) -> Tensor:
        """Sums `[N, D]` over the tensor ranks inside a region, for every rank; gradients are summed in the same way."""
        return self.enter(self.leave(y))

    def shared(self, weight: Tensor) -> Tensor:
        """Returns an unsplit parameter for use inside a region, on this rank's heads: backward sums its gradient."""
        return weight

    # -- vocabulary -----------------------------------------------------------------------------------------------
    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """Embeds `tokens [N]` int64 by `weight [V/tensor, D]`; returns this rank's tokens `[n, D]`."""
        return F.embedding(tokens, weight)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss per token `[N]` fp32 of `logits [N, V/tensor]`, which the backward pass overwrites, and `labels [N]`."""
        return cross_entropy(logits, labels)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Loss per token `[N]` fp32 of the logits `x @ weight.T`, for `x [N, D]` and `weight [V/tensor, D]`.

        Logits are computed in blocks of the vocabulary, and again in the backward pass: memory never holds all of them.
        """
        return linear_cross_entropy(x, weight, labels)

    # -- mixture of experts ---------------------------------------------------------------------------------------
    def dispatcher(self, config: MoEConfig) -> Dispatcher:
        """Makes a token dispatcher for one MoE layer."""
        from linear_moe.modeling.moe.dispatch import Dispatcher

        return Dispatcher(config.num_experts)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gathers this rank's tokens `[n, ...]` over the tensor ranks: `[N, ...]`, without gradients."""
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        """Cuts this rank's tokens `[n, ...]` out of the `[N, ...]` of `all_tokens`."""
        return x

    def router_losses(
        self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int, layout: TokenLayout
    ) -> Tensor:
        """Attaches the losses of a router with `logits [n, E]` that chose `index [n, k]` to its `weights [n, k]`.

        An index of E marks a padding token, which does not count. This host, which does not train, adds no losses.
        """
        return weights

    def observe_routing(self, index: Tensor, kept: Tensor | None, config: MoEConfig, layer: int) -> None:
        """Receives the choice of every MoE layer, of which a training host keeps statistics; this host ignores it.

        Args:
            index: `[n, k]` chosen experts; num_experts marks a padding token, which does not count.
            kept: `[n, k]` bool, choices within the experts' capacity; None: all.
        """

    # -- auxiliary losses -----------------------------------------------------------------------------------------
    def sum_over_sequence(self, x: Tensor) -> Tensor:
        """Sums `x`, inside a region, over the ranks that share out the same sequences, without gradients."""
        return x

    def auxiliary_loss(
        self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: Tensor | int
    ) -> Tensor:
        """Adds `coefficient * value`, inside a region, to the training loss, and reports the mean of `value` as `name`.

        This host, which does not train, adds no losses.

        Args:
            carrier: any tensor that the model's output depends on; the returned tensor must take its place.
            value: scalar, the same on every tensor rank. Summed over the ranks that share out the sequences, it is a
                mean over the `tokens` tokens of the micro-batch.
            tokens: number of tokens of the micro-batch on all these ranks, without padding.
        """
        return carrier


@torch.no_grad()
def initialize(model: nn.Module, host: Host, seed: int) -> None:
    """Fills every parameter from its spec; weights depend on the seed and the parameter's name, not on the layout.

    Each full tensor is drawn from a generator of its own and cut to this rank's share. Experts are drawn one by one, by
    their global indices. (CPU and GPU generators differ, so weights are equal across layouts on one kind of device.)
    """
    for name, parameter in model.named_parameters():
        spec = spec_of(parameter)
        count = parameter.shape[0] if spec.by_expert else 1
        offset = host.rank("expert") * count if spec.by_expert else 0
        for i in range(count):
            full = initial_value(name, spec, seed, offset + i, parameter.device)
            target = parameter[i] if spec.by_expert else parameter
            for dim, axis in spec.axes.items():
                if axis != "expert":
                    full = full.chunk(host.size(axis), dim - spec.by_expert)[host.rank(axis)]
            target.copy_(full)


def initial_value(
    name: str, spec: ParameterSpec, seed: int, index: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws the full fp32 value that `initialize` gives a parameter; if `spec.by_expert`, that of expert `index`."""
    generator = torch.Generator(device)
    key = f"{seed}/{name}/{index}".encode()
    generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
    full = torch.empty(spec.shape[1:] if spec.by_expert else spec.shape, dtype=torch.float32, device=device)
    spec.init(full, generator)
    return full
