"""Which layouts of a world fit into a GPU's memory, the fastest first, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from linear_moe.config.errors import ConfigError
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.validate import MAX_WORLD, ParallelLayout, parallel_layout, validate
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.mixers.checks import check
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.plan.cost import Cluster, stage_cost, step_seconds
from linear_moe.plan.memory import Chunk, RankModels, activation_bytes, stage_chunks, state_bytes, with_total
from linear_moe.plan.model import forward_flops

HEADROOM = 0.1
"""Of a GPU's memory, what is left to its driver, to communication buffers, to kernels and to fragmentation."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout with the settings that suit it best.

    Attributes:
        memory: of the fullest rank, by the KINDS of `memory`; None: not legal.
        seconds: of a step by kind, of which `total` is the sum; None: not legal, or too big.
        reason: why it is not proposed; "" if it is.
    """

    config: Config
    layout: ParallelLayout | None = None
    memory: dict[str, int] | None = None
    seconds: dict[str, float] | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """For example TP2 PP4 EP8; sizes of 1 are left out."""
        p = self.config.parallel
        sizes = {"TP": p.tensor, "PP": p.pipeline, "EP": p.expert, "ETP": p.expert_tensor}
        return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "DP only"

    def overrides(self) -> dict[str, Any]:
        """By dotted path, what makes any config of this model this layout."""
        paths = {
            "parallel": ("tensor", "pipeline", "expert", "expert_tensor"),
            "training": ("micro_batch", "recompute"),
            "optimizer": ("distributed", "overlap"),
        }
        return {f"{part}.{name}": getattr(getattr(self.config, part), name) for part in paths for name in paths[part]}


@dataclass(frozen=True)
class Proposals:
    """All layouts of `world` GPUs that were considered.

    Attributes:
        limit: bytes that a rank may use.
        flops: of a trained token, without recomputation.
        fit: the fastest first.
        big: legal, but over the limit whatever the settings; the smallest first.
        illegal: refused by the validation.
    """

    world: int
    cluster: Cluster
    limit: float
    flops: float
    fit: list[Candidate]
    big: list[Candidate]
    illegal: list[Candidate]

    def speed(self, candidate: Candidate) -> dict[str, float]:
        """Of one that fits, by the cost model: tokens per second and GPU, and the share of the GPU's peak."""
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
    """Layouts of `world` GPUs for a configuration's model, sequence length, global batch and dtype.

    What the configuration says of parallel sizes, micro-batch, recomputation, the distributed optimizer and its overlap
    is not used.

    Raises:
        ConfigError: no layout makes this configuration legal, or the world's size is none.
    """
    check("--world", world, lambda n: 1 <= n <= MAX_WORLD, f"must be from 1 to {MAX_WORLD}")
    limit = (1 - HEADROOM) * cluster.gpu.memory_gib * 2**30
    search = _Search(config, world, cluster, limit)
    found = [search.best(parallel) for parallel in search.shapes()]
    fit = sorted((c for c in found if c.seconds is not None), key=lambda c: c.seconds["total"])  # type: ignore[index]
    big = sorted((c for c in found if c.memory and c.seconds is None), key=lambda c: c.memory["total"])  # type: ignore[index]
    illegal = [c for c in found if c.memory is None]
    return Proposals(world, cluster, limit, 3 * search.flops.total, fit, big, illegal)


class _Search:
    def __init__(self, config: Config, world: int, cluster: Cluster, limit: float):
        self.config, self.world, self.cluster, self.limit = config, world, cluster, limit
        self.models = RankModels(config, vocab_size(config))
        self.flops = forward_flops(config)

    def shapes(self) -> Iterator[ParallelConfig]:
        """Parallel sizes that the world's size allows, tensor ranks within a node."""
        model, parallel, world = self.config.model, self.config.parallel, self.world
        experts = model.moe.num_experts if any(layer.ffn == "moe" for layer in resolve_layers(model)) else 1
        for tensor in divisors(world, self.cluster.node):
            for pipeline in divisors(world // tensor, model.num_layers):
                for expert_tensor in divisors(tensor, experts if experts == 1 else tensor):
                    for expert in divisors(world // pipeline // expert_tensor, experts):
                        yield replace(
                            parallel, tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor
                        )

    def settings(self, parallel: ParallelConfig) -> Iterator[Config]:
        """Those tried for one choice of parallel sizes."""
        config, replicas = self.config, self.world // (parallel.tensor * parallel.pipeline)
        shared = replicas * parallel.tensor > parallel.expert * parallel.expert_tensor or replicas > 1
        optimizers = [replace(config.optimizer, distributed=d, overlap=True) for d in (True, False)]
        for micro_batch in sorted({*MICRO_BATCHES, config.training.micro_batch}):
            if micro_batch > 1 and micro_batch * replicas > config.training.global_batch:
                break
            for recompute in RECOMPUTE:
                training = replace(config.training, micro_batch=micro_batch, recompute=recompute)
                for optimizer in optimizers if shared else [config.optimizer]:
                    yield replace(config, parallel=parallel, training=training, optimizer=optimizer)

    def best(self, parallel: ParallelConfig) -> Candidate:
        """The fastest settings that fit; if none does, the smallest; if none is legal, the first."""
        refused = smallest = fastest = None
        states: dict[tuple[bool, int], dict[str, int]] = {}
        stages: list[list[Chunk]] = []
        for config in self.settings(parallel):
            try:
                validate(config, self.world, files=False)
            except ConfigError as error:
                refused = refused or Candidate(config, reason=str(error))
                continue
            layout = parallel_layout(config, self.world)
            stages = stages or [stage_chunks(self.models(parallel), layout, stage) for stage in range(layout.pipeline)]
            memory: dict[str, int] = {}
            for stage, chunks in enumerate(stages):
                key = (config.optimizer.distributed, stage)
                if key not in states:
                    states[key] = state_bytes(config, layout, chunks, stage)
                kinds = with_total(states[key] | activation_bytes(config, layout, chunks, stage))
                memory = max(memory, kinds, key=lambda kinds: kinds.get("total", 0))
            candidate = Candidate(config, layout, memory)
            if memory["total"] > self.limit:
                if smallest is None or memory["total"] < smallest.memory["total"]:
                    smallest = candidate
                continue
            costs = [stage_cost(config, layout, chunks, self.flops, self.cluster) for chunks in stages]
            seconds = step_seconds(config, layout, costs, len(stages[0]))
            if fastest is None or seconds["total"] < fastest.seconds["total"]:
                fastest = replace(candidate, seconds=seconds)
        if fastest is None and smallest is not None:
            return replace(smallest, reason=too_big(smallest.memory, self.limit))
        found = fastest or refused
        assert found is not None
        return found


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def too_big(memory: dict[str, int], limit: float) -> str:
    parts = ", ".join(f"{kind} {bytes_ / 2**30:.1f}" for kind, bytes_ in memory.items() if kind != "total")
    return f"needs {memory['total'] / 2**30:.1f} of {limit / 2**30:.1f} GiB: {parts}"
