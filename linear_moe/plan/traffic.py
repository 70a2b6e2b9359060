"""Bytes and seconds of the messages between ranks that share out sequences: the only home of these formulas.

docs/sequence_parallelism.md explains the formulas in words; tests/distributed/test_sequence_bytes.py compares them with
the bytes counted at the collectives. To compare with this framework's ways of exchanging recurrent states, there is
also `heads`, which the framework does not have: an all-to-all turns a share of a layer's tokens into a share of its
heads before the recurrence, and another one turns them back after it. Megatron-Core does so with Mamba-2, and Ulysses
(arXiv 2309.14509) with attention. The bytes of `heads` grow with the tokens, and it needs as many heads as ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from linear_moe.config.schema import Config
from linear_moe.config.strategies import AttentionStrategy, SequenceLayout, StateExchangeStrategy
from linear_moe.layout.sequence import RING_BLOCKS, PieceOrder, order_of, rank_tokens
from linear_moe.modeling.host import DTYPES
from linear_moe.plan.needs import CarriedState, SequenceNeeds, TokenKeys

if TYPE_CHECKING:
    from linear_moe.plan.network import Group

FP32 = 4  # bytes
STEP_SECONDS = 10e-6
"""Seconds in which the host launches the kernels of one piece in the scan over pieces, or of one block of a ring."""


@dataclass(frozen=True)
class SequenceSplit:
    """Division of a micro-batch's sequences into pieces on several ranks, and the ways of their exchanges.

    Attributes:
        order: which rank holds which pieces.
        rows: rows of a micro-batch.
        tokens: tokens of a micro-batch on one rank.
        exchange: way of exchanging recurrent states: one of STATES, or heads.
        attention: way of exchanging keys and values: one of KEYS, or ulysses.
        number: bytes of one number of a state while the state travels.
    """

    order: PieceOrder
    rows: int
    tokens: int
    exchange: str
    attention: str
    number: int = FP32

    @classmethod
    def of(cls, config: Config) -> SequenceSplit:
        parallel, rows = config.parallel, config.training.micro_batch
        number = DTYPES[parallel.sequence_dtype].itemsize
        ways = parallel.sequence_exchange, parallel.sequence_attention
        return cls(order_of(parallel), rows, rank_tokens(config), *ways, number)


@dataclass(frozen=True)
class Speed:
    """Speed of a rank.

    Attributes:
        rate: FLOPs per second of the rank alone.
        together: FLOPs per second of all tensor ranks that share out the heads.
        bandwidth: bytes per second of the rank's memory.
    """

    rate: float
    together: float
    bandwidth: float


@dataclass(frozen=True)
class Message:
    """One exchange of a layer in one pass, forward or backward.

    Attributes:
        sent: bytes handed to collectives by the rank that sends most.
        received: bytes that a rank gets from others.
        seconds: duration of the exchange.
        beside: seconds of local work that goes on meanwhile.
        kept: whether the received tensors are kept, so that a backward pass that computes activations again does not
            repeat the exchange.
    """

    sent: float
    received: float
    seconds: float
    beside: float = 0.0
    kept: bool = False

    @property
    def hidden(self) -> float:
        return min(self.seconds, self.beside)

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden


Messages = tuple[Message, Message]
"""Messages of one exchange in the forward pass and in the backward pass."""


@cache
def hops(order: PieceOrder, forward: bool, rank: int | None = None) -> int:
    """Number of pieces after which `rank` must send the state to another rank, if states go from piece to piece.

    `rank` None: the most of any rank.
    """
    if rank is None:
        return max(hops(order, forward, rank) for rank in range(order.size))
    step = 1 if forward else -1
    onwards = (piece + step for piece in order.pieces(rank) if 0 <= piece + step < order.count)
    return sum(order.owner(piece)[0] != rank for piece in onwards)


def state_sent(state: CarriedState, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes of a state that `rank` (None: the rank that sends most) hands to collectives, forward and backward."""
    size, pieces = split.number * split.rows, split.order.per_rank
    if split.exchange == StateExchangeStrategy.RING or state.serial:
        forward, backward = (hops(split.order, direction, rank) for direction in (True, False))
        return size * state.numbers * forward, size * state.numbers * backward
    return size * pieces * (state.numbers + state.transition), size * pieces * state.numbers


