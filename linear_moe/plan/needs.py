"""What a mixer asks of the other ranks of its sequences, found by running it without contents (on the meta device).

No mixer declares this: whatever asks for the pieces of a sequence (`ops.sequence.Pieces`) is seen here with its shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.ops.sequence import FromState, pieces_of
from linear_moe.modeling.tokens import TokenLayout

TOKENS = 128  # of the row that is run; a whole number of any recurrence's chunks


@dataclass(frozen=True)
class CarriedState:
    """A state that goes from piece to piece.

    Attributes:
        numbers: of a row's state, a complex one counted as two.
        transition: of what a piece does to it, likewise; 0 where nothing outlasts a piece.
        flops: of a token's part in the summary, matrix products, in the forward pass and in the backward pass.
        inputs: bytes of a token that the summary reads.
        serial: known only after the piece before has been computed, so that ranks work one after the other.
    """

    numbers: int
    transition: int
    flops: tuple[float, float]
    inputs: float
    serial: bool = False


@dataclass(frozen=True)
class TokenKeys:
    """Of a token, what softmax attention makes keys and values of, for later tokens to see.

    Attributes:
        numbers, size: so many, in so many bytes.
        window: tokens that see it, itself included; None: all later ones.
    """

    numbers: int
    size: int
    window: int | None = None


@dataclass(frozen=True)
class SequenceNeeds:
    """Of one layer, on one tensor rank.

    Attributes:
        heads: by which the recurrence, or attention, can be shared out instead of by tokens.
        inputs: of what it is computed from, (heads, bytes of a token); each of fewer heads is used by several.
        output: bytes of a token of its output.
        gap: FLOPs of a token in the output projection: the gradient of its weight is computed while the gradients of
            states travel (`modeling/later.py`).
    """

    states: tuple[CarriedState, ...]
    keys: tuple[TokenKeys, ...]
    heads: int
    inputs: tuple[tuple[int, int], ...]
    output: int
    gap: float


class _Recorder:
    """See `ops.sequence.Pieces`: notes what it is asked for; whole sequences of its own are all that it gives."""

    sequences, packed = 1, False

    def __init__(self, tokens: int) -> None:
        self.length = self.tokens = tokens
        self.states_: list[CarriedState] = []
        self.keys_: list[TokenKeys] = []
        self.attended: list[Tensor] = []  # queries, keys and values

    @property
    def numbers(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device="meta")

    def states(self, summary: Callable[..., Any], *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        (transition, state), flops = self._counted(summary, *inputs)
        self._note(transition, state, (flops, 2 * flops), inputs)
        return state

    def through(
        self, run: FromState, summary: tuple[Any, ...], gradient: tuple[Any, ...], matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        (transition, state), flops = self._counted(*summary)
        outputs = run(state)
        _, back = self._counted(*gradient, outputs[0])
        self._note(transition, state, (flops, back), summary[1:])
        return outputs

    def carry(
        self,
        run: Callable[..., Any],
        inputs: Sequence[Tensor],
        start: Tensor,
        shared: Sequence[Tensor],
        count: int,
        summary: Callable[..., Any] | None = None,
    ) -> Tensor:
        outputs, state = run(inputs, start, None, 0, None, *shared)
        if summary is None:
            self._note(None, state, (0.0, 0.0), inputs, serial=True)
        else:
            (transition, _), flops = self._counted(summary, *inputs, skip=0)
            self._note(transition, state, (flops, 2 * flops), inputs)
        found: Tensor = outputs
        return found

    def all_tokens(self, x: Tensor) -> Tensor:
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        return x

    def _counted(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, float]:
        """What it gives, and FLOPs per token of its matrix products."""
        with FlopCounterMode(display=False) as counter:
            found = function(*inputs, **options)
        return found, counter.get_total_flops() / self.length

    def _note(
        self,
        transition: Tensor | None,
        state: Tensor,
        flops: tuple[float, float],
        inputs: Sequence[Tensor | None],
        serial: bool = False,
    ) -> None:
        read = sum(_bytes(x) for x in inputs if x is not None) / self.length
        does = 0 if transition is None else _numbers(transition)
        self.states_.append(CarriedState(_numbers(state), does, flops, read, serial))

    def attention(
        self,
        q: Tensor,
        shared: tuple[Tensor, ...],
        expand: Callable[..., tuple[Tensor, Tensor]],
        parameters: Sequence[Tensor],
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        k, v = expand(*shared)
        self.attended += [q, k, v]
        numbers, size = (sum(of(x) for x in shared) // self.length for of in (_numbers, _bytes))
        self.keys_.append(TokenKeys(numbers, size, window))
        return q.new_empty(*q.shape[:3], v.shape[-1])


def layer_needs(layers: Mapping[int, Any]) -> dict[int, SequenceNeeds]:
    """Of `Layer`s on the meta device, by number, in the model's order; layers alike are run once."""
    shared: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], SequenceNeeds] = {}
    found = {}
    for number, layer in layers.items():
        mixer = layer.mixer
        key = repr(mixer.config), tuple(p.shape for p in mixer.parameters()), *sorted(shared)
        if key not in known:
            known[key] = mixer_needs(mixer, shared)
        found[number] = known[key]
    return found


def mixer_needs(mixer: Mixer, shared: dict[str, Tensor] | None = None, tokens: int = TOKENS) -> SequenceNeeds:
    """Of one mixer on the meta device.

    Args:
        shared: what layers before have left (`TokenLayout.shared`); it leaves its own there.
        tokens: of a piece; only of very short ones does it matter.
    """
    recorder, dtype = _Recorder(tokens), mixer.host.dtype
    positions = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    layout = TokenLayout(1, tokens, positions=positions, shared={} if shared is None else shared, pieces=recorder)
    x = torch.empty(tokens, mixer.dims.hidden_size, dtype=dtype, device="meta")
    with torch.no_grad(), pieces_of(recorder):
        inputs, _ = mixer.project(x, layout, None)
        output = mixer.mix(inputs, layout, None)
    heads = output.shape[2]
    tensors = recorder.attended or [x for x in inputs.values() if isinstance(x, Tensor)]
    by_token = (x for x in tensors if x.ndim > 2 and x.shape[1] == tokens)
    shares = tuple((_heads(x, heads), _bytes(x) // tokens) for x in by_token)
    gap = sum(2.0 * m.weight.numel() for m in mixer.modules() if isinstance(m, Linear) and m.split == "row")
    return SequenceNeeds(tuple(recorder.states_), tuple(recorder.keys_), heads, shares, _bytes(output) // tokens, gap)


def _heads(x: Tensor, heads: int) -> int:
    """By which an input `[B, T, ..., H, ...]` or `[B, T, C]` splits; 1: every head uses all of it."""
    return heads if heads in x.shape[2:] else x.shape[2] if x.ndim > 3 else 1


def _numbers(x: Tensor) -> int:
    return math.prod(x.shape) * (2 if x.is_complex() else 1)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
