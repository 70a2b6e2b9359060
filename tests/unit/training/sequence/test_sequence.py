"""Sequence parallelism without processes: cuts of sequences, summaries of pieces, and messages of the ring."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from linear_moe.checks.fields import validate_fields
from linear_moe.config.schema import Config
from linear_moe.layout.processes import parallel_layout
from linear_moe.layout.sequence import PieceOrder, padded_length
from linear_moe.modeling.mixers.base import Capabilities
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from linear_moe.modeling.ops.fused.grouping import Grouping, last_of_groups
from linear_moe.modeling.ops.fused.short_conv import last_tokens
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.summary import gradient, summary
from linear_moe.modeling.ops.sequence import affine, current, pieces_of, start_gradient
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.training.data.loader import document_offsets
from linear_moe.training.sequence import exchange
from linear_moe.training.sequence.cut import cut, split
from linear_moe.training.sequence.exchange import SequenceGroup, StateExchange, states_before
from linear_moe.training.sequence.pieces import RankPieces
from tests.distributed.sequences import one_pass, own_layout, stream, whole_layout
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.modeling.mixers.common import build, case_ids, cases

ORDERS = [PieceOrder(size, layout) for size in (1, 2, 4) for layout in ("contiguous", "zigzag")]
ORDERS += [PieceOrder(1, "contiguous", 4), PieceOrder(2, "contiguous", 4), PieceOrder(2, "zigzag", 4)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_piece_has_one_owner(order: PieceOrder) -> None:
    held = [(piece, (rank, place)) for rank in range(order.size) for place, piece in enumerate(order.pieces(rank))]
    assert sorted(piece for piece, _ in held) == list(range(order.count))
    assert all(order.owner(piece) == where for piece, where in held)
    # A query sees itself and the keys before it. Zigzag gives every rank equally many pairs of a query and a key.
    pairs = [sum(piece + 1 for piece in order.pieces(rank)) for rank in range(order.size)]
    assert order.layout == "contiguous" or len(set(pairs)) == 1


def documents(tokens: torch.Tensor) -> torch.Tensor:
    """Number of the document of every token, shaped like `tokens`."""
    return torch.bucketize(torch.arange(tokens.numel()), document_offsets(tokens, 0)[1:], right=True).view(tokens.shape)


@pytest.mark.parametrize(("order", "isolate"), list(product(ORDERS, (False, True))), ids=str)
def test_split_batches_hold_every_token_once(order: PieceOrder, isolate: bool) -> None:
    rows, length, padded = 3, 29, 32
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (rows, length), generator=random)
    positions = torch.arange(length).expand(rows, length)
    batch: dict[str, Any] = {"tokens": tokens, "labels": tokens + 1, "loss_mask": (tokens != 0).float()}
    batch["positions"] = positions.contiguous()
    if isolate:
        offsets = document_offsets(tokens, 0)
        batch["cu_seqlens"] = offsets
        batch["positions"] = (torch.arange(rows * length) - offsets[:-1].repeat_interleave(offsets.diff())).view(
            rows, -1
        )
    shares = [split(batch, order, rank, padded) for rank in range(order.size)]
    whole = {name: torch.zeros(rows, padded, dtype=x.dtype) for name, x in batch.items() if name != "cu_seqlens"}
    documents_of = documents(tokens)
    for part in shares:
        own = part["cut"]
        for s, (row, piece) in enumerate(own.places):
            span = slice(piece * own.length, (piece + 1) * own.length)
            mine = slice(s % order.per_rank * own.length, (s % order.per_rank + 1) * own.length)
            for name, x in whole.items():
                x[row, span] = part[name][row, mine]
            first = piece * own.length
            if first < length:  # the piece is not all padding: it continues the document of the token before it
                same = first > 0 and (not isolate or documents_of[row, first] == documents_of[row, first - 1])
                assert own.continued[s] == bool(same), (row, piece)
                # The padding of each row before is a document of its own.
                number = row + (int(documents_of[row, first]) if isolate else 0)
                assert own.numbers[sum(map(len, own.starts[:s]))] == number
                begin = int((documents_of[row] == documents_of[row, first]).nonzero()[0]) if isolate else 0
                assert own.begins[s] == begin
        if isolate:
            local = torch.bucketize(
                torch.arange(rows * order.per_rank * own.length), part["cu_seqlens"][1:], right=True
            )
            assert len(set(local.tolist())) == len(part["cu_seqlens"]) - 1
            assert len(own.numbers) == len(set(local.tolist())) and max(own.numbers) < own.sequences
            assert part["max_document"] == int(part["cu_seqlens"].diff().max())
    assert all(torch.equal(x[:, :length], batch[name]) for name, x in whole.items())
    assert not whole["loss_mask"][:, length:].any()
    assert sum(sum(part["cut"].padding) for part in shares) == rows * (padded - length)


GATES = ["none", "scalar", "key", "value", "both"]


@pytest.mark.parametrize("gate", GATES)
def test_summary_of_the_decay_family(gate: str) -> None:
    """The closed form equals the recurrence run on the identity, also with a gate that forgets everything."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 21, 3, 8), torch.randn(2, 21, 3, 5)
    g = {"scalar": torch.rand(2, 21, 3), "key": torch.rand(k.shape), "both": torch.rand(k.shape)}.get(gate)
    gv = torch.rand(v.shape) if gate in ("value", "both") else None
    g, gv = (None if x is None else -x for x in (g, gv))
    if g is not None:
        g[0, 7, 1] = float("-inf")

    def run(k: torch.Tensor, v: torch.Tensor, g: Any, gv: Any, initial_state: torch.Tensor) -> Any:
        return decay(k, k, v, g, gv, initial_state=initial_state, backend="reference")

    transition, state = summary(k, v, g, gv)
    start = torch.randn(2, 3, 8, 5)
    _, final = run(k, v, g, gv, start)
    assert_close(transition * start + state, final, FP32, gate)
    if gv is None:
        matrix, same = affine(run, k, v, g, gv)
        assert_close(same, state, FP32, "state")
        assert_close(transition.expand(2, 3, 8, 1).squeeze(-1).diag_embed(), matrix, FP32, "transition")


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_the_initial_state(gate: str, bonus: bool) -> None:
    """The closed form equals automatic differentiation of the recurrence."""
    torch.manual_seed(0)
    q, k, v, d_o = (
        torch.randn(2, 21, 3, 8),
        torch.randn(2, 21, 3, 8),
        torch.randn(2, 21, 3, 5),
        torch.randn(2, 21, 3, 5),
    )
    g = {"scalar": -torch.rand(2, 21, 3), "key": -torch.rand(k.shape), "both": -torch.rand(k.shape)}.get(gate)
    gv = -torch.rand(v.shape) if gate in ("value", "both") else None
    options: Any = {"bonus": torch.randn(3, 8) if bonus else None, "scale": 0.3, "backend": "reference"}
    expected = start_gradient(
        lambda state: decay(q, k, v, g, gv, initial_state=state, **options), torch.zeros(2, 3, 8, 5), d_o
    )
    assert_close(gradient(0.3, bonus, q, g, gv, d_o), expected, FP32, gate)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_summary_of_a_window(length: int) -> None:
    before, x = torch.randn(2, 3, 4), torch.randn(2, length, 4)
    transition, state = last_tokens(x, count=3)
    assert transition is not None
    assert torch.equal(transition @ before + state, torch.cat([before, x], 1)[:, -3:])
    if length >= 3:
        none, same = last_tokens(x[..., :1], x[..., 1:], count=3, matrix=False)
        assert torch.equal(same, state) and none is None


