"""What a model asks of its surroundings, and the plain single-process answer.

The model, its layers, mixers and experts are written once against `Host`. Here every group has one member, so `enter`
and `leave` are identities; `training/host.py` overrides them with Megatron-Core's collectives.

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
"""By their names in a config."""

Init = Callable[[Tensor, torch.Generator], Any]
"""Fills a full (unsharded) fp32 tensor in place from the generator."""


@dataclass(frozen=True)
class Matrices:
    """How a parameter `[..., rows, columns]` is made of matrices, each a linear map of its own.

    Attributes:
        sizes: along `dim`, what one run of pieces, one of each matrix, is cut into; (): a single matrix.
        repeat: so many such runs follow each other (one per head, say); a matrix is its pieces of all of them.
        dim: -2, stacked rows, or -1, columns side by side.
    """

    sizes: tuple[int, ...] = ()
    repeat: int = 1
    dim: int = -2

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The matrices of a whole parameter `[..., rows, columns]`."""
        if not self.sizes:
            return (x,)
        first = x.dim() + self.dim
        return tuple(piece.flatten(first, first + 1) for piece in self._runs(x, first).split(self.sizes, first + 1))

    def join(self, matrices: tuple[Tensor, ...]) -> Tensor:
        """Undoes `split`."""
        if not self.sizes:
            return matrices[0]
        first = matrices[0].dim() + self.dim
        return torch.cat([self._runs(m, first) for m in matrices], first + 1).flatten(first, first + 1)

    def _runs(self, x: Tensor, dim: int) -> Tensor:
        return x.unflatten(dim, (self.repeat, -1))


