"""What layers send where sequences are shared out, and how long that takes: the only home of these formulas.

docs/sequence_parallelism.md has them in words, tests/distributed/test_sequence_bytes.py holds them against the bytes
counted at the collectives. Beside this framework's ways of exchanging states there is another one to compare with,
`heads`: tokens of a layer's inputs are exchanged for heads before the recurrence, and back after it, as Megatron-Core
does with Mamba-2 and Ulysses (arXiv 2309.14509) with attention. What it sends grows with the tokens, and there are only
so many heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import RING_BLOCKS, PieceOrder, order_of, rank_tokens
from linear_moe.modeling.host import DTYPES
from linear_moe.plan.needs import CarriedState, SequenceNeeds, TokenKeys

if TYPE_CHECKING:
    from linear_moe.plan.network import Group

FP32 = 4  # bytes
STEP_SECONDS = 10e-6
"""Of one piece in the scan over all, and of one block that a ring passes on: the host launches its kernels."""


@dataclass(frozen=True)
class SequenceSplit:
    """How sequences are shared out.

    Attributes:
        rows: of a micro-batch.
        tokens: of a micro-batch on one rank.
        exchange: of states, one of STATES.
        attention: of keys and values, one of KEYS.
        number: bytes of a state's number on its way.
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
    """FLOPs per second of a rank, and of those together that share out its heads; bytes per second of its memory."""

    rate: float
    together: float
    bandwidth: float


@dataclass(frozen=True)
class Message:
    """What one exchange sends in one pass.

    Attributes:
        sent: bytes that a rank hands to collectives, the rank that sends most.
        received: bytes that a rank gets from others.
        seconds: it takes.
        beside: seconds of local work that goes on meanwhile.
        kept: what it brings is: a backward pass that computes activations again does not send it again.
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
"""Of the forward and of the backward pass."""


@cache
def hops(order: PieceOrder, forward: bool, rank: int | None = None) -> int:
    """From how many pieces `rank` (None: the one with most) sends the state to another rank, with states in a ring."""
    if rank is None:
        return max(hops(order, forward, rank) for rank in range(order.size))
    step = 1 if forward else -1
    onwards = (piece + step for piece in order.pieces(rank) if 0 <= piece + step < order.count)
    return sum(order.owner(piece)[0] != rank for piece in onwards)


def state_sent(state: CarriedState, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes that `rank` (None: the rank that sends most) hands to collectives, forward and backward."""
    size, pieces = split.number * split.rows, split.order.per_rank
    if split.exchange == "ring" or state.serial:
        forward, backward = (hops(split.order, direction, rank) for direction in (True, False))
        return size * state.numbers * forward, size * state.numbers * backward
    return size * pieces * (state.numbers + state.transition), size * pieces * state.numbers


