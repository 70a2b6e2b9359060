"""The contract of a token mixer. Everything else in the code asks a mixer; nothing branches on its name.

A mixer maps the residual stream to itself in three moves: `project` (tokens -> inputs of the recurrence), `mix` (the
recurrence, or softmax attention) and `output`. Tensors inside are `[B, T, H, D]`; the stream is `[tokens, hidden]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from linear_moe.modeling.deferred import later, weights_of
from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.ops.fused.short_conv import tokens_before
from linear_moe.modeling.ops.sequence import once_by, pieces_of
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.fields import opt


@dataclass
class MixerConfig:
    """Base of every mixer's config; the fields are the subclass's."""

    type: str = opt("gla", "name of the mixer")


@dataclass(frozen=True)
class Capabilities:
    tensor_parallel: bool = True
    sequence_parallel: bool = True
    packing: bool = True
    decoding: bool = True


class Mixer(nn.Module):
    """Base class. A subclass sets the class attributes and implements project, mix and output."""

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    family: ClassVar[str]  # "decay", "delta", "softmax": the folder of ops it uses
    formula: ClassVar[str]  # the recurrence in one line of mathematics
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    limits: ClassVar[dict[str, str]] = {}  # a capability that it does not have -> why
    unsplit_states: ClassVar[frozenset[str]] = frozenset()  # of `state_shapes`, those whole on every tensor rank
    crossing_fields: ClassVar[tuple[str, ...]] = ()  # of Config, those alike in all layers if it has a `crossing`

    def __init__(self, config: Any, dims: Dims, host: Host):
        super().__init__()
        self.config, self.dims, self.host = config, dims, host

    @classmethod
    def validate(cls, config: Any, dims: Dims, tensor: int, path: str) -> None:
        """Raises ConfigError, naming fields as `path.field`, for sizes this mixer cannot have on `tensor` ranks."""
        raise NotImplementedError

    @classmethod
    def crossing(cls, config: Any, dims: Dims) -> dict[str, int]:
        """What layers pass each other through `TokenLayout.shared`: name -> channels over all tensor ranks.

        Once a layer has left it, pipeline stages send it along with the residual stream.
        """
        return {}

    @classmethod
    def softmax_heads(cls, config: Any, dims: Dims) -> tuple[int, int] | None:
        """Heads of its queries, and of its keys and values, if it is softmax attention."""
        return None

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Any]:
        """`x [B*T, hidden]` -> (keyword inputs of the recurrence, this rank's heads; what `output` needs besides)."""
        raise NotImplementedError

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        """Inputs of the recurrence -> `[B, T, H, V]`, from and to the state in `cache`."""
        raise NotImplementedError

    def output(self, o: Tensor, gate: Any) -> Tensor:
        """`o [B, T, H, V]` and what `project` left for it -> this rank's tokens `[tokens, hidden]`."""
        raise NotImplementedError

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Decoding state of `batch` rows by name: shape and dtype (None: the model's)."""
        raise NotImplementedError

    def recurrence_flops(self, length: int) -> float:
        """Forward FLOPs per token of `mix` over all heads (no projections), at sequence length `length`."""
        raise NotImplementedError

    def forward(self, x: Tensor, layout: TokenLayout, cache: Cache | None = None) -> Tensor:
        """`x [tokens, hidden]` (this rank's share) -> the same shape."""
        activations = self.host.activations
        # The gradient of the output projection's weight is computed while that of the state travels. Others could fill
        # the gaps of convolutions, but putting one off takes the host longer than such a small message.
        waits = layout.pieces is not None and self.family != "softmax" and torch.is_grad_enabled()
        weights = weights_of(m for m in self.modules() if getattr(m, "split", None) == "row") if waits else None
        with pieces_of(layout.pieces), once_by(activations.once):
            inputs, gate = self.project(activations.transient("norm", self.host.enter, x), layout, cache)

        def mix(*values: Any) -> Tensor:
            # here, where it may be called again, from another thread
            with pieces_of(layout.pieces), once_by(activations.once):
                return self.mix(dict(zip(inputs, values, strict=True)), layout, cache)

        o = activations.region("core", mix, *inputs.values())
        with later(weights):
            return self.output(o, gate)

    def init_cache(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Zeroed decoding state."""
        shapes = self.state_shapes(batch, max_length).items()
        return {name: torch.zeros(shape, dtype=kind or dtype, device=device) for name, (shape, kind) in shapes}


class LinearMixer(Mixer):
    """A mixer whose `mix` is a linear recurrence with one fp32 state tensor, or with several by name.

    A subclass sets `op`, or implements recurrence.
    """

    op: ClassVar[Callable[..., tuple[Tensor, Tensor]]]  # of `modeling/ops`, its options set; not for own `recurrence`s

    _behind: tuple[Tensor, dict[str, tuple[Tensor, Tensor]]] | None = None  # an input, and `_projections` of it

    def projected(self, name: str, x: Tensor, layout: TokenLayout, cache: Cache | None) -> Tensor:
        """`x [B*T, hidden]` through the module `{name}_proj` and, if there is one, `{name}_conv1d` -> `[B, T, C]`."""
        conv = getattr(self, f"{name}_conv1d", None)
        if conv is None or conv.size == 1 or layout.pieces is None:
            y = self._projection(name, x, layout)
            return y if conv is None else conv(y, layout, cache)
        if self._behind is None or self._behind[0] is not x:
            self._behind = x, self._projections(x, layout)
        y, before = self._behind[1].pop(name)
        if not self._behind[1]:
            self._behind = None
        return conv(y, layout, before=before)

    def _projection(self, name: str, x: Tensor, layout: TokenLayout) -> Tensor:
        y: Tensor = self.get_submodule(f"{name}_proj")(x).view(layout.batch, layout.length, -1)
        return y

    def _projections(self, x: Tensor, layout: TokenLayout) -> dict[str, tuple[Tensor, Tensor]]:
        """All projections of `x` that will be convolved, by name, and the tokens before them: in one message."""
        children = cast("Iterator[tuple[str, Any]]", self.named_children())
        sizes = {name.removesuffix("_conv1d"): conv.size for name, conv in children if name.endswith("_conv1d")}
        assert len(set(sizes.values())) == 1, f"convolutions of one input have one size, not {sizes}"
        found = tokens_before([self._projection(name, x, layout) for name in sizes], next(iter(sizes.values())) - 1)
        return dict(zip(sizes, found, strict=True))

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        """Inputs and initial states (none: zeros) -> (`o [B, T, H, V]`, final states), by the names of `state_shapes`.

        Here `op` with one state, `state [N, H, K, V]`; a mixer with others, or a choice of ops, calls these itself.
        """
        op = type(self).op  # through the class, so that a function does not become a method
        o, state = op(**inputs, initial_state=states.get("state"), cu_seqlens=layout.cu_seqlens)
        return o, {"state": state}

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        o, states = self.recurrence(inputs, layout, cache or {})
        if cache is not None:
            for name, state in states.items():
                if state is not cache[name]:
                    cache[name].copy_(state)
        return o