@dataclass(frozen=True)
class ParameterSpec:
    """What every parameter says of itself, as `parameter.spec`: enough to initialise, shard, save and optimise it.

    Attributes:
        shape: the full, unsharded shape.
        axes: dimension -> the parallel axis that splits it: "tensor", "expert" (always dimension 0) or "expert_tensor".
        init: initialiser of the full tensor.
        decay: whether weight decay applies.
        fp32: kept in fp32 even in a bf16 model.
        matrices: what its last two dimensions are; None: a vector, a table or a filter, but no linear map.
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
    return lambda t, g: t.normal_(0.0, std, generator=g)


def constant(value: float) -> Init:
    return lambda t, g: t.fill_(value)


def spec_of(parameter: Tensor) -> ParameterSpec:
    """The specification that `Host.parameter` attached to a parameter."""
    return cast(Any, parameter).spec


class Host:
    """One process, no groups.

    Args:
        dtype: of the parameters (None: torch's default); those declared fp32 stay fp32.
        device: of the parameters (None: torch's current default, so that `torch.device("meta")` works as a context).
        activations: what is kept for the backward pass; None: everything.
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
        """Ranks along a parallel axis: "tensor", "expert" or "expert_tensor"."""
        return 1

    def rank(self, axis: str) -> int:
        """This rank's place along a parallel axis."""
        return 0

    def split(self, total: int, axis: str = "tensor") -> int:
        """This rank's share of `total` heads, columns or experts; the config was checked to divide."""
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
        """An uninitialised parameter, this rank's share of full `shape`; see ParameterSpec and `initialize`.

        Args:
            tokenwise: an unsplit parameter used outside `enter`..`leave`, on this rank's tokens only.
            trained: by gradients; else it has none, no weight decay and no optimizer state.
            matrices: see ParameterSpec.
        """
        spec = ParameterSpec(tuple(shape), init, dict(axes or {}), decay, fp32, matrices)
        local = [self.split(n, spec.axes[d]) if d in spec.axes else n for d, n in enumerate(shape)]
        kind = torch.float32 if fp32 else self.dtype
        parameter = nn.Parameter(torch.empty(local, dtype=kind, device=self.device), requires_grad=trained)
        cast(Any, parameter).spec = spec
        return parameter

    # -- tensor parallelism ---------------------------------------------------------------------------------------
    def enter(self, x: Tensor) -> Tensor:
        """Begin a tensor-parallel region: this rank's tokens `[n, D]` -> all `[N, D]`; backward sums gradients."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """End it: partial sums `[N, D]` -> summed over the tensor ranks, this rank's tokens `[n, D]`."""
        return y

    def sum(self, y: Tensor) -> Tensor:
        """Inside a region: partial sums `[N, D]` -> summed over the tensor ranks, on every rank; so do gradients."""
        return self.enter(self.leave(y))

    def shared(self, weight: Tensor) -> Tensor:
        """An unsplit parameter used inside a region on this rank's heads only: backward sums its gradient."""
        return weight

    # -- vocabulary -----------------------------------------------------------------------------------------------
    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """`weight [V/tensor, D]`, `tokens [N]` -> this rank's tokens `[n, D]`."""
        return F.embedding(tokens, weight)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`logits [N, V/tensor]`, `labels [N]` -> loss per token `[N]` fp32. The backward pass overwrites `logits`."""
        return cross_entropy(logits, labels)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """As `cross_entropy(x @ weight.T, labels)` for `x [N, D]`, `weight [V/tensor, D]`, in blocks of the vocabulary:
        the logits are never whole in memory, and are computed again in the backward pass."""
        return linear_cross_entropy(x, weight, labels)

    # -- mixture of experts ---------------------------------------------------------------------------------------
    def dispatcher(self, config: MoEConfig) -> Dispatcher:
        """A new token dispatcher for one MoE layer."""
        from linear_moe.modeling.moe.dispatch import Dispatcher

        return Dispatcher(config.num_experts)

    def all_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens `[n, ...]` -> all of the micro-batch `[N, ...]`, without gradients."""
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        """Undoes `all_tokens`."""
        return x

    def router_losses(
        self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int, layout: TokenLayout
    ) -> Tensor:
        """Attach the losses of a router with `logits [n, E]` that chose `index [n, k]` to its `weights [n, k]`.

        An index of E is that of padding, which does not count.

        One process without a training loop has none.
        """
        return weights

    def observe_routing(self, index: Tensor, kept: Tensor | None, config: MoEConfig, layer: int) -> None:
        """Hears every layer's choice `index [n, k]` (num_experts: padding, which does not count), and which were within
        capacity (boolean `[n, k]`; None: all).

        A training loop keeps statistics.
        """

    # -- auxiliary losses -----------------------------------------------------------------------------------------
    def sum_over_sequence(self, x: Tensor) -> Tensor:
        """Inside a region: the sum over the ranks that share out its sequences, without gradients."""
        return x

    def auxiliary_loss(
        self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: Tensor | int
    ) -> Tensor:
        """Inside a region: add `coefficient * value` to the training loss, and report the mean of `value` as `name`.

        One process without a training loop has none.

        Args:
            carrier: any tensor that the model's output depends on; the result takes its place.
            value: scalar, the same on every tensor rank: a mean over the `tokens` tokens of this micro-batch, or this
                rank's part of it, which add up to it over the ranks that share out the sequences.
            tokens: of all those ranks, without padding.
        """
        return carrier


@torch.no_grad()
def initialize(model: nn.Module, host: Host, seed: int) -> None:
    """Fill every parameter from its spec. Weights depend on the seed and the parameter's name, not on the layout.

    Each full tensor is drawn from a generator of its own and cut to this rank's share; experts one by one, by global
    index. (CPU and GPU generators differ, so weights are equal across layouts on one kind of device.)
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
    """What `initialize` gives a parameter, full and in fp32; of one whose `spec.by_expert`, expert `index`."""
    generator = torch.Generator(device)
    key = f"{seed}/{name}/{index}".encode()
    generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
    full = torch.empty(spec.shape[1:] if spec.by_expert else spec.shape, dtype=torch.float32, device=device)
    spec.init(full, generator)
    return full
