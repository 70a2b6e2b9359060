"""Needs, messages and times of sequences shared out over GPUs in `linear-moe plan`, by hand and by other means."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_moe.checks.fields import validate_fields
from linear_moe.cli import main
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.gpus import GPU
from linear_moe.layout.flops import forward_flops
from linear_moe.layout.processes import parallel_layout
from linear_moe.layout.sequence import RING_BLOCKS, PieceOrder
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import Capabilities
from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.options.load import from_dict
from linear_moe.plan.activations import activation_bytes
from linear_moe.plan.cost import layer_seconds, stage_cost
from linear_moe.plan.needs import TOKENS, SequenceNeeds, mixer_needs
from linear_moe.plan.network import LATENCY, LINK_STEP, NETWORK_STEP, Cluster, Group
from linear_moe.plan.plan import make_plan
from linear_moe.plan.ranks import RankModels, rank_chunks
from linear_moe.plan.search import propose
from linear_moe.plan.simulate import SCHEMES, WAYS, simulate, worlds
from linear_moe.plan.traffic import (
    HEADS,
    KEYS,
    STATES,
    STEP_SECONDS,
    LayerTraffic,
    SequenceSplit,
    Speed,
    imbalance,
    layer_exchange,
)
from tests.unit.modeling.mixers.common import cases, dims

MODELS = Path(__file__).parents[3] / "configs" / "models"
ROUND = GPU(memory_gib=1.0, peak_tflops=100.0, memory_bandwidth=1e12, link=100e9, network=10e9)
CLUSTER = Cluster(ROUND, 8)
SPLIT = [(n, fields) for n, fields in cases() if mixer_class(n).capabilities.sequence_parallel]
SPEED = Speed(1e13, 1e13, 1e12)


def needs_of(name: str, **fields: Any) -> SequenceNeeds:
    return mixer_needs(mixer_class(name)(mixer_config(name, **fields), dims(), Host(torch.bfloat16, "meta")))


def tree(**sections: Any) -> Config:
    model = {"hidden_size": 64, "num_layers": 4, "num_heads": 8, "pattern": "LLLN", "vocab_size": 512, "ffn_size": 128}
    model |= {"moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32}} | sections.pop("model", {})
    training = {"sequence_length": 4096, "micro_batch": 1, "global_batch": 2} | sections.pop("training", {})
    return from_dict(Config, {"model": model, "training": training, "data": {"corpus": "synthetic"}} | sections)


def sequence(config: Config, ranks: int, **parallel: Any) -> Config:
    return replace(config, parallel=ParallelConfig(sequence=ranks, **parallel))


def line(ranks: int, node: int = 8) -> Group:
    return Group.of(list(range(ranks)), Cluster(ROUND, node))


@pytest.mark.parametrize(("name", "fields"), SPLIT, ids=[f"{n}-{i}" for i, (n, _) in enumerate(SPLIT)])
def test_needs_are_the_states_of_decoding(name: str, fields: dict[str, Any]) -> None:
    """States and keys that ranks exchange in training have as many numbers as those in a decoding cache."""
    mixer = mixer_class(name)(mixer_config(name, **fields), dims(), Host(torch.bfloat16, "meta"))
    needs, by_length = mixer_needs(mixer), {}
    for length in (1, 2):
        by_length[length] = sum(math.prod(shape) for shape, _ in mixer.state_shapes(1, length).values())
    grows = by_length[2] - by_length[1]  # keys and values, whose number grows with the tokens
    assert sum(keys.numbers for keys in needs.keys) == grows
    twice = dims().hidden_size if name == "rwkv6" else 0  # rwkv6 shifts the same tokens two times
    assert sum(state.numbers for state in needs.states) == by_length[1] - grows + twice
    assert needs.output > 0 and needs.inputs and needs.heads > 1 and needs.gap > 0


def test_needs_by_hand() -> None:
    """Needs of mixers with four heads and 32 channels in bf16.

    Summaries multiply keys and values; the summary of the delta rule also multiplies the identity.
    """
    (gla,) = needs_of("gla", expand_k=1.0).states
    assert (gla.numbers, gla.transition, gla.flops) == (4 * 8 * 8, 4 * 8, (2 * 4 * 8 * 8,) * 2)
    (gateloop,) = needs_of("gateloop").states
    assert (gateloop.numbers, gateloop.transition) == (2 * 4 * 8 * 8, 2 * 4 * 8)  # complex
    convolutions, delta = needs_of("deltanet").states
    assert (convolutions.numbers, convolutions.transition) == (3 * 3 * 32, 0)  # three tokens before each piece
    assert (delta.numbers, delta.transition) == (4 * 8 * 8, 4 * 8 * 8) and delta.flops[0] > 2 * gla.flops[0]
    attention = needs_of("attention", num_kv_heads=2)
    (keys,) = attention.keys
    assert (keys.numbers, keys.size) == (2 * 2 * 8, 2 * 2 * 2 * 8)
    assert attention.inputs == ((4, 64), (2, 32), (2, 32)) and (attention.heads, attention.output) == (4, 64)
    assert attention.gap == 2 * 32 * 32
    assert TOKENS % 64 == 0


def test_ways_are_those_of_the_config() -> None:
    choices = {field: from_dict(ParallelConfig, {}).__dataclass_fields__[field].metadata["choices"] for field in (
        "sequence_exchange", "sequence_attention")}  # fmt: skip
    assert set(STATES) == set(choices["sequence_exchange"])
    assert {*KEYS, HEADS["attention"]} == set(choices["sequence_attention"])
    assert all(way in WAYS[kind] for scheme in SCHEMES for kind, way in zip(WAYS, scheme, strict=True))


def exchange_of(
    needs: SequenceNeeds, ranks: int, tokens: int = 1024, node: int = 8, layout: str = "zigzag", **ways: str
) -> LayerTraffic:
    ways = {"exchange": "all_gather", "attention": "all_gather"} | ways
    split = SequenceSplit(PieceOrder(ranks, layout), 1, tokens, **ways)
    return layer_exchange(needs, split, line(ranks, node), lambda n: 128.0 * n, tokens * ranks, SPEED)


def test_messages_by_hand() -> None:
    gla, attention = needs_of("gla", expand_k=1.0), needs_of("attention")
    n, m = 4 * (2 * 256), 4 * (2 * 32)  # bytes of two pieces' states and transitions
    ((forward, backward),) = exchange_of(gla, 4).messages
    assert (forward.sent, forward.received, backward.sent) == (n + m, 3 * (n + m), n)
    assert forward.seconds == pytest.approx(LATENCY + 3 * LINK_STEP + 3 * (n + m) / 100e9)
    ((forward, backward),) = exchange_of(gla, 4, node=2).messages
    assert backward.seconds == pytest.approx(LATENCY + 2 * LINK_STEP + NETWORK_STEP + 3 * n / 20e9)
    assert forward.hidden == 0 and backward.hidden == pytest.approx(1024 * 2 * 32 * 32 / 1e13)
    own = 1024 * 2 * 2 * 32
    ((forward, backward),) = exchange_of(attention, 4).messages
    assert (forward.sent, backward.sent, backward.received) == (own, 5 * own, 6 * own)
    assert backward.seconds == pytest.approx(2 * forward.seconds)
    ((forward, backward),) = exchange_of(attention, 4, attention="ring", tokens=64).messages
    assert (forward.sent, backward.sent) == (3 * own / 16, 9 * own / 16)  # backward also sends gradients in fp32
    assert forward.seconds == pytest.approx(3 * (LATENCY + own / 16 / 100e9))
    assert forward.hidden == pytest.approx(0.75 * 64 * 128 * 256 / 1e13)
    for needs, way in ((attention, {"attention": "ulysses"}), (gla, {"exchange": "heads"})):
        ((forward, backward),) = exchange_of(needs, 4, **way).messages
        sent = 1024 * (sum(size for _, size in needs.inputs) + needs.output)
        assert forward == backward and forward.sent == sent and forward.received == 0.75 * sent
        assert forward.seconds == pytest.approx(2 * LATENCY + 0.75 * sent / 100e9)


def walk(ranks: int, layout: str, node: int, block: float) -> float:
    """Simulates a ring; returns the time at which the last piece has its state.

    A rank does its pieces one after the other, and each piece block by block: it waits for a block, and sends the block
    on as soon as the blocks before have left.
    """
    order = PieceOrder(ranks, layout)
    clock, link = dict.fromkeys(range(ranks), 0.0), dict.fromkeys(range(ranks), 0.0)
    arrivals = [0.0] * RING_BLOCKS
    for piece in range(order.count):
        (rank, _), arrived = order.owner(piece), arrivals
        arrivals = []
        for at in arrived:
            clock[rank] = max(clock[rank], at)
            target = order.owner(piece + 1)[0] if piece + 1 < order.count else rank
            if target != rank:
                away = rank // node != target // node
                hop = LATENCY + block / (10e9 if away else 100e9) + STEP_SECONDS
                link[rank] = max(clock[rank], link[rank]) + hop
            arrivals.append(clock[rank] if target == rank else link[rank])
    return arrivals[-1]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("ranks", "node"), [(2, 8), (4, 8), (8, 4), (16, 8)])
def test_a_ring_of_states_is_a_pipeline(ranks: int, node: int, layout: str) -> None:
    needs = needs_of("gla", expand_k=1.0)
    messages = exchange_of(needs, ranks, node=node, layout=layout, exchange="ring").messages
    ((forward, backward),) = messages
    assert forward.seconds == backward.seconds == pytest.approx(walk(ranks, layout, node, 4 * 256 / RING_BLOCKS))
    assert forward.sent == 4 * 256 * (2 if layout == "zigzag" and ranks > 2 else 1)


def test_imbalance_is_of_the_busiest_rank() -> None:
    def pairs(n: int) -> float:  # mean number of tokens to which a token attends
        return (n + 1) / 2

    for ranks in (2, 4, 8):
        contiguous, zigzag = (imbalance(pairs, 4096, PieceOrder(ranks, layout)) for layout in ("contiguous", "zigzag"))
        size = 4096 // ranks
        last = sum(i + 1 for i in range(4096 - size, 4096)) / (sum(range(1, 4097)) / ranks)
        assert contiguous == pytest.approx(last) and zigzag == pytest.approx(1.0)
        # A recurrence has the same FLOPs for every token.
        assert imbalance(lambda n: 7.0, 4096, PieceOrder(ranks)) == pytest.approx(1.0)
    window = mixer_class("attention")(mixer_config("attention", window=16), dims(), Host(torch.bfloat16, "meta"))
    assert imbalance(window.recurrence_flops, 4096, PieceOrder(8)) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba2", "hgrn", "attention", "mla"])
def test_times_grow_with_ranks_and_states_not_with_tokens(name: str) -> None:
    needs = needs_of(name)
    kind = "attention" if needs.keys else "exchange"
    for way in (way for way in WAYS[kind] if way not in HEADS.values()):
        exchanges = [exchange_of(needs, ranks, **{kind: way}) for ranks in (2, 4, 8, 16, 64, 512, 4096)]
        for fewer_ranks, more_ranks in zip(exchanges, exchanges[1:], strict=False):
            assert sum(fewer_ranks.totals("seconds")) < sum(more_ranks.totals("seconds"))
            assert sum(fewer_ranks.totals("received")) <= sum(more_ranks.totals("received"))
        for exchange in exchanges:
            for message in (message for messages in exchange.messages for message in messages):
                assert message.hidden >= 0 and message.exposed >= 0
                assert message.hidden + message.exposed == pytest.approx(message.seconds, rel=1e-12)
                assert message.hidden <= message.beside
            total = sum(exchange.totals("exposed")) + exchange.local
            assert exchange.cost() == pytest.approx(total) and exchange.cost(again=True) >= exchange.cost()
        short, long = (sum(exchange_of(needs, 8, tokens=t, **{kind: way}).totals("sent")) for t in (256, 4096))
        assert short == long if kind == "exchange" else long == 16 * short
        fast, slow = (exchange_of(needs, 16, node=node, **{kind: way}) for node in (16, 8))
        assert sum(fast.totals("seconds")) < sum(slow.totals("seconds"))


def test_one_rank_is_no_sequence_parallelism() -> None:
    for name, ways in (("gla", STATES), ("attention", KEYS)):
        exchanges = [exchange_of(needs_of(name), 1, layout="contiguous", exchange=way, attention=way) for way in ways]
        assert all(exchange == LayerTraffic() for exchange in exchanges)
    config = tree()
    simulation = simulate(config, [1], CLUSTER, 4096, total=True)
    flops, layers = forward_flops(config), RankModels(config, 512)(config.parallel).layers
    group, split = Group.of([0], CLUSTER), SequenceSplit.of(config)
    alone = [layer_seconds(config, i, layers[str(i)], flops, group, None, split)[0] for i in range(4)]
    for row in simulation.rows:
        assert row.seconds == row.compute == alone[row.kind.number] and row.exchange == LayerTraffic()
    for entry in simulation.models():
        assert entry["seconds"] == pytest.approx(sum(alone) + simulation.outside[1]) and entry["overhead"] == 0


def test_a_stage_waits_for_its_layers() -> None:
    """A stage waits for the exchanges of all its layers, and again for exchanges of keys if layers are recomputed."""
    config = sequence(tree(), 4, sequence_layout="contiguous", sequence_exchange="ring")
    models = RankModels(config, 512)
    needs, flops, layout = models.needs(config.parallel), forward_flops(config), parallel_layout(config, 4)
    chunks = rank_chunks(config, models(config.parallel), 0)
    cost = stage_cost(config, layout, chunks, flops, CLUSTER, needs).micro_batch
    split = SequenceSplit.of(config)
    (chunk,) = chunks
    exchanges = [
        layer_seconds(config, i, layer, flops, line(4), needs[i], split)[1] for i, layer in chunk.layers.items()
    ]
    assert [exchange.imbalance for exchange in exchanges] == [pytest.approx(1.0)] * 3 + [pytest.approx(1.75, rel=1e-3)]
    assert cost["sequence"] == pytest.approx(sum(exchange.cost() for exchange in exchanges))
    recomputed = replace(config, training=replace(config.training, recompute="full"))
    again = stage_cost(recomputed, layout, chunks, flops, CLUSTER, needs).micro_batch
    keys = (exchange for i, exchange in zip(chunk.layers, exchanges, strict=True) if needs[i].keys)
    forward = sum(exchange.totals("exposed")[0] for exchange in keys)
    assert again["sequence"] - cost["sequence"] == pytest.approx(forward) and forward > 0


def test_exchanges_keep_states_and_transitions() -> None:
    """Exchanges keep states and transitions: here of three layers with 8 heads of 8 x 8 and decays, in two rows."""
    split = {"sequence_layout": "zigzag", "sequence_exchange": "all_gather"}
    config = sequence(tree(training={"micro_batch": 2}, model={"mixer": {"type": "gla", "expand_k": 1.0}}), 4, **split)
    models, layout = RankModels(config, 512), parallel_layout(config, 4)
    chunks = rank_chunks(config, models(config.parallel), 0)
    state, transition = 8 * 8 * 8, 8 * 8

    def kept(config: Config) -> int:
        with_needs = (
            activation_bytes(config, layout, chunks, 0, needs) for needs in (models.needs(config.parallel), {})
        )
        exchanging, alone = (memory["activations"] for memory in with_needs)
        return exchanging - alone

    assert kept(config) == 3 * 2 * 4 * (2 * state + 7 * transition)
    assert kept(replace(config, parallel=replace(config.parallel, sequence_exchange="ring"))) == (
        3 * 2 * 4 * 2 * (state + transition)
    )
    recomputed = replace(config.training, recompute="selective", recompute_modules=["core"])
    assert kept(replace(config, training=recomputed)) == kept(config)  # so that nothing is sent again


def test_pieces_on_one_rank_cost_and_are_kept() -> None:
    config = sequence(tree(model={"mixer": {"type": "gla", "expand_k": 1.0}}), 1, sequence_pieces=4)
    models, layout = RankModels(config, 512), parallel_layout(config, 1)
    needs, flops = models.split_needs(config.parallel), forward_flops(config)
    chunks = rank_chunks(config, models(config.parallel), 0)
    cost = stage_cost(config, layout, chunks, flops, CLUSTER, needs).micro_batch
    assert len(needs) == 4 and cost["sequence"] > 0
    exchanging, alone = (activation_bytes(config, layout, chunks, 0, x)["activations"] for x in (needs, {}))
    kept = 3 * 4 * config.training.micro_batch * (4 * 8 * 8 * 8 + 3 * 8 * 8)  # states and transitions of three layers
    assert exchanging - alone == kept
    assert not models.split_needs(replace(config.parallel, sequence_pieces=None))


def test_search_shares_sequences_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search shares sequences out over eight GPUs if a step has two sequences, too few for data parallelism."""
    proposals = propose(tree(training={"sequence_length": 2**17}), 8, CLUSTER)
    names = {candidate.name: candidate for candidate in proposals.fit}
    assert {"SP4", "SP8", "TP2 SP2", "SP2 PP2"} <= names.keys() and "DP only" not in names
    for name, candidate in names.items():
        assert candidate.seconds is not None
        assert (candidate.seconds["sequence"] > 0) == ("SP" in name) or ("SP" in name and "PP" in name)
        parallel = candidate.config.parallel  # zigzag balances the softmax layer, and so does ulysses
        assert parallel.sequence_layout == "zigzag" or parallel.sequence_attention == "ulysses"
        validate_fields(candidate.config, 8)
    assert names["SP4"].memory == make_plan(names["SP4"].config, 8).memory
    pure = propose(tree(model={"pattern": "L * 4"}), 8, CLUSTER).fit
    assert {c.config.parallel.sequence_layout for c in pure if c.config.parallel.sequence > 1} == {"contiguous"}
    monkeypatch.setattr(mixer_class("gla"), "capabilities", Capabilities(sequence_parallel=False))
    illegal = propose(tree(), 8, CLUSTER).illegal
    reasons = {candidate.reason for candidate in illegal if candidate.config.parallel.sequence > 1}
    assert any("does not support parallel.sequence > 1" in reason for reason in reasons)