def test_summary_of_groups_windows() -> None:
    """A group's window has the last of its own tokens, old and new, for groups with no, few and many new tokens."""
    chosen = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool).T[
        None
    ]
    before, x = torch.randn(1, 4, 3, 2), torch.randn(1, 5, 2, 4, 1)  # [N, M, count, H * D], [N, T, H, M, D]
    grouping = Grouping(chosen, None)
    transition, state = last_of_groups(grouping.collect(x), grouping.filled, 3)
    after = transition @ before + state
    for m in range(4):
        own = x[0, chosen[0, :, m], :, m, 0]
        assert torch.equal(after[0, m], torch.cat([before[0, m], own])[-3:]), m


CUT = {
    key: case
    for key, case in zip(case_ids(), cases(), strict=True)
    if mixer_class(case[0]).capabilities.sequence_parallel
} | {"gated_deltanet-one-tap": ("gated_deltanet", {"conv_size": 1})}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("key", CUT)
def test_pieces_on_one_rank_are_the_whole(key: str, packed: bool) -> None:
    mixer = build(*CUT[key])
    _, layout = own_layout(SequenceGroup(PieceOrder(1, "contiguous", 4), 0), packed)
    actual = one_pass(mixer, stream(packed, 0), stream(packed, 1), layout)
    expected = one_pass(mixer, stream(packed, 0), stream(packed, 1), whole_layout(packed))
    assert_close(actual.pop("output"), expected.pop("output"), FP32, key)
    assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_an_exchange_has_one_backward_pass(strategy: str) -> None:
    """A second backward pass through an exchange is an error: the first one drops the transitions."""
    state = torch.randn(4, 2, 8, requires_grad=True)
    one = StateExchange(SequenceGroup(PieceOrder(1, "contiguous", 4), 0, None, strategy))
    before = one.begin(torch.rand(4, 2, 1), state)()
    assert one.before is not None and one.kept is not None
    before.sum().backward(retain_graph=True)
    assert one.before is None and one.kept is None
    with pytest.raises(AssertionError, match="one backward pass"):
        before.sum().backward()