@cache
def in_reach(order: PieceOrder, length: int, window: int, rank: int | None = None) -> tuple[int, int]:
    """Of a row in pieces of `length` tokens: how many tokens of `rank` others see, and how many of theirs it sees.

    None: the most of the first, the middle and the last rank.
    """
    if rank is None:
        found = [in_reach(order, length, window, rank) for rank in (0, order.size // 2, order.size - 1)]
        return max(given for given, _ in found), max(got for _, got in found)
    pieces, given, got = order.pieces(rank), 0, 0
    for piece in pieces:
        for away in range(1, 1 + -(-(window - 1) // length)):
            tokens = min(length, window - 1 - (away - 1) * length)
            given += tokens * (piece + away < order.count and piece + away not in pieces)
            got += tokens * (piece - away >= 0 and piece - away not in pieces)
    return given, got


def keys_in_reach(keys: TokenKeys, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """`in_reach` in bytes of a micro-batch."""
    length = split.tokens // split.rows // split.order.per_rank
    assert keys.window is not None
    given, got = in_reach(split.order, length, min(keys.window, length * split.order.count), rank)
    return given * split.rows * keys.size, got * split.rows * keys.size


def keys_sent(keys: TokenKeys, split: SequenceSplit, rank: int | None = None) -> tuple[int, int]:
    """Bytes that a rank hands to collectives, forward and backward.

    The backward pass gathers, or passes on, everything once more. A ring passes gradients on in fp32.
    """
    if split.attention == "all_gather" and keys.window is not None:
        given, got = keys_in_reach(keys, split, rank)
        return given, given + got
    own, others = split.tokens * keys.size, split.order.size - 1
    if split.attention == "ring":
        return own * others, (own + split.tokens * keys.numbers * FP32) * others
    return own, own + own * split.order.size


def heads_sent(needs: SequenceNeeds, split: SequenceSplit) -> tuple[int, int]:
    """Bytes that a rank hands to all-to-alls to share out a layer by heads: as many forward as backward."""
    ranks = split.order.size
    sizes = (size * max(1, -(-ranks // heads)) for heads, size in needs.inputs)  # of few heads, to all who use them
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
    ranks, (forward, backward) = split.order.size, state_sent(state, split)
    there = Message(forward, (ranks - 1) * forward, group.ring(ranks * forward), kept=True)
    return there, Message(backward, (ranks - 1) * backward, group.ring(ranks * backward), gap)


def _pass_states(state: CarriedState, split: SequenceSplit, group: Group, gap: float) -> Messages:
    """In blocks: once the last rank has got the first one, the others follow one by one; zigzag: there, then back."""
    block = split.number * split.rows * state.numbers / RING_BLOCKS
    inside, between = (group.hop(block, away) + STEP_SECONDS for away in (False, True))
    away = group.nodes - 1
    walk = (split.order.size - 1 - away) * inside + away * between
    turns = 1 if split.order.layout == "contiguous" else split.order.per_rank
    seconds = turns * (walk + (RING_BLOCKS - 1) * (between if away else inside))
    forward, backward = state_sent(state, split)
    there = Message(forward, forward, seconds, kept=not state.serial)
    return there, Message(backward, backward, seconds, gap)


def _gather_keys(keys: TokenKeys, split: SequenceSplit, group: Group, core: float) -> Messages:
    own, backward = keys_sent(keys, split)
    if keys.window is not None:
        given, got = keys_in_reach(keys, split)
        seconds = group.hop(max(given, got), group.nodes > 1)
        return Message(given, got, seconds), Message(given + got, given + got, 2 * seconds)
    others, seconds = own * (split.order.size - 1), group.ring(own * split.order.size)
    return Message(own, others, seconds), Message(backward, 2 * others, 2 * seconds)


def _pass_keys(keys: TokenKeys, split: SequenceSplit, group: Group, core: float) -> Messages:
    """While a rank's keys are attended to, the next one's come, and the gradients of those before leave."""
    ranks = split.order.size
    steps, away, share = ranks - 1, group.nodes > 1, (ranks - 1) / ranks
    forward, backward = keys_sent(keys, split)
    there = steps * group.hop(forward / steps, away)
    back = there + steps * group.hop((backward - forward) / steps, away)
    return Message(forward, forward, there, share * core), Message(backward, backward, back, share * 2 * core)


def _to_heads(needs: SequenceNeeds, split: SequenceSplit, group: Group) -> Messages:
    """Two all-to-alls a pass."""
    sent, _ = heads_sent(needs, split)
    back = needs.output * split.tokens
    received = sent * (split.order.size - 1) / split.order.size
    message = Message(sent, received, group.exchange(sent - back) + group.exchange(back))
    return message, message


STATES: dict[str, Callable[[CarriedState, SequenceSplit, Group, float], Messages]] = {
    "all_gather": _gather_states,
    "ring": _pass_states,
}
KEYS: dict[str, Callable[[TokenKeys, SequenceSplit, Group, float], Messages]] = {
    "all_gather": _gather_keys,
    "ring": _pass_keys,
}
HEADS = {"exchange": "heads", "attention": "ulysses"}  # of each kind, the name of the way by heads


@dataclass(frozen=True)
class LayerTraffic:
    """Of a layer and micro-batch, forward and backward.

    Attributes:
        local: seconds of work that there is only because sequences are shared out: summaries and scans.
        imbalance: the busiest rank's share of the recurrence, or of attention, over the mean.
    """

    messages: tuple[Messages, ...] = ()
    local: float = 0.0
    imbalance: float = 1.0

    def totals(self, of: str) -> tuple[float, float]:
        """Over all messages, of one of their numbers, forward and backward."""
        forward, backward = (sum(getattr(messages[i], of) for messages in self.messages) for i in range(2))
        return forward, backward

    def cost(self, again: bool = False) -> float:
        """Seconds that nothing hides; `again`: the backward pass computes the layer again."""
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
    """Of one layer.

    Args:
        group: of the ranks that share out a sequence.
        core: FLOPs of the recurrence, or of attention, per token of sequences so long (`Mixer.recurrence_flops`).
        length: of the sequences.
    """
    if split.order.count == 1:
        return LayerTraffic()
    if by_heads(needs, split):
        return LayerTraffic((_to_heads(needs, split, group),))
    if split.order.size == 1:
        return LayerTraffic(local=sum(local_seconds(state, split, speed) for state in needs.states))
    attend, gap = split.tokens * core(length) / speed.together, split.tokens * needs.gap / speed.rate
    messages = [KEYS[split.attention](keys, split, group, attend) for keys in needs.keys]
    messages += [STATES["ring" if state.serial else split.exchange](state, split, group, gap) for state in needs.states]
    local = sum(local_seconds(state, split, speed) for state in needs.states)
    if any(state.serial for state in needs.states):
        local += 3 * attend * (split.order.size - 1)  # all others' turns
    return LayerTraffic(tuple(messages), local, imbalance(core, length, split.order))


def local_seconds(state: CarriedState, split: SequenceSplit, speed: Speed) -> float:
    """Of the summary, by its FLOPs or by reading its inputs, in the backward pass twice, whichever takes longer; and of
    the scan."""
    forward, backward = (flops / speed.rate for flops in state.flops)
    read = state.inputs / speed.bandwidth
    summary = split.tokens * (max(forward, read) + max(backward, 2 * read))
    scan = 0.0
    if split.exchange == "all_gather" and not state.serial:  # a ring's is between its messages
        everyones = FP32 * split.rows * split.order.count * (state.numbers + state.transition)
        scan = split.order.count * STEP_SECONDS + everyones / speed.bandwidth
    return summary + 2 * scan


def kept_bytes(needs: SequenceNeeds, split: SequenceSplit) -> float:
    """What a layer's exchanges keep for the backward pass: the states before a rank's pieces, and transitions, with
    `all_gather` of all pieces behind its first one."""
    pieces = split.order.per_rank
    behind = pieces if split.exchange == "ring" else split.order.count - 1
    numbers = sum(pieces * state.numbers + behind * state.transition for state in needs.states)
    return float(FP32 * split.rows * numbers) if split.order.count > 1 else 0.0


def imbalance(core: Callable[[int], float], length: int, order: PieceOrder) -> float:
    """The busiest rank's FLOPs over the mean, if those of a sequence's first n tokens are n * core(n)."""
    edges = [length * i / order.count for i in range(order.count + 1)]
    until = [n * core(round(n)) if n else 0.0 for n in edges]
    shares = (sum(until[i + 1] - until[i] for i in order.pieces(rank)) for rank in range(order.size))
    return max(shares) * order.size / until[-1] if until[-1] else 1.0
