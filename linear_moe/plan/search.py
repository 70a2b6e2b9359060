"""Search for the layouts that fit into a GPU's memory, the fastest first, with the reasons against all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from operator import itemgetter
from typing import Any

from linear_moe.checks.fields import validate_fields
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.flops import forward_flops
from linear_moe.layout.pipeline import default_split
from linear_moe.layout.processes import MAX_WORLD, ProcessMesh, parallel_layout
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.options.checks import check
from linear_moe.options.errors import ConfigError
from linear_moe.plan.activations import activation_bytes
from linear_moe.plan.cost import layer_seconds, stage_cost, step_seconds
from linear_moe.plan.memory import state_bytes, with_total
from linear_moe.plan.network import Cluster, Group
from linear_moe.plan.ranks import RankModels, rank_chunks
from linear_moe.plan.traffic import SequenceSplit

HEADROOM = 0.1
"""Share of a GPU's memory that is left to its driver, to communication buffers, to kernels and to fragmentation."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ()),
    ("selective", ("norm", "activation")),
    ("selective", ("norm", "activation", "core", "experts")),
    ("full", ()),
    ("full", ("logits",)),
)
"""Values of training.recompute and training.recompute_modules that are tried, from the fastest to the smallest."""
VIRTUAL = (1, 2, 4)
LEAST_TOKENS = 1024  # tokens of a sequence on a rank: fewer do not keep a GPU busy
EXCHANGES = {
    option.name: option.metadata["choices"]
    for option in fields(ParallelConfig)
    if option.name in ("sequence_layout", "sequence_exchange", "sequence_attention")
}
"""Options of `parallel`, with their choices, of which the search takes the fastest if sequences are shared out."""


@dataclass(frozen=True)
class Candidate:
    """A layout with the settings that suit it best.

    Attributes:
        config: the configuration with the layout's parallel sizes and settings.
        layout: process groups; None if the layout is not legal.
        memory: bytes of the fullest rank, by the KINDS of `memory`; None if the layout is not legal.
        seconds: seconds of a step by kind, `total` is their sum; None if the layout is not legal, or too big.
        reason: why the layout is not proposed; "" if it is.
    """

    config: Config
    layout: ProcessMesh | None = None
    memory: dict[str, int] | None = None
    seconds: dict[str, float] | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Parallel sizes, as TP2 SP2 PP4x2 EP8 (two chunks on each of four stages); sizes of 1 are left out."""
        p = self.config.parallel
        sizes = {
            "TP": p.tensor,
            "SP": p.sequence,
            "PP": p.pipeline,
            "x": p.virtual_pipeline,
            "EP": p.expert,
            "ETP": p.expert_tensor,
        }
        words = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        return words.replace(" x", "x") or "DP only"

    def overrides(self) -> dict[str, Any]:
        """Options by dotted path that turn any configuration of this model into this layout."""
        paths = {
            "parallel": (
                *("tensor", "pipeline", "virtual_pipeline", "pipeline_layers", "expert", "expert_tensor", "sequence"),
                *EXCHANGES,
                "sequence_dtype",
                "sequence_pieces",
            ),
            "training": ("micro_batch", "recompute", "recompute_modules", "recompute_layers"),
            "optimizer": ("distributed", "overlap"),
        }
        return {f"{part}.{name}": getattr(getattr(self.config, part), name) for part in paths for name in paths[part]}


@dataclass(frozen=True)
class Proposals:
    """All layouts of `world` GPUs that were considered.

    Attributes:
        limit: bytes that a rank may use.
        flops: FLOPs of training on one token, without recomputation, over all ranks.
        fit: layouts that fit, the fastest first.
        big: legal layouts that exceed the limit with all settings that were tried, the smallest first.
        illegal: layouts that the validation refuses.
    """

    world: int
    cluster: Cluster
    limit: float
    flops: float
    fit: list[Candidate]
    big: list[Candidate]
    illegal: list[Candidate]

    def speed(self, candidate: Candidate) -> dict[str, float]:
        """Estimates tokens per second and GPU, and the share of the GPU's peak (MFU), of a layout that fits."""
        training = candidate.config.training
        assert candidate.seconds is not None
        tokens = training.global_batch * training.sequence_length / candidate.seconds["total"] / self.world
        mfu = tokens * self.flops / (self.cluster.gpu.peak_tflops * 1e12)
        return {"tokens_per_second_per_gpu": tokens, "mfu": mfu}

    def to_json(self) -> dict[str, Any]:
        def entry(candidate: Candidate) -> dict[str, Any]:
            known: dict[str, Any] = {"memory_per_rank_bytes": candidate.memory} if candidate.memory else {}
            if candidate.layout is not None:
                known["data"] = candidate.layout.data
            if candidate.seconds is not None:
                known |= {"seconds_per_step": candidate.seconds} | self.speed(candidate)
            return {"overrides": candidate.overrides(), **known, "reason": candidate.reason or None}

        return {
            "world": self.world,
            "memory_limit_bytes": round(self.limit),
            "layouts": [entry(candidate) for candidate in self.fit],
            "rejected": [entry(candidate) for candidate in (*self.big, *self.illegal)],
        }