def test_pieces_take_no_initial_state() -> None:
    order = PieceOrder(1, "zigzag")
    with pieces_of(RankPieces(cut(1, 8, order, 0), SequenceGroup(order, 0), torch.device("cpu"))):
        with pytest.raises(ValueError, match="initial state"):
            current(torch.zeros(1))
        with pieces_of(None):
            assert current() is None
    assert current() is None


def messages(order: PieceOrder, rank: int) -> list[list[tuple[str, int]]]:
    """Messages ("send", to) and ("receive", from) of a rank of the ring, in order: forward pass, backward pass."""
    log: list[tuple[str, int]] = []

    def send(x: torch.Tensor, to: int, line: SequenceGroup) -> tuple[Any, torch.Tensor]:
        log.append(("send", to))
        return mock.Mock(), x

    def receive(like: torch.Tensor, source: int, line: SequenceGroup) -> torch.Tensor:
        log.append(("receive", source))
        return torch.zeros_like(like)

    state = torch.ones(order.per_rank, 2, 8, requires_grad=True)
    with mock.patch.multiple(exchange, _send=send, _receive=receive):
        before = states_before(torch.ones(order.per_rank, 2, 1), state, SequenceGroup(order, rank, None, "ring"), False)
        split = len(log)
        before.sum().backward()
    return [log[:split], log[split:]]


WALKS = [PieceOrder(n, layout) for n in (2, 3, 8) for layout in ("contiguous", "zigzag")]


@pytest.mark.parametrize("order", [*WALKS, PieceOrder(3, "contiguous", 3), PieceOrder(3, "zigzag", 4)], ids=str)
def test_the_ring_cannot_lock_up(order: PieceOrder) -> None:
    """The ring has no deadlock even if every message blocks its rank until the other rank reaches it too."""
    for direction in range(2):
        queues = [messages(order, rank)[direction] for rank in range(order.size)]
        while any(queues):
            heads = [(rank, queue[0]) for rank, queue in enumerate(queues) if queue]
            pairs = [(a, b) for a, (kind, b) in heads if kind == "send" and queues[b][:1] == [("receive", a)]]
            assert pairs, (direction, queues)
            for a, b in pairs:
                del queues[a][0], queues[b][0]


def test_the_ring_is_a_pipeline() -> None:
    """A rank sends each block on before it receives the next one."""
    up = [("receive", 0), ("send", 2)] * exchange.RING_BLOCKS
    down = [("receive", 2), ("send", 0)] * exchange.RING_BLOCKS
    assert messages(PieceOrder(4), 1) == [up, down]
    assert messages(PieceOrder(4, "zigzag"), 1) == [up + down, up + down]


def config(**sections: Any) -> Config:
    moe = {"num_experts": 4, "expert_ffn_size": 16}
    base: dict[str, Any] = {"model": {"hidden_size": 32, "num_heads": 4, "moe": moe}, "parallel": {"sequence": 2}}
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return from_dict(Config, base)


