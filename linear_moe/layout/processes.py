"""Process groups of a world: their sizes, and the ranks in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.options.checks import check_most
from linear_moe.options.errors import ConfigError, nearest

MAX_WORLD = 2**20  # a plan lists the ranks of all groups, so that the memory bounds the world size


@dataclass(frozen=True)
class ProcessMesh:
    """Process groups of a world, as Megatron-Core's parallel_state makes them (order tp-cp-ep-dp-pp).

    Attributes:
        sequence: ranks that share out sequences.
        data: ranks that take different sequences.
        expert_data: ranks that hold the same routed experts.
    """

    world: int
    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    data: int
    expert_data: int
    sequence: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights outside the routed experts."""
        return self.data * self.sequence

    @cached_property
    def groups(self) -> dict[str, list[list[int]]]:
        """Groups of every axis, each a list of ranks.

        The axes are tensor, data (all `replicas`), pipeline, sequence if sequences are shared out, and for the routed
        experts expert_tensor, expert and expert_data.
        """
        dense = {"tensor": self.tensor, "data": self.replicas, "pipeline": self.pipeline}
        experts = {"expert_tensor": self.expert_tensor, "expert": self.expert, "expert_data": self.expert_data}
        experts["pipeline"] = self.pipeline
        groups_of = {axis: list(_groups(dense, axis)) for axis in dense}
        if self.sequence > 1:
            apart = {"tensor": self.tensor, "sequence": self.sequence, "data": self.data, "pipeline": self.pipeline}
            groups_of["sequence"] = list(_groups(apart, "sequence"))
        return groups_of | {axis: list(_groups(experts, axis)) for axis in experts if axis != "pipeline"}


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that the parallel sizes allow."""
    dense = parallel.tensor * parallel.sequence
    return parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)


def parallel_layout(config: Config, world: int) -> ProcessMesh:
    """Makes the process mesh of `world` ranks; raises ConfigError when the parallel sizes do not divide `world`."""
    p = config.parallel
    check_most("world size", world, "the largest planned for", MAX_WORLD)
    for names in (("tensor", "sequence", "pipeline"), ("expert", "expert_tensor", "pipeline")):
        size = math.prod(getattr(p, name) for name in names)
        if world < 1 or world % size:
            shown = [name for name in names if name != "sequence" or p.sequence > 1]
            terms = " * ".join(f"parallel.{name} {getattr(p, name)}" for name in shown)
            fix = nearest(world, step=smallest_world(p))
            raise ConfigError("world size", world, f"must be a positive multiple of {terms} = {size}", fix=fix)
    data = world // (p.tensor * p.sequence * p.pipeline)
    expert_data = world // (p.expert * p.expert_tensor * p.pipeline)
    return ProcessMesh(world, p.tensor, p.pipeline, p.expert, p.expert_tensor, data, expert_data, p.sequence)


def _groups(sizes: dict[str, int], axis: str) -> Iterator[list[int]]:
    """Yields the groups along `axis` of a grid of ranks whose first axis varies fastest."""
    strides, stride = {}, 1
    for name, size in sizes.items():
        strides[name] = stride
        stride *= size
    others = [range(0, size * strides[name], strides[name]) for name, size in reversed(sizes.items()) if name != axis]
    for offsets in product(*others):
        yield [sum(offsets) + i * strides[axis] for i in range(sizes[axis])]