@cache
def in_reach(order: PieceOrder, length: int, window: int, rank: int | None = None) -> tuple[int, int]:
    """Counts tokens of one row that cross ranks in attention with a window, if pieces have `length` tokens.

    Returns the tokens of `rank` that other ranks attend to, and the tokens of other ranks that `rank` attends to. With
    `rank` None, each is the largest of the first, the middle and the last rank.
    """
    if rank is None:
        counts = [in_reach(order, length, window, rank) for rank in (0, order.size // 2, order.size - 1)]
        return max(given for given, _ in counts), max(got for _, got in counts)
    pieces, given, got = order.pieces(rank), 0, 0
    for piece in pieces:
        for away in range(1, 1 + -(-(window - 1) // length)):
            tokens = min(length, window - 1 - (away - 1) * length)
            given += tokens * (piece + away < order.count and piece + away not in pieces)
            got += tokens * (piece - away >= 0 and piece - away not in pieces)
    return given, got


def keys_in_reach(keys: TokenKeys, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes of keys and values in a micro-batch that `rank` gives to others, and gets from them (see `in_reach`)."""
    length = split.tokens // split.rows // split.order.per_rank
    assert keys.window is not None
    given, got = in_reach(split.order, length, min(keys.window, length * split.order.count), rank)
    return given * split.rows * keys.size, got * split.rows * keys.size


def keys_sent(keys: TokenKeys, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes of keys and values that `rank` hands to collectives, forward and backward.

    The backward pass gathers, or passes on, all keys and values once more. A ring passes their gradients on in fp32.
    """
    if split.attention == AttentionStrategy.ALL_GATHER and keys.window is not None:
        given, got = keys_in_reach(keys, split, rank)
        return given, given + got
    own, others = split.tokens * keys.size, split.order.size - 1
    if split.attention == AttentionStrategy.RING:
        return own * others, (own + split.tokens * keys.numbers * FP32) * others
    return own, own + own * split.order.size


def heads_sent(needs: SequenceNeeds, split: SequenceSplit) -> tuple[int, int]:
    """Bytes that a rank hands to all-to-alls to share out a layer by heads, forward and backward: equally many."""
    ranks = split.order.size
    sizes = (size * max(1, -(-ranks // heads)) for heads, size in needs.inputs)  # a head can go to several ranks
    sent = split.tokens * (sum(sizes) + needs.output)
    return sent, sent


def layer_sent(needs: SequenceNeeds, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes of a layer that `rank` (None: the rank that sends most) hands to collectives, forward and backward."""
    if by_heads(needs, split):
        return heads_sent(needs, split)
    messages = [state_sent(state, split, rank) for state in needs.states]
    messages += [keys_sent(keys, split, rank) for keys in needs.keys]
    forward, backward = (sum(message[i] for message in messages) for i in range(2))
    return forward, backward


def by_heads(needs: SequenceNeeds, split: SequenceSplit) -> bool:
    """Whether the layer is shared out by heads."""
    kind = "attention" if needs.keys else "exchange"
    return getattr(split, kind) == HEADS[kind]


def _gather_states(state: CarriedState, split: SequenceSplit, group: Group, gap: float) -> Messages:
    """Messages of an all-gather of the summaries of all pieces; `gap`: seconds of work beside the backward one."""
    ranks, (forward, backward) = split.order.size, state_sent(state, split)
    there = Message(forward, (ranks - 1) * forward, group.ring(ranks * forward), kept=True)
    return there, Message(backward, (ranks - 1) * backward, group.ring(ranks * backward), gap)


def _pass_states(state: CarriedState, split: SequenceSplit, group: Group, gap: float) -> Messages:
    """Messages of a ring that passes a state on in blocks.

    The first block walks from the first to the last rank, and the other blocks arrive one by one behind it. In zigzag
    the state walks along the ranks once for every piece of a rank, there and back.
    """
    block = split.number * split.rows * state.numbers / RING_BLOCKS
    inside, between = (group.hop(block, away) + STEP_SECONDS for away in (False, True))
    away = group.nodes - 1
    walk = (split.order.size - 1 - away) * inside + away * between
    turns = 1 if split.order.layout == SequenceLayout.CONTIGUOUS else split.order.per_rank
    seconds = turns * (walk + (RING_BLOCKS - 1) * (between if away else inside))
    forward, backward = state_sent(state, split)
    there = Message(forward, forward, seconds, kept=not state.serial)
    return there, Message(backward, backward, seconds, gap)


def _gather_keys(keys: TokenKeys, split: SequenceSplit, group: Group, core: float) -> Messages:
    """Messages of an all-gather of keys and values or, with a window, of sending them only to ranks in reach."""
    own, backward = keys_sent(keys, split)
    if keys.window is not None:
        given, got = keys_in_reach(keys, split)
        seconds = group.hop(max(given, got), group.nodes > 1)
        return Message(given, got, seconds), Message(given + got, given + got, 2 * seconds)
    others, seconds = own * (split.order.size - 1), group.ring(own * split.order.size)
    return Message(own, others, seconds), Message(backward, 2 * others, 2 * seconds)


def _pass_keys(keys: TokenKeys, split: SequenceSplit, group: Group, core: float) -> Messages:
    """Messages of a ring of keys and values, which overlap with attention.

    While a rank attends to one block of keys, the next block arrives and the gradient of the previous one leaves.
    """
    ranks = split.order.size
    steps, away, share = ranks - 1, group.nodes > 1, (ranks - 1) / ranks
    forward, backward = keys_sent(keys, split)
    there = steps * group.hop(forward / steps, away)
    back = there + steps * group.hop((backward - forward) / steps, away)
    return Message(forward, forward, there, share * core), Message(backward, backward, back, share * 2 * core)


def _to_heads(needs: SequenceNeeds, split: SequenceSplit, group: Group) -> Messages:
    """Messages of a layer shared out by heads: two all-to-alls a pass, before the recurrence or attention and after."""
    sent, _ = heads_sent(needs, split)
    back = needs.output * split.tokens
    received = sent * (split.order.size - 1) / split.order.size
    message = Message(sent, received, group.exchange(sent - back) + group.exchange(back))
    return message, message


STATES: dict[str, Callable[[CarriedState, SequenceSplit, Group, float], Messages]] = {
    StateExchangeStrategy.ALL_GATHER.value: _gather_states,
    StateExchangeStrategy.RING.value: _pass_states,
}
KEYS: dict[str, Callable[[TokenKeys, SequenceSplit, Group, float], Messages]] = {
    AttentionStrategy.ALL_GATHER.value: _gather_keys,
    AttentionStrategy.RING.value: _pass_keys,
}
HEADS = {"exchange": "heads", "attention": AttentionStrategy.ULYSSES.value}
"""Fields of SequenceSplit, and their values for sharing out by heads."""


@dataclass(frozen=True)
class LayerTraffic:
    """Exchanges of one layer between the ranks of a sequence, for one micro-batch, forward and backward.

    Attributes:
        local: seconds of the local work that only sharing out sequences makes necessary: summaries and scans.
        imbalance: the busiest rank's FLOPs of the recurrence, or of attention, over the mean of all ranks.
    """

    messages: tuple[Messages, ...] = ()
    local: float = 0.0
    imbalance: float = 1.0

    def totals(self, of: str) -> tuple[float, float]:
        """Sums the attribute of Message that is called `of` over all messages, forward and backward."""
        forward, backward = (sum(getattr(messages[i], of) for messages in self.messages) for i in range(2))
        return forward, backward

    def cost(self, again: bool = False) -> float:
        """Seconds that the exchanges add to the layer: local work, and messages that local work does not hide.

        With `again`, the backward pass computes the layer again, and repeats messages whose results are not kept.
        """
        repeated = sum(there.exposed for there, _ in self.messages if not there.kept) if again else 0.0
        return self.local + sum(self.totals("exposed")) + repeated


def layer_exchange(
    needs: SequenceNeeds,
    split: SequenceSplit,
    group: Group,
    core: Callable[[int], float],
    length: int,
    speed: Speed,
) -> LayerTraffic:
    """Returns the exchanges of one layer.

    Args:
        group: ranks that share out a sequence.
        core: `core(length)` is the FLOPs per token of the recurrence or attention (`Mixer.recurrence_flops`).
        length: tokens of a sequence.
    """
    if split.order.count == 1:
        return LayerTraffic()
    if by_heads(needs, split):
        return LayerTraffic((_to_heads(needs, split, group),))
    if split.order.size == 1:
        return LayerTraffic(local=sum(local_seconds(state, split, speed) for state in needs.states))
    attend, gap = split.tokens * core(length) / speed.together, split.tokens * needs.gap / speed.rate
    messages = [KEYS[split.attention](keys, split, group, attend) for keys in needs.keys]
    ways = (StateExchangeStrategy.RING.value if state.serial else split.exchange for state in needs.states)
    messages += [STATES[way](state, split, group, gap) for way, state in zip(ways, needs.states, strict=True)]
    local = sum(local_seconds(state, split, speed) for state in needs.states)
    if any(state.serial for state in needs.states):
        local += 3 * attend * (split.order.size - 1)  # a rank waits while each other one computes
    return LayerTraffic(tuple(messages), local, imbalance(core, length, split.order))


def local_seconds(state: CarriedState, split: SequenceSplit, speed: Speed) -> float:
    """Seconds of the summary of a rank's pieces and of the scan over all pieces, forward and backward.

    A summary takes the time of its FLOPs or of reading its inputs (twice in the backward pass), whichever is longer.
    """
    forward, backward = (flops / speed.rate for flops in state.flops)
    read = state.inputs / speed.bandwidth
    summary = split.tokens * (max(forward, read) + max(backward, 2 * read))
    scan = 0.0
    if split.exchange == StateExchangeStrategy.ALL_GATHER and not state.serial:  # a ring scans between its messages
        everyones = FP32 * split.rows * split.order.count * (state.numbers + state.transition)
        scan = split.order.count * STEP_SECONDS + everyones / speed.bandwidth
    return summary + 2 * scan


def kept_bytes(needs: SequenceNeeds, split: SequenceSplit) -> float:
    """Bytes that a layer's exchanges keep for the backward pass: states before the rank's pieces, and transitions.

    A ring keeps the transitions of the rank's own pieces, `all_gather` those of all pieces behind the rank's first one.
    """
    pieces = split.order.per_rank
    behind = pieces if split.exchange == StateExchangeStrategy.RING else split.order.count - 1
    numbers = sum(pieces * state.numbers + behind * state.transition for state in needs.states)
    return float(FP32 * split.rows * numbers) if split.order.count > 1 else 0.0


def imbalance(core: Callable[[int], float], length: int, order: PieceOrder) -> float:
    """FLOPs of the busiest rank over the mean, if the first n tokens of a sequence take n * core(n) FLOPs together."""
    edges = [length * i / order.count for i in range(order.count + 1)]
    until = [n * core(round(n)) if n else 0.0 for n in edges]
    shares = (sum(until[i + 1] - until[i] for i in order.pieces(rank)) for rank in range(order.size))
    return max(shares) * order.size / until[-1] if until[-1] else 1.0
