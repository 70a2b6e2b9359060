"""What sharing out sequences costs a layer on any number of GPUs, by every way of doing it: on paper, from bandwidths.

One sequence at a time is shared out over all GPUs, `parallel.tensor` of which share out its heads besides. Compute is
`cost`'s, what is sent `exchange`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from linear_moe.checks.fields import validate_fields
from linear_moe.config.schema import Config, ParallelConfig
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

SMALLEST, LARGEST = 8, 4096  # worlds
WAYS = {"exchange": (*STATES, HEADS["exchange"]), "attention": (*KEYS, HEADS["attention"])}
"""Of sharing out recurrences, and softmax attention."""
SCHEMES = (("all_gather", "all_gather"), ("all_gather", "ring"), ("ring", "ring"), ("heads", "ulysses"))
"""Of a whole model, by both kinds."""


@dataclass(frozen=True)
class LayerKind:
    """Layers alike.

    Attributes:
        number: of the first one.
        layers: how many of the model's; 0: it has none, they are softmax attention to compare with.
        by: which of WAYS there are for them.
    """

    mixer: str
    number: int
    layers: int
    by: str
    needs: SequenceNeeds


@dataclass(frozen=True)
class SimulatedLayer:
    """One layer, one micro-batch of one sequence, forward and backward, on one number of GPUs in one way.

    Attributes:
        compute: seconds of the busiest rank, without what there is only for sharing sequences out.
        reason: why it cannot be; "" if it can.
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
        sent, received, hidden, exposed = (self.exchange.totals(of) for of in names)
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
    """Attributes:
    lengths: of sequences, by world.
    """

    cluster: Cluster
    lengths: dict[int, int]
    rows: list[SimulatedLayer]
    outside: dict[int, float]  # seconds of the head, by world

    @cached_property
    def kinds(self) -> list[LayerKind]:
        return list(dict.fromkeys(row.kind for row in self.rows))

    def of(self, kind: LayerKind, way: str) -> dict[int, SimulatedLayer]:
        """By world."""
        return {row.world: row for row in self.rows if row.kind == kind and row.way == way}

    def models(self) -> Iterator[dict[str, Any]]:
        """All layers and the head together, by world and by SCHEMES: those of a model of one kind once."""
        kinds = [kind for kind in self.kinds if kind.layers]
        present = {kind.by for kind in kinds}
        schemes = (tuple((by, way) for by, way in zip(WAYS, ways, strict=True) if by in present) for ways in SCHEMES)
        for (world, length), scheme in product(self.lengths.items(), map(dict, dict.fromkeys(schemes))):
            if scheme:
                rows = [self.of(kind, scheme[kind.by])[world] for kind in kinds]
                found: dict[str, Any] = {"gpus": world, "sequence_length": length} | scheme
                reason = next((row.reason for row in rows if row.reason), None)
                if reason is None:
                    seconds = self.outside[world] + sum(row.kind.layers * row.seconds for row in rows)
                    extra = sum(row.kind.layers * row.exchange.cost() for row in rows)
                    tokens = length / world / seconds
                    found |= {"seconds": seconds, "overhead": extra / seconds, "tokens_per_second_per_gpu": tokens}
                yield found | {"reason": reason}

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
    """8, 16, ... up to `largest`, and that."""
    found, world = [], SMALLEST
    while world < largest:
        found.append(world)
        world *= 2
    return [*found, largest]


def simulate(config: Config, sizes: list[int], cluster: Cluster, tokens: int, total: bool) -> Simulation:
    """Of a model on each of `sizes` GPUs.

    Args:
        config: of its `parallel`, `tensor` and the layout of sequences count.
        tokens: of a sequence, if `total`, else for each GPU.

    Raises:
        ConfigError: sequences of this model cannot be shared out so.
    """
    lengths = {world: tokens if total else tokens * world for world in sizes}
    model, rows, outside = _Model(config), list[SimulatedLayer](), {}
    softmax = _Model(replace(config, model=replace(config.model, pattern="N", num_layers=1)))
    for world, length in lengths.items():
        split = at(config, world, length)
        outside[world] = model.head_seconds(split, cluster)
        found = list(model.rows(split, world, cluster))
        if not any(row.kind.needs.keys for row in found):
            others = softmax.rows(replace(split, model=softmax.config.model), world, cluster)
            found += [replace(row, kind=replace(row.kind, layers=0)) for row in others]
        rows += found
    return Simulation(cluster, lengths, rows, outside)


def at(config: Config, world: int, length: int) -> Config:
    """The configuration with one sequence of `length` tokens on `world` GPUs; raises ConfigError if it cannot be."""
    tensor = config.parallel.tensor
    if world % tensor or not 1 <= world <= MAX_WORLD:
        raise ConfigError("--world", world, f"must be a multiple of parallel.tensor = {tensor}, at most {MAX_WORLD}")
    given = config.parallel
    parallel = ParallelConfig(tensor=tensor, tensor_sequence=given.tensor_sequence, sequence=world // tensor)
    parallel.sequence_pieces = given.sequence_pieces
    if parallel.sequence > 1:
        parallel.sequence_layout, parallel.sequence_dtype = given.sequence_layout, given.sequence_dtype
    training = replace(config.training, sequence_length=length, micro_batch=1)
    found = replace(config, parallel=parallel, training=training)
    validate_fields(found)
    return found


class _Model:
    """What does not depend on the number of GPUs is computed once."""

    def __init__(self, config: Config):
        rows = vocab_size(config)
        self.config = config
        self.plain = LanguageModel(config.model, rows, Host(DTYPES[config.training.dtype], "meta"))
        self.ranks = RankModels(config, rows)

    def head_seconds(self, config: Config, cluster: Cluster) -> float:
        rate = HEAD_SPEED * speed(cluster.gpu, config.parallel.tensor).together
        return 3 * rank_tokens(config) * forward_flops(config, self.plain).head / rate

    def rows(self, config: Config, world: int, cluster: Cluster) -> Iterator[SimulatedLayer]:
        """Of one layer of each kind, in every way; `config`: this model's on `world` GPUs."""
        parallel, length = config.parallel, padded_length(config)
        layers: Any = self.ranks(parallel).layers
        flops = forward_flops(config, self.plain)
        group = Group.of(list(range(0, world, parallel.tensor)), cluster)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, needs in self.ranks.needs(parallel).items():
            parts = tuple(flops.layers[number].values())
            alike.setdefault((layers[str(number)].mixer.config.type, needs, parts), []).append(number)
        for (mixer, needs, _), (number, *others) in alike.items():
            kind = LayerKind(mixer, number, 1 + len(others), "attention" if needs.keys else "exchange", needs)
            for way in WAYS[kind.by]:
                chosen: Any = {kind.by: way}
                split = replace(SequenceSplit.of(config), **chosen)
                compute, exchange = layer_seconds(config, number, layers[str(number)], flops, group, needs, split)
                reason = ""
                if way == HEADS[kind.by] and needs.heads % parallel.sequence:
                    reason = f"{needs.heads * parallel.tensor} heads are too few"
                yield SimulatedLayer(world, length, kind, way, compute, exchange, reason)