def propose(config: Config, world: int, cluster: Cluster) -> Proposals:
    """Proposes layouts of `world` GPUs for a configuration's model, sequence length, global batch and dtype.

    The configuration's own parallel sizes, micro-batch, recomputation, distributed optimizer and overlap are not used.

    Raises:
        ConfigError: the configuration's model is invalid, so that no layout can make it legal, or `world` is not from 1
            to MAX_WORLD.
    """
    check("--world", world, lambda n: 1 <= n <= MAX_WORLD, f"must be from 1 to {MAX_WORLD}")
    limit = (1 - HEADROOM) * cluster.gpu.memory_gib * 2**30
    search = _Search(config, world, cluster, limit)
    candidates = [search.best(parallel) for parallel in search.shapes()]
    timed = [(c.seconds["total"], c) for c in candidates if c.seconds is not None]
    sized = [(c.memory["total"], c) for c in candidates if c.memory and c.seconds is None]
    fit, big = ([c for _, c in sorted(pairs, key=itemgetter(0))] for pairs in (timed, sized))
    illegal = [c for c in candidates if c.memory is None]
    return Proposals(world, cluster, limit, 3 * search.flops.total, fit, big, illegal)


class _Search:
    def __init__(self, config: Config, world: int, cluster: Cluster, limit: float):
        self.config, self.world, self.cluster, self.limit = config, world, cluster, limit
        self.models = RankModels(config, vocab_size(config))
        self.flops = forward_flops(config)
        self.splits: dict[int, list[int]] = {}  # number of chunks -> layers of each chunk
        self.fastest: dict[tuple[int, int], dict[str, Any]] = {}  # (tensor, sequence) -> the fastest of EXCHANGES

    def shapes(self) -> Iterator[ParallelConfig]:
        """Yields all parallel sizes that the world's size allows, with tensor ranks within a node."""
        model, parallel, world, node = self.config.model, self.config.parallel, self.world, self.cluster.node
        experts = model.moe.num_experts if any(layer.ffn == "moe" for layer in resolve_layers(model)) else 1
        most = max(1, self.config.training.sequence_length // LEAST_TOKENS)
        tensors = (n for n in divisors(world, node) if world <= node or node % n == 0)
        for tensor, pipeline in ((t, p) for t in tensors for p in divisors(world // t, model.num_layers)):
            for sequence in divisors(world // tensor // pipeline, most):
                for expert_tensor in divisors(tensor, tensor if experts > 1 else 1):
                    for expert in divisors(world // pipeline // expert_tensor, experts):
                        for virtual in VIRTUAL if pipeline > 1 else (1,):
                            if pipeline * virtual <= model.num_layers:
                                sizes = tensor, parallel.tensor_sequence, pipeline, virtual, None, expert, expert_tensor
                                shape = ParallelConfig(*sizes, sequence)
                                if sequence > 1:
                                    shape.sequence_dtype = parallel.sequence_dtype
                                yield shape

    def exchanges(self, parallel: ParallelConfig) -> ParallelConfig:
        """Returns the same parallel sizes with the fastest layout, exchange and attention of sequences (EXCHANGES)."""
        if parallel.sequence == 1:
            return parallel
        key = parallel.tensor, parallel.sequence  # the other sizes do not change which choice is the fastest
        if key not in self.fastest:
            choices = (dict(zip(EXCHANGES, values, strict=True)) for values in product(*EXCHANGES.values()))
            configs = ((choice, replace(self.config, parallel=replace(parallel, **choice))) for choice in choices)
            legal = ((choice, self.sequence_seconds(config)) for choice, config in configs if not refused(config))
            self.fastest[key], _ = min(legal, key=lambda timed: timed[1])
        return replace(parallel, **self.fastest[key])

    def sequence_seconds(self, config: Config) -> float:
        """Seconds of all layers, with their exchanges of sequences, for a micro-batch of one row."""
        config = replace(config, training=replace(config.training, micro_batch=1))
        layers, needs = self.models(config.parallel).numbered_layers(), self.models.needs(config.parallel)
        tensor, sequence = config.parallel.tensor, config.parallel.sequence
        group = Group.of(list(range(0, tensor * sequence, tensor)), self.cluster)
        split = SequenceSplit.of(config)
        costs = (layer_seconds(config, i, layers[i], self.flops, group, needs[i], split) for i in needs)
        return sum(compute + exchange.cost() for compute, exchange in costs)

    def settings(self, parallel: ParallelConfig) -> Iterator[list[Config]]:
        """Yields for each micro-batch the configurations to try, from the fastest to the smallest, at given sizes.

        With replicas, the optimizer is always distributed and overlapped: nothing else makes a rank smaller or faster.
        """
        config, replicas = self.config, self.world // (parallel.tensor * parallel.pipeline)
        optimizer = config.optimizer
        if max(replicas, self.world // (parallel.expert * parallel.expert_tensor * parallel.pipeline)) > 1:
            optimizer = replace(optimizer, distributed=True, overlap=True)
        for micro_batch in sorted({*MICRO_BATCHES, config.training.micro_batch}):
            if micro_batch == 1 or micro_batch * replicas <= config.training.global_batch * parallel.sequence:
                training = replace(config.training, micro_batch=micro_batch, recompute_layers=None)
                yield [
                    replace(
                        config,
                        parallel=parallel,
                        optimizer=optimizer,
                        training=replace(training, recompute=recompute, recompute_modules=list(modules)),
                    )
                    for recompute, modules in RECOMPUTE
                ]

    def best(self, parallel: ParallelConfig) -> Candidate:
        """Returns the fastest settings that fit; if none fit, the smallest; if none are legal, the first."""
        illegal: Candidate | None = None
        smallest: tuple[int, Candidate] | None = None
        fastest: tuple[float, Candidate] | None = None
        rank: _Rank | None = None
        chosen: ParallelConfig | None = None
        for configs in self.settings(parallel):
            if why := refused(configs[0], self.world):
                illegal = illegal or Candidate(configs[0], reason=why)
                continue
            chosen = chosen or self.exchanges(parallel)
            configs = [replace(config, parallel=chosen) for config in configs]
            rank = rank or self.rank(configs[0])
            if smallest is not None and rank.state > self.limit:
                break  # too big without activations; the smallest micro-batch, already tried, needs the least memory
            for config in configs:
                memory = rank.memory(config)
                candidate = Candidate(config, rank.layout, memory)
                if memory["total"] > self.limit:
                    if smallest is None or memory["total"] < smallest[0]:
                        reason = too_big(memory, self.limit)
                        smallest = memory["total"], replace(candidate, reason=reason)
                    continue
                needs = rank.needs
                stages = [stage_cost(config, rank.layout, c, self.flops, self.cluster, needs) for c in rank.stages]
                seconds = step_seconds(config, rank.layout, stages)
                if fastest is None or seconds["total"] < fastest[0]:
                    fastest = seconds["total"], replace(candidate, seconds=seconds)
                break
        if fastest is not None:
            return fastest[1]
        rejected = illegal if smallest is None else smallest[1]
        assert rejected is not None
        return rejected

    def rank(self, config: Config) -> _Rank:
        parallel = config.parallel
        chunks = parallel.pipeline * parallel.virtual_pipeline
        if chunks not in self.splits:
            self.splits[chunks] = default_split(config)
        split = replace(config, parallel=replace(parallel, pipeline_layers=self.splits[chunks]))
        return _Rank(split, self.world, self.models)


class _Rank:
    """Ranks of one choice of parallel sizes, with everything that is the same for all other settings computed once."""

    def __init__(self, config: Config, world: int, models: RankModels):
        self.layout, model = parallel_layout(config, world), models(config.parallel)
        self.needs = models.split_needs(config.parallel)
        self.stages = [rank_chunks(config, model, stage) for stage in range(self.layout.pipeline)]
        self.states = [state_bytes(config, self.layout, chunks, i) for i, chunks in enumerate(self.stages)]
        self.state = max(sum(kinds.values()) for kinds in self.states)  # bytes of the fullest rank, without activations

    def memory(self, config: Config) -> dict[str, int]:
        """Bytes of the fullest rank, by the KINDS of `memory`."""
        kinds = (
            with_total(state | activation_bytes(config, self.layout, chunks, stage, self.needs))
            for stage, (state, chunks) in enumerate(zip(self.states, self.stages, strict=True))
        )
        return max(kinds, key=lambda kinds: kinds["total"])


def refused(config: Config, world: int | None = None) -> str:
    """Returns the reason for which the validation refuses `config`; "" if it does not."""
    try:
        validate_fields(config, world)
    except ConfigError as error:
        return str(error)
    return ""


def divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` up to `most`, in ascending order."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def too_big(memory: dict[str, int], limit: float) -> str:
    """Text of the reason against a layout whose `memory` exceeds `limit` bytes."""
    parts = ", ".join(f"{kind} {bytes_ / 2**30:.1f}" for kind, bytes_ in memory.items() if kind != "total")
    return f"needs {memory['total'] / 2**30:.2f} of {limit / 2**30:.2f} GiB: {parts}"
