"""Functions that the ranks run in the tests of the exchange of states, and the expected states of one process."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.activations import Activations
from linear_moe.training.sequence import exchange
from linear_moe.training.sequence.exchange import SequenceGroup, StateExchange

ROWS = 2
STATE = (3, 6, 8)  # H, K, V
TRANSITIONS: dict[str, tuple[int, ...]] = {
    "none": (0,),
    "head": (3, 1, 1),
    "slow": (3, 1, 1),
    "key": (3, 6, 1),
    "value": (3, 1, 8),
    "both": (3, 6, 8),
    "complex": (3, 6, 1),
    "matrix": (3, 6, 6),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def summaries(kind: str, pieces: int, seed: int = 0) -> tuple[Tensor | None, Tensor, Tensor]:
    """Random transitions and states `[pieces, ROWS, ...]`, and gradients of the states before the pieces.

    One of the transitions is 0.
    """
    random = torch.Generator().manual_seed(seed)
    dtype = torch.complex64 if kind == "complex" else torch.float32
    if kind == "none":
        states, gradients = (torch.randn(pieces, ROWS, *STATE, generator=random) for _ in range(2))
        return None, states, gradients
    transitions = torch.randn(pieces, ROWS, *TRANSITIONS[kind], generator=random, dtype=dtype)
    transitions = transitions * (0.4 if kind == "matrix" else 0.9 / transitions.abs().clamp(min=1.0))
    transitions[pieces // 2, 0] = 0
    if kind == "slow":  # a decay that rounds to 1 in bf16
        transitions = torch.full_like(transitions, 0.9981)
    states, gradients = (torch.randn(pieces, ROWS, *STATE, generator=random, dtype=dtype) for _ in range(2))
    return transitions, states, gradients


def expected(kind: str, pieces: int, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """States before all pieces, and gradients of transitions and states, by autograd through a loop over pieces."""
    transitions, states, gradients = summaries(kind, pieces, seed)
    if transitions is None:
        zero = torch.zeros_like(states[:1])
        return torch.cat([zero, states[:-1]]), None, torch.cat([gradients[1:], zero])
    transitions.requires_grad_(), states.requires_grad_()
    states_before = [torch.zeros_like(states[0])]
    for a, e in zip(transitions[:-1], states[:-1], strict=True):
        states_before.append((a @ states_before[-1] if kind == "matrix" else a * states_before[-1]) + e)
    before = torch.stack(states_before)
    before.backward(gradients)
    return before.detach(), transitions.grad, states.grad  # type: ignore[return-value]


def own(x: Tensor, line: SequenceGroup) -> Tensor:
    """Segments `[S, ...]` of this rank, cut out of `x [pieces, ROWS, ...]`."""
    return x[list(line.order.pieces(line.rank))].transpose(0, 1).flatten(0, 1)


Group = dist.ProcessGroup | None


def order_of(size: int, layout: str) -> PieceOrder:
    """The order of pieces that a layout names: `contiguous`, or `contiguous*3` with three pieces a rank."""
    name, _, each = layout.partition("*")
    return PieceOrder(size, name, int(each) if each else None)


def line_of(group: Group, layout: str, strategy: str, dtype: str = "fp32") -> SequenceGroup:
    order, group = order_of(dist.get_world_size(), layout), group or dist.group.WORLD
    return SequenceGroup(order, dist.get_rank(), group, strategy, dtype=DTYPES[dtype])


def exchange_states(
    kind: str, layout: str, strategy: str, dtype: str, group: Group = None, device: str = "cpu"
) -> dict[str, Any]:
    """Runs the forward and backward pass of one exchange.

    Returns:
        the states before this rank's segments, the gradients of transitions and states, the bytes sent (forward,
        backward), and the number of elements kept for the backward pass.
    """
    line = line_of(group, layout, strategy, dtype)
    given = (None if x is None else own(x, line).to(device) for x in summaries(kind, line.order.count))
    transition, state, gradient = given
    assert state is not None
    for x in (transition, state):
        if x is not None:
            x.requires_grad_()
    sent = [0]
    one = StateExchange(line, kind == "matrix")

    def counting(function: Any, place: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            sent[-1] += args[place].numel() * args[place].element_size()
            return function(*args, **options)

        return call

    with ExitStack() as stack:
        for name, place in {"all_gather_into_tensor": 1, "isend": 0}.items():
            stack.enter_context(mock.patch.object(exchange.dist, name, counting(getattr(dist, name), place)))
        before = one.begin(transition, state)()
        kept = sum(x.numel() for x in (one.before, one.kept) if x is not None)
        sent.append(0)
        before.backward(gradient)
    d_transition = None if transition is None else transition.grad
    tensors = {"before": before.detach(), "transition": d_transition, "state": state.grad}
    result = {name: x.cpu() for name, x in tensors.items() if x is not None}
    return result | {"sent": tuple(sent), "kept": kept}


KINDS = list(TRANSITIONS)


def many_exchanges(
    layout: str, again: bool, group: Group = None, device: str = "cpu"
) -> list[tuple[Tensor | None, ...]]:
    """Runs exchanges of all kinds and both strategies at once, on ranks that reach them at different times.

    Args:
        again: whether the forward pass is computed again in the backward pass.

    Returns:
        states before this rank's segments, and gradients of transitions and states, for every kind.
    """
    random = Random(dist.get_rank())
    lines = [line_of(group, layout, strategy) for strategy in exchange.STRATEGIES]
    leaves: list[Tensor | None] = []
    for seed, kind in enumerate(KINDS):
        given = summaries(kind, lines[0].order.count, seed)[:2]
        leaves += [None if x is None else own(x, lines[0]).to(device).requires_grad_() for x in given]
    waits = list(range(len(KINDS)))
    Random(0).shuffle(waits)  # a random order, but one and the same on all ranks

    def forward(*leaves: Any) -> Any:
        begun = []
        for n, kind in enumerate(KINDS):
            time.sleep(random.random() * 0.02)
            one = activations.once(partial(StateExchange, lines[n % 2], kind == "matrix"))
            begun.append(one.begin(*leaves[2 * n : 2 * n + 2]))
        arrived = {}
        for n in waits:
            time.sleep(random.random() * 0.02)
            arrived[n] = _Late.apply(begun[n](), random)
        return tuple(arrived[n] for n in range(len(KINDS)))

    activations = Activations(("layer",) if again else ())
    befores = activations.layer(0, forward, *leaves)
    losses = []
    for seed, (kind, before) in enumerate(zip(KINDS, befores, strict=True)):
        gradient = own(summaries(kind, lines[0].order.count, seed)[2], lines[0]).to(device)
        losses.append((before * gradient.conj()).real.sum())
    torch.stack(losses).sum().backward()
    gradients = [None if x is None else x.grad for x in leaves]
    triples = [(b.detach(), *gradients[2 * n : 2 * n + 2]) for n, b in enumerate(befores)]
    return [tuple(None if x is None else x.cpu() for x in three) for three in triples]


def exchanges_on_gpus(
    states: dict[str, tuple[str, str, str, str]], many: dict[str, tuple[str, bool]]
) -> dict[str, Any]:
    """Results of `exchange_states` and `many_exchanges` with these arguments, on one GPU per rank."""
    device = f"cuda:{dist.get_rank()}"
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl")
    results: dict[str, Any] = {name: exchange_states(*case, group, device) for name, case in states.items()}
    return results | {name: many_exchanges(*case, group, device) for name, case in many.items()}


class _Late(torch.autograd.Function):
    """Returns x, and delays its gradient. It saves x, so that recomputation has something to do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, random: Random) -> Tensor:  # type: ignore[override]
        ctx.random = random
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        assert ctx.saved_tensors[0].shape == gradient.shape
        time.sleep(ctx.random.random() * 0.02)
        return gradient, None