def test_proposals_suit_the_config_that_they_change() -> None:
    """Overrides of proposals also suit a configuration that sets options which only shared-out sequences have."""
    given = tree(parallel={"sequence": 2, "sequence_dtype": "bf16", "sequence_exchange": "ring"})
    fit = propose(given, 4, CLUSTER).fit
    assert {candidate.config.parallel.sequence for candidate in fit} == {1, 2, 4}
    for candidate in fit:
        sections: dict[str, dict[str, Any]] = {}
        for path, value in candidate.overrides().items():
            section, name = path.split(".")
            sections.setdefault(section, {})[name] = value
        made = replace(given, **{name: replace(getattr(given, name), **new) for name, new in sections.items()})  # type: ignore[arg-type]
        validate_fields(made, 4)
        assert made.parallel.sequence_dtype == ("bf16" if made.parallel.sequence > 1 else "fp32")


def test_simulation_says_what_heads_cannot_do() -> None:
    simulation = simulate(tree(), [4, 8, 16], CLUSTER, 1024, total=False)
    for row in simulation.rows:
        assert bool(row.reason) == (row.way in HEADS.values() and row.world == 16)
        assert not row.reason or "8 heads" in row.reason
    entries = [entry for entry in simulation.models() if entry["exchange"] == "heads"]
    assert [bool(entry["reason"]) for entry in entries] == [False, False, True]
    for world, few in ((8, False), (16, True)):  # tensor ranks share the heads out as well
        split = simulate(tree(parallel={"tensor": 2}), [world], CLUSTER, 1024, total=False)
        assert any(row.reason for row in split.rows) == few
    for kind in simulation.kinds:
        totals = {way: [row.to_json() for row in simulation.of(kind, way).values()] for way in WAYS[kind.by]}
        seconds = [row["seconds"] for rows in totals.values() for row in rows if not row["reason"]]
        assert all(s["total"] == pytest.approx(s["compute"] + s["local"] + s["exposed"]) for s in seconds)


