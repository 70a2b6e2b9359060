"""Interface of all token mixers; the rest of the code calls this interface, and never branches on a mixer's name.

A mixer maps the residual stream to itself in three steps: `project` (tokens -> inputs of the recurrence), `mix` (the
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
    """Base class of every mixer's config; subclasses add the mixer's options as fields."""

    type: str = opt("gla", "name of the mixer")


@dataclass(frozen=True)
class Capabilities:
    """Features of the framework that a mixer supports."""

    tensor_parallel: bool = True
    sequence_parallel: bool = True
    packing: bool = True
    decoding: bool = True


class Mixer(nn.Module):
    """Base class of token mixers; a subclass sets the class attributes and implements project, mix and output."""

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    family: ClassVar[str]  # key of `modeling.ops.FAMILIES`: the ops that the mixer uses
    formula: ClassVar[str]  # the recurrence in one line of mathematics
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    limits: ClassVar[dict[str, str]] = {}  # capability that the mixer lacks -> the reason
    unsplit_states: ClassVar[frozenset[str]] = frozenset()  # names of `state_shapes` that tensor ranks do not split
    crossing_fields: ClassVar[tuple[str, ...]] = ()  # options that must agree in all layers, because of `crossing`

    def __init__(self, config: Any, dims: Dims, host: Host):
        super().__init__()
        self.config, self.dims, self.host = config, dims, host

    @classmethod
    def validate(cls, config: Any, dims: Dims, tensor: int, path: str) -> None:
        """Raises ConfigError, naming options as `path.option`, for sizes that are impossible on `tensor` ranks."""
        raise NotImplementedError

    @classmethod
    def crossing(cls, config: Any, dims: Dims) -> dict[str, int]:
        """Channels over all tensor ranks, by name, of the tensors that layers pass on in `TokenLayout.shared`.

        Once a layer has left such a tensor, pipeline stages send it along with the residual stream.
        """
        return {}

    @classmethod
    def softmax_heads(cls, config: Any, dims: Dims) -> tuple[int, int] | None:
        """Numbers of query heads and of key-value heads if the mixer is softmax attention; else None."""
        return None

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Any]:
        """Projects tokens `x [B*T, hidden]` to the keyword arguments of the recurrence, with this rank's heads.

        Returns them, and a value (a gate, for example) that `output` needs besides the recurrence's result.
        """
        raise NotImplementedError

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        """Computes the recurrence `[B, T, H, V]` from its inputs; with a cache, continues and updates its state."""
        raise NotImplementedError

    def output(self, o: Tensor, gate: Any) -> Tensor:
        """Projects `o [B, T, H, V]` to this rank's tokens `[tokens, hidden]`; `gate`: the second value of `project`."""
        raise NotImplementedError

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shapes and dtypes (None: the model's dtype) of the decoding state of `batch` rows, by name."""
        raise NotImplementedError

    def recurrence_flops(self, length: int) -> float:
        """Forward FLOPs per token of `mix` over all heads (no projections), at sequence length `length`."""
        raise NotImplementedError

    def forward(self, x: Tensor, layout: TokenLayout, cache: Cache | None = None) -> Tensor:
        """Maps this rank's tokens `x [tokens, hidden]` to the mixer's output of the same shape."""
        activations = self.host.activations
        # The weight gradient of the output projection is deferred, and computed while the state's gradient travels.
        # Other weight gradients could fill the time in which convolutions exchange tokens, but these messages are so
        # small that deferring a gradient takes the host longer.
        waits = layout.pieces is not None and self.family != "softmax" and torch.is_grad_enabled()
        weights = weights_of(m for m in self.modules() if getattr(m, "split", None) == "row") if waits else None
        with pieces_of(layout.pieces), once_by(activations.once):
            inputs, gate = self.project(activations.transient("norm", self.host.enter, x), layout, cache)

        def mix(*values: Any) -> Tensor:
            # Entered here again, because the backward pass may call `mix` once more, from another thread.
            with pieces_of(layout.pieces), once_by(activations.once):
                return self.mix(dict(zip(inputs, values, strict=True)), layout, cache)

        o = activations.region("core", mix, *inputs.values())
        with later(weights):
            return self.output(o, gate)

    def init_cache(self, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Makes a decoding state of zeros for `batch` rows of at most `max_length` tokens."""
        shapes = self.state_shapes(batch, max_length).items()
        return {name: torch.zeros(shape, dtype=kind or dtype, device=device) for name, (shape, kind) in shapes}


class LinearMixer(Mixer):
    """Base class of mixers whose `mix` is a linear recurrence with one or several named fp32 state tensors.

    A subclass sets `op`, or overrides `recurrence`.
    """

    op: ClassVar[Callable[..., tuple[Tensor, Tensor]]]  # op of `modeling/ops` with its options, for `recurrence`

    _behind: tuple[Tensor, dict[str, tuple[Tensor, Tensor]]] | None = None  # an input, and its unused `_projections`

    def projected(self, name: str, x: Tensor, layout: TokenLayout, cache: Cache | None) -> Tensor:
        """Applies `{name}_proj` and, if there is one, `{name}_conv1d` to `x [B*T, hidden]`; returns `[B, T, C]`."""
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
        """Computes all projections of `x` that will be convolved, and gets the tokens before them in one message.

        Returns, by name, the projection `[B, T, C]` and the tokens before it, for `short_conv`.
        """
        children = cast("Iterator[tuple[str, Any]]", self.named_children())
        sizes = {name.removesuffix("_conv1d"): conv.size for name, conv in children if name.endswith("_conv1d")}
        assert len(set(sizes.values())) == 1, f"convolutions of one input have one size, not {sizes}"
        pairs = tokens_before([self._projection(name, x, layout) for name in sizes], next(iter(sizes.values())) - 1)
        return dict(zip(sizes, pairs, strict=True))

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        """Computes `o [B, T, H, V]` and the final states from the inputs and the initial states (empty: zeros).

        States have the names of `state_shapes`. This method calls `op`, which has one state, `state [N, H, K, V]`; a
        mixer with other states, or with a choice of ops, overrides the method.
        """
        op = type(self).op  # read from the class, so that a function does not become a method
        o, state = op(**inputs, initial_state=states.get("state"), cu_seqlens=layout.cu_seqlens)
        return o, {"state": state}

    def mix(self, inputs: dict[str, Any], layout: TokenLayout, cache: Cache | None) -> Tensor:
        o, states = self.recurrence(inputs, layout, cache or {})
        if cache is not None:
            for name, state in states.items():
                if state is not cache[name]:
                    cache[name].copy_(state)
        return o
