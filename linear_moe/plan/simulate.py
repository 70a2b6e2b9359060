"""Simulation of sequence parallelism: the cost of a layer on any number of GPUs, calculated from bandwidths.

One sequence at a time is shared out over groups of `parallel.tensor` GPUs, and each group shares out the heads. The
seconds of compute come from `cost`, the bytes and seconds of messages from `traffic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from linear_moe.checks.fields import validate_fields
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.strategies import AttentionStrategy, StateExchangeStrategy
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.flops import forward_flops
from linear_moe.layout.pipeline import HEAD_SPEED
from linear_moe.layout.processes import MAX_WORLD
from linear_moe.layout.sequence import padded_length, rank_tokens
from linear_moe.modeling.host import DTYPES, Host
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.errors import ConfigError
from linear_moe.plan.cost import EFFICIENCY, layer_seconds, speed
from linear_moe.plan.needs import SequenceNeeds
from linear_moe.plan.network import Cluster, Group
from linear_moe.plan.ranks import RankModels
from linear_moe.plan.traffic import HEADS, KEYS, STATES, LayerTraffic, SequenceSplit

SMALLEST, LARGEST = 8, 4096  # GPUs
WAYS = {"exchange": (*STATES, HEADS["exchange"]), "attention": (*KEYS, HEADS["attention"])}
"""Ways of sharing out a sequence, for recurrences ("exchange") and for softmax attention ("attention")."""
SCHEMES = (
    (StateExchangeStrategy.ALL_GATHER.value, AttentionStrategy.ALL_GATHER.value),
    (StateExchangeStrategy.ALL_GATHER.value, AttentionStrategy.RING.value),
    (StateExchangeStrategy.RING.value, AttentionStrategy.RING.value),
    (HEADS["exchange"], HEADS["attention"]),
)
"""Ways of a whole model: of its recurrences, and of its softmax attention."""


@dataclass(frozen=True)
class LayerKind:
    """Layers of a model that have the same mixer, FLOPs and exchanges.

    Attributes:
        mixer: type of the mixer.
        number: index of the first of these layers.
        layers: number of these layers in the model; 0: the model has none, and softmax attention is simulated to
            compare with.
        by: key of WAYS: "exchange" for recurrences, "attention" for softmax attention.
        needs: exchanges that each of these layers needs between the ranks of a sequence.
    """

    mixer: str
    number: int
    layers: int
    by: str
    needs: SequenceNeeds


@dataclass(frozen=True)
class SimulatedLayer:
    """Cost of one layer for one sequence, forward and backward, on `world` GPUs in one way of sharing it out.

    Attributes:
        compute: seconds of the busiest rank, without the work that only sharing out the sequence makes necessary.
        reason: why the layer cannot run in this way on so many GPUs; "" if it can.
    """

    world: int
    length: int
    kind: LayerKind
    way: str
    compute: float
    exchange: LayerTraffic
    reason: str = ""

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange.cost()

    def to_json(self) -> dict[str, Any]:
        where = {"gpus": self.world, "sequence_length": self.length, "layer": self.kind.mixer, "way": self.way}
        if self.reason:
            return where | {"reason": self.reason}
        names = ("sent", "received", "hidden", "exposed")
        sent, received, hidden, exposed = (self.exchange.totals(name) for name in names)
        return where | {
            "sent_bytes": {"forward": sent[0], "backward": sent[1]},
            "received_bytes": {"forward": received[0], "backward": received[1]},
            "seconds": {
                "compute": self.compute,
                "local": self.exchange.local,
                "exposed": sum(exposed),
                "hidden": sum(hidden),
                "total": self.seconds,
            },
            "imbalance": self.exchange.imbalance,
            "reason": None,
        }


@dataclass(frozen=True)
class Simulation:
    """Simulated costs of all kinds of layers of a model, in all ways, on several numbers of GPUs.

    Attributes:
        lengths: tokens of a sequence, by the number of GPUs.
        rows: one entry for every number of GPUs, kind of layer and way.
        outside: seconds of the head, by the number of GPUs.
    """

    cluster: Cluster
    lengths: dict[int, int]
    rows: list[SimulatedLayer]
    outside: dict[int, float]

    @cached_property
    def kinds(self) -> list[LayerKind]:
        return list(dict.fromkeys(row.kind for row in self.rows))

    def of(self, kind: LayerKind, way: str) -> dict[int, SimulatedLayer]:
        """The rows of one kind of layer and one way, by the number of GPUs."""
        return {row.world: row for row in self.rows if row.kind == kind and row.way == way}

    def models(self) -> Iterator[dict[str, Any]]:
        """Yields the cost of all layers and the head together for every number of GPUs and every scheme of SCHEMES.

        Schemes that are alike for the model, because it has only recurrences or only attention, are yielded once.
        """
        kinds = [kind for kind in self.kinds if kind.layers]
        present = {kind.by for kind in kinds}
        schemes = (tuple((by, way) for by, way in zip(WAYS, ways, strict=True) if by in present) for ways in SCHEMES)
        for (world, length), scheme in product(self.lengths.items(), map(dict, dict.fromkeys(schemes))):
            if scheme:
                rows = [self.of(kind, scheme[kind.by])[world] for kind in kinds]
                entry: dict[str, Any] = {"gpus": world, "sequence_length": length} | scheme
                reason = next((row.reason for row in rows if row.reason), None)
                if reason is None:
                    seconds = self.outside[world] + sum(row.kind.layers * row.seconds for row in rows)
                    extra = sum(row.kind.layers * row.exchange.cost() for row in rows)
                    tokens = length / world / seconds
                    entry |= {"seconds": seconds, "overhead": extra / seconds, "tokens_per_second_per_gpu": tokens}
                yield entry | {"reason": reason}

    def to_json(self) -> dict[str, Any]:
        cluster, gpu = self.cluster, self.cluster.gpu
        return {
            "cluster": {
                "gpus_per_node": cluster.node,
                "intra_node_bandwidth": gpu.link,
                "inter_node_bandwidth": gpu.network,
                "latency": cluster.latency,
                "peak_tflops": gpu.peak_tflops,
                "efficiency": EFFICIENCY,
            },
            "layers": [{"mixer": kind.mixer, "layers": kind.layers, "heads": kind.needs.heads} for kind in self.kinds],
            "rows": [row.to_json() for row in self.rows],
            "model": list(self.models()),
        }


def worlds(largest: int) -> list[int]:
    """Numbers of GPUs to simulate: 8, 16, ... below `largest`, and `largest` itself."""
    sizes, world = [], SMALLEST
    while world < largest:
        sizes.append(world)
        world *= 2
    return [*sizes, largest]


def simulate(config: Config, sizes: list[int], cluster: Cluster, tokens: int, total: bool) -> Simulation:
    """Simulates a model on each number of GPUs in `sizes`.

    Args:
        config: the model's configuration; of its `parallel` only `tensor`, `tensor_sequence` and the layout, pieces and
            dtype of sequences are used.
        tokens: tokens of the sequence if `total`, else tokens of the sequence for each GPU.

    Raises:
        ConfigError: sequences of this model cannot be shared out over one of these numbers of GPUs.
    """
    lengths = {world: tokens if total else tokens * world for world in sizes}
    model, rows, outside = _Model(config), list[SimulatedLayer](), {}
    softmax = _Model(replace(config, model=replace(config.model, pattern="N", num_layers=1)))
    for world, length in lengths.items():
        split = at(config, world, length)
        outside[world] = model.head_seconds(split, cluster)
        simulated = list(model.rows(split, world, cluster))
        if not any(row.kind.needs.keys for row in simulated):
            others = softmax.rows(replace(split, model=softmax.config.model), world, cluster)
            simulated += [replace(row, kind=replace(row.kind, layers=0)) for row in others]
        rows += simulated
    return Simulation(cluster, lengths, rows, outside)


def at(config: Config, world: int, length: int) -> Config:
    """Returns the configuration with one sequence of `length` tokens on `world` GPUs; ConfigError if it is invalid."""
    tensor = config.parallel.tensor
    if world % tensor or not 1 <= world <= MAX_WORLD:
        raise ConfigError("--world", world, f"must be a multiple of parallel.tensor = {tensor}, at most {MAX_WORLD}")
    given = config.parallel
    parallel = ParallelConfig(tensor=tensor, tensor_sequence=given.tensor_sequence, sequence=world // tensor)
    parallel.sequence_pieces = given.sequence_pieces
    if parallel.sequence > 1:
        parallel.sequence_layout, parallel.sequence_dtype = given.sequence_layout, given.sequence_dtype
    training = replace(config.training, sequence_length=length, micro_batch=1)
    changed = replace(config, parallel=parallel, training=training)
    validate_fields(changed)
    return changed


class _Model:
    """Model to be simulated, with everything that is the same for all numbers of GPUs computed once."""

    def __init__(self, config: Config):
        rows = vocab_size(config)
        self.config = config
        self.plain = LanguageModel(config.model, rows, Host(DTYPES[config.training.dtype], "meta"))
        self.ranks = RankModels(config, rows)

    def head_seconds(self, config: Config, cluster: Cluster) -> float:
        """Seconds of the head for a micro-batch, forward and backward."""
        rate = HEAD_SPEED * speed(cluster.gpu, config.parallel.tensor).together
        return 3 * rank_tokens(config) * forward_flops(config, self.plain).head / rate

    def rows(self, config: Config, world: int, cluster: Cluster) -> Iterator[SimulatedLayer]:
        """Simulates one layer of each kind in every way; `config` is this model's configuration on `world` GPUs."""
        parallel, length = config.parallel, padded_length(config)
        layers = self.ranks(parallel).numbered_layers()
        flops = forward_flops(config, self.plain)
        group = Group.of(list(range(0, world, parallel.tensor)), cluster)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, needs in self.ranks.needs(parallel).items():
            parts = tuple(flops.layers[number].values())
            alike.setdefault((layers[number].mixer.config.type, needs, parts), []).append(number)
        for (mixer, needs, _), (number, *others) in alike.items():
            kind = LayerKind(mixer, number, 1 + len(others), "attention" if needs.keys else "exchange", needs)
            for way in WAYS[kind.by]:
                chosen: Any = {kind.by: way}
                split = replace(SequenceSplit.of(config), **chosen)
                compute, exchange = layer_seconds(config, number, layers[number], flops, group, needs, split)
                reason = ""
                if way == HEADS[kind.by] and needs.heads % parallel.sequence:
                    reason = f"{needs.heads * parallel.tensor} heads are too few"
                yield SimulatedLayer(world, length, kind, way, compute, exchange, reason)