def test_pure_models_are_compared_with_softmax_attention() -> None:
    simulation = simulate(tree(model={"pattern": "L * 4"}), [8], CLUSTER, 1024, total=False)
    assert [(kind.mixer, kind.layers) for kind in simulation.kinds] == [("gla", 4), ("attention", 0)]
    (entry, *_) = simulation.models()
    assert "attention" not in entry
    row = simulation.of(simulation.kinds[0], "all_gather")[8]
    assert entry["seconds"] == pytest.approx(4 * row.seconds + simulation.outside[8])


def test_worlds() -> None:
    assert worlds(64) == [8, 16, 32, 64] and worlds(12) == [8, 12] and worlds(2) == [2]


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    words = ["plan", str(MODELS / "a0.3b_2b.yaml"), "--world", "32", "--tokens-per-gpu", "32K", "--gpu", "h200"]
    plot = tmp_path / "sequence.svg"
    assert main([*words, "--json", "--plot", str(plot), "--inter-node-bandwidth", "25", "--latency", "10"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cluster"]["inter_node_bandwidth"] == 25e9 and printed["cluster"]["latency"] == pytest.approx(10e-6)
    assert {row["gpus"] for row in printed["rows"]} == {8, 16, 32}
    assert {row["sequence_length"] // row["gpus"] for row in printed["rows"]} == {2**15}
    drawing = ElementTree.fromstring(plot.read_text())
    labels = {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"all_gather", "ring", "heads: at most as many GPUs as heads", "32"} <= labels
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8 heads are too few" in out and "tokens/s/GPU" in out and "data sheets" in out
    assert main(["plan", str(MODELS / "a0.3b_2b.yaml"), "--world", "8", "--sequence-length", "1M", "--json"]) == 0
    slower, faster = (printed["rows"], json.loads(capsys.readouterr().out)["rows"])
    assert {row["sequence_length"] for row in faster} == {2**20} and len(faster) == len(slower) / 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--tokens-per-gpu", "0"], "must be a whole number > 0"),
        (["--tokens-per-gpu", "1K", "--sequence-length", "1K"], "not allowed with"),
        (["--tokens-per-gpu", "1K", "--memory", "8"], "--memory = 8.0: does nothing with"),
        (["--plot", "x.svg"], "--plot = 'x.svg': does nothing without"),
        (["--latency", "5"], "--latency = 5.0: does nothing without"),
        (["--tokens-per-gpu", "1K", "parallel.tensor=2", "--world", "9"], "--world = 9: must be a multiple of"),
    ],
)
def test_mistakes_are_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", str(MODELS / "tiny.yaml"), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and part in err and err.count("\n") == 1
