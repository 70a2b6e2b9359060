"""Exchanges that a mixer needs between the ranks of a sequence, measured by running it on the meta device.

Mixers do not declare their exchanges. A recorder takes the place of the pieces of a sequence (`ops.sequence.Pieces`)
and notes the shapes of all tensors that ops hand to it.
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

TOKENS = 128  # length of the row that is run: a whole number of chunks for every recurrence


@dataclass(frozen=True)
class CarriedState:
    """Recurrent state of a mixer that is carried from piece to piece of a sequence.

    Attributes:
        numbers: real numbers in the state of one row; a complex number counts as two.
        transition: real numbers in the transition of one row's piece; 0 if a piece leaves nothing of the state before.
        flops: FLOPs per token of the matrix products of a piece's summary, in the forward and in the backward pass.
        inputs: bytes per token of the tensors from which the summary is computed.
        serial: whether a piece needs the state that the piece before has computed, so that ranks work one after the
            other.
    """

    numbers: int
    transition: int
    flops: tuple[float, float]
    inputs: float
    serial: bool = False


@dataclass(frozen=True)
class TokenKeys:
    """Tensors from which softmax attention makes the key and value of a token, and which ranks therefore exchange.

    Attributes:
        numbers: elements per token.
        size: bytes per token.
        window: number of tokens that attend to a token, itself included; None: all later tokens.
    """

    numbers: int
    size: int
    window: int | None = None


@dataclass(frozen=True)
class SequenceNeeds:
    """Exchanges that one layer needs between the ranks of a sequence, with the sizes of one tensor rank.

    Attributes:
        states: recurrent states that are carried from piece to piece.
        keys: tensors of keys and values, one entry for every call of softmax attention.
        heads: heads of the recurrence or attention; ranks could share out heads instead of tokens.
        inputs: (heads, bytes per token) of every input of the recurrence or attention; one head of an input that has
            fewer than `heads` is used by several heads.
        output: bytes per token of the output of the recurrence or attention.
        gap: FLOPs per token of the weight gradient of the output projection, which is computed while the gradients of
            states travel (`modeling/deferred.py`).
    """

    states: tuple[CarriedState, ...]
    keys: tuple[TokenKeys, ...]
    heads: int
    inputs: tuple[tuple[int, int], ...]
    output: int
    gap: float


class _Recorder:
    """Stand-in for `ops.sequence.Pieces` that notes every call, and answers as if the local row were the sequence."""

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
        local: Tensor = outputs
        return local

    def all_tokens(self, x: Tensor) -> Tensor:
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        return x

    def _counted(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, float]:
        """Calls `function`; returns its value, and the FLOPs per token of its matrix products."""
        with FlopCounterMode(display=False) as counter:
            value = function(*inputs, **options)
        return value, counter.get_total_flops() / self.length

    def _note(
        self,
        transition: Tensor | None,
        state: Tensor,
        flops: tuple[float, float],
        inputs: Sequence[Tensor | None],
        serial: bool = False,
    ) -> None:
        read = sum(_bytes(x) for x in inputs if x is not None) / self.length
        size = 0 if transition is None else _numbers(transition)
        self.states_.append(CarriedState(_numbers(state), size, flops, read, serial))

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
        numbers, size = (sum(measure(x) for x in shared) // self.length for measure in (_numbers, _bytes))
        self.keys_.append(TokenKeys(numbers, size, window))
        return q.new_empty(*q.shape[:3], v.shape[-1])


def layer_needs(layers: Mapping[int, Any]) -> dict[int, SequenceNeeds]:
    """Returns the needs of `Layer`s on the meta device by layer number; of layers that are alike, one is run.

    `layers` must be in the model's order: earlier layers leave tensors for later ones.
    """
    shared: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], SequenceNeeds] = {}
    needs = {}
    for number, layer in layers.items():
        mixer = layer.mixer
        key = repr(mixer.config), tuple(p.shape for p in mixer.parameters()), *sorted(shared)
        if key not in known:
            known[key] = mixer_needs(mixer, shared)
        needs[number] = known[key]
    return needs


def mixer_needs(mixer: Mixer, shared: dict[str, Tensor] | None = None, tokens: int = TOKENS) -> SequenceNeeds:
    """Runs one mixer on the meta device and returns what it needs of the other ranks of its sequences.

    Args:
        shared: tensors that earlier layers have left for this one (`TokenLayout.shared`); the mixer adds its own.
        tokens: length of the piece that is run; the result depends on the length only where it is very short.
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
    """Number of heads in an input `[B, T, ..., H, ...]` or `[B, T, C]`; 1 if every head uses the whole input."""
    return heads if heads in x.shape[2:] else x.shape[2] if x.ndim > 3 else 1


def _numbers(x: Tensor) -> int:
    return math.prod(x.shape) * (2 if x.is_complex() else 1)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