REFUSED = {
    "parallel.sequence_layout": {"parallel": {"sequence": 1, "sequence_layout": "contiguous"}},
    "parallel.sequence_exchange": {"parallel": {"sequence": 1, "sequence_exchange": "ring"}},
    "parallel.sequence_dtype": {"parallel": {"sequence": 1, "sequence_dtype": "bf16"}},
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_not_built_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_fields(config(**REFUSED[path]), 4)
    assert error.value.path == path and "\n" not in str(error.value)


ULYSSES = {"sequence": 4, "sequence_attention": "ulysses"}
NEAREST = [  # parallel, attention, path and offer of the error message (None: the configuration is valid)
    ({"sequence": 1, "sequence_attention": "ring"}, {}, "parallel.sequence_attention", "all_gather"),
    ({"sequence": 2, "sequence_attention": "ring"}, None, "parallel.sequence_attention", "all_gather"),
    ({"sequence": 2, "sequence_exchange": "ring"}, "only", "parallel.sequence_exchange", "all_gather"),
    ({"sequence": 2, "sequence_dtype": "bf16"}, "only", "parallel.sequence_dtype", "fp32"),
    ({"sequence": 2, "sequence_attention": "rings"}, {}, "parallel.sequence_attention", "ring"),
    (ULYSSES | {"sequence": 8}, {}, "model.attention.num_heads", "nearest valid: 8, or"),
    (ULYSSES | {"tensor": 2}, {}, "model.attention.num_heads", "nearest valid: 8, or"),
    (ULYSSES | {"sequence": 2}, {"type": "mla", "num_heads": 5}, "model.attention.num_heads", "4 or 6, or"),
    (ULYSSES, {"num_heads": 12, "num_kv_heads": 6}, "model.attention.num_kv_heads", "nearest valid: 4 or 12, or"),
    (ULYSSES, {"num_heads": 12, "num_kv_heads": 2}, None, None),
    (ULYSSES, {}, None, None),
    (ULYSSES, {"type": "mla"}, None, None),
    ({"sequence": 2, "sequence_attention": "ring"}, {"num_kv_heads": 1}, None, None),
]


@pytest.mark.parametrize(("parallel", "attention", "path", "offered"), NEAREST)
def test_ways_of_attention(parallel: Any, attention: Any, path: str | None, offered: str | None) -> None:
    pattern = {"pattern": "LN", "attention": attention} if isinstance(attention, dict) else {}
    pattern = pattern or {"pattern": "NN" if attention == "only" else "LL"}
    model = pattern | {"hidden_size": 96, "ffn": "dense", "num_layers": 2, "ffn_size": 64}
    if path is None:
        validate_fields(config(model=model, parallel=parallel, training={"micro_batch": 1}), 8)
        return
    with pytest.raises(ConfigError) as error:
        validate_fields(config(model=model, parallel=parallel, training={"micro_batch": 1}), 8)
    assert (
        offered is not None
        and error.value.path == path
        and offered in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_can(name: str) -> None:
    assert mixer_class(name).capabilities.sequence_parallel
    validate_fields(config(model={"mixer": {"type": name}, "hidden_size": 256, "ffn": "dense"}), 4)


def test_a_mixer_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = mixer_class("gla")
    monkeypatch.setattr(cls, "capabilities", Capabilities(sequence_parallel=False))
    monkeypatch.setattr(cls, "limits", {"sequence_parallel": "a reason"})
    with pytest.raises(ConfigError, match=r"parallel\.sequence > 1: a reason") as error:
        validate_fields(config(), 4)
    assert error.value.path == "model.mixer.type"


def test_ranks_and_lengths() -> None:
    layout = parallel_layout(config(parallel={"sequence": 2, "tensor": 2}), 8)
    assert (layout.data, layout.sequence, layout.replicas) == (2, 2, 4)
    assert layout.groups["sequence"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups["data"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ConfigError, match=r"parallel\.sequence 2"):
        parallel_layout(config(), 3)
    lengths = {"contiguous": 30, "zigzag": 32}
    for kind, length in lengths.items():
        tree = config(parallel={"sequence": 2, "sequence_layout": kind}, training={"sequence_length": 29})
        assert padded_length(tree) == length
